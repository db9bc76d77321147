"""SSRF: targets that would reach something inside are refused by how they are written, or by where they lead."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.addresses import REFUSED_V4, read_networks, why_refused, why_text_refused
from pulse.domain.errors import ConfigurationError, Refusal
from pulse.domain.webhook_url import Allowed, Destination, read_hosts, read_webhook_url

HOSTILE = [
    # other schemes, and other ways to write one
    "file:///etc/passwd",
    "ftp://example.com/",
    "gopher://example.com:70/_",
    "javascript:alert(1)",
    "//example.com/",
    "example.com/hook",
    "http:example.com",
    "https:/example.com",
    "https:\\\\example.com",
    "unix:///run/docker.sock",
    "",
    # loopback in all its forms
    "http://localhost/",
    "http://LOCALHOST./",
    "http://a.localhost/",
    "http://127.0.0.1/",
    "http://127.0.0.1./",
    "http://127.1/",
    "http://127.255.255.254/",
    "http://2130706433/",
    "http://017700000001/",
    "http://0177.0.0.1/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0x7f.1/",
    "http://127.0.0.0x1/",
    "http://example.0x7f000001/",
    "http://0/",
    "http://0x/",
    "http://0.0.0.0/",
    "http://127.0.0.01/",
    "http://1.2.3.4.5/",
    "http://256.1.1.1/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[64:ff9b:1::1]/",
    "http://[2002:7f00:1::]/",
    "http://[2001:0:53aa:64c:0:fbff:80ff:fffe]/",
    "http://[fe80::1]/",
    "http://[fe80::1%25eth0]/",
    "http://[fec0::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[ff02::1]/",
    "http://[2001:db8::1]/",
    "http://[2001:2::1]/",
    "http://[100::1]/",
    "http://[5f00::1]/",
    "http://[v1.fe80::a+en1]/",
    "http://[::1/",
    "http://::1/",
    # private, shared, metadata, multicast, reserved
    "http://10.0.0.1/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://100.64.0.1/",
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.170.2/",
    "http://168.63.129.16/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://198.18.0.1/",
    "http://203.0.113.7/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    # names of the inside
    "http://metadata.google.internal/",
    "http://postgres/",
    "http://printer.local/",
    "http://router.lan/",
    # user names, ports, and what two parsers read in two ways
    "http://user:password@example.com/",
    "http://example.com@127.0.0.1/",
    "http://127.0.0.1:80@example.com/",
    "http://example.com#@127.0.0.1/",
    "http://example.com\\@127.0.0.1/",
    "http://example.com:25/",
    "http://example.com:22/",
    "http://example.com:0/",
    "http://example.com:65536/",
    "http://example.com:99999999/",
    "http://example.com:-1/",
    "http://example.com:8080:80/",
    "http:///example.com/",
    "http://example.com/\r\nHost: evil",
    "http://exa mple.com/",
    "http://example.com/\x00",
    "http://example.com/\t",
    " http://example.com/",
    "http://ⓛocalhost/",
    "http://127。0。0。1/",
    "http://①②⑦.0.0.1/",
    "http://exämple.com/",
    "http://example%2ecom/",
    "http://%31%32%37.0.0.1/",
    "http://example..com/",
    "http://.example.com/",
    "http://-example.com/",
    "http://example.com../",
    "http://" + "a" * 64 + ".com/",
    "http://" + "a." * 127 + "com/",
    "http://example.com/" + "a" * 2048,
]


@pytest.mark.parametrize("target", HOSTILE)
def test_a_hostile_target_is_refused(target: str) -> None:
    with pytest.raises(Refusal) as caught:
        read_webhook_url(target)
    assert caught.value.field == "destination.url"


@pytest.mark.parametrize(
    ("text", "sent", "destination"),
    [
        ("https://example.com", "https://example.com:443/", Destination("https", "example.com", 443)),
        ("HTTPS://Example.COM./a?b=c", "https://example.com:443/a?b=c", Destination("https", "example.com", 443)),
        ("http://example.com:8080/%7Ea", "http://example.com:8080/%7Ea", Destination("http", "example.com", 8080)),
        ("https://example.com?x=1", "https://example.com:443/?x=1", Destination("https", "example.com", 443)),
        (
            "https://xn--exmple-cua.com/",
            "https://xn--exmple-cua.com:443/",
            Destination("https", "xn--exmple-cua.com", 443),
        ),
        ("https://8.8.8.8/", "https://8.8.8.8:443/", Destination("https", "8.8.8.8", 443)),
        ("https://[2606:4700::1111]/", "https://[2606:4700::1111]:443/", Destination("https", "2606:4700::1111", 443)),
        ("https://example.com/a@b:c", "https://example.com:443/a@b:c", Destination("https", "example.com", 443)),
    ],
)
def test_a_public_target_has_one_form(text: str, sent: str, destination: Destination) -> None:
    url = read_webhook_url(text)
    assert (url.text, url.destination) == (sent, destination)
    assert read_webhook_url(sent) == url


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        ("http://10.1.2.3/", Allowed(networks=read_networks(["10.1.0.0/16"]))),
        ("http://127.0.0.1:8080/", Allowed(networks=read_networks(["127.0.0.1"]))),
        ("http://[fd00::1]/", Allowed(networks=read_networks(["fd00::/8"]))),
        ("http://sink/", Allowed(hosts=read_hosts(["Sink."]))),
        ("http://hooks.corp.internal/", Allowed(hosts=read_hosts(["hooks.corp.internal"]))),
        ("http://example.com:25/", Allowed(ports=frozenset({25}))),
    ],
)
def test_the_operator_may_allow_more(target: str, allowed: Allowed) -> None:
    read_webhook_url(target, allowed=allowed)
    with pytest.raises(Refusal):
        read_webhook_url(target)


def test_what_is_allowed_is_no_more_than_was_said() -> None:
    allowed = Allowed(networks=read_networks(["10.1.0.0/16"]), hosts=read_hosts(["sink"]), plain_http=False)
    for target in ("https://10.2.0.1/", "https://other/", "https://sinks/", "http://example.com/", "http://sink/"):
        with pytest.raises(Refusal):
            read_webhook_url(target, allowed=allowed)


def test_an_allowed_translation_still_may_not_carry_a_forbidden_address() -> None:
    nat64 = read_networks(["64:ff9b::/96", "::ffff:0:0/96", "2002::/16"])
    assert why_text_refused("64:ff9b::8.8.8.8", nat64) is None
    for address in ("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "::ffff:169.254.169.254", "2002:7f00:1::"):
        assert why_text_refused(address, nat64) is not None


@given(st.ip_addresses(v=4))
def test_what_is_not_public_by_the_standard_library_is_refused_too(address: IPv4Address) -> None:
    """An independent list, older or newer than ours: all that it calls private, ours refuses."""
    special = address.is_private or address.is_loopback or address.is_link_local or address.is_multicast
    if special or address.is_reserved or address.is_unspecified:
        assert why_refused(address) is not None


@given(st.sampled_from(sorted(REFUSED_V4)), st.integers(0, 2**32 - 1))
def test_every_form_of_ipv6_around_a_refused_address_is_refused(network: object, offset: int) -> None:
    [base] = read_networks([str(network)])
    four = int(base.network_address) + offset % base.num_addresses
    assert why_refused(IPv4Address(four)) is not None
    for prefix in ("::ffff:0:0", "::", "64:ff9b::", "64:ff9b:1::"):
        assert why_refused(IPv6Address(int(IPv6Address(prefix)) + four)) is not None
    assert why_refused(IPv6Address((0x2002 << 112) | (four << 80))) is not None


@given(st.ip_addresses(v=6))
def test_no_ipv6_address_outside_of_global_unicast_is_let_through(address: IPv6Address) -> None:
    if why_refused(address) is None:
        assert int(address) >> 125 == 0b001
        assert not address.is_private


@pytest.mark.parametrize("text", ["", "localhost", "1.2.3", "fe80::1%eth0", "::1%lo", "2001:db8::g"])
def test_what_is_no_address_is_refused(text: str) -> None:
    assert why_text_refused(text) is not None


@given(st.text(max_size=60))
def test_any_text_is_a_url_or_is_refused(text: str) -> None:
    for target in (text, f"https://{text}", f"https://example.com{text}"):
        try:
            url = read_webhook_url(target)
        except Refusal:
            continue
        assert url.text.isascii()
        assert url.address is None or why_refused(ip_address(str(url.address))) is None


@pytest.mark.parametrize("text", ["10.0.0.0/33", "sink", "10.0.0.1/8", ""])
def test_an_allow_list_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no network"):
        read_networks([text])

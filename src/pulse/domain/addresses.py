"""Which addresses a webhook may be sent to: those of the public Internet, and what the operator allows beside them.

    IPv4   everything but the networks below
    IPv6   global unicast (2000::/3) but the networks below; so neither loopback, link-local, unique local, site-local,
           multicast, nor the forms that carry an IPv4 address: mapped, compatible, translated (NAT64)

An allowed network lifts this for its addresses, except that the IPv4 address within an IPv6 one must be allowed too.
Source: IANA's registries of special-purpose addresses, RFC 6890, RFC 6052, RFC 8215, RFC 3056, RFC 4380.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from pulse.domain.errors import ConfigurationError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

REFUSED_V4 = {
    IPv4Network("0.0.0.0/8"): "this network",
    IPv4Network("10.0.0.0/8"): "private",
    IPv4Network("100.64.0.0/10"): "shared by a carrier (CGNAT)",
    IPv4Network("127.0.0.0/8"): "loopback",
    IPv4Network("168.63.129.16/32"): "a cloud's own service",
    IPv4Network("169.254.0.0/16"): "link-local, and where clouds keep their metadata",
    IPv4Network("172.16.0.0/12"): "private",
    IPv4Network("192.0.0.0/24"): "kept for protocols",
    IPv4Network("192.0.2.0/24"): "for documentation",
    IPv4Network("192.31.196.0/24"): "AS112",
    IPv4Network("192.52.193.0/24"): "AMT",
    IPv4Network("192.88.99.0/24"): "a 6to4 relay",
    IPv4Network("192.168.0.0/16"): "private",
    IPv4Network("192.175.48.0/24"): "AS112",
    IPv4Network("198.18.0.0/15"): "for benchmarks",
    IPv4Network("198.51.100.0/24"): "for documentation",
    IPv4Network("203.0.113.0/24"): "for documentation",
    IPv4Network("224.0.0.0/4"): "multicast",
    IPv4Network("240.0.0.0/4"): "reserved, or broadcast",
}
GLOBAL_V6 = IPv6Network("2000::/3")
REFUSED_V6 = {
    IPv6Network("2001::/23"): "kept for protocols (Teredo, benchmarks, ORCHID)",
    IPv6Network("2001:db8::/32"): "for documentation",
    IPv6Network("2002::/16"): "6to4, which carries an IPv4 address",
    IPv6Network("2620:4f:8000::/48"): "AS112",
    IPv6Network("3fff::/20"): "for documentation",
}
NAT64 = (IPv6Network("64:ff9b::/96"),)
"""Whose last 32 bits are an IPv4 address; of the local-use prefix 64:ff9b:1::/48 nobody but its network knows which."""


def read_networks(texts: Iterable[str]) -> tuple[Network, ...]:
    """Networks in CIDR notation, or single addresses; ConfigurationError that names the one that is none."""
    networks: list[Network] = []
    for text in texts:
        try:
            networks.append(ip_network(text))
        except ValueError as error:
            raise ConfigurationError(f"{text!r} is no network: {error}", hint="for example 10.1.0.0/16") from error
    return tuple(networks)


def why_refused(address: Address, allowed: Iterable[Network] = ()) -> str | None:
    """Why nothing may be sent to `address`; None where it may."""
    if not any(address in network for network in allowed):
        return _why_special(address)
    embedded = _embedded(address)
    return None if embedded is None else why_refused(embedded, allowed)


def why_text_refused(text: str, allowed: Iterable[Network] = ()) -> str | None:
    """The same of an address as a resolver or the operating system writes it; what is no address is refused."""
    try:
        return why_refused(ip_address(text), allowed)
    except ValueError:
        return "no address"


def _why_special(address: Address) -> str | None:
    if isinstance(address, IPv4Address):
        return next((why for network, why in REFUSED_V4.items() if address in network), None)
    if address not in GLOBAL_V6:
        return "not global unicast"
    return next((why for network, why in REFUSED_V6.items() if address in network), None)


def _embedded(address: Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if any(address in network for network in NAT64):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour

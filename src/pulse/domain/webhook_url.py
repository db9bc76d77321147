"""The URL of a webhook, read strictly: what two parsers could read in two ways is refused.

    https://hooks.example.com:8443/pulse?key=1

Refused: other schemes, user names and passwords, ports that are not allowed, fragments, blanks, control characters,
backslashes, hosts that are no plain ASCII (an international name is written as `xn--…`), and every form of an IPv4
address but four decimal numbers. Which addresses are allowed is `addresses.py`'s, once it is known which they are.
Source: RFC 3986, and the WHATWG URL standard for which hosts end in a number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from ipaddress import AddressValueError, IPv4Address, IPv6Address

import msgspec

from pulse.domain.addresses import Address, Network, why_refused
from pulse.domain.errors import Reason, Refusal

URL_LENGTH_MAX = 2048
DEFAULT_PORTS = {"http": 80, "https": 443}
PORTS = frozenset({80, 443})
"""Ports below UNPRIVILEGED that may be sent to; mail, SSH and the like are not webhooks."""
UNPRIVILEGED = 1024
NAME_LENGTH_MAX = 253

_CHARACTERS = re.compile(r"[A-Za-z0-9\-._~:/?@!$&'()*+,;=%\[\]]+")
_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
_LOCAL_NAMES = ("localhost", "local", "internal", "localdomain", "home.arpa", "intranet", "lan", "corp", "home")
_HINT = "for example https://hooks.example.com/pulse"


class Destination(msgspec.Struct, frozen=True, order=True):
    """What answers at a URL: all webhooks of one destination share its connections and its fate."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


class WebhookUrl(msgspec.Struct, frozen=True):
    """A URL that was read; `text` is what is sent, `address` is set where the host is written as one."""

    text: str
    destination: Destination
    address: Address | None = None


class Allowed(msgspec.Struct, frozen=True):
    """What the operator of a private deployment allows beside the public Internet: networks, host names, ports.

    A host name covers that name alone, whatever it resolves to. `plain_http` allows URLs without TLS.
    """

    networks: tuple[Network, ...] = ()
    hosts: frozenset[str] = frozenset()
    ports: frozenset[int] = frozenset()
    plain_http: bool = True


PUBLIC = Allowed()
"""Nothing beside the public Internet."""


def read_webhook_url(text: str, *, allowed: Allowed = PUBLIC, field: str = "destination.url") -> WebhookUrl:
    """The URL that `text` is; Refusal INVALID_REQUEST that names `field` where nothing may be sent to it."""

    def no(why: str) -> Refusal:
        return Refusal(Reason.INVALID_REQUEST, f"{why}; {_HINT}", field=field)

    if len(text) > URL_LENGTH_MAX:
        raise no(f"a URL has at most {URL_LENGTH_MAX} characters")
    if _CHARACTERS.fullmatch(text) is None:
        raise no("a URL has no blank, control character, backslash, fragment or letter beyond ASCII")
    scheme, separator, rest = text.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in DEFAULT_PORTS:
        raise no("a webhook's URL begins with https:// or http://")
    if scheme == "http" and not allowed.plain_http:
        raise no("a webhook's URL begins with https://, unless the setting webhook_plain_http is true")
    authority = re.split(r"[/?]", rest, maxsplit=1)[0]
    found = _AUTHORITY.fullmatch(authority)
    if found is None:
        raise no("a URL names a host and, if need be, a port; user names do not belong there")
    port = int(found[2] or DEFAULT_PORTS[scheme])
    if port not in allowed.ports and port not in PORTS and not UNPRIVILEGED <= port <= 65_535:
        raise no(f"port {port} is not allowed; the setting webhook_ports_allowed can allow it")
    host, address = _read_host(found[1].lower().removesuffix("."), no=no)
    if address is not None and (why := why_refused(address, allowed.networks)):
        raise no(f"{address} is not allowed: {why}; the setting webhook_networks_allowed can allow it")
    if address is None and host not in allowed.hosts and _is_local(host):
        raise no(f"{host} is not a name of the public Internet; the setting webhook_hosts_allowed can allow it")
    destination = Destination(scheme, host, port)
    tail = rest[len(authority) :]
    return WebhookUrl(f"{destination}{tail if tail.startswith('/') else '/' + tail}", destination, address)


def _read_host(host: str, *, no: Callable[[str], Refusal]) -> tuple[str, Address | None]:
    """The host in its one form, and the address that it is, if it is one."""
    try:
        if host.startswith("["):
            six = IPv6Address(host[1:-1])
            return str(six), six
    except AddressValueError as error:
        raise no(f"{host} is no IPv6 address") from error
    labels = host.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            four = IPv4Address(host)
        except AddressValueError as error:
            raise no("an IPv4 address is written as four decimal numbers") from error
        return str(four), four
    if len(host) > NAME_LENGTH_MAX or not all(map(_LABEL.fullmatch, labels)):
        raise no(f"{host[:64]!r} is no host name")
    return host, None


def _is_local(host: str) -> bool:
    return "." not in host or any(host.endswith(f".{name}") for name in _LOCAL_NAMES)


def read_hosts(names: Collection[str]) -> frozenset[str]:
    """Host names of an allow-list, as URLs are compared with them."""
    return frozenset(name.lower().removesuffix(".") for name in names)

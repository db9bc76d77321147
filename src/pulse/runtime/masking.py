"""Keeps secrets out of what people read: settings, error lines, logs.

It errs to the safe side: what cannot be told from a secret is masked.
"""

from __future__ import annotations

import re

MASK = "********"

_SENSITIVE = r"passw(?:or)?d|passphrase|secret|token|authorization|cookie|credential|api[_-]?key|private[_-]?key"
_SECRET_NAME = re.compile(_SENSITIVE, re.IGNORECASE)
_NOT_THE_SECRET_ITSELF = ("_id", "_ids", "_count", "_max", "_s")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
_PLAIN_USER = re.compile(r"[\w.%+-]{1,64}")
_HOSTS = re.compile(r"(?:\[[0-9A-Fa-f:.%]*\]|[^:\[\]@,]*)(?::\d*)?(?:,(?:\[[0-9A-Fa-f:.%]*\]|[^:\[\]@,]*)(?::\d*)?)*")
_SECRET_PARAMETER = re.compile(rf"([?&;][\w.-]{{0,40}}(?:{_SENSITIVE})[\w.-]{{0,40}}=).*", re.IGNORECASE | re.DOTALL)
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s\"'<>]+")
_NAMED_IN_TEXT = re.compile(
    rf"((?:{_SENSITIVE})[\w-]{{0,40}}[\"']?\s{{0,4}}[=:]\s{{0,4}})(?:(?:bearer|basic)\s+)?(?:\"[^\"]*\"|'[^']*'|[^\s,;&\"']+)",
    re.IGNORECASE,
)
_BEARER_IN_TEXT = re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a value of this name is a secret: `password`, `X-Provision-Token`, but not `token_id`."""
    return _SECRET_NAME.search(name) is not None and not name.lower().endswith(_NOT_THE_SECRET_ITSELF)


def mask_password(url: str) -> str:
    """`url` with its password masked, wherever a URL can hold one.

    The password is whatever stands between the first `:` and the *last* `@`, so one with a bare `/`, `?` or `@` in it
    is masked as a whole; a token in the user's place (`nats://token@host`) and a `password=` parameter are masked too.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or not _SCHEME.fullmatch(scheme):
        scheme, separator, rest = "", "", url
    userinfo, at, location = _SECRET_PARAMETER.sub(rf"\1{MASK}", rest).rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        known = _PLAIN_USER.fullmatch(user) and (colon or scheme.startswith("postgres"))
        userinfo = f"{user}{':' + MASK if colon else ''}" if known else MASK
    authority = re.split(r"[/?#]", location, maxsplit=1)[0]
    if not _HOSTS.fullmatch(authority):
        return f"{scheme}{separator}{MASK}"
    return scheme + separator + userinfo + at + location


def mask_urls(urls: str) -> str:
    """`urls`, separated by commas, each with its password masked."""
    return ",".join(mask_password(url) for url in re.split(r",(?=[A-Za-z][A-Za-z0-9+.-]*://)", urls))


def mask_text(text: str) -> str:
    """Free text with the passwords of its URLs and the values of its secret names (`token=…`) masked."""
    if "://" in text:
        text = _URL_IN_TEXT.sub(lambda found: mask_urls(found.group()), text)
    text = _NAMED_IN_TEXT.sub(rf"\1{MASK}", text)
    return _BEARER_IN_TEXT.sub(rf"\1 {MASK}", text)

"""As much of HOCON as compose/emqx/emqx.conf uses: objects, lists, quoted texts, plain words, comments with `#`.

>>> parse('a { b = "c d", e = [1, true] }')
{'a': {'b': 'c d', 'e': [1, True]}}
"""

from __future__ import annotations

import re
from typing import Any

_TOKEN = re.compile(r'\s+|#[^\n]*|(?P<text>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\]=,])|(?P<word>[^\s{}\[\]=,"#]+)')
_WORDS = {"true": True, "false": False}


def parse(text: str) -> dict[str, Any]:
    """The outermost object, which needs no braces. Raises ValueError for what is none."""
    tokens = _tokens(text)
    found = _object(tokens, end="")
    if tokens:
        raise ValueError(f"unexpected {tokens[-1]}")
    return found


def _tokens(text: str) -> list[tuple[str, str]]:
    """In reverse, to be popped; each with its kind."""
    found, at = [], 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ValueError(f"not HOCON: {text[at : at + 20]!r}")
        if match.lastgroup:
            found.append((match.lastgroup, match[0]))
        at = match.end()
    return found[::-1]


def _object(tokens: list[tuple[str, str]], *, end: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    while tokens:
        kind, token = tokens.pop()
        if token == end and kind == "mark":
            return found
        if token == "," and kind == "mark":
            continue
        if kind == "mark":
            raise ValueError(f"a name was expected, not {token}")
        name = token.strip('"')
        if name in found:
            raise ValueError(f"{name} stands there twice")
        if tokens and tokens[-1] == ("mark", "="):
            tokens.pop()
        found[name] = _value(tokens)
    if end:
        raise ValueError(f"{end} is missing")
    return found


def _value(tokens: list[tuple[str, str]]) -> Any:
    if not tokens:
        raise ValueError("a value is missing")
    kind, token = tokens.pop()
    match kind, token:
        case "mark", "{":
            return _object(tokens, end="}")
        case "mark", "[":
            found = []
            while tokens and tokens[-1] != ("mark", "]"):
                if tokens[-1] == ("mark", ","):
                    tokens.pop()
                else:
                    found.append(_value(tokens))
            if not tokens:
                raise ValueError("] is missing")
            tokens.pop()
            return found
        case "text", _:
            return token[1:-1]
        case "word", _:
            return _WORDS[token] if token in _WORDS else int(token)
    raise ValueError(f"a value was expected, not {token}")

"""What an expression is made of, read from its serialized form: the protocol buffers of `cel.expr.CheckedExpr`.

Only what the bounds need is read, by field number, so no protobuf runtime is needed. Source: checked.proto and
syntax.proto of cel-spec, and the encoding of protocol buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import msgspec

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_REFERENCE = 2
_ID = 2
_CONSTANT, _IDENTIFIER, _SELECT, _CALL, _LIST, _STRUCT, _LOOP = 3, 4, 5, 6, 7, 8, 9
_RANGE, _BODY = 2, (4, 5, 6, 7)
INDEX = "_[_]"
MATCHES = "matches"
JOINING = frozenset({b"add_string", b"add_bytes", b"add_list"})


class Syntax(msgspec.Struct, frozen=True):
    """Of one expression: its nodes, names of parts of the message, and loops within loops or over what was computed.

    `joins` may join texts or lists; `patterns` are its regular expressions, None for one that is no literal.
    """

    nodes: int = 0
    nodes_in_loops: int = 0
    names: int = 0
    names_in_loops: int = 0
    loops_nested: int = 0
    loops_over_computed: int = 0
    joins: int = 0
    joins_in_loops: int = 0
    patterns: tuple[str | None, ...] = ()
    patterns_in_loops: int = 0


class _Tally:
    def __init__(self, joining: frozenset[int], variables: frozenset[bytes]) -> None:
        self.joining = joining
        self.variables = variables
        self.count: Counter[str] = Counter()
        self.patterns: list[str | None] = []

    def add(self, what: str, loops: int) -> None:
        self.count[what] += 1
        self.count[f"{what}_in_loops"] += loops > 0

    def walk(self, node: bytes, loops: int) -> None:
        self.add("nodes", loops)
        for number, value in fields(node):
            if number == _ID and value in self.joining:
                self.add("joins", loops)
            if not isinstance(value, bytes):
                continue
            if number == _LOOP:
                self._loop(value, loops)
            elif number == _CALL:
                self._call(value, loops)
            elif number == _IDENTIFIER and _one(value, 1).lstrip(b".") in self.variables:
                self.add("names", loops)
            elif number == _SELECT:
                self.walk(_one(value, 1), loops)
            elif number == _LIST:
                self._each(value, 1, loops)
            elif number == _STRUCT:
                for _, entry in fields(value):
                    if isinstance(entry, bytes):
                        self._each(entry, 3, loops)
                        self._each(entry, 4, loops)

    def _loop(self, loop: bytes, loops: int) -> None:
        self.count["loops_nested"] += loops > 0
        self.count["loops_over_computed"] += not _is_path(_one(loop, _RANGE))
        self._each(loop, _RANGE, loops)
        for number in _BODY:
            self._each(loop, number, loops + 1)

    def _call(self, call: bytes, loops: int) -> None:
        function = _one(call, 2).decode()
        operands = [each for number, each in fields(call) if number in (1, 3) and isinstance(each, bytes)]
        if function == MATCHES and operands:
            self.patterns.append(_literal(operands[-1]))
            self.count["patterns_in_loops"] += loops > 0
        for operand in operands:
            self.walk(operand, loops)

    def _each(self, message: bytes, number: int, loops: int) -> None:
        for found, value in fields(message):
            if found == number and isinstance(value, bytes):
                self.walk(value, loops)


def read_syntax(serialized: bytes, variables: Collection[str]) -> Syntax:
    """What the expression behind `Expression.serialize()` is made of; ValueError where it is none.

    `variables` are the parts of the message; any other name is a loop's own.
    """
    checked = _one(serialized, 2)
    tally = _Tally(frozenset(_joining(checked)), frozenset(name.encode() for name in variables))
    tally.walk(_one(checked, 4), 0)
    count = {name: tally.count[name] for name in Syntax.__struct_fields__ if name != "patterns"}
    return Syntax(**count, patterns=tuple(tally.patterns))


def _joining(checked: bytes) -> Iterator[int]:
    """The ids of the nodes that are an addition, and, for all that is known of its types, of texts, bytes or lists."""
    for number, entry in fields(checked):
        if number == _REFERENCE and isinstance(entry, bytes):
            overloads = {value for part, value in fields(_one(entry, 2)) if part == 3}
            if overloads & JOINING:
                yield from (value for part, value in fields(entry) if part == 1 and isinstance(value, int))


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message in order: (number, value); ValueError where it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        if kind == _BYTES:
            length, at = _varint(message, at)
        elif kind in (_FIXED64, _FIXED32):
            length = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"protocol buffers have no wire type {kind}")
        if at + length > len(message):
            raise ValueError("the message is cut off")
        yield key >> 3, message[at : at + length]
        at += length


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("the message is cut off")


def _one(message: bytes, number: int) -> bytes:
    """The last field of that number, as protocol buffers have it; empty where there is none."""
    found = b""
    for each, value in fields(message):
        if each == number and isinstance(value, bytes):
            found = value
    return found


def _is_path(node: bytes) -> bool:
    """Whether it is a part of the message: a name, and what stands below it, by members and constant indexes."""
    for number, value in fields(node):
        if not isinstance(value, bytes):
            continue
        if number == _IDENTIFIER:
            return True
        if number == _SELECT:
            return _is_path(_one(value, 1))
        if number == _CALL:
            operands = [each for part, each in fields(value) if part == 3 and isinstance(each, bytes)]
            is_index = _one(value, 2).decode() == INDEX and len(operands) == 2
            return is_index and _is_path(operands[0]) and _is_constant(operands[1])
    return False


def _is_constant(node: bytes) -> bool:
    return any(number == _CONSTANT for number, _ in fields(node))


def _literal(node: bytes) -> str | None:
    for number, value in fields(node):
        if number == _CONSTANT and isinstance(value, bytes):
            texts = [each for kind, each in fields(value) if kind == 6 and isinstance(each, bytes)]
            return texts[-1].decode() if texts else None
    return None

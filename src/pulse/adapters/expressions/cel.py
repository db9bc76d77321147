"""CEL: what a route asks of a message, compiled once, answered in microseconds, and never for longer than milliseconds.

    metrics.temp > 80.0 && device.attributes.site == "roof" && ts > timestamp("2026-01-01T00:00:00Z")

The library stops loops within loops by itself (10,000 iterations an evaluation) and refuses what is nested more than
32 deep. It does not bound how much one iteration does, nor how large a text or list may grow. So expressions have
bounds of their own, and what each can cost at most for a message of this size is known before it is asked (ADR 16).

    refused when it is compiled   too long, too many nodes, a loop in a loop, a loop over anything but a part of the
                                  message, texts or lists joined in a loop (so also map and filter), more than 4
                                  regular expressions, one in a loop, or one that is no literal
    not evaluated                 a message for which it could take more than STEPS_MAX
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum

from cel_expr_python import cel  # type: ignore[import-untyped]

from pulse.adapters.expressions.syntax import Syntax, read_syntax
from pulse.domain.errors import Reason, Refusal
from pulse.domain.routed import RoutedMessage

EXPRESSION_BYTES_MAX = 4096
"""1024 characters, whatever they are."""
NODES_MAX = 400
NAMES_MAX = 64
JOINS_MAX = 4
PATTERNS_MAX = 4
PATTERN_LENGTH_MAX = 128
STEPS_MAX = 100_000
"""Of one evaluation; a step is a node, or a look at 64 bytes: some milliseconds."""
STEP_BYTES = 64
MESSAGE_STEPS_MAX = 300_000
"""Of all evaluations for one message: whatever a tenant's routes ask, the others wait some ten milliseconds at most."""

_FIELD = "match.expression"
_COMPILE_ERROR = re.compile(r"ERROR: <input>:([0-9]{1,4}):([0-9]{1,4}): (.*)")
_MAP = cel.Type.Map(cel.Type.STRING, cel.Type.DYN)
_VARIABLES = {
    "metrics": _MAP,
    "payload": _MAP,
    "device": _MAP,
    "tenant": cel.Type.STRING,
    "ts": cel.Type.TIMESTAMP,
}


class Unanswered(StrEnum):
    """Why an expression said neither yes nor no, which is no match; the value stands in metrics."""

    ERROR = "error"
    """A missing key, or a value of another type."""
    STOPPED = "stopped"
    """The library's bound on iterations."""
    TOO_COSTLY = "too_costly"
    """For a message as large as this one, or after all that was asked of it before."""


class Scope:
    """One message as expressions see it; its values are handed over once for all of them."""

    __slots__ = ("activation", "elements", "size", "steps_left")

    def __init__(self, activation: cel.Activation, *, size: int, elements: int) -> None:
        self.activation = activation
        self.size = size
        self.elements = elements
        self.steps_left = MESSAGE_STEPS_MAX


class Expression:
    """A compiled expression; calling it with a Scope answers whether its message is wanted."""

    __slots__ = ("_compiled", "_loop_names", "_loop_nodes", "_names", "_nodes", "_told", "text")

    def __init__(self, text: str, compiled: cel.Expression, syntax: Syntax, told: Callable[[Unanswered], None]) -> None:
        self.text = text
        self._compiled = compiled
        self._told = told
        self._nodes, self._loop_nodes = syntax.nodes, syntax.nodes_in_loops
        self._names, self._loop_names = syntax.names, syntax.names_in_loops

    def steps(self, *, size: int, elements: int) -> int:
        """What an evaluation can take at most, for a message of `size` bytes in which nothing has more `elements`."""
        looks = 1 + size // STEP_BYTES
        once = self._nodes + self._names * looks
        return once + elements * (self._loop_nodes + self._loop_names * looks) if self._loop_nodes else once

    def __call__(self, scope: object) -> bool:
        """Whether the message is wanted; where there is no answer it is not, and `told` hears why."""
        assert isinstance(scope, Scope)
        steps = self.steps(size=scope.size, elements=scope.elements)
        if steps > STEPS_MAX or steps > scope.steps_left:
            self._told(Unanswered.TOO_COSTLY)
            return False
        scope.steps_left -= steps
        try:
            answer = self._compiled.eval(scope.activation).value()
        except RuntimeError:
            self._told(Unanswered.STOPPED)
            return False
        if answer is True or answer is False:
            return answer
        self._told(Unanswered.ERROR)
        return False

    def why_unanswered(self, scope: object) -> str:
        """In words, why there is no answer for a message; empty where there is one."""
        assert isinstance(scope, Scope)
        if self.steps(size=scope.size, elements=scope.elements) > STEPS_MAX:
            return "it could take too long for a message as large as this one"
        try:
            answer = self._compiled.eval(scope.activation).value()
        except RuntimeError as error:
            return _first_line(str(error))
        if answer is True or answer is False:
            return ""
        return str(answer).partition(": ")[2][:300] or "it says neither true nor false"


def _nobody(_: Unanswered) -> None:
    """Nobody wants to know."""


class Compiler:
    """Compiles expressions; `told` hears of every evaluation that had no answer."""

    def __init__(self, *, told: Callable[[Unanswered], None] = _nobody) -> None:
        self._environment = cel.NewEnv(variables=_VARIABLES)
        self._told = told

    def compile(self, text: str, *, told: Callable[[Unanswered], None] | None = None) -> Expression:
        """The expression that `text` is; Refusal INVALID_REQUEST that says what is wrong with it.

        `told` hears in place of the compiler's own of evaluations that had no answer. Of a text that does not read, the
        refusal's `position` is the offset in its characters.
        """
        try:
            if len(text.encode()) > EXPRESSION_BYTES_MAX or "\x00" in text:
                raise _refusal(f"an expression has at most {EXPRESSION_BYTES_MAX} bytes, and no U+0000")
            compiled = self._environment.compile(text)
        except (RuntimeError, UnicodeEncodeError) as error:
            raise _unreadable(text, str(error)) from error
        if compiled.return_type() not in (cel.Type.BOOL, cel.Type.DYN):
            raise _refusal(f"an expression says true or false, and not {compiled.return_type().name()}")
        syntax = read_syntax(compiled.serialize(), _VARIABLES)
        if why := _why_refused(syntax):
            raise _refusal(why)
        return Expression(text, compiled, syntax, told or self._told)

    def scope(self, message: RoutedMessage) -> Scope:
        """What expressions see of `message`; made once a message."""
        body = message.body
        activation = self._environment.Activation(
            {
                "metrics": message.metrics,
                "payload": message.payload,
                "device": {"id": message.device_id, "attributes": message.attributes},
                "tenant": message.tenant_id,
                "ts": datetime.fromtimestamp(message.ts_ms / 1000, UTC),
            }
        )
        return Scope(activation, size=len(body), elements=1 + body.count(b","))


def _why_refused(syntax: Syntax) -> str:
    if syntax.nodes > NODES_MAX or syntax.names > NAMES_MAX:
        return f"an expression has at most {NODES_MAX} parts, of which {NAMES_MAX} names"
    if syntax.loops_nested:
        return "all, exists and exists_one cannot stand within one another"
    if syntax.joins_in_loops:
        return "map and filter are not available, and nothing is joined with + in all, exists or exists_one"
    if syntax.loops_over_computed:
        return "all, exists and exists_one go over a part of the message, such as metrics or payload.list"
    if syntax.joins > JOINS_MAX:
        return f"at most {JOINS_MAX} + may join texts or lists; say double(…) or int(…) where numbers are meant"
    if len(syntax.patterns) > PATTERNS_MAX or syntax.patterns_in_loops:
        return f"matches may stand {PATTERNS_MAX} times, and not in all, exists or exists_one"
    if any(pattern is None or len(pattern) > PATTERN_LENGTH_MAX for pattern in syntax.patterns):
        return f"matches takes a literal of at most {PATTERN_LENGTH_MAX} characters"
    return ""


def _unreadable(text: str, said: str) -> Refusal:
    """With the offset in `text`, which the library tells in its words and nowhere else."""
    found = _COMPILE_ERROR.search(said)
    if found is None:
        return _refusal(_first_line(said))
    line, column = int(found[1]), int(found[2])
    position = sum(len(each) + 1 for each in text.split("\n")[: line - 1]) + column - 1
    message = found[3].removesuffix(" [INVALID_ARGUMENT]").partition(" expecting {")[0][:300]
    where = f"line {line}, column {column}" if line > 1 else f"column {column}"
    return Refusal(Reason.INVALID_REQUEST, f"{message} ({where})", field=_FIELD, position=position)


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "no expression")[:300]


def _refusal(message: str) -> Refusal:
    return Refusal(Reason.INVALID_REQUEST, message, field=_FIELD)

"""CEL: what routes ask is answered as CEL has it; what would take long is refused, or not evaluated."""

from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.adapters.expressions.cel import MESSAGE_STEPS_MAX, STEPS_MAX, Compiler, Unanswered
from pulse.adapters.expressions.syntax import fields
from pulse.domain.errors import Reason, Refusal
from pulse.domain.routed import RoutedMessage
from pulse.domain.subjects import MessageType

PAYLOAD = {
    "metrics": {"temp": 21.5, "hum": 40, "door": "open", "ok": True, "temp.inside": 3},
    "list": [1, "a", None, {"x": [7]}],
    "seq": 2**63 - 1,
}


def message(payload: object) -> RoutedMessage:
    body = msgspec.json.encode(payload)
    return RoutedMessage(
        tenant_id="acme",
        device_id="boiler-1",
        message_type=MessageType.TELEMETRY,
        source="http",
        ts_ms=1_790_000_000_000,
        payload=msgspec.json.decode(body),
        attributes={"site": "roof"},
        body=body,
    )


def answer(text: str, payload: object = PAYLOAD) -> bool | Unanswered:
    told: list[Unanswered] = []
    compiler = Compiler(told=told.append)
    wanted = compiler.compile(text)(compiler.scope(message(payload)))
    if told:
        assert wanted is False
        return told[0]
    return wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("metrics.temp > 20.0", True),
        ("metrics.temp > 20", True),
        ("metrics.hum == 40.0", True),
        ("metrics.door == 'open' && metrics.ok", True),
        ("metrics['temp.inside'] == 3", True),
        ("has(metrics.nope) && metrics.nope > 1", False),
        ("'door' in metrics", True),
        ("metrics.exists(k, k.startsWith('te') && metrics[k] > 21.0)", True),
        ("metrics.all(k, k != 'door')", False),
        ("payload.list.exists_one(x, x == 'a')", True),
        ("payload.list[3].x[0] == 7", True),
        ("payload.list[2] == null", True),
        ("payload.seq > 1", True),
        ("device.id == 'boiler-1' && device.attributes.site == 'roof'", True),
        ("tenant == 'acme'", True),
        ("ts > timestamp('2026-01-01T00:00:00Z')", True),
        ("metrics.door.matches('^op')", True),
        ("metrics.nope > 1", Unanswered.ERROR),
        ("metrics.nope > 1 || metrics.ok", True),
        ("metrics.door > 1", Unanswered.ERROR),
        ("metrics.temp", Unanswered.ERROR),
        ("payload.list[17] == 1", Unanswered.ERROR),
        ("1 / (metrics.hum - 40) == 1", Unanswered.ERROR),
    ],
)
def test_an_expression_is_answered(text: str, wanted: bool | Unanswered) -> None:
    assert answer(text) is wanted


TEN = "[1,1,1,1,1,1,1,1,1,1]"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "metrics.temp >",
        "nobody == 1",
        "metrics.temp + 1",
        "'text'",
        "metrics.temp > 1 \x00",
        "\ud800 == 1",
        "a" * 5000,
        "(" * 2000 + "true" + ")" * 2000,
        "(" * 40 + "true" + ")" * 40,
        "[" * 40 + "]" * 40 + " == []",
        "metrics" + ".a" * 40,
        "1" + "+1" * 1000 + " > 1",
        " || ".join(["metrics.a"] * 200),
        "'" + "a" * 4090 + "' == 'a'",
        "metrics.all(a, metrics.all(b, a != b))",
        "metrics.all(a, metrics.all(b, metrics.all(c, a + b != c)))",
        f"{TEN}.all(a, {TEN}.all(b, {TEN}.all(c, {TEN}.all(d, a + b + c + d > 0))))",
        f"{TEN}.exists(x, x == 2)",
        "metrics.map(k, k).size() > 1",
        "metrics.filter(k, k != 'a').size() > 1",
        "['a']" + ".map(x, x + x)" * 10 + "[0].size() > 1",
        "[payload.s + payload.s].exists(x, [x + x].exists(y, y != ''))",
        "metrics.exists(k, k + k == 'aa')",
        "payload.s" + " + payload.s" * 6 + " == 'a'",
        "metrics.all(k, k.matches('a'))",
        "payload.s.matches(payload.pattern)",
        "payload.s.matches('" + "a" * 200 + "')",
        " || ".join(["payload.s.matches('a')"] * 5),
    ],
)
def test_a_hostile_or_wrong_expression_is_refused_when_it_is_compiled(text: str) -> None:
    with pytest.raises(Refusal) as caught:
        Compiler().compile(text)
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.field == "match.expression"
    assert caught.value.message.strip()


HOSTILE_MESSAGES = {
    "long list": {"list": [1] * 20_000, "s": "b" * 20_000, "metrics": {"s": "a" * 4000}},
    "long text": {"list": [1], "s": "a" * 60_000, "metrics": {"s": "a"}},
    "objects": {"list": [{"a": 1}] * 5000, "other": [{"a": 1}] * 3000, "metrics": {"s": "a"}},
    "metrics": {"metrics": {f"metric_{number}": number * 1.5 for number in range(256)}},
}
HOSTILE_EXPRESSIONS = [
    "payload.list.all(x, x != payload.other)",
    "payload.list.all(x, " + " && ".join(["x != 2"] * 60) + ")",
    "payload.list.all(payload, true) && payload.s == payload.s",
    "payload.list.exists(x, x in payload.list && false)",
    "metrics.all(k, metrics[k] != payload)",
    "payload.s.matches('^(a?){100}(a){100}$')",
    "payload.s.matches('(x+x+)+y')",
    "payload.s + payload.s + payload.s + payload.s != payload.s",
    " && ".join(["payload != payload.s"] * 30),
]


@pytest.mark.parametrize("text", HOSTILE_EXPRESSIONS)
@pytest.mark.parametrize("name", HOSTILE_MESSAGES)
def test_what_compiles_is_evaluated_only_within_its_bound(name: str, text: str) -> None:
    """Without the bound the worst of these takes minutes, which is what this test then does."""
    told: list[Unanswered] = []
    compiler = Compiler(told=told.append)
    expression = compiler.compile(text)
    hostile = message(HOSTILE_MESSAGES[name])
    expression(compiler.scope(hostile))
    steps = expression.steps(size=len(hostile.body), elements=1 + hostile.body.count(b","))
    assert (told == [Unanswered.TOO_COSTLY]) is (steps > STEPS_MAX)
    assert Unanswered.STOPPED not in told


def test_what_is_bounded_does_not_touch_the_usual() -> None:
    usual = message(HOSTILE_MESSAGES["metrics"])
    compiler = Compiler(told=pytest.fail)
    for text in ("metrics.exists(k, metrics[k] == 382.5)", "metrics.all(k, k.startsWith('metric_'))"):
        assert compiler.compile(text)(compiler.scope(usual)) is True


def test_one_scope_serves_many_expressions() -> None:
    compiler = Compiler()
    scope = compiler.scope(message(PAYLOAD))
    texts = [f"metrics.hum == {number}" for number in range(60)]
    assert [compiler.compile(text)(scope) for text in texts] == [number == 40 for number in range(60)]


def test_all_that_is_asked_of_one_message_has_a_bound_together() -> None:
    told: list[str] = []
    compiler = Compiler()
    looping = compiler.compile("metrics.all(k, k != 'temp.inside')", told=told.append)
    small = compiler.compile("metrics.hum == 40")
    crowd = PAYLOAD | {"metrics": {"hum": 40, **{f"m{number}": number for number in range(400)}}}
    scope = compiler.scope(message(crowd))
    steps = looping.steps(size=scope.size, elements=scope.elements)
    assert steps <= STEPS_MAX
    answers = [looping(scope) for _ in range(MESSAGE_STEPS_MAX // steps + 3)]
    assert answers == [True] * (MESSAGE_STEPS_MAX // steps) + [False] * 3
    assert told == [Unanswered.TOO_COSTLY] * 3
    assert small(scope)
    assert looping(compiler.scope(message(crowd)))


@given(st.text(max_size=60))
def test_any_text_compiles_or_is_refused(text: str) -> None:
    compiler = Compiler()
    try:
        expression = compiler.compile(text)
    except Refusal:
        return
    assert expression(compiler.scope(message(PAYLOAD))) in (True, False)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    with suppress(ValueError):
        assert sum(1 for _ in fields(data)) <= len(data)

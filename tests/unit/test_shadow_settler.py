"""What a shadow worker makes of its messages, on a store that answers from memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from pulse.domain.envelope import wrap
from pulse.domain.errors import Reason, Refusal
from pulse.domain.ledger import PositionSet
from pulse.domain.settlement import DeadLetter, Message
from pulse.domain.shadow import Shadow, ShadowBounds, ShadowKey
from pulse.domain.shadow_requests import Answers, Request, answer
from pulse.domain.subjects import MessageType
from pulse.services.device_state import Answered
from pulse.services.shadow import ShadowSettler

BOUNDS = ShadowBounds(shadow_bytes_max=100, shadow_depth_max=8)


class World:
    """Store and metrics at once; `said` is the end of each topic."""

    def __init__(self, *, already: Sequence[int] = ()) -> None:
        self.already = PositionSet.of(already)
        self.shadows: dict[ShadowKey, Shadow] = {}
        self.order: list[int] = []
        self.dead: list[DeadLetter] = []
        self.said: list[str] = []
        self.told = 0
        self.counts: Counter[str] = Counter()

    async def check(self) -> None:
        """It is there."""

    async def epoch(self, created_ns: int) -> int:
        return created_ns

    async def settle(self, requests: Sequence[Request], dead: Sequence[DeadLetter]) -> tuple[Answers, PositionSet]:
        left = [request for request in requests if request.position not in self.already]
        self.order += [request.position for request in left]
        self.dead += [letter for letter in dead if letter.position not in self.already]
        known = {request.key: self.shadows.get(request.key, Shadow()) for request in left}
        answers = answer(left, known, {}, bounds=BOUNDS, names_max=1)
        self.shadows.update(answers.shadows)
        self.said += [each.topic.removeprefix("shadow/") for each in answers.said]
        return answers, self.already

    def settled(self, *, commit_s: float, end_to_end_s: Sequence[float], **counts: int) -> None:
        self.counts.update(counts)

    def tell(self) -> None:
        self.told += 1


def message(sequence: int, payload: object, *, get: bool = False) -> tuple[int, Message]:
    body = wrap(
        tenant_id="t1",
        device_id="d1",
        message_type=MessageType.SHADOW_GET if get else MessageType.SHADOW,
        received_ms=1,
        source="mqtt",
        payload=msgspec.json.encode(payload),
    )
    return sequence, Message("shadow.t1", body, b"", "", sequence, 1, 1)


def settler(world: World) -> ShadowSettler:
    return ShadowSettler(store=world, metrics=world, posted=world.tell, probe=lambda _: None)


BATCH = Answered(1, [])


async def test_messages_are_answered_in_the_order_of_the_stream_and_counted_by_what_became_of_them() -> None:
    world = World()
    poison = (2, Message("shadow.t1", b'{"test":1}', b"", "", 2, 1, 1))
    late_first = [
        message(5, {"state": {"reported": {"a": "x" * 200}}}),
        message(4, {}, get=True),
        poison,
        message(3, {"state": {"reported": {"a": 2}}}),
        message(1, {"state": {"reported": {"a": 1}}}),
    ]
    await settler(world).settle(BATCH, late_first)
    assert world.order == [1, 3, 4, 5]
    assert world.said == ["update/accepted", "update/accepted", "get/accepted", "update/rejected"]
    assert [letter.reason for letter in world.dead] == [Reason.INVALID_ENVELOPE]
    assert world.counts == {"accepted": 2, "answered": 1, "rejected": 1, "dead": 1, "already_settled": 0}
    assert world.told == 1


async def test_what_others_have_settled_is_counted_as_that_and_nothing_else() -> None:
    world = World(already=[1, 2])
    await settler(world).settle(
        BATCH, [message(1, {"state": {"reported": {"a": 1}}}), (2, Message("shadow.t1", b"", b"", "", 2, 1, 1))]
    )
    assert world.counts == {"accepted": 0, "answered": 0, "rejected": 0, "dead": 0, "already_settled": 2}
    assert (world.dead, world.told) == ([], 0)


async def test_what_the_database_refuses_dies_for_that_with_the_name_of_its_device() -> None:
    world = World()
    position, refused = message(1, {"state": {"reported": {"a": 1}}})
    await settler(world).condemn(BATCH, position, refused, Refusal(Reason.REFUSED_BY_DATABASE, "no"))
    (letter,) = world.dead
    assert (letter.position, letter.reason, letter.device_id) == (1, Reason.REFUSED_BY_DATABASE, "d1")
    assert world.counts["dead"] == 1

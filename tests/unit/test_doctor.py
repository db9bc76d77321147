"""How the numbers that `pulse doctor` reads are judged."""

from __future__ import annotations

import pytest

from pulse.domain.doctor import (
    Finding,
    Status,
    finding,
    full_in_s,
    graded,
    is_well,
    judge_clock,
    judge_connections,
    judge_dead_letters,
    judge_disk,
    judge_partitions,
    stay_s,
)


@pytest.mark.parametrize(
    ("value", "status"),
    [(0, Status.OK), (0.79, Status.OK), (0.8, Status.WARNING), (0.99, Status.WARNING), (1.0, Status.FAILING)],
)
def test_a_value_is_graded_by_its_bounds(value: float, status: Status) -> None:
    assert graded(value, warning_at=0.8, failing_at=1.0) is status


def test_only_what_is_not_ok_has_an_advice() -> None:
    assert finding("x", Status.OK, "fine", "do this").advice == ""
    assert finding("x", Status.WARNING, "not fine", "do this").advice == "do this"


@pytest.mark.parametrize(
    ("status", "well"),
    [(Status.OK, True), (Status.WARNING, True), (Status.NOT_RUN, True), (Status.FAILING, False)],
)
def test_only_a_failure_is_a_failure(status: Status, well: bool) -> None:
    assert is_well([Finding(check="x", status=status, text="")]) is well


@pytest.mark.parametrize(
    ("offset_s", "status", "words"),
    [
        (0.004, Status.OK, "4 ms ahead"),
        (-3.0, Status.WARNING, "3000 ms behind"),
        (-90.0, Status.FAILING, "behind"),
        (61.0, Status.FAILING, "ahead"),
    ],
)
def test_a_clock_is_judged_either_way(offset_s: float, status: Status, words: str) -> None:
    found = judge_clock("clock", offset_s)
    assert found.status is status
    assert words in found.text


@pytest.mark.parametrize(
    ("used", "usable", "status"), [(7, 10, "ok"), (8, 10, "warning"), (10, 10, "failing"), (0, 0, "ok")]
)
def test_connections_are_judged_by_what_is_left(used: int, usable: int, status: str) -> None:
    assert judge_connections(used=used, usable=usable, what="max_connections").status == status


@pytest.mark.parametrize(("share", "status"), [(0.5, "ok"), (0.9, "warning"), (0.98, "failing")])
def test_a_disk_is_judged_by_what_is_used(share: float, status: str) -> None:
    assert judge_disk(used_share=share, free_text="1 GiB", where="/data").status == status


@pytest.mark.parametrize(("ahead", "status"), [(-1, "failing"), (0, "warning"), (2, "warning"), (3, "ok"), (9, "ok")])
def test_partitions_are_judged_by_what_is_wanted(ahead: int, status: str) -> None:
    assert judge_partitions(ahead=ahead, wanted=3).status == status


def test_dead_letters_are_told_by_reason() -> None:
    assert judge_dead_letters({}).status is Status.OK
    found = judge_dead_letters({"invalid_json": 2, "conflict": 1})
    assert (found.status, found.text) == (Status.WARNING, "3 wait: conflict 1, invalid_json 2")


def test_a_message_stays_until_the_first_of_the_limits_reaches_it() -> None:
    limits = {"age_s_max": 3600.0, "bytes_left_at": (1000.0, 1_000_000), "messages_left_at": (10.0, 5000)}
    assert stay_s(**limits) == 500  # type: ignore[arg-type]
    assert stay_s(**{**limits, "messages_left_at": None}) == 1000  # type: ignore[arg-type]
    assert stay_s(age_s_max=3600.0, bytes_left_at=(0.0, 100), messages_left_at=None) == 3600
    assert stay_s(age_s_max=None, bytes_left_at=(0.0, 100), messages_left_at=None) is None


def test_a_stream_is_full_when_its_growth_has_used_up_the_rest() -> None:
    assert full_in_s(used=400, limit=1000, growth_per_s=60.0) == 10
    assert full_in_s(used=2000, limit=1000, growth_per_s=60.0) == 0
    assert full_in_s(used=400, limit=None, growth_per_s=60.0) is None
    assert full_in_s(used=400, limit=1000, growth_per_s=-5.0) is None

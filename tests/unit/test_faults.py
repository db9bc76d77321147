"""Deaths on order: at that step, at that arrival, and by no other."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse.domain.errors import ConfigurationError
from pulse.runtime import faults


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    signals: list[int] = []
    monkeypatch.setattr(os, "kill", lambda _, number: signals.append(number))
    return signals


@pytest.mark.parametrize(
    ("spec", "arrival"), [("ingest.committed", 1), ("ingest.committed:1", 1), ("ingest.committed:3", 3)]
)
def test_the_process_is_killed_at_the_nth_arrival_and_not_before(spec: str, arrival: int, killed: list[int]) -> None:
    probe = faults.probe_for(spec)
    for _ in range(arrival - 1):
        probe("ingest.committed")
        probe("ingest.fetched")
    assert killed == []
    probe("ingest.committed")
    assert killed == [signal.SIGKILL]


def test_nothing_is_armed_by_an_empty_spec(killed: list[int]) -> None:
    faults.probe_for("")("ingest.committed")
    assert killed == []


@pytest.mark.parametrize(
    "spec", ["Ingest", "ingest:", "ingest:0", "ingest:x", ":1", "a b", "a..b", "a.", "a:1:2", "a\n", " a"]
)
def test_what_is_no_step_is_refused(spec: str) -> None:
    with pytest.raises(ConfigurationError, match="is no step"):
        faults.probe_for(spec)


@given(st.text(max_size=20))
def test_any_text_is_a_spec_or_is_refused(spec: str) -> None:
    try:
        probe = faults.probe_for(spec)
    except ConfigurationError:
        return
    probe("never.this")


def test_an_armed_probe_knows_a_name_that_can_never_be_ordered() -> None:
    with pytest.raises(AssertionError, match="is no name of a step"):
        faults.probe_for("ingest.committed")("Ingest Committed")

"""Deaths on order: a test names a step, and the process kills itself there as `kill -9` would."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable

from pulse.domain.errors import ConfigurationError

STEP_PATTERN = r"[a-z][a-z0-9_]*(?:[.-][a-z0-9_]+)*"
SPEC_PATTERN = rf"^(?:{STEP_PATTERN}(?::[1-9][0-9]{{0,8}})?)?$"
_STEP = re.compile(STEP_PATTERN)
_SPEC = re.compile(SPEC_PATTERN)


def probe_for(spec: str) -> Callable[[str], None]:
    """A function that a service calls with the name of each step it reaches.

    `spec` is empty (the function does nothing), `step`, or `step:n`: SIGKILL to this process at the n-th arrival at
    that step, before the step itself. Raises ConfigurationError for any other `spec`.
    """
    if not _SPEC.fullmatch(spec):
        raise ConfigurationError(
            f"crash_at = {spec!r} is no step", hint="`step` or `step:n`, such as ingest.committed or ingest.committed:3"
        )
    if not spec:
        return _pass_by
    fatal_step, _, arrival = spec.partition(":")
    arrivals_left = int(arrival or 1)

    def probe(step: str) -> None:
        nonlocal arrivals_left
        assert _STEP.fullmatch(step), f"{step!r} is no name of a step"
        if step != fatal_step:
            return
        arrivals_left -= 1
        if arrivals_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    return probe


def _pass_by(step: str) -> None:
    """Nothing is armed."""

"""Says in one plain line, above pytest's own last line, which checks did not run and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest


def summary(reasons: list[str]) -> str:
    """One line for any number of skips; empty where there are none.

    >>> summary(["mosquitto is not installed", "mosquitto is not installed"])
    '2 checks did not run: mosquitto is not installed (2)'
    """
    if not reasons:
        return ""
    counted = ", ".join(f"{reason} ({count})" for reason, count in Counter(reasons).most_common())
    return f"{len(reasons)} {'check' if len(reasons) == 1 else 'checks'} did not run: {counted}"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Hook of pytest, imported by tests/conftest.py; outermost, so that its line comes after the list of skips."""
    yield
    reasons = [
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.stats.get("skipped", [])
        if not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple)
    ]
    if line := summary(reasons):
        terminalreporter.write_line(line)

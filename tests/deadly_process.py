"""`python deadly_process.py ROLE…`: the roles as shipped, but a message that contains `deadly` kills who decides on it.

Stands for what no decoder of ours does: a fault of the interpreter, of a library in C, of memory.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Iterable

from pulse.app import serve
from pulse.domain.settlement import Message, Settlement, settle
from pulse.domain.telemetry import PayloadDecoder
from pulse.runtime.layers import load
from pulse.runtime.roles import Role
from pulse.services import ingest

DEADLY = b'"deadly"'


def deadly_settle(messages: Iterable[tuple[int, Message]], decoder: PayloadDecoder) -> Settlement:
    """`settle`, unless it has to look at a deadly message."""
    messages = list(messages)
    if any(DEADLY in message.body for _, message in messages):
        os.kill(os.getpid(), signal.SIGKILL)
    return settle(messages, decoder)


if __name__ == "__main__":
    assert getattr(ingest, "settle") is settle  # noqa: B009 - it is no export of theirs
    setattr(ingest, "settle", deadly_settle)  # noqa: B010 - as above
    asyncio.run(serve(load(environment=os.environ), [Role(name) for name in sys.argv[1:]]))

"""Answers in parts: the first is made before the status is sent, so that an early failure has a status of its own."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator


async def begun(parts: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    """`parts` with its first one made already. What it raises now, the caller can still answer.

    What it raises later cuts the connection: the reader sees an answer without an end, not a short one.
    """
    first = await anext(parts, b"")

    async def rest() -> AsyncIterator[bytes]:
        try:
            yield first
            async for part in parts:
                yield part
        finally:
            await parts.aclose()

    return rest()

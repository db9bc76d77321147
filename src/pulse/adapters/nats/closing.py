"""Leaving a server that reads no more, or is gone."""

from __future__ import annotations

from nats.aio.client import Client
from nats.aio.transport import TcpTransport


def abandon(client: Client) -> None:
    """Give up what is unsent and cut the connection, so that `Client.close` has nothing to wait for.

    nats-py 2.16 writes what is pending to whatever socket there is: a dead one fails it and leaves the rest of its
    closing undone, that of a server which hangs is waited for without end.
    """
    client._pending = []
    client._pending_data_size = 0
    if isinstance(client._transport, TcpTransport) and client._transport._io_writer is not None:
        client._transport._io_writer.transport.abort()

"""What a failed statement says: the system is away, this data can never be stored, or the code is wrong.

    SQLSTATE                                                             who is at fault
    08*          connection                                              OUTAGE
    25006        read-only transaction (a standby after a failover)      OUTAGE
    25P03 25P04  idle or whole transaction timed out                     OUTAGE
    40001 40003 40P01   serialization, unknown outcome, deadlock         OUTAGE
    53*          out of disk, memory, connections                        OUTAGE
    55P03        lock timeout                                            OUTAGE
    57*          shutdown, cannot connect now, cancelled, statement timeout   OUTAGE
    58*          I/O                                                     OUTAGE
    22*          data exception                                          POISON
    23*          integrity, unless the caller handles it                 POISON
    54*          too large for the database (a row, an index entry)      POISON
    all others   syntax, undefined, privilege, internal, …               BUG

Longer prefixes win. An argument that asyncpg cannot encode is its DataError, 22000.
Codes: PostgreSQL manual, appendix A.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import asyncpg

from pulse.domain.errors import ConfigurationError, Outage

SYSTEM = "postgresql"


class Fault(Enum):
    """Who is at fault for a failed statement."""

    OUTAGE = "outage"
    """The system: wait and do it again, unchanged."""
    POISON = "poison"
    """The data: it will be refused for ever."""
    BUG = "bug"
    """The code or the installation: raise."""


BY_SQLSTATE: dict[str, Fault] = {
    "08": Fault.OUTAGE,
    "22": Fault.POISON,
    "23": Fault.POISON,
    "25006": Fault.OUTAGE,
    "25P03": Fault.OUTAGE,
    "25P04": Fault.OUTAGE,
    "40001": Fault.OUTAGE,
    "40003": Fault.OUTAGE,
    "40P01": Fault.OUTAGE,
    "53": Fault.OUTAGE,
    "54": Fault.POISON,
    "55P03": Fault.OUTAGE,
    "57": Fault.OUTAGE,
    "58": Fault.OUTAGE,
}

SETTINGS_AT_FAULT = {
    "28": "PostgreSQL refuses the user or password of DATABASE_URL",
    "3D": "PostgreSQL has no database of the name in DATABASE_URL",
}
"""Classes that only a connection attempt raises: a BUG to the worker, to the operator a line that says what to mend."""


def classify(error: BaseException) -> Fault:
    """Who is at fault for `error`, by its SQLSTATE or type; see the table above."""
    if isinstance(error, asyncpg.PostgresError):
        return _by_sqlstate(error.sqlstate or "")
    if isinstance(error, asyncpg.InterfaceError):
        # A connection or pool that is closed raises the base class and its text alone. The descendants are misuse, and
        # so is what comes with a hint for programmers: a statement that gets more or fewer arguments than it has.
        return Fault.OUTAGE if type(error) is asyncpg.InterfaceError and error.hint is None else Fault.BUG
    if type(error) is asyncpg.InternalClientError:
        # A server that shuts down says so between two statements, and asyncpg then takes the connection, until it sees
        # the end of it, for one that is in the middle of another operation.
        return Fault.OUTAGE
    # asyncpg lets the socket's own errors through, and TimeoutError (an OSError) for `command_timeout`
    return Fault.OUTAGE if isinstance(error, OSError) else Fault.BUG


def _by_sqlstate(sqlstate: str) -> Fault:
    return BY_SQLSTATE.get(sqlstate) or BY_SQLSTATE.get(sqlstate[:2]) or Fault.BUG


def to_outage(error: BaseException) -> Outage:
    """The Outage that `error` is; for callers that have classified it."""
    if isinstance(error, TimeoutError):
        what = "no answer in time"
    elif isinstance(error, ConnectionRefusedError):
        what = "connection refused"
    else:
        what = str(error) or type(error).__name__
    return Outage(SYSTEM, f"PostgreSQL is away: {what}", hint="is it running, and is DATABASE_URL right?")


@contextmanager
def mapped() -> Iterator[None]:
    """Raise Outage for what the table calls an outage, ConfigurationError for a refused login, all else as it is.

    Wrap database calls only: any OSError within counts as PostgreSQL's.
    """
    try:
        yield
    except (asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError, OSError) as error:
        if isinstance(error, asyncpg.PostgresError):
            at_fault = SETTINGS_AT_FAULT.get((error.sqlstate or "")[:2])
            if at_fault:
                raise ConfigurationError(f"{at_fault}: {error}") from error
        if isinstance(error, asyncpg.ClientConfigurationError):
            raise ConfigurationError(f"DATABASE_URL cannot be used: {error}") from error
        if classify(error) is Fault.OUTAGE:
            raise to_outage(error) from error
        raise

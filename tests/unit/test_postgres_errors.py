"""Whose fault a failed statement is."""

from __future__ import annotations

import asyncio

import asyncpg
import pytest

from pulse.adapters.postgres.errors import BY_SQLSTATE, Fault, classify, mapped
from pulse.domain.errors import ConfigurationError, Outage


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.ConnectionDoesNotExistError("08003"),
        asyncpg.CannotConnectNowError("57P03"),
        asyncpg.AdminShutdownError("57P01"),
        asyncpg.CrashShutdownError("57P02"),
        asyncpg.QueryCanceledError("57014"),
        asyncpg.DiskFullError("53100"),
        asyncpg.OutOfMemoryError("53200"),
        asyncpg.TooManyConnectionsError("53300"),
        asyncpg.SerializationError("40001"),
        asyncpg.StatementCompletionUnknownError("40003"),
        asyncpg.DeadlockDetectedError("40P01"),
        asyncpg.LockNotAvailableError("55P03"),
        asyncpg.ReadOnlySQLTransactionError("25006"),
        asyncpg.IdleInTransactionSessionTimeoutError("25P03"),
        asyncpg.PostgresIOError("58030"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress"),
        ConnectionRefusedError(),
        ConnectionResetError(),
        TimeoutError(),
        OSError("no route to host"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_failure_of_the_system_is_an_outage(error: Exception) -> None:
    assert classify(error) is Fault.OUTAGE
    with pytest.raises(Outage) as raised, mapped():
        raise error
    assert raised.value.system == "postgresql"
    assert raised.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.DataError("asyncpg could not encode an argument"),
        asyncpg.NumericValueOutOfRangeError("22003"),
        asyncpg.UntranslatableCharacterError("22P05: \\u0000 in jsonb"),
        asyncpg.NotNullViolationError("23502"),
        asyncpg.CheckViolationError("23514"),
        asyncpg.UniqueViolationError("23505"),
        asyncpg.ProgramLimitExceededError("54000: index row too large"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_data_that_is_refused_is_poison_and_raised_as_it_is(error: Exception) -> None:
    assert classify(error) is Fault.POISON
    with pytest.raises(type(error)) as raised, mapped():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.UndefinedTableError("42P01"),
        asyncpg.PostgresSyntaxError("42601"),
        asyncpg.InsufficientPrivilegeError("42501"),
        asyncpg.InFailedSQLTransactionError("25P02"),
        asyncpg.InternalServerError("XX000"),
        asyncpg.RaiseError("P0001"),
        asyncpg.UnsupportedClientFeatureError("misuse"),
        asyncpg.InterfaceError("the server expects 2 arguments for this query, 1 was passed", hint="Check the query"),
        ValueError("a bug"),
        asyncio.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_everything_else_is_a_bug_and_raised_as_it_is(error: BaseException) -> None:
    assert classify(error) is Fault.BUG
    with pytest.raises(type(error)) as raised, mapped():
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        asyncpg.InvalidPasswordError("28P01"),
        asyncpg.InvalidAuthorizationSpecificationError("28000"),
        asyncpg.InvalidCatalogNameError("3D000"),
        asyncpg.ClientConfigurationError("invalid DSN"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_refused_login_is_for_the_operator_to_mend(error: Exception) -> None:
    assert classify(error) is Fault.BUG, "a worker must not wait for it as for an outage"
    with pytest.raises(ConfigurationError, match="DATABASE_URL"), mapped():
        raise error


def test_every_sqlstate_that_asyncpg_knows_has_one_answer() -> None:
    """Classes and codes of the table exist, and none is hidden by a shorter one that says the same."""
    known = {
        error.sqlstate
        for error in vars(asyncpg.exceptions).values()
        if isinstance(error, type) and issubclass(error, asyncpg.PostgresError) and error.sqlstate
    }
    for prefix, fault in BY_SQLSTATE.items():
        assert any(sqlstate.startswith(prefix) for sqlstate in known) or prefix == "25P04"
        assert len(prefix) == 2 or BY_SQLSTATE.get(prefix[:2]) is not fault

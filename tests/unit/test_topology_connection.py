"""NATS URLs, and what NATS's errors are in our tree."""

from __future__ import annotations

import nats.errors
import nats.js.errors
import pytest

from pulse.adapters.nats.connection import Address, parse_address
from pulse.adapters.nats.errors import JetStreamRefusal, mapped
from pulse.domain.errors import ConfigurationError, Outage, PulseError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("nats://h:4222", Address(urls=("nats://h:4222",))),
        ("h", Address(urls=("nats://h:4222",))),
        ("h:1", Address(urls=("nats://h:1",))),
        ("tls://h", Address(urls=("tls://h:4222",))),
        ("nats://[::1]:4223", Address(urls=("nats://[::1]:4223",))),
        ("wss://h/nats", Address(urls=("wss://h:443/nats",))),
        ("nats://u:p%40ss@h", Address(urls=("nats://h:4222",), user="u", password="p@ss")),
        ("nats://t%2Fken@h", Address(urls=("nats://h:4222",), token="t/ken")),
        ("nats://u:p@a, nats://b:7", Address(urls=("nats://a:4222", "nats://b:7"), user="u", password="p")),
        ("nats://u:p@a,nats://u:p@b", Address(urls=("nats://a:4222", "nats://b:4222"), user="u", password="p")),
    ],
)
def test_a_url_gives_servers_and_decoded_credentials(url: str, address: Address) -> None:
    assert parse_address(url) == address


@pytest.mark.parametrize(
    "url", ["", "http://u:hidden@h", "nats://u:hidden@", "nats://u:hidden@h:port", "nats://u:hidden@h:99999", "nats://a,,b",
            "nats://u:hidden@a,nats://u:hidden2@b"],
)  # fmt: skip
def test_what_is_no_nats_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        parse_address(url)
    assert "hidden" not in str(refused.value)


def test_an_address_is_shown_without_its_credentials() -> None:
    assert str(parse_address("nats://user:hidden@a,nats://b")) == "a:4222, b:4222"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (nats.errors.TimeoutError(), Outage),
        (TimeoutError(), Outage),
        (ConnectionRefusedError(111, "refused"), Outage),
        (nats.errors.NoRespondersError(), Outage),
        (nats.errors.ConnectionClosedError(), Outage),
        (nats.errors.OutboundBufferLimitError(), Outage),
        (nats.errors.AuthorizationError(), ConfigurationError),
        (nats.js.errors.ServiceUnavailableError(code=503, err_code=10008, description="away"), Outage),
        (nats.js.errors.NotFoundError(code=404, err_code=10059, description="stream not found"), ConfigurationError),
        (JetStreamRefusal(code=500, err_code=10047, description="no room", doing="x"), ConfigurationError),
        (JetStreamRefusal(code=500, err_code=10118, description="offline", doing="x"), Outage),
    ],
)
def test_an_error_of_nats_becomes_ours(error: Exception, expected: type[PulseError]) -> None:
    with pytest.raises(expected) as raised, mapped("cannot do it"):
        raise error
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [nats.errors.BadSubjectError(), nats.errors.MaxPayloadError(), ValueError("bug")])
def test_a_bug_stays_a_bug(error: Exception) -> None:
    with pytest.raises(type(error)) as raised, mapped("cannot do it"):
        raise error
    assert raised.value is error

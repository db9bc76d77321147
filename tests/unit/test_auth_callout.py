"""The auth callout: a question that cannot be answered now is left to the server, which refuses."""

from __future__ import annotations

import base64
import secrets
from typing import Any, cast

import msgspec
import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import ConnectionClosedError

from pulse.adapters.nats.auth_callout import Allowed, Asked, AuthCallout
from pulse.adapters.nats.nkeys import AccountKey
from pulse.domain.errors import Outage


class Question:
    """A message of the server; the connection is lost where `lost`."""

    def __init__(self, *, lost: bool = False) -> None:
        claims = {
            "nats": {
                "server_id": {"id": "N"},
                "user_nkey": "U",
                "client_info": {"type": "mqtt"},
                "connect_opts": {"user": "acme/t-1", "pass": "t"},
            }
        }
        body = base64.urlsafe_b64encode(msgspec.json.encode(claims)).rstrip(b"=")
        self.data = b".".join((b"e30", body, b"x"))
        self.lost = lost
        self.answers: list[bytes] = []

    async def respond(self, answer: bytes) -> None:
        if self.lost:
            raise ConnectionClosedError
        self.answers.append(answer)


def refuse(_asked: Asked) -> Allowed | None:
    return None


def away(_asked: Asked) -> Allowed | None:
    raise Outage("registry", "the devices have not been read yet")


async def put(question: Question, decide: Any) -> None:
    callout = AuthCallout(cast(Client, None), key=AccountKey(secrets.token_hex(32)), decide=decide)
    await callout._answer(cast(Msg, question))


async def test_a_question_is_answered() -> None:
    question = Question()
    await put(question, refuse)
    assert len(question.answers) == 1


@pytest.mark.parametrize(("decide", "lost"), [(away, False), (refuse, True)])
async def test_an_outage_is_said_in_the_log_and_not_to_the_server(
    decide: Any, lost: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    question = Question(lost=lost)
    await put(question, decide)
    assert question.answers == []
    assert "gets no answer" in capsys.readouterr().out

"""Device HTTP without sockets: what each request is answered, and that nothing a stranger sends is ever a 5xx."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any
from urllib.parse import quote

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest

from edge import BATCH, NO_LIMITS, PATH, PAYLOAD, TOKEN, Answer, Publisher, Registry, ask, make_app, past_asgi
from pulse.api.bodies import MEMBERS_MAX
from pulse.api.device_paths import SINGLE
from pulse.api.headers import read_headers
from pulse.api.problem import Header
from pulse.domain.errors import Outage, Overloaded, Refusal
from pulse.domain.limits import Rate, RateLimits
from pulse.domain.receipt import Receipt

Row = dict[str, Any]


@pytest.fixture(scope="module", params=["through ASGI", "past ASGI"], autouse=True)
def way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here is of both ways; what may not go past ASGI goes through it all the same."""
    with past_asgi() if request.param == "past ASGI" else nullcontext():
        yield


def zstd(data: bytes, *, sized: bool = True) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=sized, write_checksum=True).compress(data)


async def test_an_accepted_message_is_answered_with_its_sequence() -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), PATH, PAYLOAD, content_type="application/json")
    assert answer.status == 202
    assert answer.headers["content-type"] == "application/json"
    assert answer.told == {
        "status": "accepted", "stream": "TELEMETRY", "seq": 1, "durability": "disk", "duplicate": False,
    }  # fmt: skip
    assert publisher.published[0].subject == "telemetry.acme"


async def test_a_body_in_parts_is_one_body() -> None:
    answer = await ask(make_app(Publisher()), PATH, [PAYLOAD[:5], b"", PAYLOAD[5:]])
    assert answer.status == 202


async def test_an_empty_heartbeat_is_one() -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), PATH.replace("telemetry", "heartbeat"))
    assert answer.status == 202
    assert b'"payload":{}}' in publisher.published[0].body


FAULTS: dict[str, tuple[bytes, int, str, str, int | None]] = {
    # name: body, status, reason, field, position
    "empty": (b"", 400, "invalid_json", "", 0),
    "cut off": (b'{"metrics":{"a":1}', 400, "invalid_json", "", 18),
    "trailing": (PAYLOAD + b" x", 400, "invalid_json", "", 34),
    "NaN": (b'{"metrics":{"a":NaN}}', 400, "invalid_json", "", 16),
    "Infinity": (b'{"metrics":{"a":Infinity}}', 400, "invalid_json", "", 16),
    "minus Infinity": (b'{"metrics":{"a":-Infinity}}', 400, "invalid_json", "", 17),
    "a high surrogate": (b'{"metrics":{"a":"x\\\\\\ud800"}}', 400, "invalid_json", "", 20),
    "a low surrogate": (b'{"metrics":{"a":"\\udc00"}}', 400, "invalid_json", "", 23),
    "not UTF-8": (b'{"metrics":{"a":"\xc3\xa9\xff"}}', 400, "invalid_json", "", 19),
    "UTF-16": (PAYLOAD.decode().encode("utf-16"), 400, "invalid_json", "", 0),
    "a byte order mark": (b"\xef\xbb\xbf" + PAYLOAD, 400, "invalid_json", "", 0),
    "U+0000": (b'{"metrics":{"a":"\\u0000"}}', 422, "invalid_payload", "metrics.a", None),
    "64 bits exceeded": (b'{"metrics":{"a":9223372036854775808}}', 422, "invalid_payload", "metrics.a", None),
    "a number too large": (b'{"metrics":{"a":1e400}}', 422, "invalid_payload", "metrics.a", None),
    "a key twice": (b'{"metrics":{"a":1,"a":2}}', 422, "invalid_payload", "", None),
    "depth 10,000": (
        b'{"metrics":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}", 422, "invalid_payload", "metrics", None,
    ),
    "depth 10,000 cut off": (b"[" * 10_000, 422, "invalid_payload", "", None),
    "a wrong type before what is no JSON": (b'{"metrics":{"a":[NaN]}}', 422, "invalid_payload", "metrics", None),
    "a wrong type before half a surrogate": (
        b'{"metrics":{"a":{"b":"\\ud800"}}}', 422, "invalid_payload", "metrics", None,
    ),
    "a wrong field": (b'{"metrics":{"a":1},"seq":-1}', 422, "invalid_payload", "seq", None),
    "an old time": (b'{"metrics":{"a":1},"ts":0}', 422, "timestamp_out_of_range", "ts", None),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
async def test_a_body_at_fault_is_refused_with_its_reason_field_and_position(name: str) -> None:
    body, status, reason, field, position = FAULTS[name]
    publisher = Publisher()
    answer = await ask(make_app(publisher), PATH, body)
    told = answer.told
    assert (answer.status, told["status"], told["reason"]) == (status, status, reason)
    assert (told.get("field", ""), told.get("position")) == (field, position)
    assert answer.headers["content-type"] == "application/problem+json"
    assert position is None or f"(byte {position})" in told["detail"]
    assert publisher.published == []


BAD_IDS = [
    "",
    ".",
    "..",
    "a.b",
    "*",
    ">",
    "a b",
    "a/b",
    "a/device/b",
    "a\x00",
    "a\n",
    "\x7f",
    "é",
    "a" * 65,
    "%",
    "a+b",
]


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("kept", ["", "/*>+"])
async def test_what_is_no_id_is_422_and_names_which(bad: str, kept: str) -> None:
    """Whether its characters come as they are or escaped."""
    app = make_app(Publisher())
    escaped = quote(bad, safe=kept)
    device = await ask(app, f"/ingest/v1/tenant/acme/device/{escaped}/telemetry", PAYLOAD)
    assert (device.status, device.told["field"]) == (422, "device_id")
    if "/device/" not in escaped:
        tenant = await ask(app, f"/ingest/v1/tenant/{escaped}/device/t-1/telemetry", PAYLOAD)
        assert (tenant.status, tenant.told["field"]) == (422, "tenant_id")


async def test_an_escaped_id_is_the_id() -> None:
    assert (await ask(make_app(Publisher()), PATH.replace("t-1", "%74%2D1"), PAYLOAD)).status == 202


@pytest.mark.parametrize(
    "path",
    [
        "/ingest/", "/ingest/v1", "/ingest/v1/tenant/acme/device/t-1", "/ingest/v1/tenant/acme/t-1/telemetry",
        PATH + "/", PATH.replace("telemetry", "shadow-get"), PATH.replace("telemetry", "commands-sent"),
        BATCH + "/", "/ingest/v2/tenant/acme/device/t-1/telemetry",
    ],
)  # fmt: skip
async def test_what_is_no_path_of_ours_is_404_and_says_which_are(path: str) -> None:
    answer = await ask(make_app(Publisher()), path, PAYLOAD)
    assert answer.status == 404
    assert "/ingest/v1/batch" in answer.told["detail"]


async def test_other_paths_are_somebody_elses() -> None:
    assert (await ask(make_app(Publisher()), "/livez")).status == 418


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"])
@pytest.mark.parametrize("path", [PATH, BATCH])
async def test_any_other_method_is_405_and_told_which_is_allowed(method: str, path: str) -> None:
    answer = await ask(make_app(Publisher()), path, method=method)
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("token", [None, "", "wrong"])
async def test_without_its_token_a_device_is_401(token: str | None) -> None:
    answer = await ask(make_app(Publisher()), PATH, PAYLOAD, token=token)
    assert answer.status == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")


async def test_the_token_may_come_by_its_own_header() -> None:
    answer = await ask(make_app(Publisher()), PATH, PAYLOAD, token=None, x_provision_token=TOKEN)
    assert answer.status == 202


@pytest.mark.parametrize("key", ["", " ", "a b", "é", "k" * 129])
@pytest.mark.parametrize("path", [PATH, BATCH])
async def test_a_malformed_idempotency_key_is_422_and_names_the_header(key: str, path: str) -> None:
    body = PAYLOAD if path == PATH else b'{"messages":[{"payload":1}]}'
    answer = await ask(make_app(Publisher()), path, body, idempotency_key=key)
    assert (answer.status, answer.told["field"]) == (422, "Idempotency-Key")


def test_a_header_that_must_not_be_repeated_is_not_silently_the_last_one() -> None:
    with pytest.raises(Refusal) as refused:
        read_headers([(b"idempotency-key", b"a"), (b"idempotency-key", b"b")])
    assert refused.value.field == "Idempotency-Key"
    twice = read_headers([(b"content-encoding", b"gzip"), (b"content-encoding", b"zstd")])
    assert twice.content_encoding == b"gzip, zstd"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", ""])
async def test_a_body_that_is_not_called_json_is_415(content_type: str) -> None:
    answer = await ask(make_app(Publisher()), PATH, PAYLOAD, content_type=content_type)
    assert (answer.status, answer.told["field"]) == (415, "Content-Type")


@pytest.mark.parametrize("content_type", ["application/json", "Application/JSON; charset=utf-8"])
async def test_a_body_that_is_called_json_is_taken(content_type: str) -> None:
    assert (await ask(make_app(Publisher()), PATH, PAYLOAD, content_type=content_type)).status == 202


async def test_a_body_above_its_bound_is_413_however_it_comes() -> None:
    app = make_app(Publisher(), body_bytes_max=100)
    fits = PAYLOAD.ljust(100)
    assert (await ask(app, PATH, fits, content_length="100")).status == 202
    for body, headers in (
        (fits + b" ", {}), ([fits, b" "], {}), (b"", {"content_length": "101"}),
        (gzip.compress(fits + b" "), {"content_encoding": "gzip"}),
    ):  # fmt: skip
        answer = await ask(app, PATH, body, **headers)
        assert (answer.status, answer.told["limit"], answer.told["limit_value"]) == (413, "body_bytes_max", 100)


async def test_who_may_not_speak_is_told_before_the_body_is_read() -> None:
    """A limit is asked for before it too; the body that never comes would leave no answer at all."""
    limits = RateLimits(device=Rate(0.5, 1), tenant=Rate(0, 1))
    app = make_app(Publisher(), limits=limits)
    assert (await ask(app, PATH, [], token="wrong")).status == 401
    assert (await ask(app, PATH, [])).status == 0
    assert (await ask(app, PATH, [])).status == 429


async def test_a_client_that_goes_away_leaves_nothing() -> None:
    publisher = Publisher()
    registry = CollectorRegistry()
    app = make_app(publisher, metrics=registry)
    events: list[bytes] = [PAYLOAD]

    async def receive() -> dict[str, Any]:
        return (
            {"type": "http.request", "body": events.pop(), "more_body": True} if events else {"type": "http.disconnect"}
        )

    async def send(_: object) -> None:
        raise AssertionError("nobody is there")

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    await app({"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "headers": headers},
              receive, send)  # fmt: skip
    assert publisher.published == []
    assert b"pulse_gateway_pending 0.0" in generate_latest(registry)


async def test_bodies_on_their_way_have_a_bound_together() -> None:
    app = make_app(Publisher(), gateway_bodies_bytes_max=100)
    arrived = asyncio.Event()
    release = asyncio.Event()
    parts = [b"x" * 90, b""]

    async def receive() -> dict[str, Any]:
        if len(parts) == 1:
            arrived.set()
            await release.wait()
        return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

    async def send(_: object) -> None:
        pass

    headers = [(b"authorization", f"Bearer {TOKEN}".encode())]
    scope = {"type": "http", "method": "POST", "path": PATH, "raw_path": PATH.encode(), "headers": headers}
    slow = asyncio.ensure_future(app(scope, receive, send))
    await arrived.wait()
    answer = await ask(app, PATH, [PAYLOAD, b" " * 10, b""])
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert (await ask(app, PATH, PAYLOAD)).status == 202
    release.set()
    await slow
    assert (await ask(app, PATH, [PAYLOAD, b" "])).status == 202


CODINGS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip by another name": ("X-GZIP", gzip.compress),
    "gzip in members": ("gzip", lambda data: gzip.compress(data[:7]) + gzip.compress(b"") + gzip.compress(data[7:])),
    "zstd": ("zstd", zstd),
    "zstd of unknown size": ("ZSTD", lambda data: zstd(data, sized=False)),
    "zstd in frames": ("zstd", lambda data: zstd(data[:7]) + zstd(b"", sized=False) + zstd(data[7:])),
    "identity": ("identity", bytes),
    "nothing": ("", bytes),
}


@pytest.mark.parametrize("name", CODINGS)
async def test_a_coded_body_is_the_body(name: str) -> None:
    coding, encode = CODINGS[name]
    publisher = Publisher()
    answer = await ask(make_app(publisher), PATH, encode(PAYLOAD), content_encoding=coding)
    assert answer.status == 202
    assert PAYLOAD in publisher.published[0].body


@pytest.mark.parametrize("name", [name for name in CODINGS if name not in {"identity", "nothing"}])
@given(data=st.data())
def test_a_coded_body_that_is_cut_off_or_corrupt_is_400(name: str, data: st.DataObject) -> None:
    """Cut off anywhere but between two members, where what is left is no JSON."""
    coding, encode = CODINGS[name]
    coded = encode(PAYLOAD)
    cut = coded[: data.draw(st.integers(0, len(coded) - 1))]
    answer = asyncio.run(ask(make_app(Publisher()), PATH, cut, content_encoding=coding))
    assert answer.status == 400
    if "in" not in name.split():
        assert (answer.told["reason"], answer.told["field"]) == ("invalid_encoding", "Content-Encoding")
    garbage = coded + data.draw(st.binary(min_size=1, max_size=20))
    assert asyncio.run(ask(make_app(Publisher()), PATH, garbage, content_encoding=coding)).status == 400


@pytest.mark.parametrize("coding", ["br", "deflate", "gzip, gzip", "compress", "gzip;q=1"])
async def test_an_unknown_coding_is_415_and_told_which_are_known(coding: str) -> None:
    answer = await ask(make_app(Publisher()), PATH, PAYLOAD, content_encoding=coding)
    assert (answer.status, answer.told["field"]) == (415, "Content-Encoding")
    assert answer.headers["accept-encoding"] == "gzip, zstd"


@pytest.mark.parametrize("coding", ["gzip", "zstd", "zstd that lies", "zstd of unknown size"])
async def test_a_bomb_costs_no_memory(coding: str) -> None:
    """50 MB in some KB: refused, and never in memory."""
    content = bytes(50_000_000)
    if coding == "gzip":
        bomb = zlib.compressobj(9, wbits=31)
        body = bomb.compress(content) + bomb.flush()
    else:
        body = zstd(content, sized="unknown" not in coding)
    if "lies" in coding:
        size = body.index(len(content).to_bytes(4, "little"))
        body = body[:size] + (10).to_bytes(4, "little") + body[size + 4 :]
    del content
    app = make_app(Publisher())
    tracemalloc.start()
    answer = await ask(app, PATH, body, content_encoding=coding.split(maxsplit=1)[0])
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert answer.status == (400 if "lies" in coding else 413)
    assert most < 1_000_000


@pytest.mark.parametrize(
    ("coding", "empty"), [("gzip", gzip.compress(b"", mtime=0)), ("zstd", zstd(b""))], ids=["gzip", "zstd"]
)
async def test_a_body_of_nothing_but_members_is_refused(coding: str, empty: bytes) -> None:
    answer = await ask(make_app(Publisher()), PATH, empty * (MEMBERS_MAX + 1), content_encoding=coding)
    assert (answer.status, answer.told["reason"]) == (400, "invalid_encoding")


async def test_a_device_beyond_its_rate_is_429_and_others_are_served() -> None:
    app = make_app(Publisher(), limits=RateLimits(device=Rate(0.5, 3), tenant=Rate(0, 1)))
    statuses = [(await ask(app, PATH, PAYLOAD)).status for _ in range(300)]
    answer = await ask(app, PATH, PAYLOAD)
    assert statuses[:3] == [202] * 3
    assert set(statuses[3:]) == {429}
    assert (answer.told["limit"], answer.told["limit_value"], answer.told["reason"]) == (
        "device_messages_per_s", 0.5, "rate_limited",
    )  # fmt: skip
    assert answer.headers["retry-after"] == "2"
    assert (await ask(app, PATH.replace("t-1", "t-2"), PAYLOAD)).status == 202


async def test_a_tenant_beyond_its_rate_is_429_and_others_are_served() -> None:
    app = make_app(Publisher(), limits=RateLimits(device=Rate(0, 1), tenant=Rate(0.01, 10)))
    statuses = [(await ask(app, PATH.replace("t-1", f"t-{n}"), PAYLOAD)).status for n in range(100)]
    assert statuses == [202] * 10 + [429] * 90
    assert (await ask(app, PATH.replace("acme", "beta"), PAYLOAD)).status == 202


@pytest.mark.parametrize("kind", [Outage, Overloaded])
@pytest.mark.parametrize("path", [PATH, BATCH])
async def test_while_jetstream_is_away_it_is_503_and_told_when_to_come_again(kind: type[Outage], path: str) -> None:
    publisher = Publisher()
    publisher.raises = lambda: kind("nats", "secret", retry_after_s=3)
    body = PAYLOAD if path == PATH else batch([row(), row()])
    answer = await ask(make_app(publisher), path, body)
    assert (answer.status, answer.headers["retry-after"]) == (503, "3")
    assert b"secret" not in answer.body
    publisher.raises = None
    assert (await ask(make_app(publisher), path, body)).status == 202


async def test_before_the_devices_are_read_it_is_503() -> None:
    registry = Registry()
    registry.ready = False
    assert (await ask(make_app(Publisher(), registry=registry), PATH, PAYLOAD)).status == 503


def row(n: int = 0, **changes: Any) -> Row:
    return {"tenant_id": "acme", "device_id": "t-1", "payload": {"metrics": {"n": n}}} | changes


def batch(rows: list[Row], **more: Any) -> bytes:
    return json.dumps({"messages": rows, **more}).encode()


def ndjson(rows: list[Row]) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


async def test_a_batch_answers_each_row_with_its_own_sequence() -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), BATCH, batch([row(n) for n in range(3)]))
    assert answer.status == 202
    assert (answer.told["accepted"], answer.told["rejected"]) == (3, 0)
    assert answer.told["results"][2] == {
        "index": 2, "status": 202, "stream": "TELEMETRY", "seq": 3, "durability": "disk", "duplicate": False,
    }  # fmt: skip
    assert [b'"n": %d' % n in publisher.published[n].body for n in range(3)] == [True] * 3


async def test_five_bad_rows_of_a_hundred_refuse_only_themselves() -> None:
    rows = [row(n) for n in range(100)]
    bad: dict[int, tuple[Row, int, str, str]] = {
        3: (row(payload={"metrics": {"a": None}}), 422, "invalid_payload", "payload.metrics.a"),
        17: (row(device_id="a.b"), 422, "invalid_identity", "device_id"),
        40: (row(token="wrong"), 401, "unauthenticated", ""),
        41: (row(payload={"metrics": {"a": 1}, "ts": 0}), 422, "timestamp_out_of_range", "payload.ts"),
        99: (row(idempotency_key="a b"), 422, "invalid_payload", "idempotency_key"),
    }
    for index, (wrong, *_) in bad.items():
        rows[index] = wrong
    publisher = Publisher()
    for body, media_type in ((batch(rows), "application/json"), (ndjson(rows), "application/x-ndjson")):
        publisher.published.clear()
        answer = await ask(make_app(publisher), BATCH, body, content_type=media_type)
        assert answer.status == 207
        assert (answer.told["accepted"], answer.told["rejected"], len(publisher.published)) == (95, 5, 95)
        assert [result["index"] for result in answer.told["results"]] == list(range(100))
        refused = {
            result["index"]: (result["status"], result["reason"], result.get("field", ""))
            for result in answer.told["results"]
            if result["status"] != 202
        }
        assert refused == {index: tuple(expected) for index, (_, *expected) in bad.items()}


BAD_LINES: dict[bytes, tuple[int, str, str]] = {
    b'{"payload":{"metrics":{"a":NaN}}}': (400, "invalid_json", ""),
    b'{"payload":{"metrics":{"a":"\\ud800"}}}': (400, "invalid_json", ""),
    b'{"payload":{"metrics":{"a":"\xff"}}}': (400, "invalid_json", "payload"),
    b'{"payload":{"metrics":{"a":' + b"[" * 10_000 + b"]" * 10_000 + b"}}}": (400, "invalid_json", ""),
    b"[" * 10_000: (422, "invalid_payload", ""),
    b'{"payload":{"metrics":{"a":1,"a":2}}}': (422, "invalid_payload", "payload"),
    b'{"payload":{"metrics":{"a":1}},"payload":{"metrics":{"a":1}}}': (422, "invalid_payload", ""),
    b'{"payload":"token"}': (422, "invalid_payload", "payload"),
    b'{"token":"token","payload":"token","token":"token"}': (422, "invalid_payload", "payload"),
    b'{"device_id":"t-1","device_id":"t-1","payload":{"metrics":{"a":1}}}': (422, "invalid_payload", ""),
    b'{"payload":{"metrics":{"a":1}},"extra":1}': (422, "invalid_payload", "extra"),
    b'{"payload":{"metrics":{"a":1}},"msg_type":"shadow"}': (422, "invalid_payload", "payload.metrics"),
    b'{"payload":{"commandId":"c-1"},"msg_type":"commands-sent"}': (422, "invalid_payload", "msg_type"),
    b'{"payload":{"metrics":{"a":1}},"device_id":7}': (422, "invalid_payload", "device_id"),
    b"{}": (400, "invalid_json", "payload"),
    b"7": (422, "invalid_payload", ""),
}


async def test_in_ndjson_a_line_that_is_no_json_refuses_only_itself() -> None:
    good = b'{"tenant_id":"acme","device_id":"t-1","payload":{"metrics":{"a":1}}}'
    lines = [good]
    for bad in BAD_LINES:
        lines += [bad.replace(b"{", b'{"tenant_id":"acme",', 1) if b"{" in bad else bad, good]
    lines = [line.replace(b'"acme",', b'"acme","device_id":"t-1",', 1) if b'"device_id"' not in line else line
             for line in lines]  # fmt: skip
    lines = [line.replace(b",}", b"}") for line in lines]
    publisher = Publisher()
    answer = await ask(
        make_app(publisher), BATCH, b"\r\n\n".join(lines), content_type="application/x-ndjson; charset=utf-8"
    )
    assert answer.status == 207
    results = answer.told["results"]
    assert [result["status"] for result in results[::2]] == [202] * (len(BAD_LINES) + 1)
    refused = [(result["status"], result["reason"], result.get("field", "")) for result in results[1::2]]
    assert refused == list(BAD_LINES.values())
    assert len(publisher.published) == len(BAD_LINES) + 1


GOOD = b'{"tenant_id":"acme","device_id":"t-1","messages":[{"payload":{"metrics":{"a":1}}}]}'


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"", 400, ""),
        (b'{"messages":[{"payload":NaN}]}', 400, ""),
        (b'{"messages":[' + b"[" * 10_000 + b"]" * 10_000 + b"]}", 400, ""),
        (b"[" * 10_000, 422, ""),
        (b"{}", 422, "messages"),
        (b'{"messages":[]}', 422, "messages"),
        (b'{"messages":{}}', 422, "messages"),
        (b'{"messages":[],"more":1}', 422, "more"),
        (b'{"messages":[{"payload":1}],"tenant_id":7}', 422, "tenant_id"),
        (b'{"messages":[{"payload":{"metrics":{"a":1}}}],"messages":[{"payload":1}]}', 422, ""),
        (GOOD.replace(b'"messages":', b'"messages":[{"payload":1}],"messages":'), 422, ""),
        (GOOD.replace(b'"messages":', b'"device_id":"t-1","messages":'), 422, ""),
    ],
)
async def test_a_batch_that_is_none_is_refused_whole(body: bytes, status: int, field: str) -> None:
    publisher = Publisher()
    answer = await ask(make_app(publisher), BATCH, body)
    assert (answer.status, answer.told.get("field", "")) == (status, field)
    assert "results" not in answer.told
    assert publisher.published == []
    assert (await ask(make_app(publisher), BATCH, GOOD)).status == 202


async def test_rows_that_are_all_refused_alike_give_the_request_their_status() -> None:
    limits = RateLimits(device=Rate(0.25, 1), tenant=Rate(0, 1))
    app = make_app(Publisher(), limits=limits)
    first = await ask(app, BATCH, batch([row(), row()]))
    assert (first.status, first.headers["retry-after"]) == (207, "4")
    again = await ask(app, BATCH, batch([row(), row()]))
    assert (again.status, again.told["status"], again.headers["retry-after"]) == (429, 429, "4")
    assert [result["index"] for result in again.told["results"]] == [0, 1]
    assert again.headers["content-type"] == "application/problem+json"
    wrong = await ask(app, BATCH, batch([row(), row()]), token="wrong")
    assert (wrong.status, wrong.headers["www-authenticate"]) == (401, 'Bearer realm="pulse"')


async def test_each_row_speaks_by_its_own_token_or_else_by_the_requests() -> None:
    app = make_app(Publisher())
    rows = [row(), row(token="wrong"), row(token=TOKEN)]
    answer = await ask(app, BATCH, batch(rows))
    assert [result["status"] for result in answer.told["results"]] == [202, 401, 202]
    answer = await ask(app, BATCH, batch(rows), token=None)
    assert [result["status"] for result in answer.told["results"]] == [401, 401, 202]


async def test_a_backlog_names_its_device_once() -> None:
    publisher = Publisher()
    rows: list[Row] = [{"payload": {"metrics": {"a": 1}}}, {"msg_type": "heartbeat"}, {"device_id": "t-2"} | row()]
    answer = await ask(make_app(publisher), BATCH, batch(rows, tenant_id="acme", device_id="t-9"))
    assert answer.status == 202
    assert [b'"device_id":"t-9"' in each.body for each in publisher.published] == [True, True, False]


async def test_a_batch_sent_again_is_the_same_messages() -> None:
    """By the request's key and the row's index, by the row's own key, by seq; without any of them it is new."""
    rows = [row(1), row(1), row(2, idempotency_key="mine")]
    app = make_app(Publisher())
    first, again, other = [
        (await ask(app, BATCH, batch(rows), idempotency_key=key)).told["results"] for key in ("b-1", "b-1", "b-2")
    ]
    assert [result["duplicate"] for result in first] == [False] * 3
    assert [(result["duplicate"], result["seq"]) for result in again] == [(True, result["seq"]) for result in first]
    assert [result["duplicate"] for result in other] == [False, False, True]


async def test_a_batch_has_bounds_of_its_own() -> None:
    app = make_app(Publisher(), batch_rows_max=3, batch_body_bytes_max=1000, body_bytes_max=40)
    many = await ask(app, BATCH, batch([row()] * 4))
    assert (many.status, many.told["limit"], many.told["limit_value"]) == (413, "batch_rows_max", 3)
    lines = await ask(app, BATCH, b"\n" * 7, content_type="application/x-ndjson")
    assert (lines.status, lines.told["limit"]) == (413, "batch_rows_max")
    large = await ask(app, BATCH, batch([row()]).ljust(1001))
    assert (large.status, large.told["limit"]) == (413, "batch_body_bytes_max")
    wide = await ask(app, BATCH, batch([row(), row(payload={"metrics": {"a": "x" * 40}})]))
    assert wide.told["results"][1]["limit"] == "body_bytes_max"
    assert [result["status"] for result in wide.told["results"]] == [202, 413]


async def test_what_is_refused_and_received_is_counted() -> None:
    registry = CollectorRegistry()
    app = make_app(Publisher(), metrics=registry)
    await ask(app, PATH, PAYLOAD)
    await ask(app, PATH, b"{")
    await ask(app, BATCH, (body := batch([row(), row(token="wrong")])))
    exposed = generate_latest(registry).decode()
    for line in (
        f"pulse_gateway_body_bytes_total {len(PAYLOAD) + 1 + len(body):.1f}",
        "pulse_gateway_batch_rows_total 2.0",
        'pulse_gateway_refused_total{reason="invalid_json"} 1.0',
        'pulse_gateway_refused_total{reason="unauthenticated"} 1.0',
        'pulse_gateway_refused_total{reason="unavailable"} 0.0',
        'pulse_gateway_requests_total{kind="batch",status="207"} 1.0',
    ):
        assert line in exposed


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
near_payloads = st.fixed_dictionaries(
    {"metrics": st.dictionaries(st.text(), json_values, max_size=4) | json_values},
    optional={"ts": json_values, "seq": json_values, "site_id": json_values, "other": json_values},
)
near_rows = st.fixed_dictionaries(
    {"payload": near_payloads | json_values},
    optional={
        name: json_values | st.sampled_from(["acme", "t-1", "telemetry", "heartbeat", TOKEN])
        for name in ("tenant_id", "device_id", "token", "msg_type", "idempotency_key", "other")
    },
)
bodies = st.binary(max_size=200) | near_payloads.map(json.dumps).map(str.encode)
batches = (
    st.binary(max_size=200)
    | st.lists(near_rows, max_size=5).map(lambda rows: json.dumps({"messages": rows}).encode())
    | st.lists(near_rows.map(json.dumps), max_size=5).map("\n".join).map(str.encode)
)


def is_expected(answer: Answer) -> bool:
    """Never a 5xx, and every refusal says why."""
    return answer.status in {202, 207} or (400 <= answer.status < 500 and bool(answer.told["detail"]))


@given(bodies, st.sampled_from(["", "gzip", "zstd"]))
def test_no_body_does_worse_than_a_refusal(body: bytes, coding: str) -> None:
    for path in (PATH, PATH.replace("telemetry", "heartbeat")):
        answer = asyncio.run(ask(make_app(Publisher()), path, body, content_encoding=coding))
        assert is_expected(answer), answer


@given(batches, st.sampled_from(["application/json", "application/x-ndjson"]))
def test_no_batch_does_worse_than_a_refusal(body: bytes, media_type: str) -> None:
    answer = asyncio.run(ask(make_app(Publisher()), BATCH, body, content_type=media_type))
    assert is_expected(answer), answer
    for result in answer.told.get("results", []):
        assert result["status"] == 202 or (400 <= result["status"] < 500 and result["detail"])


@given(st.text(), st.text(), st.text())
def test_no_ids_do_worse_than_a_refusal(tenant_id: str, device_id: str, key: str) -> None:
    path = f"/ingest/v1/tenant/{quote(tenant_id)}/device/{quote(device_id)}/telemetry"
    header = quote(key, safe=" %/;,")
    answer = asyncio.run(ask(make_app(Publisher(), limits=NO_LIMITS), path, PAYLOAD, idempotency_key=header))
    assert answer.status in {401, 404, 422}


async def test_a_request_that_ends_in_a_bug_is_no_longer_pending() -> None:
    class Broken(Publisher):
        def submit(self, subject: str, body: bytes, *, message_id: str) -> asyncio.Future[Receipt]:
            raise RuntimeError("a bug")

    metrics = CollectorRegistry()
    with pytest.raises(RuntimeError, match="a bug"):
        await ask(make_app(Broken(), metrics=metrics), PATH, PAYLOAD)
    assert metrics.get_sample_value("pulse_gateway_pending") == 0


async def test_a_request_whose_answer_cannot_be_written_is_counted_out_once() -> None:
    def respond(status: int, headers: Sequence[Header], body: bytes) -> None:
        raise RuntimeError("a bug")

    metrics = CollectorRegistry()
    app = make_app(Publisher(), metrics=metrics)
    match = SINGLE.fullmatch(PATH.encode())
    assert match is not None
    with pytest.raises(RuntimeError, match="a bug"):
        app.direct(match, [(b"authorization", f"Bearer {TOKEN}".encode())], PAYLOAD, respond)
    assert metrics.get_sample_value("pulse_gateway_pending") == 0

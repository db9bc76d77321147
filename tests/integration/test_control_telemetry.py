"""The control API on telemetry: rows in pages, buckets, CSV, the newest row."""

from __future__ import annotations

import csv
import json
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from control_api import NOW, Api, control_api
from pulse.adapters.embedded.nats_server import NatsServer
from pulse.adapters.postgres.device_state import write_states
from pulse.adapters.postgres.pool import transaction
from pulse.domain.device_state import DeviceState, Value
from pulse.domain.presence import PRESENCE_AFTER
from pulse.domain.telemetry import EPOCH
from storage import ON_BOTH

pytestmark = ON_BOTH

PATH = "/tenants/acme/devices/boiler/telemetry"
RANGE = {"from": NOW.isoformat(), "to": (NOW + timedelta(hours=1)).isoformat()}


@pytest.fixture
async def api(database: str, nats: NatsServer) -> AsyncIterator[Api]:
    async with control_api(database, nats) as made:
        yield made


def instant(text: str) -> datetime:
    return datetime.fromisoformat(text)


async def ask(api: Api, **parameters: object) -> Any:
    answer = await api.get(PATH, params={**RANGE, **parameters}, key=api.acme)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def buckets(api: Api, **parameters: object) -> Mapping[str, Any]:
    """Minutes since NOW to the bucket's metrics."""
    found = (await ask(api, bucket="10m", **parameters))["buckets"]
    return {f"{(instant(each['ts']) - NOW).seconds // 60}": each["metrics"] for each in found}


@pytest.mark.parametrize("order", ["asc", "desc"])
async def test_pages_have_every_row_once_in_order_though_many_share_an_instant(api: Api, order: str) -> None:
    # three rows of each instant, over midnight, so over two partitions
    start = datetime(2026, 3, 1, 23, 59, 58, tzinfo=UTC)
    await api.store([(start + timedelta(seconds=number // 3), {"n": number}) for number in range(20)])
    parameters = {"from": start.isoformat(), "to": (start + timedelta(minutes=1)).isoformat(), "order": order}
    seen: list[int] = []
    cursor = None
    while True:
        page = (await api.get(PATH, params={**parameters, "limit": 7, **({"cursor": cursor} if cursor else {})})).json()
        assert len(page["readings"]) <= 7
        seen += [row["metrics"]["n"] for row in page["readings"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == (list(range(20)) if order == "asc" else list(range(19, -1, -1)))


async def test_the_range_begins_with_from_and_ends_before_to(api: Api) -> None:
    await api.store([(NOW + timedelta(minutes=minute), {"n": minute}) for minute in (-1, 0, 59, 60)])
    assert [row["metrics"]["n"] for row in (await ask(api))["readings"]] == [0, 59]
    epoch = NOW.timestamp()
    for since, until in ((epoch, epoch + 3600), (int(epoch * 1000), int((epoch + 3600) * 1000))):
        found = (await ask(api, **{"from": since, "to": until}))["readings"]
        assert [row["metrics"]["n"] for row in found] == [0, 59]
    # an offset whose plus was not percent-encoded
    plus = await api.get(f"{PATH}?from=2026-03-01T14:00:00+02:00&to=2026-03-01T15:00:00+02:00")
    assert [row["metrics"]["n"] for row in plus.json()["readings"]] == [0, 59]


async def test_named_metrics_alone_come_and_rows_without_any_do_not(api: Api) -> None:
    await api.store([(NOW, {"a": 1, "b": 2}), (NOW, {"b": 3}), (NOW, {"c": 4})])
    assert [row["metrics"] for row in (await ask(api, metrics="a"))["readings"]] == [{"a": 1}]
    assert [row["metrics"] for row in (await ask(api, metrics="a,b"))["readings"]] == [{"a": 1, "b": 2}, {"b": 3}]
    assert [row["metrics"] for row in (await ask(api, metrics=["a", "c"]))["readings"]] == [{"a": 1}, {"c": 4}]


async def test_no_number_loses_a_digit(api: Api) -> None:
    await api.store([(NOW, {"large": 2**63 - 1, "small": 0.1, "text": 'a"b\u00e9', "yes": True})])
    answer = await api.get(PATH, params=RANGE)
    assert '"large": 9223372036854775807' in answer.text
    assert json.loads(answer.text)["readings"][0]["metrics"] == {
        "large": 2**63 - 1, "small": 0.1, "text": 'a"bé', "yes": True,
    }  # fmt: skip


async def test_buckets_aggregate_the_numbers_of_their_time(api: Api) -> None:
    rows = [(0, 1.0), (5, 4), (9, 1), (10, 10), (35, -1)]
    await api.store([(NOW + timedelta(minutes=minute), {"t": value, "x": "text"}) for minute, value in rows])
    for aggregate, expected in (
        ("avg", {"0": 2.0, "10": 10.0, "30": -1.0}),
        ("min", {"0": 1.0, "10": 10.0, "30": -1.0}),
        ("max", {"0": 4.0, "10": 10.0, "30": -1.0}),
        ("sum", {"0": 6.0, "10": 10.0, "30": -1.0}),
        ("count", {"0": 3, "10": 1, "30": 1}),
        ("last", {"0": 1, "10": 10, "30": -1}),
    ):
        found = await buckets(api, aggregate=aggregate, metrics="t")
        assert {minute: metrics["t"] for minute, metrics in found.items()} == expected, aggregate
    assert (await buckets(api, aggregate="last"))["0"] == {"t": 1, "x": "text"}
    assert (await buckets(api, aggregate="count"))["0"] == {"t": 3, "x": 3}
    assert (await buckets(api))["0"] == {"t": 2.0}
    assert await buckets(api, metrics="x") == {}


async def test_a_sum_beyond_a_double_is_the_questions_fault_not_ours(api: Api) -> None:
    await api.store([(NOW, {"t": 1.7e308}), (NOW, {"t": 1.7e308})])
    answer = await api.get(PATH, params={**RANGE, "bucket": "1m", "aggregate": "sum"})
    assert (answer.status_code, answer.json()["field"]) == (422, "aggregate")


async def test_csv_has_all_rows_of_the_range_beyond_a_page(api: Api) -> None:
    await api.store([(NOW + timedelta(milliseconds=number), {"n": number, "s": "a,b\n"}) for number in range(5001)])
    answer = await api.get(PATH, params={**RANGE, "format": "csv", "metrics": "n,s,none"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="boiler.csv"'
    header, *rows = csv.reader(answer.text.splitlines(keepends=True))
    assert header == ["ts", "seq", "site_id", "position", "n", "s", "none"]
    assert [int(row[4]) for row in rows] == list(range(5001))
    assert rows[0] == ["2026-03-01T12:00:00Z", "", "", "1", "0", "a,b\n", ""]
    limited = await api.get(PATH, params={**RANGE, "format": "csv", "limit": 2, "order": "desc"})
    header, *rows = csv.reader(limited.text.splitlines())
    assert [json.loads(row[4])["n"] for row in rows] == [5000, 4999]
    short = {**RANGE, "to": (NOW + timedelta(minutes=1)).isoformat()}
    binned = await api.get(PATH, params={**short, "format": "csv", "bucket": "1s", "aggregate": "count"})
    assert binned.text.splitlines() == [
        "ts,n,s",
        *(f"2026-03-01T12:00:0{second}Z,1000,1000" for second in range(5)),
        "2026-03-01T12:00:05Z,1,1",
    ]


async def test_the_newest_row_and_when_the_device_was_last_heard_of(api: Api) -> None:
    path = "/tenants/acme/devices/boiler/latest"
    assert (await api.get(path)).json() == {"last_seen": None, "presence": "offline", "metrics": {}, "reading": None}
    await api.store([(NOW, {"n": 1}), (NOW + timedelta(days=3), {"n": 2}), (NOW + timedelta(days=2), {"n": 3})])
    async with transaction(api.pool) as database:
        await database.execute("INSERT INTO device_state VALUES ('acme', 'boiler', $1)", NOW)
    latest = (await api.get(path, key=api.acme)).json()
    assert latest["reading"]["metrics"] == {"n": 2}
    assert instant(latest["last_seen"]) == NOW
    assert (latest["presence"], latest["metrics"]) == ("offline", {}), "its state says no metrics yet"
    assert (await api.get("/tenants/acme/devices/nobody/latest")).status_code == 404


async def test_the_latest_value_of_each_metric_and_whether_the_device_is_there(api: Api) -> None:
    now_us = int(datetime.now(UTC).timestamp() * 1_000_000)
    state = DeviceState(now_us, {"n": Value(1.50, now_us, 7), "door": Value("open", now_us - 5_000_000, 3)})
    await write_states(api.pool, {("acme", "boiler"): state})
    path = "/tenants/acme/devices/boiler"
    latest = (await api.get(f"{path}/latest", key=api.acme)).json()
    assert latest["presence"] == "online"
    assert latest["metrics"]["n"]["value"] == 1.5
    assert latest["metrics"]["door"]["value"] == "open"
    assert instant(latest["metrics"]["n"]["ts"]) == EPOCH + timedelta(microseconds=now_us)
    (listed,) = [each for each in (await api.get("/tenants/acme/devices")).json()["devices"] if each["last_seen"]]
    assert (listed["device_id"], listed["presence"], instant(listed["last_seen"])) == (
        "boiler",
        "online",
        EPOCH + timedelta(microseconds=now_us),
    )
    for silent_s, presence in ((PRESENCE_AFTER.stale_s, "stale"), (PRESENCE_AFTER.offline_s, "offline")):
        async with transaction(api.pool) as database:
            await database.execute(
                "UPDATE device_state SET last_seen = now() - make_interval(secs => $1)", silent_s + 1
            )
        assert (await api.get(path, key=api.acme)).json()["presence"] == presence


async def test_a_device_without_rows_is_empty_and_one_that_is_not_there_is_404(api: Api) -> None:
    assert await ask(api) == {"readings": [], "next": None}
    assert (await ask(api, bucket="1h"))["buckets"] == []
    for more in ({}, {"bucket": "1h"}, {"format": "csv"}):
        missing = await api.get("/tenants/acme/devices/nobody/telemetry", params={**RANGE, **more})
        assert missing.status_code == 404


WRONG: tuple[tuple[dict[str, str], str], ...] = (
    ({"from": "yesterday"}, "from"),
    ({"from": "2026-01-01T00:00:00"}, "from"),
    ({"from": "2026-01-01"}, "from"),
    ({"from": "0001-01-01T00:00:00+14:00"}, "from"),
    ({"to": "9" * 17}, "to"),
    ({"to": "NaN"}, "to"),
    ({"from": RANGE["to"], "to": RANGE["from"]}, "from"),
    ({"from": RANGE["from"], "to": RANGE["from"]}, "from"),
    ({"from": "2024-01-01T00:00:00Z", "to": "2026-01-01T00:00:00Z"}, "from"),
    ({"bucket": "5"}, "bucket"),
    ({"bucket": "0m"}, "bucket"),
    ({"bucket": "1y"}, "bucket"),
    ({"bucket": "1s"}, "bucket"),
    ({"bucket": "-5m"}, "bucket"),
    ({"bucket": "٣m"}, "bucket"),
    ({"bucket": "5m", "cursor": "1_1"}, "cursor"),
    ({"bucket": "5m", "limit": "5"}, "limit"),
    ({"bucket": "5m", "order": "desc"}, "order"),
    ({"bucket": "5m", "aggregate": "median"}, "aggregate"),
    ({"aggregate": "avg"}, "bucket"),
    ({"limit": "0"}, "limit"),
    ({"limit": "10001"}, "limit"),
    ({"limit": "1e3"}, "limit"),
    ({"limit": "9" * 30}, "limit"),
    ({"cursor": "x"}, "cursor"),
    ({"cursor": "1_9999999999999999999"}, "cursor"),
    ({"cursor": "999999999999999999_1"}, "cursor"),
    ({"metrics": ""}, "metrics"),
    ({"metrics": "a,,b"}, "metrics"),
    ({"metrics": "a\0"}, "metrics"),
    ({"metrics": ",".join(map(str, range(51)))}, "metrics"),
    ({"order": "up"}, "order"),
    ({"format": "xml"}, "format"),
    ({"metric": "a"}, "metric"),
)


async def test_a_question_that_cannot_be_answered_is_told_which_word_is_wrong(api: Api) -> None:
    for parameters, field in WRONG:
        answer = await api.get(PATH, params={**RANGE, **parameters})
        assert (answer.status_code, answer.json().get("field")) == (422, field), (parameters, answer.text)


async def test_a_question_that_takes_too_long_is_refused_and_is_no_outage(database: str, nats: NatsServer) -> None:
    async with control_api(database, nats, query_s_max=0.001) as api:
        await api.store([(NOW + timedelta(milliseconds=number), {"n": number}) for number in range(20_000)])
        answer = await api.get(PATH, params={**RANGE, "bucket": "1m"})
        assert (answer.status_code, answer.json()["field"]) == (422, "from")

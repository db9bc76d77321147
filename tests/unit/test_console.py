"""What the console decides without a server: rates and health, sign-in attempts, room of streams, how values look."""

from __future__ import annotations

import hashlib
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest

from pulse.adapters.http.role_metrics import edge_of
from pulse.adapters.passwords import Argon2Passwords
from pulse.domain.account import Attempts, check_password, form_token, is_form_token
from pulse.domain.browse import readable
from pulse.domain.errors import Refusal
from pulse.domain.histogram import quantile
from pulse.domain.picture import picture
from pulse.domain.pipeline import Edge, Fleet, Health, Reading, StreamLevel, SystemState
from pulse.domain.stream_status import StreamStatus
from pulse.services.stream_room import room_of
from pulse.ui import assets, map, render
from pulse.ui.pages.device import POINTS, RANGES, bucket_width_s
from pulse.ui.security import path_within

UP = (SystemState(name="nats", ok=True, since=0.0), SystemState(name="postgresql", ok=True, since=0.0))
PG_DOWN = (UP[0], SystemState(name="postgresql", ok=False, since=7.0, detail="no connection"))
STATIC = Path(assets.__file__).parent / "static"


def level(last_seq: int, *, pending: int = 0, created: str = "a", pulls: int = 2, in_hand: int = 0) -> StreamLevel:
    return StreamLevel(
        name="TELEMETRY",
        created=created,
        messages=last_seq,
        bytes=last_seq * 100,
        bytes_max=1_000_000,
        last_seq=last_seq,
        oldest_age_s=1.0,
        consumer="ingest-workers",
        pending=pending,
        ack_pending=in_hand,
        waiting_pulls=pulls,
    )


def readings(*levels: StreamLevel, systems: tuple[SystemState, ...] = UP) -> list[Reading]:
    """One a second."""
    return [
        Reading(at_s=float(second), systems=systems, streams={"TELEMETRY": each}) for second, each in enumerate(levels)
    ]


def test_rates_are_of_the_last_seconds() -> None:
    drawn = picture(readings(*(level(1000 + 50 * second) for second in range(20))))
    assert drawn.stages["TELEMETRY"].rate == 50
    assert drawn.stages["ingest-workers"].rate == 50
    assert drawn.figures["rate"] == 50
    assert drawn.stages["ingest-workers"].health is Health.FLOWING


def test_one_reading_has_no_rate_and_a_stream_made_anew_none_before_the_second() -> None:
    assert picture(readings(level(5))).figures["rate"] is None
    drawn = picture(readings(level(5000), level(3, created="b")))
    assert drawn.stages["TELEMETRY"].rate is None


def test_a_worker_is_stuck_once_messages_wait_and_none_was_settled_for_long_enough() -> None:
    waiting = [level(1000 + 10 * second, pending=10 * second + 5) for second in range(12)]
    assert picture(readings(*waiting[:9])).stages["ingest-workers"].health is Health.FLOWING
    stuck = picture(readings(*waiting)).stages["ingest-workers"]
    assert stuck.health is Health.STUCK
    assert "115 messages wait" in stuck.why


def test_a_stuck_worker_says_that_it_waits_for_postgresql_where_that_is_away() -> None:
    waiting = [level(1000 + second, pending=second + 5) for second in range(12)]
    drawn = picture(readings(*waiting, systems=PG_DOWN))
    assert "waits for PostgreSQL" in drawn.stages["ingest-workers"].why
    assert drawn.stages["postgresql"].health is Health.DOWN


def test_a_worker_that_settles_something_is_not_stuck() -> None:
    moving = [level(1000 + 10 * second, pending=9 * second + 5) for second in range(12)]
    assert picture(readings(*moving)).stages["ingest-workers"].health is Health.FLOWING


def test_a_stage_that_nobody_works_on_is_absent_and_not_well() -> None:
    assert picture(readings(level(0, pulls=0))).stages["ingest-workers"].health is Health.ABSENT
    assert picture(readings(level(0, pulls=1))).stages["ingest-workers"].health is Health.QUIET


def test_what_cannot_be_read_is_unknown_and_never_zero() -> None:
    drawn = picture([Reading(at_s=1.0, systems=UP)])
    assert drawn.stages["http"].health is Health.UNKNOWN
    assert set(drawn.figures.values()) == {None}


def test_dead_letters_that_wait_are_a_warning() -> None:
    fleet = Fleet(online=1, stale=0, offline=0, dead_letters=3)
    stage = picture([Reading(at_s=1.0, systems=UP, fleet=fleet)]).stages["dead letters"]
    assert (stage.health, stage.messages) == (Health.WARNING, 3)


def test_routes_that_deliver_nothing_are_a_warning_at_their_destinations_with_what_was_delivered_and_waits() -> None:
    fleet = Fleet(online=1, stale=0, offline=0, dead_letters=0, routes=4, routes_failing=1)
    later = msgspec.structs.replace(level(90), name="LATER", messages=7)
    drawn = picture(
        [
            Reading(at_s=at_s, systems=UP, fleet=fleet, streams={"LATER": later}, edge=Edge(delivered=100 + int(at_s)))
            for at_s in (0.0, 5.0)
        ]
    )
    stage = drawn.stages["destinations"]
    assert (stage.health, stage.rate, stage.lag) == (Health.WARNING, 1.0, 7)
    assert stage.why == "1 of 4 routes deliver nothing now"
    assert picture([Reading(at_s=1.0, systems=UP)]).stages["destinations"].health is Health.UNKNOWN


def test_messages_are_counted_where_devices_say_them_and_not_again_as_jobs() -> None:
    streams = [
        {name: msgspec.structs.replace(level(count), name=name) for name in ("TELEMETRY", "ROUTES", "LATER")}
        for count in (0, 50)
    ]
    drawn = picture([Reading(at_s=5.0 * n, systems=UP, streams=each) for n, each in enumerate(streams)])
    assert drawn.figures["rate"] == 10


def test_the_roles_metrics_are_summed_and_absent_ones_are_none() -> None:
    gateway = (
        "# TYPE pulse_gateway_requests_total counter\n"
        'pulse_gateway_requests_total{kind="telemetry",status="202"} 40.0\n'
        'pulse_gateway_requests_total{kind="telemetry",status="401"} 7.0\n'
    )
    ingest = (
        'pulse_ingest_end_to_end_seconds_bucket{le="0.1"} 90.0\n'
        'pulse_ingest_end_to_end_seconds_bucket{le="+Inf"} 100.0\n'
    )
    delivery = (
        "# TYPE pulse_delivery_jobs_total counter\n"
        'pulse_delivery_jobs_total{outcome="delivered"} 12.0\n'
        'pulse_delivery_jobs_total{outcome="parked"} 90.0\n'
    )
    edge = edge_of([gateway, gateway, ingest, delivery])
    assert edge == Edge(http=80, mqtt=None, delivered=12, latency={0.1: 90, float("inf"): 100})


@pytest.mark.parametrize(
    ("cumulative", "wanted"),
    [
        ({0.1: 0, 1.0: 0}, None),
        ({}, None),
        ({0.1: 100, 1.0: 100}, 0.099),
        ({0.1: 50, 1.0: 100}, 0.982),
        ({0.1: 50, float("inf"): 100}, 0.1),
        ({0.1: -1, 1.0: 5}, None),
    ],
)
def test_a_quantile_lies_in_its_bucket(cumulative: dict[float, int], wanted: float | None) -> None:
    found = quantile(cumulative, 0.99)
    assert found == pytest.approx(wanted) if wanted is not None else found is None


def test_attempts_run_out_come_back_and_take_bounded_memory() -> None:
    attempts = Attempts(burst=3, drain_s=60, names_max=2)
    for _ in range(3):
        assert attempts.wait_s("a", 0.0) == 0.0
        attempts.failed("a", 0.0)
    assert attempts.wait_s("a", 0.0) == 60.0
    assert attempts.wait_s("a", 61.0) == 0.0
    attempts.failed("b", 0.0)
    attempts.failed("c", 0.0)
    assert attempts.wait_s("a", 0.0) == 0.0
    assert len(vars(attempts)["_fills"]) == 2
    attempts.forget("c")
    assert attempts.wait_s("c", 0.0) == 0.0


def test_a_form_token_belongs_to_its_secret() -> None:
    assert is_form_token(form_token("a" * 43), "a" * 43)
    assert not is_form_token(form_token("a" * 43), "b" * 43)
    assert not is_form_token("\ud800", "a" * 43)


@pytest.mark.parametrize("password", ["short", "x" * 300, "aaaaaaaaaaaaaa", "ada-and-something"])
def test_a_password_that_is_easy_to_guess_is_refused(password: str) -> None:
    with pytest.raises(Refusal):
        check_password(password, "ada")
    assert check_password("correct horse battery", "ada")


def test_a_password_is_verified_by_its_hash_alone_and_nobodys_never() -> None:
    passwords = Argon2Passwords()
    hashed = passwords.hash("correct horse battery")
    assert "correct" not in hashed
    assert passwords.verify(hashed, "correct horse battery")
    assert not passwords.verify(hashed, "wrong")
    assert not passwords.verify(None, "nobody's")
    assert not passwords.verify("no hash", "x")


def test_a_stream_that_fills_says_when_and_one_that_age_empties_does_not() -> None:
    def stream(age_s_max: float | None, *, keeps_acked: bool = True) -> StreamStatus:
        return StreamStatus(
            name="S", messages=1000, bytes=100_000, bytes_max=1_000_000, age_s_max=age_s_max, oldest_age_s=1.0,
            keeps_acked=keeps_acked, first_seq=1, last_seq=1000, deleted=0, replicas=1, created="", consumers=(),
        )  # fmt: skip

    assert room_of(stream(None), 10.0).full_in_s == pytest.approx(900)
    assert room_of(stream(3600.0), 10.0).full_in_s == pytest.approx(900)
    held = room_of(stream(60.0), 10.0)
    assert held.full_in_s is None
    assert held.steady_fill == pytest.approx(0.06)
    assert room_of(stream(None), None).full_in_s is None
    assert room_of(stream(None, keeps_acked=False), 10.0).full_in_s is None, "what comes says nothing of what stays"


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (render.rate(0.04), "0.0"),
        (render.rate(99.94), "99.9"),
        (render.rate(1204.4), "1,204"),
        (render.rate(None), "–"),
        (render.duration(0.0123), "12 ms"),
        (render.duration(4.21), "4.2 s"),
        (render.duration(7200), "2 h"),
        (render.duration(200_000), "2 d"),
        (render.size(512), "512 B"),
        (render.size(1536), "1.5 KB"),
        (render.size(2**30), "1 GB"),
        (render.percent(0.421), "42 %"),
    ],
)
def test_values_are_short_and_have_units(shown: str, wanted: str) -> None:
    assert shown == wanted


def test_a_time_is_shown_with_utc_on_hover() -> None:
    shown = render.instant(datetime(2026, 3, 1, 12, tzinfo=UTC))
    assert 'datetime="2026-03-01T12:00:00.000Z"' in shown
    assert 'title="2026-03-01 12:00:00 UTC"' in shown


@pytest.mark.parametrize("seconds", [60, 61, *(seconds for _, seconds in RANGES), 366 * 86_400])
def test_a_chart_never_asks_for_more_than_it_has_room_for(seconds: int) -> None:
    assert seconds / bucket_width_s(seconds) <= POINTS


@pytest.mark.parametrize("target", ["", "x", "//x", "/\\x", "https://x", "/a\nb", "/a\\b"])
def test_a_path_that_leads_away_is_the_home_page(target: str) -> None:
    assert path_within(target) == "/"
    assert path_within("/devices?text=a") == "/devices?text=a"


def test_a_body_is_readable_whatever_it_is() -> None:
    assert readable(b'{"a":1}', pretty=True) == '{\n  "a": 1\n}'
    assert readable(b"\xff\x00", pretty=True) == "\\xff\x00"
    assert readable(b"x" * 70_000, pretty=False).endswith("bytes more)")


def test_nothing_of_the_map_lies_outside_it() -> None:
    for node in map.NODES:
        assert node.x >= 0
        assert node.y >= 0
        assert node.x + node.width <= map.WIDTH
        assert node.y + node.height <= map.HEIGHT


def test_a_library_that_is_missing_or_another_one_is_not_served(tmp_path: Path) -> None:
    assert assets.Assets(tmp_path).missing == [each.name for each in assets.library_files()]
    for each in assets.library_files():
        place = tmp_path / each.path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"something else")
    made = assets.Assets(tmp_path)
    assert made.missing == [each.name for each in assets.library_files()]
    assert made.address("htmx.min.js") == ""


def test_an_asset_is_named_by_its_content_and_compressed(tmp_path: Path) -> None:
    shutil.copytree(STATIC, tmp_path / "static")
    made = assets.Assets(tmp_path)
    address = made.address("console.css")
    assert re.fullmatch(r"/static/console\.[A-Za-z0-9_-]{12}\.css", address)
    asset = made.by_address[address]
    assert asset.body == (STATIC / "console.css").read_bytes()
    assert asset.compressed is not None
    assert len(asset.compressed) < len(asset.body) / 2


def test_the_hashes_of_the_libraries_are_whole() -> None:
    for each in assets.library_files():
        assert len(bytes.fromhex(each.sha512)) == hashlib.sha512().digest_size


def test_no_template_or_script_of_ours_has_inline_script_or_style() -> None:
    for path in (STATIC.parent / "templates").iterdir():
        text = path.read_text("utf-8")
        assert not re.search(r"<style|\sstyle=|\son[a-z]+=|javascript:|hx-on", text), path.name
        assert not re.search(r"<script(?![^>]*\ssrc=)", text), path.name
        assert "| safe" not in text, path.name

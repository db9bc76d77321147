"""`/devices/{tenant}/{device}`: one device, its charts, shadow, commands, latest values and what it says now."""

from __future__ import annotations

import secrets
from datetime import timedelta
from typing import Annotated, NamedTuple

import msgspec
from fastapi import APIRouter, Query, Request, Response
from starlette.responses import JSONResponse

from pulse.domain.command_documents import document
from pulse.domain.errors import Reason, Refusal
from pulse.domain.identity import ID_PATTERN
from pulse.domain.labels import check_name
from pulse.domain.query import Aggregate, BucketQuery, Question, parse_question
from pulse.domain.registry import device_key, tenant_key
from pulse.domain.shadow import Shadow, ShadowKey
from pulse.services.console import Console
from pulse.services.control import Reach
from pulse.services.device_watch import COMMANDS_SHOWN, mark_of
from pulse.ui.pages.devices import show_token
from pulse.ui.parameters import DeviceId, TenantId
from pulse.ui.render import page
from pulse.ui.security import read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

POINTS = 600
"""Of one chart, at most: more than its pixels say nothing."""
WIDTHS_S = (1, 2, 5, 10, 15, 30, 60, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400, 604_800)
RANGES = (
    ("15m", 900),
    ("1h", 3600),
    ("6h", 21_600),
    ("24h", 86_400),
    ("7d", 604_800),
    ("30d", 2_592_000),
    ("1y", 31_536_000),
)
RANGE = "1h"
OVERLAP_S = 86_400
METRICS_MAX = 24
"""Charts on one page; the rest is in the table of latest values, each with a link to its own."""

ShadowName = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$")]

router = APIRouter(prefix="/devices/{tenant_id}/{device_id}")


class Parts(NamedTuple):
    """The shadow of that name, the newest commands, and the mark of both."""

    shadow: Shadow
    shadow_name: str
    commands: list[dict[str, object]]
    mark: str


@router.get("")
async def show(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheVisitor,
    tenant_id: TenantId,
    device_id: DeviceId,
    shadow: ShadowName = "",
    range_: Annotated[str, Query(alias="range", max_length=8)] = RANGE,
    done: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """The device; its charts are asked for by the page itself."""
    reach = visitor.caller.reading(tenant_id)
    device = await reach.identities.device(tenant_id, device_id)
    latest = await reach.telemetry.latest(tenant_id, device_id)
    values = {name: (each.ts, msgspec.json.decode(each.value)) for name, each in sorted(latest.metrics.items())}
    numeric = [name for name, (_, value) in values.items() if isinstance(value, int | float)]
    return page(
        request,
        "device.html",
        visitor=visitor,
        name="devices",
        device=device,
        latest=latest,
        values=values,
        charted=[name for name in numeric if not isinstance(values[name][1], bool)][:METRICS_MAX],
        ranges=RANGES,
        chosen=range_ if range_ in dict(RANGES) else RANGE,
        done=done,
        names=await reach.shadows.names(tenant_id, device_id),
        ttl_s=console.command.command_ttl_s,
        ttl_s_max=console.command.command_ttl_s_max,
        once=secrets.token_urlsafe(12),
        parts=await parts_of(reach, ShadowKey(tenant_id, device_id, shadow)),
    )


@router.get("/parts")
async def parts(
    *, request: Request, visitor: TheVisitor, tenant_id: TenantId, device_id: DeviceId, shadow: ShadowName = ""
) -> Response:
    """What of the page moves with the shadow and the commands."""
    reach = visitor.caller.reading(tenant_id)
    device = await reach.identities.device(tenant_id, device_id)
    shown = await parts_of(reach, ShadowKey(tenant_id, device_id, shadow))
    return page(request, "device_parts.html", visitor=visitor, device=device, parts=shown)


async def parts_of(reach: Reach, key: ShadowKey) -> Parts:
    """As they are now."""
    shadow = await reach.shadows.shadow(key)
    commands = await reach.commands.commands(key.tenant_id, device_id=key.device_id, limit=COMMANDS_SHOWN)
    return Parts(shadow, key.name, [document(command) for command in commands], mark_of(shadow, commands))


@router.get("/series")
async def series(
    *,
    console: TheConsole,
    visitor: TheVisitor,
    tenant_id: TenantId,
    device_id: DeviceId,
    metric: Annotated[list[str], Query(max_length=METRICS_MAX)],
    since: Annotated[str, Query(alias="from")] = "",
    until: Annotated[str, Query(alias="to")] = "",
) -> Response:
    """Averages of some metrics, in as many buckets as a chart has room for: `{bucket_s, ts, series: {name: […]}}`."""
    telemetry = visitor.caller.reading(tenant_id).telemetry
    query = bucket_query(console, since, until, metric)
    buckets = await telemetry.buckets(tenant_id, device_id, query)
    first, width = int(query.since.timestamp()) // query.bucket_s * query.bucket_s, query.bucket_s
    times = list(range(first, int(query.until.timestamp()) + 1, width))
    by_time = {int(bucket.ts.timestamp()): bucket.metrics for bucket in buckets}
    return JSONResponse(
        {
            "bucket_s": width,
            "ts": times,
            "series": {
                name: [
                    None if (found := by_time.get(at, {}).get(name)) is None else msgspec.json.decode(found)
                    for at in times
                ]
                for name in metric
            },
        }
    )


@router.post("/change")
async def change(
    *, request: Request, console: TheConsole, visitor: TheVisitor, tenant_id: TenantId, device_id: DeviceId
) -> Response:
    """Rename, enable, disable, or give another token."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    action, changing = form["action"], visitor.caller.changing
    if action == "rename":
        reach = changing(tenant_id, "device.change", device_id, name=form["name"])
        await reach.identities.update_device(tenant_id, device_id, name=check_name(form["name"]), attributes={})
        return redirect(f"/devices/{tenant_id}/{device_id}")
    if action in ("enable", "disable"):
        reach = changing(tenant_id, f"device.{action}", device_id)
        await reach.identities.set_device_enabled(tenant_id, device_id, action == "enable")
        await _tell_edge(console, tenant_id, device_id)
        return redirect(f"/devices/{tenant_id}/{device_id}")
    if action != "rotate":
        raise Refusal(Reason.INVALID_REQUEST, "there is no such action", field="action")
    overlap_s = OVERLAP_S if form["overlap"] == "day" else 0
    reach = changing(tenant_id, "device.rotate", device_id, overlap_s=overlap_s)
    token = await reach.identities.rotate_token(tenant_id, device_id, overlap_s=overlap_s)
    projected = await _tell_edge(console, tenant_id, device_id)
    return show_token(
        request, console, visitor, tenant_id=tenant_id, device_id=device_id, token=token, projected=projected
    )


async def _tell_edge(console: Console, tenant_id: str, device_id: str) -> bool:
    return await console.control.tell_edge([tenant_key(tenant_id), device_key(tenant_id, device_id)])


def bucket_query(console: Console, since: str, until: str, metrics: list[str]) -> BucketQuery:
    """The question behind a chart from `since` to `until` (default: the last hour). Raises Refusal."""
    now = console.control.clock()
    from_default = (now - timedelta(hours=1)).isoformat()
    question = Question(
        since=since or from_default,
        until=until or None,
        metrics=[name for name in metrics if "," not in name],
        bucket="1s",
        aggregate=Aggregate.AVG,
    )
    unlimited = msgspec.structs.replace(console.query, buckets_max=2**62)
    query = parse_question(question, now=now, bounds=unlimited)
    assert isinstance(query, BucketQuery)
    return msgspec.structs.replace(query, bucket_s=bucket_width_s((query.until - query.since).total_seconds()))


def bucket_width_s(range_s: float) -> int:
    """The narrowest of WIDTHS_S of which a chart has room for all."""
    return next((width for width in WIDTHS_S if range_s / width <= POINTS), WIDTHS_S[-1])

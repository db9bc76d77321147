"""`/tenants/{tenant_id}/devices/import`: many devices from one CSV table, with a result for each row.

The table is read and checked whole; then its devices are made some hundred at a time, and the results of each such part
are sent once it is committed. A row that is refused leaves the others alone. Where PostgreSQL goes away on the way, the
rows that are left are told so, and the same table can be sent again: what is there already is refused as a conflict.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from pulse.api.control import models
from pulse.api.control.parameters import TenantId, TheBounds, TheCaller, TheControl
from pulse.api.control.streaming import begun
from pulse.api.problem import UNAVAILABLE
from pulse.domain.device_csv import Row, parse_devices
from pulse.domain.errors import Outage, Reason, Refusal
from pulse.domain.identity import NewDevice
from pulse.domain.registry import device_key, tenant_key
from pulse.services.control import Caller, Control

PART_ROWS = 500
TABLE = {"type": "string", "examples": ["device_id,name,site\nboiler-1,Boiler,north\n"]}

router = APIRouter(tags=["devices"])


class Result(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one row."""

    row: int
    device_id: str
    status: str
    token: str = ""
    reason: str = ""
    detail: str = ""
    field: str = ""


@router.post(
    "/tenants/{tenant_id}/devices/import",
    response_class=StreamingResponse,
    responses={200: {"content": {"application/x-ndjson": {"schema": models.ImportResult.model_json_schema()}}}},
    openapi_extra={"requestBody": {"required": True, "content": {"text/csv": {"schema": TABLE}}}},
)
async def import_devices(
    request: Request, caller: TheCaller, control: TheControl, bounds: TheBounds, tenant_id: TenantId
) -> StreamingResponse:
    """Make a device of each row that is none yet; one JSON line a row, with its token, then a summary.

    The header names `device_id`, maybe `name`; every other column is an attribute.
    """
    caller.changing(tenant_id, "device.import")
    await caller.reading(tenant_id).identities.tenant(tenant_id)
    rows = parse_devices(await request.body(), rows_max=bounds.import_rows_max)
    return StreamingResponse(await begun(_made(caller, control, tenant_id, rows)), media_type="application/x-ndjson")


async def _made(caller: Caller, control: Control, tenant_id: str, rows: Sequence[Row]) -> AsyncGenerator[bytes, None]:
    counts = {"created": 0, "refused": 0, "failed": 0}
    projected, away = True, False
    for start in range(0, len(rows), PART_ROWS):
        part = rows[start : start + PART_ROWS]
        devices = [row.outcome for row in part if isinstance(row.outcome, NewDevice)]
        tokens: dict[str, str] = {}
        if devices and not away:
            try:
                reach = caller.changing(tenant_id, "device.import", devices[0].device_id, rows=len(devices))
                tokens = await reach.identities.add_missing_devices(tenant_id, devices)
            except Outage:
                if start == 0:
                    raise
                away = True
        if tokens:
            keys = [tenant_key(tenant_id), *(device_key(tenant_id, device_id) for device_id in tokens)]
            projected &= await control.tell_edge(keys)
        results = [_result(row, tokens, away=away) for row in part]
        for result in results:
            counts[result.status] += 1
        yield b"".join(msgspec.json.encode(result) + b"\n" for result in results)
    yield msgspec.json.encode({"summary": {**counts, "projected": projected}}) + b"\n"


def _result(row: Row, tokens: dict[str, str], *, away: bool) -> Result:
    if isinstance(row.outcome, Refusal):
        refusal = row.outcome
    elif row.device_id in tokens:
        return Result(row=row.number, device_id=row.device_id, status="created", token=tokens[row.device_id])
    elif away:
        detail = "PostgreSQL went away: send this row again"
        return Result(row=row.number, device_id=row.device_id, status="failed", reason=UNAVAILABLE, detail=detail)
    else:
        refusal = Refusal(Reason.CONFLICT, "a device of that id is there already", field="device_id")
    return Result(
        row=row.number,
        device_id=row.device_id,
        status="refused",
        reason=refusal.reason,
        detail=refusal.message,
        field=refusal.field,
    )

"""`/tenants/{tenant_id}/devices/{device_id}/telemetry` and `/latest`: rows, buckets of time, the newest row.

JSON comes in pages; CSV comes whole, a page of the database at a time.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated, Literal

import msgspec
from fastapi import APIRouter, Query, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from pulse.api.control import reports
from pulse.api.control.parameters import DeviceId, TenantId, TheBounds, TheCaller, TheControl
from pulse.api.control.streaming import begun
from pulse.api.control.telemetry_csv import buckets_csv, rows_csv, rows_header
from pulse.domain import query as queries
from pulse.domain.query import BUCKET_PATTERN, CURSOR_PATTERN, Aggregate, BucketQuery, Question, parse_question
from pulse.services.control import Telemetry

EXPORT_PAGE_ROWS = 5000
INSTANT: dict[str, JsonValue] = {"format": "date-time", "examples": ["2026-03-01T12:00:00Z"]}
"""What the OpenAPI document says of an instant; a number of seconds or milliseconds is taken too."""

router = APIRouter(prefix="/tenants/{tenant_id}/devices/{device_id}", tags=["telemetry"])


class TelemetryParameters(BaseModel):
    """The question; nothing else may be asked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    since: str | None = Field(
        None, alias="from", description="First instant; default: a day before `to`.", json_schema_extra=INSTANT
    )
    until: str | None = Field(
        None, alias="to", description="First instant that is no longer meant; default: now.", json_schema_extra=INSTANT
    )
    metrics: list[str] = Field([], description="Names, separated by commas; default: all.")
    bucket: str | None = Field(
        None,
        description="Width of a bucket: 30s, 5m, 1h, 1d.",
        examples=["5m"],
        json_schema_extra={"pattern": BUCKET_PATTERN},
    )
    aggregate: Aggregate | None = Field(None, description="With a bucket: what becomes of its values; default: avg.")
    limit: int | None = Field(None, ge=1, description="Rows of one page; of CSV: rows in all.")
    cursor: str | None = Field(
        None, description="`next` of the page before.", json_schema_extra={"pattern": CURSOR_PATTERN}
    )
    order: Literal["asc", "desc"] = "asc"
    format: Literal["json", "csv"] = "json"

    def question(self) -> Question:
        """As the domain asks it."""
        return Question(
            since=self.since,
            until=self.until,
            metrics=self.metrics,
            bucket=self.bucket,
            aggregate=self.aggregate,
            limit=self.limit,
            cursor=self.cursor,
            order=self.order,
        )


@router.get(
    "/telemetry",
    response_class=Response,
    responses={
        200: {
            "model": reports.ReadingPage | reports.BucketPage,
            "content": {"text/csv": {"schema": {"type": "string"}}},
        }
    },
)
async def read_telemetry(
    *,
    caller: TheCaller,
    control: TheControl,
    bounds: TheBounds,
    tenant_id: TenantId,
    device_id: DeviceId,
    parameters: Annotated[TelemetryParameters, Query()],
) -> Response:
    """Rows from `from` to before `to`; with `bucket`, one value a metric for each bucket that has any."""
    telemetry = caller.reading(tenant_id).telemetry
    query = parse_question(parameters.question(), now=control.clock(), bounds=bounds.query)
    as_csv = parameters.format == "csv"
    if isinstance(query, BucketQuery):
        buckets = await telemetry.buckets(tenant_id, device_id, query)
        if as_csv:
            return _csv(Response(buckets_csv(buckets, query.metrics)), device_id)
        return _json({"bucket_s": query.bucket_s, "aggregate": query.aggregate, "buckets": buckets})
    if as_csv:
        wanted = None if parameters.limit is None else query.limit
        parts = _exported(telemetry, tenant_id, device_id, query, wanted)
        return _csv(StreamingResponse(await begun(parts)), device_id)
    rows = await telemetry.rows(tenant_id, device_id, msgspec.structs.replace(query, limit=query.limit + 1))
    page = rows[: query.limit]
    return _json({"readings": page, "next": str(page[-1].cursor) if len(rows) > query.limit else None})


@router.get("/latest", response_class=Response, responses={200: {"model": reports.LatestReading}})
async def read_latest(caller: TheCaller, tenant_id: TenantId, device_id: DeviceId) -> Response:
    """When the device was last heard of, the latest value of each metric, and the newest row."""
    return _json(await caller.reading(tenant_id).telemetry.latest(tenant_id, device_id))


async def _exported(
    telemetry: Telemetry, tenant_id: str, device_id: str, query: queries.Query, wanted: int | None
) -> AsyncGenerator[bytes, None]:
    """All rows of the range (`wanted`: so many at most), each page in a transaction of its own."""
    yield_first = rows_header(query.metrics)
    while True:
        page_rows = EXPORT_PAGE_ROWS if wanted is None else min(EXPORT_PAGE_ROWS, wanted)
        rows = await telemetry.rows(tenant_id, device_id, msgspec.structs.replace(query, limit=page_rows))
        yield yield_first + rows_csv(rows, query.metrics)
        yield_first = b""
        wanted = None if wanted is None else wanted - len(rows)
        if len(rows) < page_rows or wanted == 0:
            return
        query = msgspec.structs.replace(query, cursor=rows[-1].cursor)


def _json(value: object) -> Response:
    """The metrics go out as they came from the database; no number is read and written on the way."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def _csv(response: Response, device_id: str) -> Response:
    response.headers["content-type"] = "text/csv; charset=utf-8"
    response.headers["content-disposition"] = f'attachment; filename="{device_id}.csv"'
    return response

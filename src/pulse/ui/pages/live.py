"""`/live`: messages as they are stored."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from pulse.ui.pages.devices import tenants_of
from pulse.ui.parameters import OptionalId
from pulse.ui.render import page
from pulse.ui.sessions import TheConsole, TheVisitor

router = APIRouter()


@router.get("/live")
async def live(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheVisitor,
    stream: Annotated[str, Query(pattern="^[A-Za-z0-9_-]{1,64}$")] = "TELEMETRY",
    tenant: OptionalId = "",
    device: OptionalId = "",
) -> Response:
    """The filters; what matches is streamed."""
    return page(
        request,
        "live.html",
        visitor=visitor,
        name="live",
        streams=list(console.prefixes),
        tenants=await tenants_of(visitor),
        filters={"stream": stream, "tenant": tenant or visitor.key.tenant_id or "", "device": device},
    )

"""`/`: the way of all messages, live."""

from __future__ import annotations

import msgspec
from fastapi import APIRouter, Request, Response

from pulse.ui.map import EDGES, NODES
from pulse.ui.render import page
from pulse.ui.security import redirect
from pulse.ui.sessions import TheConsole, TheVisitor

router = APIRouter()

FIGURES = (
    ("rate", "Messages a second", "rate", "/s"),
    ("p99_s", "Received to stored, p99", "duration", ""),
    ("pending", "Waiting to be stored", "count", ""),
    ("online", "Devices online", "count", ""),
)
"""Name in the picture, title, how it is written, unit."""


@router.get("/")
async def home(request: Request, console: TheConsole, visitor: TheVisitor) -> Response:
    """The map; whoever is of one tenant has no part in it, and comes to the devices."""
    if not visitor.is_operator:
        return redirect("/devices")
    picture = console.pipeline.picture
    return page(
        request,
        "pipeline.html",
        visitor=visitor,
        name="pipeline",
        nodes=NODES,
        edges=EDGES,
        figures=FIGURES,
        picture=None if picture is None else msgspec.to_builtins(picture),
        first=f"{console.gateway_url}/ingest/v1/tenant/TENANT/device/DEVICE/telemetry",
    )

"""`/streams` and `/audit`: how the streams stand, and that no message is missing. For operators."""

from __future__ import annotations

from fastapi import APIRouter

from pulse.api.control import reports
from pulse.api.control.parameters import TheCaller, TheControl

AUDITED = ("TELEMETRY", "SHADOW", "COMMANDS")

router = APIRouter(tags=["streams"])


@router.get("/streams", response_model=reports.StreamsStatus)
async def streams_status(caller: TheCaller, control: TheControl) -> object:
    """The streams as declared and as they are, and how far their consumers are behind."""
    caller.reading(None)
    return await control.streams.status()


@router.get("/audit", response_model=reports.AuditReport)
async def audit(caller: TheCaller, control: TheControl) -> dict[str, object]:
    """accepted = stored + dead + in flight + expired, for each making of the streams of devices, while they run."""
    caller.reading(None)
    audits = [each for stream in AUDITED for each in await control.auditor.audit(stream)]
    return {"ok": all(each.balanced and not each.expired for each in audits), "audits": audits}

"""`/audit-log`: who changed what, and when. A tenant's key sees the changes of its tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from pulse.api.control import models
from pulse.api.control.parameters import BIGINT_MAX, Limit, TheCaller
from pulse.domain.identity import ID_PATTERN

router = APIRouter(tags=["audit log"])


@router.get("/audit-log", response_model=models.ChangePage)
async def list_changes(
    caller: TheCaller,
    tenant_id: Annotated[str | None, Query(pattern=f"^{ID_PATTERN}$", description="Only this tenant's.")] = None,
    before: Annotated[int | None, Query(ge=1, le=BIGINT_MAX, description="Only older ones.")] = None,
    limit: Limit = 100,
) -> dict[str, object]:
    """The changes that the key may see, the newest first."""
    reach = caller.reading_own() if tenant_id is None else caller.reading(tenant_id)
    page = await reach.changes.changes(tenant_id=tenant_id, before=before, limit=limit + 1)
    return {"changes": page[:limit], "next": page[limit - 1].id if len(page) > limit else None}

"""`/keys`: make, list and revoke API keys. For operators."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Query

from pulse.api.control import models
from pulse.api.control.parameters import BIGINT_MAX, Limit, TheCaller, TheControl
from pulse.domain.labels import check_name

router = APIRouter(prefix="/keys", tags=["keys"])

KeyId = Annotated[int, Path(ge=1, le=BIGINT_MAX)]


@router.get("", response_model=models.KeyPage)
async def list_keys(
    caller: TheCaller, after: Annotated[int, Query(ge=0, le=BIGINT_MAX)] = 0, limit: Limit = 100
) -> dict[str, object]:
    """All keys by id, those that have ended too."""
    page = await caller.reading(None).keys.keys(after=after, limit=limit + 1)
    return {"keys": page[:limit], "next": page[limit - 1].key_id if len(page) > limit else None}


@router.post("", response_model=models.KeyWithSecret, status_code=201)
async def make_key(caller: TheCaller, control: TheControl, body: models.NewKey) -> dict[str, object]:
    """Make a key and answer with its secret, which cannot be read again."""
    expires_at = None if body.expires_in_s is None else control.clock() + timedelta(seconds=body.expires_in_s)
    reach = caller.changing(
        body.tenant_id, "key.create", body.name, operators_only=True, read_only=body.read_only, expires_at=expires_at
    )
    made, secret = await reach.keys.add(
        name=check_name(body.name), tenant_id=body.tenant_id, read_only=body.read_only, expires_at=expires_at
    )
    return {"key": made, "secret": secret}


@router.post("/{key_id}/revoke", response_model=models.Key)
async def revoke_key(caller: TheCaller, key_id: KeyId) -> object:
    """End a key, from the next request on."""
    return await caller.changing(None, "key.revoke", str(key_id)).keys.revoke(key_id)

"""`/tenants`: make, list, show, enable, disable, limit. A tenant's key sees its own; only operators change them."""

from __future__ import annotations

from fastapi import APIRouter

from pulse.api.control import models
from pulse.api.control.parameters import After, Enabled, Limit, TenantId, TheCaller, TheControl
from pulse.domain.labels import check_name
from pulse.domain.limits import Rate, TenantLimits, check_rate
from pulse.domain.registry import tenant_key

router = APIRouter(prefix="/tenants", tags=["tenants"])


@router.get("", response_model=models.TenantPage)
async def list_tenants(
    caller: TheCaller, after: After = "", enabled: Enabled = None, limit: Limit = 100
) -> dict[str, object]:
    """The tenants that the key reaches, by id."""
    page = await caller.reading_own().identities.tenants(after=after, enabled=enabled, limit=limit + 1)
    return {"tenants": page[:limit], "next": page[limit - 1].tenant_id if len(page) > limit else None}


@router.post("", response_model=models.TenantChanged, status_code=201)
async def make_tenant(caller: TheCaller, control: TheControl, body: models.NewTenant) -> dict[str, object]:
    """Make a tenant, enabled."""
    reach = caller.changing(body.tenant_id, "tenant.create", body.tenant_id, operators_only=True, name=body.name)
    made = await reach.identities.add_tenant(body.tenant_id, name=check_name(body.name))
    return {"tenant": made, "projected": await control.tell_edge([tenant_key(body.tenant_id)])}


@router.get("/{tenant_id}", response_model=models.TenantWithCount)
async def show_tenant(caller: TheCaller, tenant_id: TenantId) -> dict[str, object]:
    """The tenant, and how many devices it has."""
    identities = caller.reading(tenant_id).identities
    return {"tenant": await identities.tenant(tenant_id), "devices": await identities.device_count(tenant_id)}


@router.post("/{tenant_id}/enable", response_model=models.TenantChanged)
async def enable_tenant(caller: TheCaller, control: TheControl, tenant_id: TenantId) -> dict[str, object]:
    """Let the tenant's devices speak again, those that are enabled themselves."""
    return await _set_enabled(caller, control, tenant_id, enabled=True)


@router.post("/{tenant_id}/disable", response_model=models.TenantChanged)
async def disable_tenant(caller: TheCaller, control: TheControl, tenant_id: TenantId) -> dict[str, object]:
    """Refuse all of the tenant's devices from now on."""
    return await _set_enabled(caller, control, tenant_id, enabled=False)


@router.put("/{tenant_id}/limits", response_model=models.TenantChanged)
async def limit_tenant(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, body: models.NewLimits
) -> dict[str, object]:
    """Give the tenant these limits, in place of those that it had; every gateway holds to them within a second."""
    limits = TenantLimits(
        messages=_rate(body.messages, "messages"), device_messages=_rate(body.device_messages, "device_messages")
    )
    reach = caller.changing(tenant_id, "tenant.limit", tenant_id, operators_only=True, **body.model_dump())
    await reach.identities.set_tenant_limits(tenant_id, limits)
    return await _told(caller, control, tenant_id)


def _rate(given: models.NewRate | None, field: str) -> Rate | None:
    return None if given is None else check_rate(Rate(given.per_s, given.burst), field=field)


async def _set_enabled(caller: TheCaller, control: TheControl, tenant_id: str, *, enabled: bool) -> dict[str, object]:
    action = "tenant.enable" if enabled else "tenant.disable"
    reach = caller.changing(tenant_id, action, tenant_id, operators_only=True)
    await reach.identities.set_tenant_enabled(tenant_id, enabled)
    return await _told(caller, control, tenant_id)


async def _told(caller: TheCaller, control: TheControl, tenant_id: str) -> dict[str, object]:
    """The tenant as it is now, and whether the edge knows."""
    projected = await control.tell_edge([tenant_key(tenant_id)])
    return {"tenant": await caller.reading(tenant_id).identities.tenant(tenant_id), "projected": projected}

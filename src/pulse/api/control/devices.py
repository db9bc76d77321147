"""`/tenants/{tenant_id}/devices`: make, list, show, change, enable, disable; tokens are shown once."""

from __future__ import annotations

from fastapi import APIRouter

from pulse.api.control import models
from pulse.api.control.parameters import After, DeviceId, Enabled, Limit, Prefix, TenantId, TheCaller, TheControl
from pulse.domain.identity import NewDevice
from pulse.domain.labels import check_attributes, check_name
from pulse.domain.registry import device_key, tenant_key
from pulse.services.control import Caller, Control

router = APIRouter(prefix="/tenants/{tenant_id}/devices", tags=["devices"])


@router.get("", response_model=models.DevicePage)
async def list_devices(
    *,
    caller: TheCaller,
    tenant_id: TenantId,
    after: After = "",
    prefix: Prefix = "",
    enabled: Enabled = None,
    limit: Limit = 100,
) -> dict[str, object]:
    """The tenant's devices, by id, without their tokens."""
    identities = caller.reading(tenant_id).identities
    await identities.tenant(tenant_id)
    page = await identities.devices(
        tenant_id=tenant_id, enabled=enabled, prefix=prefix, after=(tenant_id, after), limit=limit + 1
    )
    return {"devices": page[:limit], "next": page[limit - 1].device_id if len(page) > limit else None}


@router.post("", response_model=models.DeviceWithToken, status_code=201)
async def make_device(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, body: models.NewDevice
) -> dict[str, object]:
    """Make a device, enabled, and answer with its token, which cannot be read again."""
    new = NewDevice(device_id=body.device_id, name=check_name(body.name), attributes=check_attributes(body.attributes))
    identities = caller.changing(tenant_id, "device.create", body.device_id).identities
    token = (await identities.add_devices(tenant_id, [new]))[body.device_id]
    return {**await _told(caller, control, tenant_id, body.device_id), "token": token}


@router.get("/{device_id}", response_model=models.Device)
async def show_device(caller: TheCaller, tenant_id: TenantId, device_id: DeviceId) -> object:
    """The device, and when its tokens end."""
    return await caller.reading(tenant_id).identities.device(tenant_id, device_id)


@router.patch("/{device_id}", response_model=models.Device)
async def change_device(
    caller: TheCaller, tenant_id: TenantId, device_id: DeviceId, body: models.DevicePatch
) -> object:
    """Change the name; merge attributes, of which null removes one. The edge knows neither."""
    if body.name is not None:
        check_name(body.name)
    changed = body.model_dump(exclude_unset=True)
    reach = caller.changing(tenant_id, "device.change", device_id, **changed)
    await reach.identities.update_device(tenant_id, device_id, name=body.name, attributes=body.attributes)
    return await caller.reading(tenant_id).identities.device(tenant_id, device_id)


@router.post("/{device_id}/enable", response_model=models.DeviceChanged)
async def enable_device(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, device_id: DeviceId
) -> dict[str, object]:
    """Let the device speak again, with the tokens that it has."""
    await caller.changing(tenant_id, "device.enable", device_id).identities.set_device_enabled(
        tenant_id, device_id, True
    )
    return await _told(caller, control, tenant_id, device_id)


@router.post("/{device_id}/disable", response_model=models.DeviceChanged)
async def disable_device(
    caller: TheCaller, control: TheControl, tenant_id: TenantId, device_id: DeviceId
) -> dict[str, object]:
    """Refuse the device from now on."""
    await caller.changing(tenant_id, "device.disable", device_id).identities.set_device_enabled(
        tenant_id, device_id, False
    )
    return await _told(caller, control, tenant_id, device_id)


@router.post("/{device_id}/rotate", response_model=models.DeviceWithToken)
async def rotate_token(
    caller: TheCaller,
    control: TheControl,
    tenant_id: TenantId,
    device_id: DeviceId,
    body: models.Rotation | None = None,
) -> dict[str, object]:
    """Give the device a new token; the old ones stay valid for a while."""
    overlap_s = (body or models.Rotation()).overlap_s
    identities = caller.changing(tenant_id, "device.rotate", device_id, overlap_s=overlap_s).identities
    token = await identities.rotate_token(tenant_id, device_id, overlap_s=overlap_s)
    return {**await _told(caller, control, tenant_id, device_id), "token": token}


async def _told(caller: Caller, control: Control, tenant_id: str, device_id: str) -> dict[str, object]:
    """The device as it is now, and whether the edge knows; of its tenant too, should it have missed that."""
    projected = await control.tell_edge([tenant_key(tenant_id), device_key(tenant_id, device_id)])
    return {"device": await caller.reading(tenant_id).identities.device(tenant_id, device_id), "projected": projected}

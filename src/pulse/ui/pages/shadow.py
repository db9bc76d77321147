"""`/devices/{tenant}/{device}/shadow`: say what a device should be, and decide where somebody else has said so too."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from pulse.domain.errors import Reason, Refusal, VersionConflict
from pulse.domain.shadow import Sections, Shadow, ShadowKey, Update
from pulse.domain.shadow_edit import patch_between, read_desired
from pulse.domain.shadow_requests import Changed, change
from pulse.services.console import Console, Visitor
from pulse.ui.pages.device import ShadowName
from pulse.ui.parameters import DeviceId, TenantId
from pulse.ui.render import page, query
from pulse.ui.security import read_form, redirect
from pulse.ui.sessions import TheConsole, TheVisitor

router = APIRouter(prefix="/devices/{tenant_id}/{device_id}/shadow")


@router.post("")
async def edit(
    *,
    request: Request,
    console: TheConsole,
    visitor: TheVisitor,
    tenant_id: TenantId,
    device_id: DeviceId,
    shadow: ShadowName = "",
) -> Response:
    """Make what is desired the document of the form, if the shadow is still at the version that it was made of."""
    form = await read_form(request, visitor.signed_in.secret, origin=request.app.state.origin)
    key = ShadowKey(tenant_id, device_id, shadow)
    if not form["version"].isdecimal() or len(form["version"]) > 18:
        raise Refusal(Reason.INVALID_REQUEST, "is no version", field="version")
    version, text = int(form["version"]), form.raw("desired")
    reach = visitor.caller.reading(tenant_id)
    await reach.identities.device(tenant_id, device_id)
    there = await reach.shadows.shadow(key)
    try:
        wanted = read_desired(text)
        if there.version != version:
            raise VersionConflict(there.version)
        patch = patch_between(there.desired.state, wanted)
        if not patch:
            return redirect(_path(key, "nothing was changed: that is what is desired already"))
        changed = await _change(console, visitor, key, Update(Sections(desired=patch), version=version))
    except Refusal as refusal:
        if refusal.reason is Reason.FORBIDDEN:
            raise
        there = await reach.shadows.shadow(key)
        return page(
            request,
            "shadow_edit.html",
            status=409 if isinstance(refusal, VersionConflict) else 422,
            visitor=visitor,
            name="devices",
            key=key,
            refusal=refusal,
            conflict=isinstance(refusal, VersionConflict),
            text=text,
            version=version,
            shadow=there,
            changes=[each for each in reversed(await reach.shadows.changes(key)) if each.version > version],
        )
    return redirect(_path(key, f"the shadow is at version {changed.shadow.version}"))


async def _change(console: Console, visitor: Visitor, key: ShadowKey, update: Update) -> Changed:
    desired = update.patch["desired"]
    reach = visitor.caller.changing(key.tenant_id, "shadow.change", key.device_id, name=key.name, desired=desired)

    def decide(shadow: Shadow) -> Changed:
        now_ms = console.control.now_ms()
        return change(key, shadow, update, at_ms=now_ms, who=visitor.key.name, bounds=console.shadow)

    return await reach.shadows.change(key, decide)


def _path(key: ShadowKey, done: str) -> str:
    return f"/devices/{key.tenant_id}/{key.device_id}{query({}, shadow=key.name, done=done)}#shadow"

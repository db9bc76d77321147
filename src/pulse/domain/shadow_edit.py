"""What a person who edits a whole document asks for, as the merge patch that a shadow takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from pulse.domain.errors import Refusal
from pulse.domain.json_text import check_storable, read_json
from pulse.domain.shadow import UPDATE_DEPTH_MAX, same

_documents: msgspec.json.Decoder[dict[str, Any]] = msgspec.json.Decoder(dict[str, Any])


def read_desired(text: str) -> dict[str, Any]:
    """The document that somebody has typed; nothing is an empty one. Raises Refusal with what is at fault."""
    try:
        document = read_json(_documents, text.encode()) if text.strip() else {}
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.message, field="desired", position=refusal.position) from refusal
    check_storable(document, "desired", depth_max=UPDATE_DEPTH_MAX, limit="UPDATE_DEPTH_MAX")
    return document


def patch_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON Merge Patch (RFC 7396) that makes `after` of `before`; an attribute of `after` that is null is gone."""
    patch: dict[str, Any] = {name: None for name in before if after.get(name) is None}
    for name, wanted in after.items():
        there = before.get(name)
        if wanted is None or (name in before and same(wanted, there)):
            continue
        if isinstance(wanted, Mapping) and isinstance(there, Mapping):
            if inner := patch_between(there, wanted):
                patch[name] = inner
        else:
            patch[name] = wanted
    return patch

"""Ids as they stand in paths and queries of the console's pages."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query

from pulse.domain.identity import ID_PATTERN

TenantId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
DeviceId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
RouteId = Annotated[str, Path(pattern=f"^{ID_PATTERN}$")]
OptionalId = Annotated[str, Query(pattern=f"^({ID_PATTERN})?$")]
"""Empty where it is not asked for."""

"""The control API put together."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, FastAPI, Security
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer

from pulse import __version__
from pulse.api.control import (
    changes,
    commands,
    dead_letters,
    device_import,
    devices,
    fleet_commands,
    keys,
    models,
    routes,
    shadows,
    streams,
    telemetry,
    tenants,
)
from pulse.api.control.entrance import OPENAPI_PATH, PREFIX, App, ControlBounds, Entrance
from pulse.api.control.errors import handle_errors
from pulse.services.control import Control

_PROBLEM = {"application/problem+json": {"schema": models.ProblemBody.model_json_schema()}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A body that is no JSON, with the position", "content": _PROBLEM},
    401: {"description": "No API key, or none in force", "content": _PROBLEM},
    403: {"description": "Not within this key's reach", "content": _PROBLEM},
    404: {"description": "Not there", "content": _PROBLEM},
    409: {"description": "There already", "content": _PROBLEM},
    413: {"description": "Larger than its bound", "content": _PROBLEM},
    415: {"description": "Another type than it must have", "content": _PROBLEM},
    422: {"description": "A value that cannot be accepted, by its path", "content": _PROBLEM},
    429: {"description": "More at once than a key may ask; `Retry-After` says when to try again", "content": _PROBLEM},
    503: {"description": "A system is away; `Retry-After` says when to try again", "content": _PROBLEM},
}


# The import before the devices, whose `{device_id}` would take its name for one.
MODULES = (
    tenants,
    device_import,
    devices,
    telemetry,
    shadows,
    commands,
    fleet_commands,
    routes,
    dead_letters,
    streams,
    changes,
    keys,
)


def methods_of(path: str) -> list[str]:
    """All that this path may be asked with: a method is a route, and the framework names those of the first alone."""
    routes = [route for module in MODULES for route in module.router.routes if isinstance(route, APIRoute)]
    below = path.removeprefix(PREFIX)
    template = next((route.path for route in routes if route.path_regex.match(below)), None)
    return sorted({method for route in routes if route.path == template for method in route.methods or ()})


def control_app(*, control: Control, bounds: ControlBounds, other: App) -> App:
    """The ASGI application; `other` answers all paths that are not below `/api/`."""
    app = FastAPI(
        title="Pulse control API",
        version=__version__,
        openapi_url=OPENAPI_PATH,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        responses=PROBLEMS,
    )
    app.state.control = control
    app.state.bounds = bounds
    # The entrance has checked the key; this one tells the OpenAPI document of it.
    api = APIRouter(prefix=PREFIX, dependencies=[Security(HTTPBearer(auto_error=False, scheme_name="api_key"))])
    for module in MODULES:
        api.include_router(module.router)
    app.include_router(api)
    app.state.methods_of = methods_of
    handle_errors(app)
    return Entrance(app, control=control, bounds=bounds, other=other)

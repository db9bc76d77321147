"""Templates, and how values look: the same here as in `live.js`, so that nothing moves when it becomes live."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import NamedTuple
from urllib.parse import urlencode

import msgspec
from fastapi import Request
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.responses import HTMLResponse

from pulse import __version__
from pulse.domain.account import form_token
from pulse.domain.browse import readable
from pulse.services.console import Visitor
from pulse.ui.assets import Assets
from pulse.ui.sessions import console_of, secret_of

ABSENT = "–"
UNITS = ("B", "KB", "MB", "GB", "TB")


class Page(NamedTuple):
    """One entry of the navigation; `operators` alone see it where that is said."""

    name: str
    path: str
    title: str
    operators: bool = False


PAGES = (
    Page("pipeline", "/", "Pipeline", operators=True),
    Page("devices", "/devices", "Devices"),
    Page("live", "/live", "Live tail"),
    Page("streams", "/streams", "Streams", operators=True),
    Page("routes", "/routes", "Routes"),
    Page("dead-letters", "/dead-letters", "Dead letters"),
    Page("settings", "/settings", "Settings"),
)
"""In the order of the navigation. A page for another capability is a module in `pages/` and a line here."""


def rate(value: float | None) -> str:
    """Messages a second: 0.4, 12.5, 1,204."""
    if value is None:
        return ABSENT
    return f"{value:,.1f}" if value < 99.95 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """1,204."""
    return ABSENT if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """12 ms, 4.2 s, 3 min, 5 h, 2 d."""
    if seconds is None:
        return ABSENT
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    for limit, width, unit in ((3600, 60, "min"), (172_800, 3600, "h"), (float("inf"), 86_400, "d")):
        if seconds < limit:
            return f"{seconds // width:.0f} {unit}"
    return ABSENT


def size(value: float | None) -> str:
    """512 B, 1.5 KB, 1 GB; powers of 1024."""
    if value is None:
        return ABSENT
    scaled, unit = float(value), 0
    while scaled >= 1024 and unit < len(UNITS) - 1:
        scaled, unit = scaled / 1024, unit + 1
    return f"{scaled:.0f} {UNITS[unit]}" if scaled >= 99.95 or scaled.is_integer() else f"{scaled:.1f} {UNITS[unit]}"


def percent(value: float | None) -> str:
    """42 %."""
    return ABSENT if value is None else f"{value * 100:.0f} %"


def instant(value: datetime | float | None) -> Markup:
    """A time as `live.js` shows it by the reader's clock, with UTC on hover; without scripts it is UTC."""
    if value is None:
        return Markup("<span class=absent>never</span>")
    at = datetime.fromtimestamp(value, UTC) if isinstance(value, int | float) else value.astimezone(UTC)
    iso = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    shown = at.strftime("%Y-%m-%d %H:%M:%S")
    return Markup('<time datetime="{}" title="{} UTC">{}</time>').format(iso, shown, shown)


def as_json(value: object) -> Markup:
    """For a `data-` attribute."""
    return escape(msgspec.json.encode(value).decode())


def compact(value: object) -> str:
    """JSON on one line."""
    return msgspec.json.encode(value).decode()


def pretty(value: object) -> str:
    """JSON for reading."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


def breakable(text: str) -> Markup:
    """A URL or a topic that may be broken behind its slashes."""
    return Markup("/<wbr>").join(text.split("/"))


def readable_json(text: str) -> str:
    """Text that may be JSON, for reading."""
    return readable(text.encode(), pretty=True)


def query(values: Mapping[str, object], **changed: object) -> str:
    """The query of this page with some values changed; what is empty is left out."""
    kept = {name: value for name, value in {**values, **changed}.items() if value not in (None, "")}
    return f"?{urlencode(kept)}" if kept else "?"


def make_templates(assets: Assets) -> Environment:
    """All templates, with what each may use; an undefined name is a bug."""
    environment = Environment(
        loader=PackageLoader("pulse.ui"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    shown = (rate, count, duration, size, percent, instant, as_json, compact, pretty, readable_json, breakable)
    environment.filters |= {function.__name__: function for function in shown}
    environment.globals |= {"asset": assets.address, "version": __version__, "missing": assets.missing, "query": query}
    return environment


def page(
    request: Request, template: str, *, status: int = 200, visitor: Visitor | None = None, **values: object
) -> HTMLResponse:
    """`template` as an answer; htmx takes the part that it wants."""
    secret = visitor.signed_in.secret if visitor is not None else values.pop("secret", "") or secret_of(request)
    environment: Environment = request.app.state.templates
    text = environment.get_template(template).render(
        visitor=visitor,
        pages=[each for each in PAGES if visitor is not None and (visitor.is_operator or not each.operators)],
        systems=list(console_of(request).pipeline.systems()),
        form_token=form_token(str(secret)) if secret else "",
        here=request.url.path,
        **values,
    )
    return HTMLResponse(text, status_code=status, headers={"vary": "hx-request"})

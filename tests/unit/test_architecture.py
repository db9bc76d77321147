"""The rules of ARCHITECTURE.md, read off the source: who may import whom, no cycle, a pure domain, small units.

Each rule is also shown a small tree that breaks it, because a checker that finds nothing proves nothing.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from repository import ROOT

MODULE_LINES_MAX = 300
FUNCTION_LINES_MAX = 60

# Layer → the layers that it may import besides itself. A package below `adapters` or `services` counts as one layer.
MAY_IMPORT = {
    "domain": set(),
    "topology": {"domain"},
    "services": {"domain"},
    "adapters": {"domain", "topology"},
    "runtime": {"domain"},
    "api": {"services", "domain"},
    "ui": {"services", "domain"},
    "wiring": {"domain", "topology", "services", "adapters", "runtime", "api", "ui"},
    "app": {"domain", "topology", "services", "adapters", "runtime", "api", "ui", "wiring"},
    "cli": {"app", "wiring", "adapters", "runtime", "topology", "domain"},
    "__main__": {"cli"},
    "__init__": set(),
}

# What would bring a clock, chance, the environment or I/O into the domain.
IMPURE_STANDARD = """
    asyncio concurrent contextvars fcntl glob http io locale logging mmap multiprocessing os pathlib platform queue
    random sched secrets select selectors shutil signal socket sqlite3 ssl subprocess sys tempfile
    threading time urllib uuid
"""
IMPURE_PACKAGES = "aiohttp asyncpg click nats prometheus_client psutil rich structlog uvicorn uvloop"
IMPURE_MODULES = frozenset([*IMPURE_STANDARD.split(), *IMPURE_PACKAGES.split()])
PURE_PARTS = ("urllib.parse",)
IMPURE_CALLS = frozenset(
    {"open", "print", "input", "exec", "eval", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
)

Tree = Mapping[str, str]
"""Module name → source; a package's own module has the package's name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One import: of `target`, which is a module or a name in one, at `line`."""

    target: str
    line: int
    at_start: bool
    """Runs when the module is imported: not inside a function, nor under TYPE_CHECKING."""


def source_tree() -> dict[str, str]:
    source = ROOT / "src"
    return {module_name(path.relative_to(source)): path.read_text(encoding="utf-8") for path in source.rglob("*.py")}


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def imports_of(tree: Tree, module: str) -> Iterator[Import]:
    yield from _imports_in(ast.parse(tree[module]), module, is_package=is_package(tree, module), at_start=True)


def is_package(tree: Tree, module: str) -> bool:
    return any(other.startswith(module + ".") for other in tree)


def _imports_in(node: ast.AST, module: str, *, is_package: bool, at_start: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(target=alias.name, line=node.lineno, at_start=at_start)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = module.split(".")
            base = ".".join([*parts[: len(parts) - node.level + is_package], *filter(None, [node.module])])
        for alias in node.names:
            yield Import(target=f"{base}.{alias.name}", line=node.lineno, at_start=at_start)
    for child in ast.iter_child_nodes(node):
        later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).removeprefix("typing.") == "TYPE_CHECKING":
            later = child in node.body
        yield from _imports_in(child, module, is_package=is_package, at_start=at_start and not later)


def own_module(tree: Tree, target: str) -> str:
    """The module of ours that holds `target`, or an empty string where it is not ours."""
    while target and target not in tree:
        target = target.rpartition(".")[0]
    return target


def layer(module: str) -> str:
    """`domain`, `runtime`, …; for an adapter `adapters.nats`, because no adapter may import another."""
    parts = [*module.split(".")[1:], "__init__"]
    return ".".join(parts[:2]) if parts[0] == "adapters" and len(parts) > 2 else parts[0]


def layer_breaches(tree: Tree) -> list[str]:
    breaches = []
    for module in tree:
        here = layer(module)
        if here.partition(".")[0] not in MAY_IMPORT:
            breaches.append(f"{module}: no rule says what layer this is")
            continue
        for item in imports_of(tree, module):
            target = own_module(tree, item.target)
            there = layer(target)
            if not target or there in ("__init__", here):
                continue
            if there.partition(".")[0] not in MAY_IMPORT[here.partition(".")[0]]:
                breaches.append(f"{module}:{item.line} imports {target}")
    return breaches


def cycle(tree: Tree) -> list[str]:
    """The modules of one import cycle, or none; only imports that run when a module is imported can make one."""
    graph = {
        module: {own_module(tree, item.target) for item in imports_of(tree, module) if item.at_start} - {"", module}
        for module in tree
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found = error.args[1]
        assert isinstance(found, list)
        return found
    return []


def impurities(tree: Tree) -> list[str]:
    found = []
    for module, source in tree.items():
        if layer(module) != "domain":
            continue
        found += [
            f"{module}:{item.line} imports {item.target}"
            for item in imports_of(tree, module)
            if item.target.partition(".")[0] in IMPURE_MODULES and not item.target.startswith(PURE_PARTS)
        ]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPURE_CALLS:
                found.append(f"{module}:{node.lineno} calls {ast.unparse(node.func)}")
            if isinstance(node, ast.Await | ast.AsyncFunctionDef | ast.AsyncFor | ast.AsyncWith):
                found.append(f"{module}:{node.lineno} is asynchronous")
    return found


def oversized(tree: Tree) -> list[str]:
    found = []
    for module, source in tree.items():
        lines = len(source.splitlines())
        if lines > MODULE_LINES_MAX:
            found.append(f"{module} has {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno
                length = node.end_lineno - node.lineno + 1
                if length > FUNCTION_LINES_MAX:
                    found.append(f"{module}:{node.lineno} {node.name} has {length} lines")
    return found


def test_no_layer_imports_what_it_must_not_know() -> None:
    assert layer_breaches(source_tree()) == []


def test_no_import_cycle() -> None:
    assert cycle(source_tree()) == []


def test_domain_has_no_io_no_clock_and_no_chance() -> None:
    assert impurities(source_tree()) == []


def test_modules_and_functions_fit_the_reader() -> None:
    assert oversized(source_tree()) == []


def test_the_source_tree_is_read() -> None:
    """Guards the four above: an empty tree would pass them all."""
    tree = source_tree()
    assert {"pulse", "pulse.__main__", "pulse.domain.errors", "pulse.cli"} <= set(tree)
    assert "pulse.cli" in {own_module(tree, item.target) for item in imports_of(tree, "pulse.__main__")}


OURS = {
    "pulse": "",
    "pulse.domain": "",
    "pulse.domain.errors": "",
    "pulse.services": "",
    "pulse.services.ingest": "",
    "pulse.adapters": "",
    "pulse.adapters.nats": "",
    "pulse.adapters.postgres": "",
    "pulse.adapters.postgres.pool": "",
    "pulse.runtime.settings": "",
    "pulse.app": "",
    "pulse.cli": "",
}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pulse.domain.errors", "from pulse.runtime import settings"),
        ("pulse.domain.errors", "from ..runtime import settings"),
        ("pulse.domain", "from ..runtime.settings import Settings"),
        ("pulse.services.ingest", "import pulse.adapters.nats"),
        ("pulse.services.ingest", "def run():\n    from pulse.adapters.nats import connect"),
        ("pulse.services.ingest", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pulse.app"),
        ("pulse.adapters.nats", "from pulse.adapters.postgres.pool import Pool"),
        ("pulse.adapters.nats", "from pulse.services.ingest import Ingest"),
        ("pulse.runtime.settings", "import pulse.cli"),
        ("pulse.app", "import pulse.cli"),
        ("pulse.cli", "from pulse.services import ingest"),
        ("pulse.utilities", ""),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str) -> None:
    assert len(layer_breaches({**OURS, module: source})) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("pulse.adapters.postgres", "from .pool import Pool\nfrom pulse.domain.errors import Outage"),
        ("pulse.app", "from pulse.adapters import nats\nfrom pulse.services.ingest import Ingest"),
        ("pulse.cli", "import pulse.app\nfrom pulse import __version__\nimport asyncio"),
    ],
)
def test_a_permitted_import_is_let_be(module: str, source: str) -> None:
    assert layer_breaches({**OURS, module: source}) == []


@pytest.mark.parametrize(
    ("back", "is_cycle"),
    [
        ("from pulse.b import B", True),
        ("from . import b", True),
        ("class Late:\n    import pulse.b", True),
        ("def late():\n    import pulse.b", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pulse.b", False),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    pass\nelse:\n    import pulse.b", True),
    ],
)
def test_a_cycle_is_one_only_if_it_runs_at_import(back: str, is_cycle: bool) -> None:
    tree = {"pulse": "", "pulse.a": "import pulse.b", "pulse.b": "import pulse.c", "pulse.c": back}
    assert bool(cycle(tree)) is is_cycle


@pytest.mark.parametrize(
    "source",
    [
        "import asyncio",
        "from time import monotonic",
        "import os.path",
        "import random as chance",
        "def read():\n    return open('file')",
        "from datetime import datetime\ndef stamp():\n    return datetime.now()",
        "async def run():\n    pass",
        "import nats",
    ],
)
def test_an_impure_domain_is_found(source: str) -> None:
    assert impurities({"pulse.domain.shadow": source}) != []
    assert impurities({"pulse.services.shadow": source}) == []


def test_a_pure_domain_is_let_be() -> None:
    source = "import re\nfrom urllib.parse import urlsplit\nfrom datetime import UTC, datetime\nopened = re.compile('')"
    assert impurities({"pulse.domain.route": source}) == []


def test_too_long_a_module_or_function_is_found() -> None:
    body = "    pass\n" * FUNCTION_LINES_MAX
    assert oversized({"pulse.a": "def long():\n" + body}) == ["pulse.a:1 long has 61 lines"]
    assert oversized({"pulse.a": "\n" * (MODULE_LINES_MAX + 1)}) == ["pulse.a has 301 lines"]
    assert oversized({"pulse.a": "def long():\n" + body.removesuffix("    pass\n")}) == []


def test_every_impure_module_of_the_standard_library_is_spelled_right() -> None:
    assert set(IMPURE_STANDARD.split()) <= sys.stdlib_module_names

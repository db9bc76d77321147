"""What the console costs while it is looked at, how much a page weighs, and how soon a month of a device is drawn.

    .venv/bin/python bench/pages.py [--json] [--tabs 20] [--seconds 30] [--rate 200] [--days 30]

`pulse up` with a simulated fleet that sends at `--rate`, and Chromium, on the same cores. Needs `chromium`.

    tabs     % of a core of the role ui, nats-server and PostgreSQL: no tab, then so many of one page, each with its
             stream of events at 1 Hz. Each tab is a browser of its own: none is hidden, each has its connections.
    weight   bytes over the wire of a page and all it loads, by a browser that has never been there
    charts   from the navigation to the last chart drawn, of a device with so many days at one reading a minute: by a
             browser that has never been there (first), and by one that has (again)

The readings are stored by the worker's own code (COPY), and rolled up as the role maintenance does.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
import psutil  # type: ignore[import-untyped]
from playwright.sync_api import Browser, BrowserContext, Page, StorageState, sync_playwright
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from publish import fsync_us, machine  # noqa: E402
from pulse.adapters.postgres.pool import open_pool  # noqa: E402
from pulse.adapters.postgres.rollups import RollupStore  # noqa: E402
from pulse.adapters.postgres.telemetry import TelemetryStore  # noqa: E402
from pulse.domain.ledger import position  # noqa: E402
from pulse.domain.settlement import Row, Settlement  # noqa: E402
from pulse.domain.simulation import Fleet  # noqa: E402
from pulse_up import Instance, started, wait_for  # noqa: E402

TENANT = "acme"
DEVICES = 50
MONTH_DAYS, DAY_S = 30, 86_400
EVERY_S = 60
BATCH_ROWS = 5000
EPOCH = 100_000
"""Of positions that no stream has, so that nobody's audit meets them."""
SETTLE_S = 3.0
WAIT_MS = 60_000
CHART_ROUNDS = 4
DRAWN = """() => {
    const shown = document.querySelector("[data-range-shown]");
    return shown && shown.textContent && document.querySelector(".plot canvas") ? performance.now() : 0;
}"""
LIVE = "() => /^live/.test((document.querySelector('[data-live-state]') || {}).textContent || '')"


class Cost(msgspec.Struct, frozen=True):
    """% of a core while so many tabs of a page are open."""

    page: str
    tabs: int
    ui: float
    nats: float
    postgresql: float


class Weight(msgspec.Struct, frozen=True):
    """Bytes on the wire, headers included."""

    page: str
    bytes: int
    requests: int


class Charts(msgspec.Struct, frozen=True):
    """Milliseconds from the navigation until all charts are drawn: medians, and the longest."""

    data: str
    range: str
    first_ms: float
    again_ms: float
    most_ms: float


class Report(msgspec.Struct):
    """All that was measured."""

    costs: list[Cost] = []
    weights: list[Weight] = []
    charts: list[Charts] = []


@contextmanager
def simulated(instance: Instance, *, rate: int) -> Iterator[None]:
    """A fleet that sends until the end."""
    arguments = instance.command(
        "simulate", "--tenant", TENANT, "--devices", str(DEVICES), "--rate", str(rate), "--duration", "36000",
        "--protocol", "http", "--json",
    )  # fmt: skip
    with subprocess.Popen(
        arguments, cwd=instance.folder, env=dict(instance.environment), stdout=subprocess.DEVNULL
    ) as process:
        try:
            yield
        finally:
            process.send_signal(signal.SIGINT)
            time.sleep(1)
            process.send_signal(signal.SIGINT)


class Bench:
    """One browser and one running system."""

    def __init__(self, browser: Browser, instance: Instance, report: Report) -> None:
        self._browser = browser
        self._instance = instance
        self._report = report
        self._stored = 0
        self._device = Fleet(size=DEVICES, seed=1).device_ids()[0]
        self._state = self._signed_in()
        wait_for(self._is_there, "the fleet sends")

    @property
    def device_path(self) -> str:
        """Of the device that has a past."""
        return f"/devices/{TENANT}/{self._device}"

    def _note(self, found: Cost | Weight | Charts) -> None:
        if isinstance(found, Cost):
            self._report.costs.append(found)
        elif isinstance(found, Weight):
            self._report.weights.append(found)
        else:
            self._report.charts.append(found)
        Console(stderr=True).print(found)

    def cost(self, name: str, path: str, *, tabs: int, seconds: float) -> None:
        """`seconds` with so many tabs of one page."""
        contexts = [self._context() for _ in range(tabs)]
        for context in contexts:
            page = self._open(context, path)
            page.wait_for_function(LIVE, timeout=WAIT_MS)
            assert not page.evaluate("document.hidden")
        time.sleep(SETTLE_S)
        before, begin = self._cpu_s(), time.monotonic()
        # Playwright's pages stand still while nobody calls it.
        while (left := begin + seconds - time.monotonic()) > 0:
            if contexts:
                contexts[0].pages[0].wait_for_timeout(min(left, 1.0) * 1000)
            else:
                time.sleep(left)
        elapsed, after = time.monotonic() - begin, self._cpu_s()
        used = {part: (after[part] - before[part]) / elapsed * 100 for part in before}
        self._note(Cost(page=name, tabs=tabs, **used))
        for context in contexts:
            context.close()

    def weigh(self, name: str, path: str) -> None:
        """A page and all it loads until it is still, but for its stream of events."""
        context = self._context()
        page = context.new_page()
        session = context.new_cdp_session(page)
        sizes: list[float] = []
        session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
        session.send("Network.enable")
        page.goto(self._instance.ui_url + path, wait_until="load")
        page.wait_for_function(LIVE, timeout=WAIT_MS)
        page.wait_for_timeout(2000)
        self._note(Weight(page=name, bytes=int(sum(sizes)), requests=len(sizes)))
        context.close()

    def draw(self, data: str, range_: str) -> None:
        """The device's page with charts of that range."""
        path = f"{self.device_path}?range={range_}"
        first, again = [], []
        for _ in range(CHART_ROUNDS):
            context = self._context()
            first.append(self._drawn_ms(context, path))
            again.append(self._drawn_ms(context, path))
            context.close()
        self._note(
            Charts(
                data=data,
                range=range_,
                first_ms=statistics.median(first),
                again_ms=statistics.median(again),
                most_ms=max(*first, *again),
            )
        )

    def load(self, days: range) -> None:
        """Readings of the device, one a minute, from so many days ago to so many."""
        simulated_fleet = Fleet(size=DEVICES, seed=1)
        now_s = int(time.time()) // EVERY_S * EVERY_S
        moments = range(now_s - days.start * DAY_S, now_s - days.stop * DAY_S - EVERY_S, EVERY_S)
        rows = []
        for sequence, at_s in enumerate(moments, self._stored + 1):
            metrics = msgspec.json.decode(simulated_fleet.telemetry(0, seq=at_s, ts_ms=at_s * 1000))["metrics"]
            body = msgspec.json.encode(metrics)
            rows.append(Row(position(EPOCH, sequence), at_s * 1_000_000, TENANT, self._device, at_s, None, body))
        self._stored += len(rows)
        _run(_settle(self._instance.database_url, rows))

    def roll_up(self) -> None:
        """All that is pending."""
        _run(_roll_up(self._instance.database_url))

    def _drawn_ms(self, context: BrowserContext, path: str) -> float:
        page = self._open(context, path)
        drawn = page.wait_for_function(DRAWN, timeout=WAIT_MS).json_value()
        page.close()
        return float(drawn)

    def _open(self, context: BrowserContext, path: str) -> Page:
        page = context.new_page()
        page.goto(self._instance.ui_url + path, wait_until="commit", timeout=WAIT_MS)
        return page

    def _context(self) -> BrowserContext:
        return self._browser.new_context(storage_state=self._state)

    def _signed_in(self) -> StorageState:
        context = self._browser.new_context()
        page = context.new_page()
        page.goto(self._instance.pulse("account", "link", check=True).stdout.strip())
        page.get_by_role("button", name="Sign in").click()
        page.wait_for_url(f"{self._instance.ui_url}/")
        state = context.storage_state()
        context.close()
        return state

    def _is_there(self) -> bool:
        context = self._context()
        status = context.request.get(f"{self._instance.ui_url}{self.device_path}").status
        context.close()
        return status == 200

    def _cpu_s(self) -> dict[str, float]:
        instance = self._instance
        parts = {"ui": ["serve", "ui"], "nats": ["nats-server"], "postgresql": ["postgres", "-D"]}
        return {part: _cpu_s(instance.child(words)) for part, words in parts.items()}


def _cpu_s(process: psutil.Process) -> float:
    """Of a process and its children: those that are there, and those that have ended."""
    own = process.cpu_times()
    total = sum(own[:4])
    for child in process.children(recursive=True):
        total += sum(child.cpu_times()[:2])
    return float(total)


def _run(work: Coroutine[object, object, None]) -> None:
    """In a thread: playwright has a loop in this one."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(asyncio.run, work).result()


async def _settle(url: str, rows: Sequence[Row]) -> None:
    async with open_pool(url, size_max=2, timeout_s=60, application_name="bench") as pool:
        store = TelemetryStore(pool, stream="TELEMETRY")
        for first in range(0, len(rows), BATCH_ROWS):
            batch = list(rows[first : first + BATCH_ROWS])
            await store.settle(Settlement(rows=batch, signs_of_life=[], dead_letters=[]))
        await pool.execute("ANALYZE telemetry")


async def _roll_up(url: str) -> None:
    async with open_pool(url, size_max=2, timeout_s=600, application_name="bench") as pool:
        while await RollupStore(pool).add():
            pass
        await pool.execute("ANALYZE telemetry_minutes, telemetry_hours")


def measure(browser: Browser, instance: Instance, *, tabs: int, seconds: float, days: int) -> Report:
    """Everything, in turn."""
    report = Report()
    bench = Bench(browser, instance, report)
    bench.weigh("home", "/")
    bench.load(range(MONTH_DAYS, 0))
    bench.roll_up()
    for range_ in ("30d", "7d", "1h"):
        bench.draw("30 days", range_)
    bench.weigh("device", bench.device_path)
    if tabs:
        bench.cost("none", "", tabs=0, seconds=seconds)
        bench.cost("home", "/", tabs=tabs, seconds=seconds)
        bench.cost("device", bench.device_path, tabs=tabs, seconds=seconds)
    if days > MONTH_DAYS:
        bench.load(range(days, MONTH_DAYS))
        bench.roll_up()
        for range_ in ("1y", "30d"):
            bench.draw(f"{days} days", range_)
    return report


def show(report: Report) -> None:
    """The tables."""
    console = Console()
    costs = Table("open tabs", "ui, % of a core", "nats-server", "PostgreSQL")
    for cost in report.costs:
        costs.add_row(f"{cost.tabs} of {cost.page}", f"{cost.ui:.1f}", f"{cost.nats:.1f}", f"{cost.postgresql:.1f}")
    weights = Table("page", "KB over the wire", "requests")
    for weight in report.weights:
        weights.add_row(weight.page, f"{weight.bytes / 1024:.0f}", str(weight.requests))
    charts = Table("stored", "range", "first, ms", "again, ms", "longest, ms")
    for chart in report.charts:
        charts.add_row(
            chart.data, chart.range, f"{chart.first_ms:.0f}", f"{chart.again_ms:.0f}", f"{chart.most_ms:.0f}"
        )
    for table in (costs, weights, charts):
        if table.row_count:
            console.print(table)


@click.command()
@click.option("--json", "as_json", is_flag=True)
@click.option("--tabs", default=20, show_default=True)
@click.option("--seconds", default=30.0, show_default=True, help="For which tabs are open.")
@click.option("--rate", default=200, show_default=True, help="Readings a second of the simulated fleet.")
@click.option("--days", default=MONTH_DAYS, show_default=True, help="Of readings in the end; 365 take some minutes.")
def main(as_json: bool, tabs: int, seconds: float, rate: int, days: int) -> None:
    """Measure and print."""
    program = shutil.which("chromium")
    if program is None:
        raise click.ClickException("chromium is not installed")
    with tempfile.TemporaryDirectory(prefix="pulse-bench-", ignore_cleanup_errors=True) as own:
        sync_us, load_1 = fsync_us(Path(own)), os.getloadavg()[0]
        with started(Path(own)) as instance, simulated(instance, rate=rate), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
            report = measure(browser, instance, tabs=tabs, seconds=seconds, days=days)
            browser.close()
    if as_json:
        print(json.dumps({"rate": rate, **msgspec.to_builtins(report)}))
        return
    print(f"{machine()}; {load_1:.1f} before; fsync of 4 KiB {sync_us:.0f} µs; {rate} readings a second")
    show(report)


if __name__ == "__main__":
    main()

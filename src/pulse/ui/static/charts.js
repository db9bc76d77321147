"use strict";
// The charts of a device: one a metric, of one range, which a drag over any of them narrows for all.

(() => {
  const section = document.querySelector("[data-charts]");
  if (!section) return;
  const metrics = JSON.parse(section.dataset.metrics);
  const figures = new Map([...section.querySelectorAll("[data-metric]")].map((each) => [each.dataset.metric, each]));
  const plots = new Map();
  const FOLLOW_EVERY_MS = 5000;
  const chosen = section.querySelector('[data-range][aria-pressed="true"]');
  let range = { length_s: Number(chosen.dataset.range), zoomed: null };
  let asked = 0;
  let shownAt = 0;
  let series = null;

  const two = (part) => String(part).padStart(2, "0");
  const day = (date) => `${two(date.getMonth() + 1)}-${two(date.getDate())}`;

  // Ticks by the clock of whoever looks; days where the range has several.
  const ticks = (plot, splits) => {
    const length_s = plot.scales.x.max - plot.scales.x.min;
    return splits.map((at) => {
      const date = new Date(at * 1000);
      if (length_s > 2 * 86400) return day(date);
      const time = `${two(date.getHours())}:${two(date.getMinutes())}`;
      return length_s < 600 ? `${time}:${two(date.getSeconds())}` : time;
    });
  };

  // Room above and below; a value that never changes is a line in the middle.
  const span = (_plot, least, most) => {
    if (least === null || most === null) return [0, 1];
    const room = (most - least) * 0.12 || Math.max(Math.abs(most) * 0.05, 1);
    return [least - room, most + room];
  };

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  function options(figure, width) {
    const axis = {
      stroke: colour("--muted"),
      font: "11px system-ui, sans-serif",
      grid: { stroke: colour("--line"), width: 1 },
      ticks: { show: false },
    };
    return {
      width,
      height: 168,
      padding: [8, 20, 0, 0],
      legend: { show: false },
      cursor: {
        sync: { key: "device" },
        points: { size: 7, fill: colour("--accent") },
        drag: { x: true, y: false, setScale: false },
        bind: { dblclick: () => () => zoom(null) },
      },
      scales: { x: { time: true }, y: { range: span } },
      axes: [
        { ...axis, size: 26, space: 70, values: ticks },
        { ...axis, size: 48, space: 34 },
      ],
      series: [{}, { stroke: colour("--accent"), width: 1.6, points: { show: false }, spanGaps: true }],
      hooks: {
        setSelect: [
          (plot) => {
            if (plot.select.width < 6) return;
            zoom([plot.posToVal(plot.select.left, "x"), plot.posToVal(plot.select.left + plot.select.width, "x")]);
          },
        ],
        setCursor: [(plot) => showValue(figure, plot)],
      },
    };
  }

  function showValue(figure, plot) {
    const index = plot.cursor.idx;
    const place = figure.querySelector(".value");
    if (place.dataset.now === undefined) place.dataset.now = place.textContent;
    const value = index === null || index === undefined ? null : plot.data[1][index];
    place.textContent = value === null || value === undefined ? place.dataset.now : Number(value.toPrecision(6)).toString();
    if (value === null || value === undefined) delete place.dataset.now;
  }

  function draw() {
    for (const [name, figure] of figures) {
      const place = figure.querySelector(".plot");
      const values = series.series[name];
      if (typeof uPlot === "undefined") {
        place.textContent = summary(values);
        continue;
      }
      const data = [series.ts, values];
      const known = plots.get(name);
      if (known) {
        known.setData(data);
      } else {
        plots.set(name, new uPlot(options(figure, place.clientWidth), data, place));
      }
    }
  }

  function summary(values) {
    const known = values.filter((value) => value !== null);
    if (!known.length) return "no values in this range";
    const mean = known.reduce((sum, value) => sum + value, 0) / known.length;
    const words = { least: Math.min(...known), mean, most: Math.max(...known) };
    return Object.entries(words).map(([word, value]) => `${word} ${Number(value.toPrecision(5))}`).join(", ");
  }

  const short = (date) =>
    `${day(date)} ${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;

  async function load() {
    const turn = ++asked;
    const now = Date.now() / 1000;
    const [since, until] = range.zoomed || [now - range.length_s, now];
    const query = new URLSearchParams({ from: since.toFixed(3), to: until.toFixed(3) });
    for (const name of metrics) query.append("metric", name);
    let answer;
    try {
      answer = await fetch(`${section.dataset.charts}?${query}`, { headers: { accept: "application/json" } });
    } catch {
      return;
    }
    if (turn !== asked) return;
    if (!answer.ok) {
      const said = await answer.json().catch(() => ({}));
      section.querySelector("[data-range-shown]").textContent = said.detail || "the charts cannot be read now";
      return;
    }
    series = await answer.json();
    shownAt = Date.now();
    draw();
    const width = series.bucket_s < 60 ? `${series.bucket_s} s` : series.bucket_s < 3600 ? `${series.bucket_s / 60} min` : `${series.bucket_s / 3600} h`;
    section.querySelector("[data-range-shown]").textContent =
      `${short(new Date(since * 1000))} to ${short(new Date(until * 1000))}, averages of ${width}`;
  }

  function zoom(selected) {
    range.zoomed = selected;
    for (const plot of plots.values()) plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    load();
  }

  section.addEventListener("click", (event) => {
    const button = event.target.closest("[data-range]");
    if (!button) return;
    for (const each of section.querySelectorAll("[data-range]")) each.setAttribute("aria-pressed", String(each === button));
    range = { length_s: Number(button.dataset.range), zoomed: null };
    const link = new URL(location.href);
    link.searchParams.set("range", button.textContent);
    history.replaceState(null, "", link);
    load();
  });
  document.addEventListener("pulse:reading", () => {
    if (!range.zoomed && Date.now() - shownAt >= FOLLOW_EVERY_MS) load();
  });
  document.addEventListener("pulse:theme", () => {
    for (const plot of plots.values()) plot.destroy();
    plots.clear();
    if (series) draw();
  });
  new ResizeObserver(() => {
    for (const [name, plot] of plots) plot.setSize({ width: figures.get(name).querySelector(".plot").clientWidth, height: 168 });
  }).observe(section);
  load();
})();

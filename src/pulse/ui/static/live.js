"use strict";
// What is live on a page: one stream of events for each tab, closed while nobody looks at it.
//
//   data-live="stages.http.rate" data-as="rate"   the text follows that value of the picture
//   data-stage / data-edge / data-spark            health, speed and history of a stage
//   data-tail="messages|rows"                      lines as they come
//   data-parts, data-part                          what moves of a device or a route
//   data-steps="id"                                a button whose form is answered step by step

const ABSENT = "–";
const TAIL_LINES_MAX = 500;
const SYSTEM_NAMES = { nats: "NATS", postgresql: "PostgreSQL" };
const MEANWHILE = {
  nats: "Nothing is accepted until it is back; what is stored can be read.",
  postgresql: "Readings are still accepted, and wait in the streams.",
};
const HEALTHS = ["flowing", "quiet", "warning", "stuck", "down", "absent", "unknown"];
const page = document.body;

const number = (value, digits) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });

const SHOWN = {
  rate: (value) => number(value, value < 99.95 ? 1 : 0),
  count: (value) => number(value, 0),
  duration: (seconds) => {
    if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
    if (seconds < 60) return `${number(seconds, 1)} s`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min`;
    if (seconds < 172800) return `${Math.floor(seconds / 3600)} h`;
    return `${Math.floor(seconds / 86400)} d`;
  },
};
const shown = (value, how) => (value === null || value === undefined ? ABSENT : how ? SHOWN[how](value) : String(value));

const clock = (date, milliseconds = false) => {
  const two = (part) => String(part).padStart(2, "0");
  const time = `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
  return milliseconds ? `${time}.${String(date.getMilliseconds()).padStart(3, "0")}` : time;
};
const localTime = (date) => {
  const two = (part) => String(part).padStart(2, "0");
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${clock(date)}`;
};
const utc = (date) => `${date.toISOString().slice(0, 19).replace("T", " ")} UTC`;

function timeElement(date) {
  const element = document.createElement("time");
  element.dateTime = date.toISOString();
  element.textContent = localTime(date);
  element.title = utc(date);
  return element;
}

function localize(root) {
  for (const element of root.querySelectorAll("time[datetime]")) {
    const date = new Date(element.dateTime);
    if (!Number.isNaN(date.getTime())) element.textContent = localTime(date);
  }
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const at = (root, path) => {
  // A stage's name may have a space, never a dot.
  let value = root;
  for (const part of path.split(".")) value = value === null || value === undefined ? value : value[part];
  return value;
};

function icon(name) {
  const paths = {
    flowing: "m3 8.5 3.2 3L13 4.5",
    warning: "M8 2.5 14.5 13h-13zM8 6.5v3M8 11.2v.6",
    stuck: "M8 2.5 14.5 13h-13zM8 6.5v3M8 11.2v.6",
    down: "m4 4 8 8M12 4l-8 8",
  };
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
  path.setAttribute("d", paths[name] || "M4 8h8");
  svg.append(path);
  return svg;
}

function notice(kind, strong, text, when) {
  const line = document.createElement(kind === "outage" ? "p" : "li");
  line.className = kind === "warning" ? "notice" : "notice bad";
  const words = document.createElement("span");
  const name = document.createElement("b");
  name.textContent = strong;
  words.append(name);
  if (when) words.append(" since ", timeElement(when));
  words.append(": ");
  words.append(text);
  line.append(icon(kind === "warning" ? "warning" : "down"), words);
  return line;
}

let outagesSaid = null;
function showSystems(systems) {
  const said = JSON.stringify(systems);
  if (said === outagesSaid) return;
  outagesSaid = said;
  const outages = document.querySelector("[data-outages]");
  const lines = [];
  for (const system of systems) {
    const name = SYSTEM_NAMES[system.name] || system.name;
    const chip = document.querySelector(`[data-system="${system.name}"]`);
    if (chip) {
      chip.dataset.health = system.ok ? "flowing" : "down";
      chip.querySelector(".icon").replaceWith(icon(chip.dataset.health));
    }
    if (!system.ok) lines.push(notice("outage", `${name} is away`, `${system.detail}. ${MEANWHILE[system.name] || ""}`, new Date(system.since * 1000)));
  }
  outages.replaceChildren(...lines);
}

const speed = (rate) => (!rate ? 0 : rate < 10 ? 1 : rate < 500 ? 2 : rate < 10000 ? 3 : 4);

function drawSpark(svg, values) {
  const known = values.filter((value) => value !== null);
  const [area, line] = [svg.querySelector(".area"), svg.querySelector(".line")];
  if (known.length < 2) {
    line.setAttribute("d", "");
    area.setAttribute("d", "");
    return;
  }
  const most = Math.max(...known, 1e-9);
  const least = Math.min(...known, 0);
  const step = 120 / (values.length - 1);
  let path = "";
  let first = null;
  let last = 0;
  values.forEach((value, index) => {
    if (value === null) return;
    const y = 26 - (24 * (value - least)) / (most - least || 1);
    path += `${path && values[index - 1] !== null ? "L" : "M"}${(index * step).toFixed(1)} ${y.toFixed(1)}`;
    first = first === null ? index * step : first;
    last = index * step;
  });
  line.setAttribute("d", path);
  area.setAttribute("d", `${path.replaceAll("M", "L").replace("L", "M")}L${last.toFixed(1)} 28L${first.toFixed(1)} 28Z`);
}

function showVerdict(audit) {
  const place = document.querySelector("[data-verdict]");
  if (!place || !audit) return;
  const adds = audit.accepted === audit.stored + audit.dead + audit.in_flight + audit.expired;
  const health = !adds ? "down" : audit.expired ? "warning" : "flowing";
  const text = !adds ? "does not add up" : audit.expired ? "some expired unprocessed" : "nothing is missing";
  if (place.dataset.said === text) return;
  place.dataset.said = text;
  const word = document.createElement("span");
  word.className = "status";
  word.dataset.health = health;
  word.append(icon(health), text);
  place.replaceChildren(word);
}

let troublesSaid = null;
function showTroubles(stages) {
  const bad = Object.entries(stages).filter(
    ([, stage]) => ["stuck", "down", "warning"].includes(stage.health) && stage.why,
  );
  const said = JSON.stringify(bad.map(([name, stage]) => [name, stage.health, stage.why]));
  if (said === troublesSaid) return;
  troublesSaid = said;
  document
    .querySelector("[data-troubles]")
    .replaceChildren(...bad.map(([name, stage]) => notice(stage.health === "warning" ? "warning" : "bad", name, stage.why)));
}

function showPicture(picture) {
  if (picture.fleet) picture.fleet.devices = picture.fleet.online + picture.fleet.stale + picture.fleet.offline;
  showSystems(picture.systems);
  for (const element of document.querySelectorAll("[data-live]")) {
    setText(element, shown(at(picture, element.dataset.live), element.dataset.as));
  }
  for (const element of document.querySelectorAll("[data-stage]")) {
    const health = (picture.stages[element.dataset.stage] || {}).health || "unknown";
    if (HEALTHS.includes(health)) element.dataset.health = health;
  }
  for (const element of document.querySelectorAll("[data-why]")) {
    const why = (picture.stages[element.dataset.why] || {}).why;
    if (why) setText(element, why);
  }
  for (const element of document.querySelectorAll("[data-edge]")) {
    element.dataset.speed = speed((picture.stages[element.dataset.edge] || {}).rate);
  }
  for (const element of document.querySelectorAll("[data-level]")) {
    const width = Math.min(1, at(picture, element.dataset.level) || 0) * Number(element.dataset.width);
    element.setAttribute("width", width.toFixed(1));
  }
  for (const element of document.querySelectorAll("[data-spark]")) {
    drawSpark(element, picture.sparks[element.dataset.spark] || []);
  }
  showTroubles(picture.stages);
  showVerdict(picture.audit);
  for (const element of document.querySelectorAll("[data-live-state]")) {
    element.replaceChildren("live, as of ", timeElement(new Date(picture.at_ms)));
  }
}

let paused = false;
function showLines(found, kind) {
  const list = document.querySelector("[data-tail]");
  const state = document.querySelector("[data-live-state]");
  if (!list || paused) return;
  setText(state, found.away ? `nothing can be read: ${found.away}` : list.childElementCount ? "live" : "waiting for messages");
  if (!found.lines.length) return;
  const follow = list.scrollTop + list.clientHeight >= list.scrollHeight - 40;
  if (found.skipped) list.append(remark(`${number(found.skipped, 0)} more came too fast to be shown`));
  for (const line of found.lines) list.append(lineElement(line, kind));
  while (list.childElementCount > TAIL_LINES_MAX) list.firstElementChild.remove();
  setText(state, "live");
  if (follow) list.scrollTop = list.scrollHeight;
  if (kind === "rows") showLatest(found.lines[found.lines.length - 1]);
}

function remark(text) {
  const item = document.createElement("p");
  item.className = "remark";
  item.textContent = text;
  return item;
}

function span(name, text) {
  const element = document.createElement("span");
  element.className = name;
  element.textContent = text;
  return element;
}

function lineElement(line, kind) {
  const item = document.createElement("p");
  const when = new Date(line.at_ms);
  const time = span("at", clock(when, true));
  time.title = utc(when);
  item.append(time);
  if (kind === "messages") {
    const from = span("from", "");
    if (line.device_id) {
      const link = document.createElement("a");
      link.href = `/devices/${line.tenant_id}/${line.device_id}`;
      link.textContent = `${line.tenant_id}/${line.device_id}`;
      from.append(link);
    } else {
      from.textContent = line.subject;
    }
    item.append(from, span("from", line.kind));
  }
  item.append(said(line.text, kind));
  return item;
}

// Metrics as words; whatever else a message holds is told as it is.
function said(text, kind) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    return span("text", text);
  }
  const metrics = kind === "rows" ? value : value && value.metrics;
  if (metrics === null || typeof metrics !== "object" || Array.isArray(metrics)) return span("text", text);
  const words = span("text", "");
  for (const [name, each] of Object.entries(metrics)) {
    const label = document.createElement("i");
    label.textContent = `${name} `;
    words.append(label, typeof each === "string" ? each : JSON.stringify(each), "  ");
  }
  return words;
}

function showLatest(line) {
  let metrics;
  try {
    metrics = JSON.parse(line.text);
  } catch {
    return;
  }
  for (const element of document.querySelectorAll("[data-latest]")) {
    const value = metrics[element.dataset.latest];
    if (value !== undefined) setText(element, String(value));
  }
  document.dispatchEvent(new CustomEvent("pulse:reading", { detail: { at_ms: line.at_ms, metrics } }));
}

// Shadow and commands have moved: their parts of the page are asked for anew. An editor that is open is left alone.
let partsTurn = 0;
async function showParts(mark) {
  const place = document.querySelector("[data-parts]");
  if (!place || place.dataset.mark === mark) return;
  const turn = ++partsTurn;
  let answer;
  try {
    answer = await fetch(place.dataset.parts, { headers: { accept: "text/html" }, redirect: "error" });
  } catch {
    return;
  }
  if (!answer.ok || turn !== partsTurn) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (turn !== partsTurn) return;
  localize(fresh);
  const focused = document.activeElement.id;
  for (const part of place.querySelectorAll("[data-part]")) {
    const found = fresh.querySelector(`[data-part="${part.dataset.part}"]`);
    if (found && !part.open) part.replaceWith(document.adoptNode(found));
  }
  if (focused && document.activeElement === document.body) document.getElementById(focused)?.focus();
  place.dataset.mark = fresh.querySelector("[data-mark]").dataset.mark;
}

// A page that an outage has kept away: it is asked for again until it is there.
const COMES_BACK_EVERY_MS = 3000;
async function comeBack() {
  if (!document.hidden) {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } }).catch(() => null);
    if (answer && answer.status !== 503) {
      location.reload();
      return;
    }
  }
  setTimeout(comeBack, COMES_BACK_EVERY_MS);
}
if (document.querySelector("[data-comes-back]")) setTimeout(comeBack, COMES_BACK_EVERY_MS);

// The tab's one stream.
let source = null;
function connect() {
  if (source || document.hidden || !page.querySelector("[data-systems]")) return;
  source = new EventSource(page.dataset.stream || "/events?topic=systems");
  source.addEventListener("systems", (event) => showSystems(JSON.parse(event.data)));
  source.addEventListener("picture", (event) => showPicture(JSON.parse(event.data)));
  source.addEventListener("messages", (event) => showLines(JSON.parse(event.data), "messages"));
  source.addEventListener("rows", (event) => showLines(JSON.parse(event.data), "rows"));
  source.addEventListener("mark", (event) => showParts(JSON.parse(event.data)));
  source.addEventListener("error", () => {
    for (const element of document.querySelectorAll("[data-live-state]")) setText(element, "not connected; trying again");
    // A refusal (signed out) closes it for good; whatever else, the browser comes back by itself.
    if (source && source.readyState === EventSource.CLOSED) setTimeout(reconnect, 5000);
  });
}
function disconnect() {
  if (source) source.close();
  source = null;
}
function reconnect() {
  disconnect();
  connect();
}
document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
window.addEventListener("pagehide", disconnect);
window.addEventListener("pageshow", connect);

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.copy) {
    const place = document.getElementById(button.dataset.copy);
    navigator.clipboard.writeText(place.value === undefined ? place.textContent : place.value).then(() => {
      setText(button, "Copied");
      setTimeout(() => setText(button, "Copy"), 2000);
    });
  }
  if ("themeSwitch" in button.dataset) {
    const dark = getComputedStyle(document.documentElement).colorScheme === "dark";
    document.documentElement.dataset.theme = dark ? "light" : "dark";
    localStorage.setItem("pulse-theme", document.documentElement.dataset.theme);
    document.dispatchEvent(new CustomEvent("pulse:theme"));
  }
  if ("pause" in button.dataset) {
    paused = !paused;
    button.setAttribute("aria-pressed", String(paused));
    setText(button, paused ? "Go on" : "Pause");
  }
});

// What a form does to many is told line by line; ending the request ends it.
document.addEventListener("submit", (event) => {
  const button = event.submitter;
  if (!button || !button.dataset.steps) return;
  event.preventDefault();
  if (!button.disabled) followSteps(event.target, button);
});

async function followSteps(form, button) {
  const place = document.getElementById(button.dataset.steps);
  const [words, bar, stop] = ["[data-words]", "progress", "[data-stop]"].map((each) => place.querySelector(each));
  const request = new AbortController();
  let far = { done: 0, total: 0 };
  const verb = button.dataset.verb;
  const many = () => `${number(far.done, 0)} of ${number(Math.max(far.total, far.done), 0)} ${verb}`;
  const body = new URLSearchParams(new FormData(form));
  body.set(button.name, button.value);
  for (const each of form.querySelectorAll("button")) each.disabled = true;
  place.hidden = false;
  setText(words, "begun");
  stop.addEventListener("click", () => request.abort(), { once: true });
  let ended = "The connection broke";
  try {
    const answer = await fetch(form.getAttribute("action"), {
      method: "POST",
      body,
      headers: { accept: "application/x-ndjson, application/json" },
      redirect: "error",
      signal: request.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).detail);
    for await (const line of linesOf(answer.body)) {
      const told = JSON.parse(line);
      if (told.go) {
        location.assign(told.go);
        return;
      }
      far = told;
      bar.max = Math.max(far.total, far.done, 1);
      bar.value = far.done;
      setText(words, many());
    }
  } catch (error) {
    ended = request.signal.aborted ? "Cancelled" : `It stopped: ${error.message}`;
  }
  setText(words, `${ended}: ${many()}, the rest is as it was.`);
  place.querySelector("[data-hint]").hidden = true;
  const anew = document.createElement("button");
  anew.type = "button";
  anew.className = "quiet small";
  anew.textContent = "Show what is left";
  anew.addEventListener("click", () => location.reload());
  stop.replaceWith(anew);
  anew.focus();
}

async function* linesOf(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines.filter(Boolean);
  }
}

document.addEventListener("change", (event) => {
  const into = event.target.dataset.into;
  const file = into && event.target.files[0];
  if (file) file.text().then((text) => (document.getElementById(into).value = text));
});

document.addEventListener("htmx:afterSwap", (event) => localize(event.detail.target.ownerDocument));
localize(document);
document.querySelector(".side nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
for (const svg of document.querySelectorAll("[data-spark]")) drawSpark(svg, JSON.parse(svg.dataset.values));
connect();


"use strict";
// Lays out what /status.json says. Text from the server only ever becomes text (textContent), never markup.
const POLL_MS = 2000, TIMEOUT_MS = 5000, SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const put = (node, text) => { if (node.textContent !== text) node.textContent = text; };
const attribute = (node, name, value) => { if (node.getAttribute(name) !== value) node.setAttribute(name, value); };

function make(tag, name, ...inside) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
}
function drawn(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// ------------------------------------------------------------------ figures as people read them
const grouped = (value, digits = 0) =>
  value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
const rate = (value) => (value === 0 ? "0" : value < 10 ? grouped(value, 1) : grouped(value));
function time(ms) {
  if (ms === null) return ["–", ""];
  const [value, unit] = ms >= 999.5 ? [ms / 1000, "s"] : [ms, "ms"];
  const text = value >= 100 ? grouped(value) : value >= 10 ? grouped(value, 1) : grouped(value, 2);
  return [ms >= 10000 ? "≥ 10" : text, unit];
}
const inWords = (pair) => pair.join(" ").trim();
function percent(share) {
  if (share === null) return ["–", ""];
  if (share === 0 || share === 1) return [String(100 * share), "%"];
  const hundredths = Math.min(Math.max(Math.round(share * 1e4), 1), 9999);
  return [grouped(hundredths / 100, 2), "%"];
}
function ago(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}
const clock = (ms) => new Date(ms).toLocaleTimeString([], { hourCycle: "h23" });
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

// ------------------------------------------------------------------ a shape for each level: colour is never alone
const OCTAGON = "M6.5 1h7L19 6.5v7L13.5 19h-7L1 13.5v-7z", DISC = "M10 1a9 9 0 1 0 0 18a9 9 0 1 0 0-18z";
const MARKS = {
  "keeping": [[DISC], ["M6 10.4l2.7 2.7L14 7.6", "cut"]],
  "idle": [["M10 2a8 8 0 1 0 0 16a8 8 0 1 0 0-16z", "ring"]],
  "at risk": [["M10 1.2L19.4 18.2H.6z"], ["M10 7.2v5M10 15.2v.1", "cut"]],
  "breaching": [[OCTAGON], ["M7 7l6 6M13 7l-6 6", "cut"]],
  "failed": [["M2 2h16v16H2z"], ["M7 7l6 6M13 7l-6 6", "cut"]],
  "loading": [["M10 2a8 8 0 0 1 8 8M18 10a8 8 0 0 1-3 6.2M10 18a8 8 0 0 1-8-8", "ring"]],
  "not loaded": [["M3 3h14v14H3z", "ring"]],
};
const SIGNS = { "keeping": "✓", "idle": "○", "at risk": "▲", "breaching": "✕", "failed": "✕", "loading": "…", "not loaded": "□" };
function mark(into, level) {
  if (into.dataset.mark === level) return;
  into.dataset.mark = level;
  const svg = drawn("svg", { viewBox: "0 0 20 20", "aria-hidden": "true" });
  for (const [d, name] of MARKS[level] || []) svg.append(drawn("path", name ? { d, class: name } : { d }));
  into.replaceChildren(svg);
}
function tabIcon(level) {
  const colour = { "keeping": "#1d8a55", "at risk": "#d08700", "breaching": "#c8332a", "failed": "#c8332a" }[level] || "#7b8088";
  const paths = (MARKS[level] || []).map(([d, name]) =>
    `<path d="${d}" fill="${name ? "none" : colour}" stroke="${name === "cut" ? "#fff" : name ? colour : "none"}" stroke-width="2.4"/>`);
  attribute($("icon"), "href",
    "data:image/svg+xml," + encodeURIComponent(`<svg xmlns="${SVG}" viewBox="0 0 20 20">${paths.join("")}</svg>`));
}

// ------------------------------------------------------------------ charts
function ceiling(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 1.5, 2, 3, 4, 5, 6, 8, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}
const at = (values, top, scale = 100) => (i) =>
  `${(i / (values.length - 1) * 100).toFixed(2)} ${(scale - Math.min(values[i] / top, 1) * scale).toFixed(2)}`;
function line(values, top) {
  const place = at(values, top);
  let path = "", open = false;
  for (let i = 0; i < values.length; i++) {
    if (values[i] === null) { open = false; continue; }
    path += open ? `L${place(i)}` : `M${place(i)}h0`;
    open = true;
  }
  return path;
}
function area(values, top, floor) {
  const place = at(values, top), below = floor && at(floor, top);
  let path = "", from = -1;
  for (let i = 0; i <= values.length; i++) {
    const here = i < values.length && values[i] !== null;
    if (here && from < 0) from = i;
    if (here || from < 0) continue;
    if (i - from === 1) {  // one step alone is as wide as half a step
      const x = at(values, top)(from).split(" ")[0], y = (n) => 100 - Math.min((n || 0) / top, 1) * 100;
      path += `M${x} ${y(values[from])}h-0.9V${y(floor ? floor[from] : 0)}h0.9z`;
      from = -1;
      continue;
    }
    const span = Array.from({ length: i - from }, (_, n) => from + n);
    const back = below ? span.reverse().map((n) => `L${below(n)}`).join("") : "";
    const x = (n) => (n / (values.length - 1) * 100).toFixed(2);
    if (below) span.reverse();
    path += `M${span.map(place).join("L")}` + (below ? `${back}z` : `L${x(i - 1)} 100L${x(from)} 100z`);
    from = -1;
  }
  return path;
}
class Chart {
  constructor(title, legend, classes) {
    this.svg = drawn("svg", { viewBox: "0 0 100 100", preserveAspectRatio: "none", "aria-hidden": "true" });
    this.paths = classes.map((name) => this.svg.appendChild(drawn("path", { class: name })));
    this.top = make("span", "top-value");
    this.nothing = make("span", "nothing", "no requests");
    this.plot = make("div", "plot", this.svg, this.top, this.nothing);
    this.plot.setAttribute("role", "img");
    this.title = title;
    const words = this.words = legend.map(([name, text]) => make("span", "", make("i", name), text));
    this.node = make("div", "chart", make("div", "caption", make("b", "", title), make("div", "legend", ...words)), this.plot,
      make("div", "axis", make("span", "", "5 min ago"), make("span", "", "now")));
    this.node.querySelector(".axis").setAttribute("aria-hidden", "true");
  }
  draw(top, topText, summary, paths) {
    this.nothing.hidden = paths !== null;
    this.top.hidden = this.svg.style.visibility = paths === null ? "hidden" : "";
    this.top.hidden = paths === null;
    put(this.top, topText);
    attribute(this.plot, "aria-label", `${this.title} over five minutes: ${paths === null ? "no requests" : summary}`);
    (paths || []).forEach((d, i) => attribute(this.paths[i], "d", d));
  }
}
// A line is not drawn along the axis where nothing goes on.
const active = (values) => values.map((v, i) => (v || values[i - 1] || values[i + 1] ? v : null));
const most = (...lists) => Math.max(0, ...lists.flat().filter((value) => value !== null));

// ------------------------------------------------------------------ named figures
class Figures {
  constructor(node) { this.node = node; this.known = new Map(); }
  set(name, [value, unit], bad = false) {
    let dd = this.known.get(name);
    if (!dd) {
      dd = make("dd", "", make("span"), make("small"));
      this.node.append(make("div", "", make("dt", "", name), dd));
      this.known.set(name, dd);
    }
    put(dd.firstChild, value);
    put(dd.lastChild, unit);
    dd.classList.toggle("bad", bad);
  }
}

// ------------------------------------------------------------------ one model version
const narrow = matchMedia("(max-width: 760px)");
let cards = new Map(), number = 0;
class Card {
  constructor(model) {
    const id = `model-${++number}`;
    this.name = make("span", "name");
    this.about = make("span", "about");
    this.icon = make("span", "icon");
    this.level = make("span");
    this.button = make("button", "bar", make("span", "title", this.name, this.about),
      make("span", "chip", this.icon, this.level), make("span", "caret"));
    this.button.type = "button";
    this.button.setAttribute("aria-controls", id);
    this.why = make("p", "why");
    this.body = make("div", "body");
    this.body.id = id;
    this.node = make("article", "model", make("h3", "", this.button), this.why, this.body);
    this.chosen = null;
    this.button.addEventListener("click", () => { this.chosen = this.body.hidden; this.open(this.chosen); this.fill(); });
    const list = make("dl", "figures");
    this.figures = new Figures(list);
    this.load = new Chart("Load, per second", [["line", "offered"], ["fill", "in time"]], ["lost", "fill", "strong", "line"]);
    this.latency = new Chart("Latency", [["strong", "p99"], ["thin", "p50"], ["dash", "objective"]], ["thin", "strong", "dash"]);
    this.spent = new Chart("Where the time goes", [["fill", "queue"], ["deep", "compute"]], ["fill", "deep"]);
    this.bars = make("div", "bars");
    this.bars.setAttribute("role", "img");
    this.ticks = make("div", "ticks");
    this.ticks.setAttribute("aria-hidden", "true");
    this.mean = make("span", "legend");
    const batches = make("div", "chart", make("div", "caption", make("b", "", "Batch sizes, rows"), this.mean), this.bars, this.ticks);
    this.lost = make("ul", "list");
    this.facts = make("ul", "list");
    this.body.append(list, make("div", "charts", this.load.node, this.latency.node, this.spent.node),
      make("div", "charts more", batches, make("div", "chart", make("b", "", "Promises broken"), this.lost),
        make("div", "chart", make("b", "", "Where it runs"), this.facts)));
  }
  open(yes) {
    this.body.hidden = !yes;
    this.node.classList.toggle("open", yes);
    attribute(this.button, "aria-expanded", String(yes));
  }
  show(model, few) {
    const { verdict, history } = model;
    this.node.dataset.level = verdict.level;
    put(this.name, model.name);
    const aim = model.slo_ms === null ? "no objective" : `${inWords(percent(target)).replace(".00", "")} within ${inWords(time(model.slo_ms)).replace(/\.0+ /, " ")}`;
    put(this.about, [model.version === null ? "no version" : `version ${model.version}`, model.state, aim]
      .filter((word) => word !== aim || model.devices.length).join(" · "));
    mark(this.icon, verdict.level);
    const cause = verdict.cause.startsWith(verdict.level) ? "" : verdict.cause;
    put(this.level, capital(cause ? `${verdict.level}: ${cause}` : verdict.cause || verdict.level));
    put(this.why, verdict.text);
    const trouble = verdict.level !== "keeping" && verdict.level !== "idle";
    this.open(this.chosen ?? (history !== null && (few || trouble)));
    this.model = model;
    this.fill();
  }
  fill() {
    if (this.body.hidden) return;
    this.numbers(this.model);
    this.charts(this.model);
    this.sizes(this.model);
    this.lists(this.model);
  }
  numbers(model) {
    const [p50, p95, p99] = model.latency_ms, missed = (share) => share !== null && share < target;
    const late = (ms) => ms !== null && model.slo_ms !== null && ms > model.slo_ms;
    const f = this.figures;
    f.set("Share in time", percent(model.attainment), missed(model.attainment));
    f.set("over 5 min", percent(model.attainment_5m), missed(model.attainment_5m));
    f.set("Offered", [rate(model.offered_per_s), "/s"]);
    f.set("In time", [rate(model.in_time_per_s), "/s"]);
    f.set("p50", time(p50), late(p50));
    f.set("p95", time(p95), late(p95));
    f.set("p99", time(p99), late(p99));
    f.set("In queue", time(model.queue_ms));
    f.set("Computing", time(model.compute_ms));
  }
  charts({ history: h, slo_ms: slo, queue_ms, compute_ms }) {
    if (h === null) { for (const chart of [this.load, this.latency, this.spent]) chart.draw(1, "", "", null); return; }
    const load = ceiling(most(h.offered_per_s)), last = h.offered_per_s.length - 1;
    this.load.draw(load, grouped(load, load < 10 ? 1 : 0),
      `now ${rate(h.offered_per_s[last])} offered, ${rate(h.in_time_per_s[last])} in time; at most ${rate(most(h.offered_per_s))} offered`,
      [area(h.offered_per_s, load, h.in_time_per_s), area(h.in_time_per_s, load), line(active(h.in_time_per_s), load), line(active(h.offered_per_s), load)]);
    const worst = most(h.p99_ms), top = ceiling(Math.max(worst, slo === null ? 0 : Math.min(slo * 1.15, Math.max(worst * 4, slo * 0.01))));
    this.latency.words[2].hidden = slo === null;
    const objective = slo !== null && slo <= top ? `M0 ${100 - slo / top * 100}H100` : "";
    this.latency.draw(top, inWords(time(top)).replace(/\.0+ /, " "),
      worst ? `p99 at most ${inWords(time(worst))}${slo === null ? "" : `, objective ${inWords(time(slo))}`}` : "nothing was answered",
      worst ? [line(h.p50_ms, top), line(h.p99_ms, top), objective] : null);
    const both = h.queue_ms.map((value, i) => (value === null ? null : value + h.compute_ms[i])), high = ceiling(most(both));
    this.spent.draw(high, inWords(time(high)).replace(/\.0+ /, " "),
      queue_ms === null ? "nothing was answered in the last minute" : `in the last minute ${inWords(time(queue_ms))} in the queue, ${inWords(time(compute_ms))} computing, on average`,
      worst ? [area(both, high, h.compute_ms), area(h.compute_ms, high)] : null);
  }
  sizes({ batches, mean_rows }) {
    const total = batches.reduce((sum, { batches: n }) => sum + n, 0), high = most(batches.map((b) => b.batches));
    put(this.mean, total ? `${grouped(total)} batches, ${grouped(mean_rows, 1)} rows on average` : "no batches in the last minute");
    attribute(this.bars, "aria-label", "Batches by rows: " +
      (batches.filter((b) => b.batches).map((b) => `${b.rows}: ${inWords(percent(b.batches / total))}`).join(", ") || "none"));
    while (this.bars.children.length > batches.length) { this.bars.lastChild.remove(); this.ticks.lastChild.remove(); }
    while (this.bars.children.length < batches.length) { this.bars.append(make("div")); this.ticks.append(make("span")); }
    batches.forEach(({ rows, batches: n }, i) => {
      const bar = this.bars.children[i];
      bar.style.height = `${n ? Math.max(n / high * 100, 2) : 0}%`;
      bar.title = `${rows} rows: ${grouped(n)} batches`;
      put(this.ticks.children[i], batches.length > 12 && i % 2 ? "" : rows.replace(/^\d+-/, "≤"));
    });
  }
  lists(model) {
    const row = (kind, name, count) => {
      const word = make("span", "kind");
      if (kind) word.append(`${kind} · `);
      word.append(make("b", "", name));
      return make("li", "", word, make("span", "count", count));
    };
    const lost = model.broken.map((b) => row(b.kind === b.reason ? "" : b.kind, b.reason.replaceAll("_", " "), grouped(b.requests)));
    const faults = model.client_faults.map((b) => row("by the client", b.reason.replaceAll("_", " "), grouped(b.requests)));
    replace(this.lost, lost.length || faults.length ? [...lost, ...faults] : [make("li", "none", "none in the last minute")]);
    const speed = model.scale === null ? [] : [row("", "Speed against that at load", `${grouped(1 / model.scale, 2)}×`)];
    replace(this.facts, [
      row("", model.devices.length > 1 ? "Devices" : "Device", model.devices.join(", ") || "–"),
      row("", "Instances", grouped(model.instances)),
      row("", "Waiting now", grouped(model.pending)),
      ...(model.batch_rows_limit === null ? [] : [row("", "Largest batch", grouped(model.batch_rows_limit))]),
      ...speed,
    ]);
  }
}
// Puts `rows` where others were, only if they say something else: what somebody reads or selects stays.
function replace(list, rows) {
  const text = (nodes) => Array.from(nodes, (node) => node.textContent).join("\n");
  if (text(list.children) !== text(rows)) list.replaceChildren(...rows);
}

// ------------------------------------------------------------------ the whole
let target = 0.99, announced = "", devices = null, totals = null, answeredAt = 0, seenAt = 0, away = false;
function show(status) {
  const { server, verdict } = status;
  target = server.target;
  $("main").hidden = false;
  document.body.dataset.level = verdict.level;
  put($("version"), server.version);
  put($("headline"), verdict.headline);
  put($("why"), verdict.text);
  mark($("mark"), verdict.level);
  tabIcon(verdict.level);
  document.title = `${SIGNS[verdict.level]} ${verdict.headline} · onclock`;
  if (announced !== verdict.level + verdict.cause) {
    announced = verdict.level + verdict.cause;
    put($("announce"), `${verdict.headline}. ${verdict.cause}`);
  }
  totals = totals || new Figures($("totals"));
  totals.set("Offered", [rate(status.offered_per_s), "/s"]);
  totals.set("In time", [rate(status.in_time_per_s), "/s"]);
  totals.set("Share in time", percent(status.attainment), status.attainment !== null && status.attainment < target);
  totals.set("Up for", ago(server.up_s).split(" "));
  showDevices(status.devices);
  put($("aim"), `A promise is kept when ${inWords(percent(target)).replace(".00", "")} of the requests are answered in time.`);
  const more = status.count - status.shown;
  put($("models-note"), more ? `the ${status.shown} most urgent of ${status.count}` : `${status.count} version${status.count === 1 ? "" : "s"}`);
  showModels(status.models);
}
function showDevices(list) {
  if (!devices) {
    devices = make("dd", "devices");
    $("totals").append(make("div", "wide", make("dt", "", "Saturation: asked for, of what can be answered in time"), devices));
  }
  while (devices.children.length > list.length) devices.lastChild.remove();
  while (devices.children.length < list.length) {
    devices.append(make("div", "device", make("span", "name"), make("span", "meter", make("i")), make("span", "note")));
  }
  list.forEach((device, i) => {
    const [name, meter, note] = devices.children[i].children;
    put(name, device.name);
    meter.classList.toggle("full", device.saturation >= 0.9);
    meter.firstChild.style.width = `${Math.min(device.saturation, 1) * 100}%`;
    const slots = `${device.slots} slot${device.slots === 1 ? "" : "s"}`;
    put(note, device.healthy ? `${grouped(device.saturation, 2)} · ${slots}` : "lost");
  });
}
function showModels(models) {
  const before = cards, few = models.length <= (narrow.matches ? 1 : 4), list = $("models");
  const focused = document.activeElement;
  cards = new Map();
  models.forEach((model, i) => {
    const key = JSON.stringify([model.name, model.version]), card = before.get(key) || new Card(model);
    cards.set(key, card);
    // Moved only where the order has changed: a node that stays keeps its focus and its place in a reader.
    if (list.children[i] !== card.node) list.insertBefore(card.node, list.children[i] || null);
    card.show(model, few);
  });
  for (const [key, card] of before) if (!cards.has(key)) card.node.remove();
  // A node that was moved has lost the focus: whoever was there is there still.
  if (focused !== document.activeElement && list.contains(focused)) focused.focus({ preventScroll: true });
}

// ------------------------------------------------------------------ asking
function gone(why) {
  away = true;
  document.body.classList.add("is-gone");
  put($("gone"), `${why} ${answeredAt ? "What is below is from then; still" : "Still"} trying to reach it.`);
  $("gone").hidden = false;
  put($("fresh"), "No connection");
  document.title = "✕ No answer · onclock";
}
function back() {
  away = false;
  document.body.classList.remove("is-gone");
  $("gone").hidden = true;
  answeredAt = Date.now();
}
function tick() {
  if (away || !answeredAt) return;
  put($("fresh"), `Live · figures of ${clock(seenAt)}`);
}
async function poll() {
  let status;
  try {
    const answer = await fetch("/status.json", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    if (answer.status === 401) return gone("The server asks for a key: load this page again.");
    if (!answer.ok) return gone(`The server answers with status ${answer.status}.`);
    status = await answer.json();
  } catch {
    return gone(answeredAt ? `The server has not answered since ${clock(answeredAt)}.` : "The server does not answer.");
  }
  seenAt = status.server.at_s * 1000;
  back();
  show(status);
  tick();
}
// Nobody looks at a hidden page: it asks for nothing until it is seen again.
async function run() {
  for (;;) {
    if (!document.hidden) await poll().catch((error) => { gone(`This page has failed: ${error.message}.`); console.error(error); });
    await new Promise((resume) => {
      const timer = setTimeout(resume, POLL_MS);
      document.addEventListener("visibilitychange", () => { clearTimeout(timer); resume(); }, { once: true });
    });
  }
}
run();

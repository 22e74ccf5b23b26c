"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg"; // a name, not an address: nothing is fetched
const OURS = "hia";
const SHOWN = 250; // rows of a table before the button that shows all
const state = new URLSearchParams(location.hash.slice(1));

function setState(name, value) {
  if (value === "" || value === null || value === undefined) state.delete(name);
  else state.set(name, value);
  history.replaceState(null, "", "#" + state.toString());
}

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function svg(tag, attributes = {}, text = null) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== null) node.textContent = text;
  return node;
}

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0";
  if (Math.abs(value) < 1e-3) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, String(Math.trunc(Math.abs(value))).length) });
}

const unique = (values) => [...new Set(values)];
const distinct = (rows, key) => unique(rows.map((row) => row[key]).filter((value) => value !== null && value !== undefined && value !== ""));

function byName(a, b) {
  if (a === b) return 0;
  return a === OURS ? -1 : b === OURS ? 1 : String(a).localeCompare(String(b), "en", { numeric: true });
}

// a provider has one colour and one shape everywhere
const PROVIDERS = unique([OURS, ...DATA.devices.flatMap((device) => device.rows.map((row) => row.provider)), "baseline", "anyres", "released"]).sort(byName);
const colour = (name) => `var(--p${PROVIDERS.indexOf(name) % 10})`;
const SHAPES = [
  (s) => `M0 ${-s}A${s} ${s} 0 1 1 0 ${s}A${s} ${s} 0 1 1 0 ${-s}Z`,
  (s) => `M${-s} ${-s}H${s}V${s}H${-s}Z`,
  (s) => `M0 ${-1.2 * s}L${1.1 * s} ${0.9 * s}H${-1.1 * s}Z`,
  (s) => `M0 ${-1.3 * s}L${1.3 * s} 0L0 ${1.3 * s}L${-1.3 * s} 0Z`,
  (s) => `M0 ${1.2 * s}L${1.1 * s} ${-0.9 * s}H${-1.1 * s}Z`,
  (s) => `M${-0.4 * s} ${-s}H${0.4 * s}V${-0.4 * s}H${s}V${0.4 * s}H${0.4 * s}V${s}H${-0.4 * s}V${0.4 * s}H${-s}V${-0.4 * s}H${-0.4 * s}Z`,
];
const shape = (name, size) => SHAPES[PROVIDERS.indexOf(name) % SHAPES.length](size);

function mark(name, x, y, tip, size = 4.2) {
  const node = svg("path", { d: shape(name, size), transform: `translate(${x} ${y})`, class: "mark" });
  node.style.fill = colour(name);
  node.append(svg("title", {}, tip));
  node.dataset.tip = tip;
  return node;
}

const tipBox = document.getElementById("tip");
document.addEventListener("pointermove", (event) => {
  const text = event.target instanceof Element ? event.target.closest("[data-tip]")?.dataset.tip : null;
  tipBox.hidden = !text;
  if (!text) return;
  tipBox.textContent = text;
  tipBox.style.left = `${Math.min(event.clientX + 14, innerWidth - 370)}px`;
  tipBox.style.top = `${event.clientY + 14}px`;
});

// charts
function ticks(low, high) {
  const decades = Math.log10(high / low);
  const steps = decades < 0.6 ? [1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9] : decades < 1.6 ? [1, 2, 5] : [1];
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const step of steps) found.push(step * 10 ** power);
  return found.filter((value) => value >= low * 0.999 && value <= high * 1.001);
}

function chart({ series, lines = false, limits = [], xLabel, yLabel, xTicks = null, label, width = 860, height = 430 }) {
  const left = 78, right = 18, top = 14, bottom = 52;
  const points = series.flatMap((one) => one.points);
  if (!points.length) return el("p", { class: "empty" }, "Nothing measured here.");
  const xs = points.map((p) => p.x), ys = points.map((p) => p.y);
  const corner = limits.map((limit) => limit.rate / limit.bandwidth);
  const x0 = Math.min(...xs, ...corner.map((x) => x / 3)) / 1.15, x1 = Math.max(...xs, ...corner.map((x) => x * 3)) * 1.15;
  const y0 = Math.min(...ys) / 1.3, y1 = Math.max(...ys, ...limits.map((limit) => limit.rate)) * 1.3;
  const scale = (value, a, b, from, to) => from + ((Math.log(value) - Math.log(a)) / (Math.log(b) - Math.log(a) || 1)) * (to - from);
  const X = (value) => scale(value, x0, x1, left, width - right), Y = (value) => scale(value, y0, y1, height - bottom, top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label });
  for (const value of ticks(y0, y1)) {
    root.append(svg("line", { x1: left, x2: width - right, y1: Y(value), y2: Y(value), class: "grid" }));
    root.append(svg("text", { x: left - 8, y: Y(value) + 4, "text-anchor": "end" }, number(value)));
  }
  let reached = -Infinity;
  for (const value of xTicks ?? ticks(x0, x1)) {
    root.append(svg("line", { x1: X(value), x2: X(value), y1: top, y2: height - bottom, class: "grid" }));
    const name = String(xTicks ? value : number(value));
    if (X(value) - reached < 4 * name.length + 6) continue; // it would run into the one before
    reached = X(value) + 4 * name.length;
    root.append(svg("text", { x: X(value), y: height - bottom + 18, "text-anchor": "middle" }, name));
  }
  root.append(svg("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "axis" }));
  root.append(svg("text", { x: (left + width - right) / 2, y: height - 10, "text-anchor": "middle" }, xLabel));
  root.append(svg("text", { transform: `translate(16 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, yLabel));
  for (const limit of limits) {
    const ridge = limit.rate / limit.bandwidth, low = Math.max(x0, y0 / limit.bandwidth);
    root.append(svg("path", { class: "limit", d: `M${X(low)} ${Y(low * limit.bandwidth)}L${X(ridge)} ${Y(limit.rate)}L${X(x1)} ${Y(limit.rate)}` }));
    // left of the roof's corner, where no mark can be, unless that is too near the edge for its text
    const room = X(ridge) - left > 8 * limit.name.length;
    root.append(svg("text", room ? { x: X(ridge) - 8, y: Y(limit.rate) + 4, "text-anchor": "end", class: "halo" }
      : { x: left + 6, y: Y(limit.rate) - 6, class: "halo" }, limit.name));
  }
  for (const one of [...series].reverse()) {
    if (lines) {
      const path = one.points.map((p, i) => `${i ? "L" : "M"}${X(p.x)} ${Y(p.y)}`).join("");
      const line = svg("path", { d: path, fill: "none", "stroke-width": one.name === OURS ? 3 : 1.7, "stroke-dasharray": one.dash ?? "none" });
      line.style.stroke = colour(one.name);
      root.append(line);
      for (const p of one.points)
        if (p.low && p.high) {
          const bar = svg("line", { x1: X(p.x), x2: X(p.x), y1: Y(Math.max(p.low, y0)), y2: Y(Math.min(p.high, y1)), "stroke-width": 1.5 });
          bar.style.stroke = colour(one.name);
          root.append(bar);
        }
    }
    for (const p of one.points) root.append(mark(one.name, X(p.x), Y(p.y), p.tip));
  }
  return root;
}

function legend(names, hidden, redraw) {
  return el("ul", { class: "legend", "aria-label": "Providers: press to hide or show" }, ...names.map((name) => {
    const icon = svg("svg", { viewBox: "-7 -7 14 14", "aria-hidden": "true" });
    const path = svg("path", { d: shape(name, 5) });
    path.style.fill = colour(name);
    icon.append(path);
    const button = el("button", { type: "button", "aria-pressed": String(!hidden.has(name)), onclick: () => {
      hidden.has(name) ? hidden.delete(name) : hidden.add(name);
      redraw();
    } }, icon, name === OURS ? "hia (ours)" : name);
    return el("li", {}, button);
  }));
}

function choice(label, options, value, onpick) {
  const list = el("select", { onchange: (event) => onpick(event.target.value) },
    ...options.map((option) => el("option", { value: option, selected: option === value }, option)));
  return el("label", {}, label + " ", list);
}

// a chart with a row of choices above it; `keys` narrow the rows one after the other
function explorer(id, rows, keys, draw) {
  const box = el("div"), hidden = new Set();
  function redraw() {
    let left = rows;
    const filters = el("div", { class: "filters" });
    for (const [key, label] of keys) {
      const options = distinct(left, key).sort(byName);
      const wanted = state.get(`${id}.${key}`);
      const value = options.includes(wanted) ? wanted : options.length ? richest(left, key, options) : "";
      filters.append(choice(label, options, value, (picked) => { setState(`${id}.${key}`, picked); redraw(); }));
      left = left.filter((row) => row[key] === value);
    }
    const names = distinct(left, "provider").sort(byName);
    box.replaceChildren(filters, draw(left, names.filter((name) => !hidden.has(name))), legend(names, hidden, redraw), sources(left));
  }
  redraw();
  return box;
}

function richest(rows, key, options) {
  const count = (option) => rows.filter((row) => row[key] === option).reduce((seen, row) => seen.add(row.side), new Set()).size;
  const first = options.includes("forward") ? "forward" : options[0];
  return options.reduce((best, option) => (count(option) > count(best) ? option : best), first);
}

const describe = (row) => [`${row.provider}: ${number(row.p50)} ms (p20 ${number(row.p20)}, p80 ${number(row.p80)})`,
  `${row.op}, ${row.case}, ${row.mode}, ${row.dtype}`,
  row.pof === null ? "" : `${number(row.pof)} % of the roofline`,
  row.peak === null ? "" : `${number(row.peak / 1e9)} GB at most`, row.noisy ? "noisy" : ""].filter(Boolean).join("\n");

function bySide(rows, names, value, low, high, yLabel, label) {
  const series = names.map((name) => ({ name, points: rows.filter((row) => row.provider === name && value(row))
    .sort((a, b) => a.side - b.side).map((row) => ({ x: row.side, y: value(row), low: low(row), high: high(row), tip: describe(row) })) }))
    .filter((one) => one.points.length);
  return chart({ series, lines: true, width: 580, height: 360, xLabel: "image side, pixels", yLabel, label, xTicks: distinct(rows, "side").sort((a, b) => a - b) });
}

// tables
function sources(rows) {
  const lines = unique(rows.map((row) => row.source).filter(Boolean));
  return el("ul", { class: "sources", "aria-label": "Command, device and commit" }, ...lines.map((line) => el("li", {}, el("code", {}, line))));
}

function sortable(id, caption, columns, rows, { facets = [], sort = "", filter = true, most = SHOWN, dense = false } = {}) {
  const box = el("div"), count = el("span", { role: "status" }), body = el("tbody");
  let all = false;
  const view = { q: state.get(`${id}.q`) ?? "", sort: state.get(`${id}.sort`) ?? sort };
  for (const key of facets) view[key] = state.get(`${id}.${key}`) ?? "";
  const heads = columns.map((column) => el("th", { scope: "col", class: column.text ? null : "n" },
    el("button", { type: "button", onclick: () => pick(column.key) }, column.label)));
  const more = el("button", { type: "button", onclick: () => { all = true; fill(); } });

  function set(name, value) { view[name] = value; setState(`${id}.${name}`, value); fill(); }
  function pick(key) { set("sort", view.sort === key ? "-" + key : key); }
  function chosen() {
    const words = view.q.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter((row) => facets.every((key) => !view[key] || String(row[key]) === view[key]) &&
      words.every((word) => columns.some((column) => String(row[column.key] ?? "").toLowerCase().includes(word))));
    const key = view.sort.replace(/^-/, ""), sign = view.sort.startsWith("-") ? -1 : 1;
    if (!key) return found;
    const missing = (value) => value === null || value === undefined || value === "";
    return [...found].sort((a, b) => { // what has no value comes last either way
      if (missing(a[key]) || missing(b[key])) return missing(a[key]) - missing(b[key]);
      return sign * (typeof a[key] === "number" ? a[key] - b[key] : String(a[key]).localeCompare(String(b[key]), "en", { numeric: true }));
    });
  }
  function fill() {
    const found = chosen(), shown = all ? found : found.slice(0, most);
    body.replaceChildren(...shown.map((row) => el("tr", { class: [row.status ?? "", row.provider === OURS || row.method === OURS ? "ours" : ""].join(" ").trim() || null },
      ...columns.map((column) => cell(column, row)))));
    heads.forEach((head, index) => {
      const { key } = columns[index];
      head.setAttribute("aria-sort", view.sort === key ? "ascending" : view.sort === "-" + key ? "descending" : "none");
    });
    count.textContent = `${found.length} of ${rows.length} rows`;
    more.hidden = shown.length === found.length;
    more.textContent = `Show all ${found.length}`;
  }
  const filters = el("div", { class: "filters" });
  if (filter) {
    filters.append(el("label", {}, "Filter ", el("input", { type: "search", value: view.q, placeholder: "words, all must occur", oninput: (event) => set("q", event.target.value) })));
    for (const key of facets) {
      const list = el("select", { onchange: (event) => set(key, event.target.value) }, el("option", { value: "" }, "all"),
        ...distinct(rows, key).map(String).sort(byName).map((option) => el("option", { value: option, selected: option === view[key] }, option)));
      filters.append(el("label", {}, key + " ", list));
    }
    filters.append(count);
  }
  const table = el("table", { id: "table-" + id, class: dense ? "dense" : null }, el("caption", {}, caption), el("thead", {}, el("tr", {}, ...heads)), body);
  box.append(filters, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": caption }, table), more, sources(rows));
  fill();
  return box;
}

function cell(column, row) {
  const value = row[column.key];
  const text = column.show ? column.show(value, row) : column.text ? (value ?? "") : number(value);
  return el("td", { class: [column.text ? "" : "n", column.wrap ? "wrap" : "", column.fold ? "fold" : "", column.tone ? column.tone(value, row) : ""].join(" ").trim() || null }, text);
}

const text = (key, label = key, more = {}) => ({ key, label, text: true, ...more });
const value = (key, label, more = {}) => ({ key, label, ...more });
const ratioTone = (ratio) => (ratio >= 1.05 ? "good" : ratio < 1 / 1.05 ? "bad" : "");
const bytes = (unit) => (count) => (count === null || count === undefined ? "–" : number(count / unit));

// sections
function section(id, title, about, ...content) {
  return el("section", { id: "section-" + id, "aria-labelledby": "h-" + id }, el("h2", { id: "h-" + id }, title), el("p", {}, about), ...content);
}

function targets(device) {
  const { rows, sources: lines } = device.targets;
  const about = "What the project is held to: each is a ratio of two measurements of one workload, taken in turns in one run. A missed target is a result like any other.";
  if (!rows.length) return section("targets", "Targets", about, el("p", { class: "empty" }, "No targets were recorded on this device."));
  const tone = (verdict) => ({ met: "good", MISSED: "bad", "not measured": "warn" })[verdict] ?? "";
  const columns = [text("target"), text("workload", "workload", { wrap: true }), text("ratio of", "ratio of", { wrap: true }), value("must be", "must be", { show: (v) => v }),
    value("ratio", "measured", { show: (v, row) => row.measured }), text("verdict", "verdict", { tone }), text("note", "note", { wrap: true })];
  const counts = ["met", "MISSED", "not measured", "no target"].map((word) => `${rows.filter((row) => row.verdict === word).length} ${word}`).join(", ");
  return section("targets", "Targets", `${about} ${counts}.`, sortable("targets", "Targets", columns, rows, { facets: ["verdict"] }),
    sources(lines.map((source) => ({ source }))));
}

function standing(device) {
  // one cell for all others: a column each would push what matters out of sight
  const rows = device.standings.map((row) => {
    const others = Object.entries(row.against).map(([name, [ratio]]) => [name, ratio]).sort((a, b) => a[1] - b[1]);
    const which = row.slower.slice(0, 3).join(", ") + (row.slower.length > 3 ? `, ${row.slower.length - 3} more` : "");
    return { ...row, slower: row.slower.length, which, best: others[0][1], rival: others[0][0],
      others: others.slice(1).map(([name, ratio]) => `${name}\u00a0${ratio.toFixed(2)}`).join(", ") };
  });
  const columns = [text("op"), text("mode"), text("dtype"), value("cases", "cases"), value("slower", "cases lost", { tone: (count) => (count ? "bad" : "good") }),
    text("which", "where another is faster", { wrap: true }), text("rival", "fastest other"),
    value("best", "its time / ours", { show: (v) => v.toFixed(2), tone: ratioTone }), text("others", "the others\u2019", { wrap: true })];
  return section("standing", "Ours beside the others", "Geometric mean of the other provider's time over ours, over the cases that both have. Above 1 ours is faster; what is lost is listed beside what is won.",
    rows.length ? sortable("standing", "Time of others over ours", columns, rows.map((row) => ({ ...row, source: null })), { facets: ["op", "mode", "dtype"] }) : el("p", { class: "empty" }, "No case has both ours and another provider."),
    sources(device.rows));
}

function curves(device) {
  const rows = device.rows.filter((row) => row.status === "ok" && row.side !== null);
  const keys = [["op", "Op"], ["family", "Cases"], ["mode", "Mode"], ["dtype", "Type"]];
  return section("curves", "Time and memory against resolution", "Medians, with bars from the 20th to the 80th percentile; both axes are logarithmic. * stands for the side of the images.",
    explorer("curves", rows, keys, (left, names) => el("div", { class: "pair" },
      el("div", {}, el("h3", {}, "Time"), bySide(left, names, (r) => r.p50, (r) => r.p20, (r) => r.p80, "milliseconds", "Time against the side of the images, one line a provider")),
      el("div", {}, el("h3", {}, "Peak memory"), bySide(left, names, (r) => r.peak && r.peak / 1e6, () => null, () => null, "MB", "Peak memory against the side of the images, one line a provider")))));
}

function roofline(device) {
  const rows = device.rows.filter((row) => row.status === "ok" && row.flops && row.bytes && row.p50);
  const about = "Every timed row with known FLOPs and bytes. The dashed line is the bandwidth and the matrix rate measured on this device in the same run; a mark on it is at the hardware's limit.";
  if (!rows.length) return section("roofline", "Roofline", about, el("p", { class: "empty" }, "No row has FLOPs and bytes."));
  return section("roofline", "Roofline", about, explorer("roofline", rows, [["dtype", "Type"], ["mode", "Mode"]], (left, names) => {
    const limits = device.ceilings.filter((limit) => left.some((row) => row.dtype === limit.dtype))
      .map((limit) => ({ name: `measured limit, ${limit.dtype}`, bandwidth: limit.bandwidth / 1e9, rate: limit.rate / 1e9 }));
    const series = names.map((name) => ({ name, points: left.filter((row) => row.provider === name)
      .map((row) => ({ x: row.flops / row.bytes, y: row.flops / row.p50 / 1e6, tip: describe(row) })) }));
    return chart({ series, limits, xLabel: "FLOPs per byte", yLabel: "GFLOP/s", label: "Roofline: rate against arithmetic intensity" });
  }));
}

function memory(device) {
  const all = device.rows.filter((row) => row.status === "ok" && row.peak);
  const whole = all.filter((row) => row.level === "end_to_end"), rows = whole.length ? whole : all;
  const columns = [text("op"), text("case"), text("provider"), text("mode"), text("dtype"), value("peak", "peak MB", { show: bytes(1e6) }),
    value("over", "over ours", { show: (v) => (v === null ? "–" : v.toFixed(2)), tone: (v) => (v === null ? "" : ratioTone(v)) })];
  const ours = new Map(rows.filter((row) => row.provider === OURS).map((row) => [[row.op, row.case, row.mode, row.dtype].join(), row.peak]));
  const filled = rows.map((row) => ({ ...row, over: ours.get([row.op, row.case, row.mode, row.dtype].join()) ? row.peak / ours.get([row.op, row.case, row.mode, row.dtype].join()) : null }));
  return section("memory", "Memory", "Peak bytes: of a whole model its weights, inputs and activations; of an op what one call adds. Above 1 ours needs less.",
    rows.length ? sortable("memory", "Peak memory", columns, filled, { facets: ["op", "provider"], sort: "-peak", most: 40 }) : el("p", { class: "empty" }, "No peak was measured."));
}

function table3(device) {
  const about = "The paper's Table 3 recomputed for the 13B host, predicted under fake tensors, the paper's figure in every row.";
  const record = device.table3;
  if (!record) return section("table3", "Table 3", about, el("p", { class: "empty" }, "No Table 3 was recorded on this device."));
  const rows = record.rows.map((row) => ({ ...row, provider: row.method, source: record.source, side: row.resolution,
    paper: row.paper_out_of_memory ? "x" : row.paper_memory_gb }));
  const columns = [value("resolution", "px", { show: String }), text("method"), text("attention"), value("tokens", "tokens"),
    value("flops", "TFLOPs", { show: bytes(1e12) }), value("paper_flops_t", "paper TFLOPs"), value("memory_bytes", "GB", { show: bytes(1e9) }),
    value("paper", "paper GB", { show: (v) => (v === "x" ? "x" : number(v)) }), value("fits", "fits the card", { show: (v) => (v === null ? "–" : v ? "yes" : "no"), tone: (v) => (v === false ? "bad" : "") })];
  const draw = (key, unit) => (left, names) => bySide(left, names, (r) => r[key] && r[key] / unit, () => null, () => null, key === "flops" ? "TFLOPs" : "GB", key + " against resolution");
  const tip = rows.map((row) => ({ ...row, p50: null, p20: null, p80: null, pof: null, peak: row.memory_bytes, noisy: false, op: "prefill", case: `${row.resolution} px, ${row.attention}`, mode: "predicted", dtype: record.dtype }));
  return section("table3", "Table 3", about,
    explorer("table3", tip, [["attention", "Attention"]], (left, names) => el("div", { class: "pair" },
      el("div", {}, el("h3", {}, "FLOPs of a prefill"), draw("flops", 1e12)(left, names)), el("div", {}, el("h3", {}, "Peak memory"), draw("memory_bytes", 1e9)(left, names)))),
    sortable("t3", "Table 3, predicted, beside the paper", columns, rows, { facets: ["method", "attention"] }));
}

function changes(device) {
  const rows = device.changes;
  const columns = [text("verdict", "verdict", { tone: (v) => (v === "slower" ? "bad" : v === "faster" ? "good" : "") }), value("ratio", "now / before", { show: (v) => v.toFixed(2) }),
    text("note", "note", { tone: () => "warn" }), value("before", "before ms"), value("now", "now ms"), text("op"), text("case", "case", { wrap: true }), text("provider"), text("mode"), text("dtype")];
  const counts = ["slower", "faster", "unchanged"].map((verdict) => `${rows.filter((row) => row.verdict === verdict).length} ${verdict}`).join(", ");
  return section("changes", "Changes since the previous record", `Against ${device.previous}${rows.length ? `: ${counts}` : ""}. Regressions and wins stand in one table; within 5 % counts as unchanged.`,
    rows.length ? sortable("changes", "Regressions and wins", columns, rows, { facets: ["verdict", "op", "provider"], sort: "-ratio" }) : el("p", { class: "empty" }, "Nothing to compare with."));
}

// a name that may be broken behind its underscores
function foldable(name) {
  const whole = document.createDocumentFragment();
  String(name ?? "").split(/(?<=_)/).forEach((part, index) => whole.append(...(index ? [el("wbr"), part] : [part])));
  return whole;
}

function everything(device) {
  // as many columns as a window of 1280 pixels holds: the level is a filter alone, the status a part of the note
  const tps = device.rows.some((row) => row.tps) ? [value("tps", "tokens/s")] : [];
  const columns = [text("op", "op", { show: foldable }), text("case", "case", { fold: true }), text("provider", "provider", { show: foldable }), text("mode"), text("dtype"),
    value("p50", "p50 ms"), value("p20", "p20 \u2013 p80", { show: (v, row) => (v === null ? "\u2013" : `${number(v)} \u2013 ${number(row.p80)}`) }), value("floor", "roofline ms"), value("pof", "% of roofline"),
    value("gflops", "GFLOP/s"), value("gbs", "GB/s"), value("peak", "peak MB", { show: bytes(1e6) }), ...tps, value("repeats", "runs"),
    text("note", "note", { wrap: true, tone: (v, row) => (row.status === "failed" ? "bad" : row.noisy ? "warn" : "") })];
  const rows = device.rows.map((row) => ({ ...row, note: row.status === "ok" ? row.reason ?? "" : `${row.status}: ${row.reason}`,
    gflops: row.flops && row.p50 ? row.flops / row.p50 / 1e6 : null, gbs: row.bytes && row.p50 ? row.bytes / row.p50 / 1e6 : null }));
  return section("all", "All measurements", "Every record. Press a column's name to sort by it, again to turn it round; the address keeps what you chose.",
    sortable("all", "All measurements", columns, rows, { facets: ["level", "op", "provider", "mode", "dtype", "status"], dense: true }));
}

function show() {
  const device = DATA.devices.find((one) => one.slug === state.get("device")) ?? DATA.devices[0];
  const main = document.getElementById("main");
  document.getElementById("made").textContent = device ? `${device.name} · ${device.rows.length} measurements · report of ${DATA.made}` : DATA.made;
  if (!device) return main.replaceChildren(section("none", "Nothing measured yet", "Run make bench, then make report."));
  main.replaceChildren(targets(device), standing(device), curves(device), roofline(device), memory(device), table3(device), changes(device), everything(device));
}

const picker = document.getElementById("device");
picker.append(...DATA.devices.map((one) => el("option", { value: one.slug, selected: one.slug === state.get("device") }, one.name)));
picker.addEventListener("change", () => { setState("device", picker.value); show(); });

function theme(name) { document.documentElement.dataset.theme = name; }
const dark = matchMedia("(prefers-color-scheme: dark)");
theme(state.get("theme") ?? (dark.matches ? "dark" : "light"));
dark.addEventListener("change", () => { if (!state.has("theme")) theme(dark.matches ? "dark" : "light"); });
document.getElementById("theme").addEventListener("click", () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setState("theme", next);
  theme(next);
});
for (const link of document.querySelectorAll("nav a")) {
  link.href = "#" + state.toString();
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const target = document.getElementById("section-" + link.dataset.to);
    if (!target) return;
    target.scrollIntoView();
    target.setAttribute("tabindex", "-1");
    target.focus({ preventScroll: true });
  });
}
show();
document.documentElement.dataset.ready = "yes";

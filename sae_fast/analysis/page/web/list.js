// The table of features and the picture of their densities: what is filtered, sorted and seen.

const ROW = 26, DEAD = -Infinity;
const COLUMNS = [
  { key: "index", title: "feature", show: f => String(f), value: f => f },
  { key: "density", title: "density", show: f => percent(density[f]), value: f => density[f] },
  { key: "maximum", title: "max", show: f => number(columns.maximum[f]), value: f => columns.maximum[f] },
  { key: "mean", title: "mean", show: f => number(columns.mean[f]), value: f => columns.mean[f] },
  { key: "effect", title: "effect", show: f => signed(columns.effect[f]), value: f => columns.effect[f] },
  { key: "mark", title: "mark", show: f => marks.get(f) ?? "", value: f => ({ relevant: 2, irrelevant: 1 })[marks.get(f)] ?? 0 },
];

const number = v => Number.isNaN(v) ? "" : v === 0 ? "0" : Math.abs(v) >= 1000 || Math.abs(v) < 0.001 ? v.toExponential(2) : v.toPrecision(3);
const signed = v => (v > 0 ? "+" : "") + number(v);
const percent = v => v === 0 ? "dead" : v < 1e-5 ? (100 * v).toExponential(1) + " %" : (100 * v).toPrecision(3) + " %";

let columns, density, contexts, shown = [], sort = { key: "index", down: false }, chosen = -1;
let range = [DEAD, 0], textHits = null;

const $ = id => document.getElementById(id);
function make(tag, options = {}, ...children) {
  const { attributes, ...rest } = options, element = Object.assign(document.createElement(tag), rest);
  for (const [name, value] of Object.entries(attributes ?? {})) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
function svg(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function usedColumns() {
  return COLUMNS.filter(column => column.key !== "effect" || about.effects);
}

function drawHead() {
  const cells = usedColumns().map(({ key, title }) => {
    const here = sort.key === key, arrow = here ? (sort.down ? " ▾" : " ▴") : "";
    const button = make("button", { type: "button", textContent: title + arrow });
    button.addEventListener("click", () => {
      sort = { key, down: here ? !sort.down : key !== "index" };
      drawHead();
      refresh();
    });
    const attributes = { scope: "col", "data-key": key };
    if (here) attributes["aria-sort"] = sort.down ? "descending" : "ascending";
    return make("th", { attributes }, button);
  });
  const focused = document.activeElement?.closest?.("th")?.dataset.key;
  $("table").tHead.rows[0].replaceChildren(...cells);
  cells.find(cell => cell.dataset.key === focused)?.firstChild.focus();
}

// Which features are seen and in which order, from the filters; then the table.
function refresh() {
  const query = $("search").value.trim(), exact = /^#?\d+$/.test(query) ? Number(query.replace("#", "")) : -1;
  const kind = $("marked").value, { value } = COLUMNS.find(column => column.key === sort.key);
  shown = [];
  for (let f = 0; f < about.d_sae; f++) {
    const log = density[f] ? Math.log10(density[f]) : DEAD, mark = marks.get(f);
    if (log < range[0] || log > range[1]) continue;
    if (query && f !== exact && !textHits?.[f]) continue;
    if (kind && (kind === "unmarked" ? mark : mark !== kind)) continue;
    shown.push(f);
  }
  const sign = sort.down ? -1 : 1, keys = new Float64Array(about.d_sae);
  for (const f of shown) keys[f] = Number.isNaN(value(f)) ? sign * Infinity : value(f);  // what is not known comes last
  shown.sort((a, b) => sign * (keys[a] - keys[b] || 0) || a - b);
  $("found").textContent = `${shown.length.toLocaleString("en")} of ${about.d_sae.toLocaleString("en")} features`
    + (query && !contexts && about.text ? "; reading the contexts" : "");
  $("scroll").scrollTop = 0;
  drawRows();
}

async function searched() {
  const query = $("search").value.trim();
  textHits = null;
  if (query && !/^#\d+$/.test(query) && about.text) {
    if (!contexts) refresh();
    await ready;
    if (query !== $("search").value.trim()) return;
    textHits = contexts.search(query, $("where").value === "token");
  }
  refresh();
}

// Only the rows in sight are there, between two rows as high as the others would be.
function drawRows() {
  const box = $("scroll"), first = Math.max(0, Math.floor(box.scrollTop / ROW) - 8);
  const last = Math.min(shown.length, Math.ceil((box.scrollTop + (box.clientHeight || 800)) / ROW) + 8);
  const space = rows => {
    const cell = make("td", { colSpan: usedColumns().length });
    cell.style.height = `${rows * ROW}px`;
    cell.style.padding = "0";
    return make("tr", { attributes: { "aria-hidden": "true" } }, cell);
  };
  const rows = shown.slice(first, last).map((f, i) => {
    const cells = usedColumns().map(column => make("td", { textContent: column.show(f), className: column.key === "mark" ? marks.get(f) ?? "" : "" }));
    const attributes = { "aria-rowindex": first + i + 2, "aria-selected": f === chosen, "data-feature": f };
    return make("tr", { className: "row", attributes }, ...cells);
  });
  $("table").setAttribute("aria-rowcount", shown.length + 1);
  $("table").tBodies[0].replaceChildren(space(first), ...rows, space(shown.length - last));
}

// The density of features, on a logarithmic axis; dead ones are a bar of their own at the left.  A drag or a click chooses.
function drawOverview() {
  const picture = $("overview").querySelector("svg"), width = picture.clientWidth || 460, height = 92;
  const foot = 14, left = 34, bins = 50, alive = density.filter(d => d > 0), counts = new Array(bins).fill(0);
  const span = Math.max(1, Math.ceil(-Math.log10(alive.reduce((least, d) => Math.min(least, d), 1))));  // decades
  for (const d of alive) counts[Math.min(bins - 1, Math.floor((Math.log10(d) / span + 1) * bins))]++;
  const dead = about.d_sae - alive.length, most = Math.max(dead, ...counts, 1), wide = (width - left) / bins;
  picture.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const bar = (x, w, count, low, high, title) => {
    const h = count ? Math.max(1, count / most * (height - foot - 4)) : 0, out = high <= range[0] || low >= range[1];
    const rect = svg("rect", { x, y: height - foot - h, width: w, height: h, class: out ? "bar out" : "bar" });
    rect.append(svg("title", {}, title));
    return rect;
  };
  const edge = i => (i / bins - 1) * span;
  const deadBar = bar(0, 18, dead, DEAD, DEAD, `${dead} dead features`);
  if (range[0] !== DEAD) deadBar.setAttribute("class", "bar out");
  const parts = [deadBar, svg("text", { x: 0, y: height - 3, class: "axis" }, "dead")];
  counts.forEach((count, i) => parts.push(
    bar(left + i * wide, wide - 1, count, edge(i), edge(i + 1), `${count} features of density ${percent(10 ** edge(i))} to ${percent(10 ** edge(i + 1))}`),
  ));
  for (let power = -span; power <= 0; power++) {
    const anchor = power === -span ? "start" : power ? "middle" : "end";
    parts.push(svg("text", { x: left + (power / span + 1) * (width - left), y: height - 3, class: "axis", "text-anchor": anchor }, `${Number((10 ** (power + 2)).toPrecision(1))} %`));
  }
  const brush = svg("rect", { y: 0, height: height - foot, class: "brush", visibility: "hidden" });
  picture.replaceChildren(...parts, brush);

  const at = event => event.clientX - picture.getBoundingClientRect().left;
  const log = x => (Math.min(Math.max(x, left), width) - left) / (width - left) * span - span;
  let from = null;
  picture.onpointerdown = event => { from = at(event); picture.setPointerCapture(event.pointerId); };
  picture.onpointermove = event => {
    if (from === null) return;
    const x = [from, at(event)].sort((a, b) => a - b);
    for (const [name, value] of [["x", x[0]], ["width", x[1] - x[0]], ["visibility", "visible"]]) brush.setAttribute(name, value);
  };
  picture.onpointerup = event => {
    if (from === null) return;
    let [a, b] = [from, at(event)].sort((p, q) => p - q);
    from = null;
    if (b < left - 6) return setRange(DEAD, DEAD);
    if (b - a < 3) {  // a click: the bar below it
      const i = Math.min(bins - 1, Math.max(0, Math.floor((a - left) / wide)));
      return setRange(edge(i), edge(i + 1));
    }
    setRange(a < left - 6 ? DEAD : log(a), log(b));
  };
}

function setRange(low, high) {
  range = [low, high];
  $("low").value = low === DEAD ? "" : (10 ** low).toPrecision(3);
  $("high").value = high === 0 ? "" : high === DEAD ? "0" : (10 ** high).toPrecision(3);
  drawOverview();
  refresh();
}

function typedRange() {
  const read = (id, otherwise) => {
    const text = $(id).value.trim().replace(/\s*%$/, ""), value = Number(text) / ($(id).value.includes("%") ? 100 : 1);
    return text === "" || Number.isNaN(value) ? otherwise : value <= 0 ? DEAD : Math.log10(value);
  };
  range = [read("low", DEAD), read("high", 0)];
  drawOverview();
  refresh();
}

// Starts the page: the table from the first chunk, then, when all of the file is there, the rest.

let detail = null, ready;

function say(text, good = false) {
  $("message").hidden = !text;
  $("message").textContent = text;
  $("message").className = good ? "good" : "";
}

function listen() {
  $("search").addEventListener("input", searched);
  $("where").addEventListener("change", searched);
  $("marked").addEventListener("change", refresh);
  for (const id of ["low", "high"]) $(id).addEventListener("change", typedRange);
  $("all").addEventListener("click", () => setRange(DEAD, 0));
  $("scroll").addEventListener("scroll", () => requestAnimationFrame(drawRows));
  window.addEventListener("resize", () => { drawOverview(); drawRows(); });
  $("table").tBodies[0].addEventListener("click", event => {
    const row = event.target.closest("tr.row");
    if (row) choose(Number(row.dataset.feature), false);
  });
  $("search").addEventListener("keydown", event => {
    if (event.key === "Enter" && shown.length) {
      const exact = Number($("search").value.trim().replace("#", ""));
      choose(shown.includes(exact) ? exact : shown[0]);
    }
    if (event.key === "Escape") event.target.blur();
  });
  $("export").addEventListener("click", () => { exportMarks(); drawMarks(); });
  $("import").addEventListener("change", async event => {
    const [file] = event.target.files;
    if (!file) return;
    try {
      say(await importMarks(file), true);
    } catch (error) {
      say(`${file.name} is not taken: ${error.message}.`);
    }
    event.target.value = "";
    refresh();
    if (chosen >= 0) drawFeature(); else drawMarks();
  });
  window.addEventListener("storage", event => {
    if (event.key !== KEY) return;
    recall();
    refresh();
    if (chosen >= 0) drawFeature(); else drawMarks();
  });
  const keys = {
    j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1), r: () => mark("relevant"), i: () => mark("irrelevant"),
    u: () => mark(""), n: () => $("note")?.focus(), "/": () => $("search").focus(),
  };
  document.addEventListener("keydown", event => {
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName);
    if (typing && event.target.id === "note" && event.key === "Escape") event.target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !keys[event.key]) return;
    event.preventDefault();
    keys[event.key]();
  });
}

async function start() {
  columns = await unpack("columns");
  density = Float64Array.from(columns.fires, fires => fires / about.n_tokens);
  recall();
  $("facts").replaceWith(Object.assign(factList(about.facts), { id: "facts" }));
  ready = rest();
  drawHead();
  drawOverview();
  refresh();
  drawMarks();
  listen();
  performance.mark("table");
  const wanted = Number(location.hash.slice(1) || NaN);
  if (wanted >= 0 && wanted < about.d_sae && Number.isInteger(wanted)) choose(wanted);
  await ready;
  if (chosen >= 0) drawFeature();
  performance.mark("contexts");
}

async function rest() {
  if (document.readyState === "loading") await new Promise(done => document.addEventListener("DOMContentLoaded", done));
  const [text, examples, more] = await Promise.all(["text", "examples", "detail"].map(unpack));
  contexts = new Contexts(text, examples);
  detail = more;
}

start().catch(error => {
  say(`This page cannot show its data: ${error.message}. It needs a browser of 2023 or later.`);
  throw error;
});

// The chosen feature: its numbers, the histogram of its activations, contexts, nearest decoder rows, mark and note.

function choose(f, scroll = true) {
  chosen = f;
  try { history.replaceState(null, "", `#${f}`); } catch { /* some browsers refuse it to a file */ }
  if (scroll) {
    const place = shown.indexOf(f), box = $("scroll"), top = place * ROW;
    if (place >= 0 && (top < box.scrollTop || top > box.scrollTop + box.clientHeight - 3 * ROW)) {
      box.scrollTop = top - box.clientHeight / 2;
    }
  }
  drawRows();
  drawFeature();
}

function step(by) {
  if (!shown.length) return;
  const place = shown.indexOf(chosen);
  choose(shown[place < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, place + by))]);
}

function mark(kind) {
  if (chosen < 0) return;
  setMark(chosen, kind);
  drawMarks();
  drawRows();
}

// What depends on marks outside the table.
function drawMarks() {
  const all = [...marks.values()], count = kind => all.filter(found => found === kind).length;
  $("counts").textContent = `${count("relevant")} relevant, ${count("irrelevant")} irrelevant`
    + (stored ? "" : "; kept in this tab only: export them");
  for (const button of $("feature").querySelectorAll("[data-mark]")) {
    button.setAttribute("aria-pressed", String((marks.get(chosen) ?? "") === button.dataset.mark));
  }
}

function drawFeature() {
  const f = chosen, button = (text, does, attributes = {}) => {
    const element = make("button", { type: "button", textContent: text, attributes });
    element.addEventListener("click", does);
    return element;
  };
  const note = make("input", {
    className: "note", id: "note", value: notes.get(f) ?? "", placeholder: "note",
    attributes: { "aria-label": `Note on feature ${f}`, autocomplete: "off" },
  });
  note.addEventListener("input", () => { setNote(f, note.value); drawMarks(); });
  const facts = [
    ["density", percent(density[f])], ["tokens", columns.fires[f].toLocaleString("en")],
    ["max", number(columns.maximum[f])], ["mean where it fires", number(columns.mean[f])],
  ];
  if (about.effects) facts.push(["effect", Number.isNaN(columns.effect[f]) ? "unknown" : signed(columns.effect[f])]);
  const parts = [
    make("div", { className: "title" },
      make("h2", { textContent: `Feature ${f}` }),
      button("‹", () => step(-1), { "aria-label": "Previous feature" }), button("›", () => step(1), { "aria-label": "Next feature" }),
      ...[["relevant", "relevant"], ["irrelevant", "irrelevant"], ["unmark", ""]].map(
        ([text, kind]) => button(text, () => mark(kind), { "data-mark": kind }),
      )),
    factList(facts), note,
  ];
  if (detail) parts.push(...section("Activations where it fires", drawHistogram(f)));
  if (contexts) {
    const examples = contexts.of(f);
    for (let group = 0; group <= about.bins; group++) {
      const found = examples.filter(example => example.group === group);
      if (found.length) parts.push(...section(groupTitle(group), make("ol", { className: "contexts" }, ...found.map(drawExample))));
    }
    if (!examples.length) parts.push(make("p", { className: "hint", textContent: "It fires nowhere in the store." }));
  } else parts.push(make("p", { className: "hint", textContent: "Reading the contexts…" }));
  if (detail) parts.push(...section("Nearest decoder rows, by cosine", drawNearest(f)));
  $("feature").replaceChildren(...parts);
  drawMarks();
}

const section = (title, content) => [make("h3", { textContent: title }), content];

function groupTitle(group) {
  if (group === 0) return "Strongest contexts";
  const edge = i => Math.round(100 * (1 - i / about.bins));
  return `From the ${edge(group)}–${edge(group - 1)} % quantiles of its activations`;
}

function factList(facts) {
  return make("dl", { className: "facts" }, ...facts.map(
    ([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })),
  ));
}

function drawHistogram(f) {
  const bins = about.histogram_bins, counts = detail.histogram.subarray(f * bins, (f + 1) * bins), most = Math.max(...counts, 1);
  const width = 560, height = 96, foot = 14, wide = width / bins, edge = i => number(columns.maximum[f] * i / bins);
  const picture = svg("svg", { class: "histogram", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "How many tokens have which activation" });
  counts.forEach((count, i) => {
    const h = count ? Math.max(1, count / most * (height - foot)) : 0;
    const bar = svg("rect", { x: i * wide, y: height - foot - h, width: wide - 1, height: h, class: "bar" });
    bar.append(svg("title", {}, `${count} tokens of ${edge(i)} to ${edge(i + 1)}`));
    picture.append(bar);
  });
  for (const [x, anchor, text] of [[0, "start", "0"], [width / 2, "middle", edge(bins / 2)], [width, "end", edge(bins)]]) {
    picture.append(svg("text", { x, y: height - 3, class: "axis", "text-anchor": anchor }, text));
  }
  return picture;
}

function drawNearest(f) {
  const buttons = [];
  for (let k = f * about.nearest; k < (f + 1) * about.nearest; k++) {
    const other = detail.neighbour[k], cosine = detail.cosine[k] / 32767;
    const button = make("button", { type: "button", textContent: `${other}  ${cosine.toFixed(2)}`, title: `feature ${other}, cosine ${cosine.toFixed(4)}` });
    button.addEventListener("click", () => choose(other));
    buttons.push(button);
  }
  return make("div", { className: "near" }, ...buttons);
}

// Line breaks and tabs are shown as signs: an example is a line.
const visible = text => text.replace(/\r\n|\r|\n/g, "↵").replace(/\t/g, "⇥");

function drawExample({ start, length, peak, activations }) {
  const text = make("span", { className: "text" }), most = columns.maximum[chosen];
  for (let i = 0; i < length; i++) {
    const [gap, word] = contexts.token(start + i).map(visible), span = make("span", { textContent: word }), activation = activations[i];
    if (activation > 0) {
      span.className = i === peak ? "fires peak" : "fires";
      span.title = `${number(activation)}  (token ${contexts.number(start + i)})`;
      span.style.setProperty("--strength", (12 + 78 * Math.min(1, activation / most)).toFixed(1));
    }
    text.append(gap, span);
  }
  return make("li", {}, make("span", { className: "value", textContent: number(activations[peak]) }), text);
}

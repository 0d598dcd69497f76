// Marks: kept here, in localStorage where the browser lets a file have it, and in the file that is exported.

const FORMAT = "sae_fast.marks", VERSION = 1, KEY = `${FORMAT}.${about.sae}`, KINDS = ["relevant", "irrelevant"];
const marks = new Map(), notes = new Map();
let stored = true, exported = true;

function asJson() {
  const object = map => Object.fromEntries([...map].sort((a, b) => a[0] - b[0]).map(([k, v]) => [String(k), v]));
  const value = { format: FORMAT, version: VERSION, sae: about.sae, d_sae: about.d_sae, marks: object(marks) };
  if (notes.size) value.notes = object(notes);
  return JSON.stringify(value, null, 1) + "\n";
}

// What a file of marks says, or an Error that says what is wrong with it.
function readMarks(text) {
  let value;
  try { value = JSON.parse(text); } catch { throw new Error("it is not JSON"); }
  if (value?.format !== FORMAT) throw new Error(`its format is ${JSON.stringify(value?.format)}, not "${FORMAT}"`);
  if (value.version !== VERSION) throw new Error(`its version is ${JSON.stringify(value.version)}, not ${VERSION}`);
  if (value.sae !== about.sae || value.d_sae !== about.d_sae) {
    throw new Error(`it marks another SAE: ${value.sae} of ${value.d_sae} features, this is ${about.sae} of ${about.d_sae}`);
  }
  const read = (name, fits) => Object.entries(value[name] ?? {}).map(([key, found]) => {
    if (String(Number(key)) !== key || !(Number(key) >= 0 && Number(key) < about.d_sae && Number.isInteger(Number(key)))) {
      throw new Error(`${name}: there is no feature ${JSON.stringify(key)}`);
    }
    if (!fits(found)) throw new Error(`${name}: feature ${key} has ${JSON.stringify(found)}`);
    return [Number(key), found];
  });
  return { marks: read("marks", found => KINDS.includes(found)), notes: read("notes", found => typeof found === "string") };
}

function keep() {
  exported = false;
  try { localStorage.setItem(KEY, asJson()); stored = true; } catch { stored = false; }
}

function setMark(feature, mark) {
  if (mark) marks.set(feature, mark); else marks.delete(feature);
  keep();
}

function setNote(feature, text) {
  if (text) notes.set(feature, text); else notes.delete(feature);
  keep();
}

// From what this browser has stored; another tab's marks come the same way.
function recall() {
  try {
    const text = localStorage.getItem(KEY);
    if (text === null) return;
    const read = readMarks(text);
    marks.clear();
    notes.clear();
    read.marks.forEach(([feature, mark]) => marks.set(feature, mark));
    read.notes.forEach(([feature, note]) => notes.set(feature, note));
  } catch { /* no storage, or not ours: the marks start empty */ }
}

function exportMarks() {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asJson()], { type: "application/json" }));
  link.download = "marks.json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  exported = true;
}

// What the file says is added to the marks that are there, and wins over them.
async function importMarks(file) {
  const read = readMarks(await file.text());
  read.marks.forEach(([feature, mark]) => marks.set(feature, mark));
  read.notes.forEach(([feature, note]) => notes.set(feature, note));
  keep();
  return `${read.marks.length} marks and ${read.notes.length} notes read from ${file.name}`;
}

window.addEventListener("beforeunload", event => {
  if (!stored && !exported) event.preventDefault();
});

// Marks: kept here, in localStorage where the browser lets a file have it, and in the file that is exported.

const FORMAT = "sae_fast.marks", VERSION = 1, KEY = `${FORMAT}.${about.sae}`, KINDS = ["relevant", "irrelevant"];
const marks = new Map(), notes = new Map();
let stored = true, exported = true, full = false;

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
  stored = false;
  if (full) return; // what is there could not be put aside
  try { localStorage.setItem(KEY, asJson()); stored = true; } catch { /* no storage: the page says so */ }
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
  let text, read;
  try { text = localStorage.getItem(KEY); } catch { return; } // no storage: the marks start empty
  if (text === null) return;
  try { read = readMarks(text); } catch (error) { return putAside(text, error); }
  marks.clear();
  notes.clear();
  read.marks.forEach(([feature, mark]) => marks.set(feature, mark));
  read.notes.forEach(([feature, note]) => notes.set(feature, note));
}

// Stored text that cannot be read, of another version or damaged, is not lost when the next mark is stored.
function putAside(text, error) {
  let name = `${KEY}.old`, where = "they stay there, and new ones are not stored: export them";
  try {
    while (![null, text].includes(localStorage.getItem(name))) name += ".old";
    localStorage.setItem(name, text);
    where = `they are kept there as ${name}`;
  } catch { full = true; }
  say(`The marks that this browser has stored are not taken: ${error.message}; ${where}.`);
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

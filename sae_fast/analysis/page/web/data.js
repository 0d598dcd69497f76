// What the page holds: arrays in gzip and base64, a chunk an element, unpacked when first needed.

const about = JSON.parse(document.getElementById("about").textContent);
const ARRAYS = { u1: Uint8Array, u2: Uint16Array, u4: Uint32Array, i2: Int16Array, f4: Float32Array };

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

// {name: typed array} of a chunk; "json" entries are parsed.  The element goes, so that the text is not held twice.
async function unpack(chunk) {
  const element = document.getElementById("data-" + chunk);
  const packed = fromBase64(element.textContent);
  element.remove();
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const buffer = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, kind, begin, length] of about.chunks[chunk]) {
    arrays[name] = kind === "json"
      ? JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, begin, length)))
      : new ARRAYS[kind](buffer, begin, length);
  }
  return arrays;
}

// Where each of many runs begins, from their lengths: one number more than there are runs.
function starts(lengths) {
  const out = new Uint32Array(lengths.length + 1);
  for (let i = 0; i < lengths.length; i++) out[i + 1] = out[i] + lengths[i];
  return out;
}

// Examples share one stream of tokens; each is a window of it, with the activations of its feature that lie inside.
class Contexts {
  constructor(text, examples) {
    Object.assign(this, text, examples);
    this.ofFeature = starts(this.count);
    this.ofExample = starts(this.firing);
  }

  // [white space before it, its text]
  token(place) {
    const text = about.text ? this.words[this.ids[place]] : `token ${this.number(place)}`, own = text.trimStart() || text;
    return [text.slice(0, text.length - own.length), own];
  }

  // The token's number in the store.
  number(place) {
    let low = 0, high = this.run.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (this.run[middle] <= place) low = middle; else high = middle - 1;
    }
    return this.run_token[low] + place - this.run[low];
  }

  // The examples of a feature: which group each is of (0: top, then the quantiles, strongest first) and its tokens.
  of(feature) {
    const found = [], unit = columns.maximum[feature] / 65535;
    for (let e = this.ofFeature[feature]; e < this.ofFeature[feature + 1]; e++) {
      const activations = new Float32Array(this.length[e]);
      for (let k = this.ofExample[e]; k < this.ofExample[e + 1]; k++) activations[this.offset[k]] = this.level[k] * unit;
      found.push({ group: this.group[e], start: this.start[e], length: this.length[e], peak: this.peak[e], activations });
    }
    return found;
  }

  // One string of all tokens, in small letters, and where each token begins in it.  Made when text is first searched.
  index() {
    if (this.searchable) return this.searchable;
    const lower = this.words.map(word => word.toLowerCase()), parts = new Array(this.ids.length);
    const begin = new Uint32Array(this.ids.length + 1), firsts = new Set(this.run);
    for (let i = 0, at = 0; i < this.ids.length; i++) {
      const word = firsts.has(i) ? "\0" + lower[this.ids[i]] : lower[this.ids[i]];  // nothing is found across a gap
      parts[i] = word;
      begin[i] = at;
      begin[i + 1] = at += word.length;
    }
    return this.searchable = { text: parts.join(""), begin };
  }

  // [F] 1 where a context of the feature holds the text, or (firing) where it meets the token that fires.
  search(query, firing) {
    const { text, begin } = this.index(), wanted = query.toLowerCase(), n = this.ids.length;
    const hits = new Uint32Array(n + 1), found = new Uint8Array(about.d_sae);  // hits[i]: matches that begin before token i
    const touched = new Uint8Array(n), ends = new Uint32Array(n);
    for (let at = text.indexOf(wanted), token = 0; at >= 0; at = text.indexOf(wanted, at + 1)) {
      while (begin[token + 1] <= at) token++;
      let last = token;
      while (begin[last + 1] < at + wanted.length) last++;
      if (!hits[token + 1]++) ends[token] = last;
      for (let i = token; i <= last; i++) touched[i] = 1;
    }
    for (let i = 0; i < n; i++) hits[i + 1] += hits[i];
    for (let feature = 0; feature < about.d_sae; feature++) {
      for (let e = this.ofFeature[feature]; e < this.ofFeature[feature + 1] && !found[feature]; e++) {
        const first = this.start[e], end = first + this.length[e];
        if (firing) found[feature] = touched[first + this.peak[e]];
        else if (hits[end] > hits[first]) {
          for (let i = first; i < end && !found[feature]; i++) found[feature] = hits[i + 1] > hits[i] && ends[i] < end ? 1 : 0;
        }
      }
    }
    return found;
  }
}

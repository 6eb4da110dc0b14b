// A document's text, with the tokens shaded and the shared passages marked where they lie in it.

import { el, whole } from "./dom.js";
import { around, largestPart, shaded, shadedToken, shadeLegend } from "./hits.js";

const CHARACTERS_AROUND = 300;
const PIECE = 10000; // of text without a token, which `clean` would cut

// Places are in characters, as the server counts them: code points, not the units of a string.
export class DocumentText {
  // `found` is the server's document with its beginning; `part(start)` gets more of its text.
  constructor(found, hit, part) {
    this.found = found; this.part = part;
    this.tokens = hit.tokens ?? []; this.matches = (hit.text_matches ?? []).filter((match) => match.tokens > 1);
    this.start = 0; this.characters = [...found.text];
    this.size = Math.max(this.characters.length, 1); // of a part of the text
    this.text = el("div", { class: "excerpt", dir: "auto", tabindex: 0, role: "region", "aria-label": "Text of the document" });
    this.earlier = el("button", { type: "button", onclick: () => this.extend(-1) });
    this.later = el("button", { type: "button", onclick: () => this.extend(1) });
    this.about = el("div", {}); this.row = el("div", {});
    this.element = el("div", {}, this.about, this.earlier, this.text, this.later, this.row);
  }

  get end() { return this.start + this.characters.length; }

  // Shows the text around the tokens that matter, or its beginning.
  async begin() {
    const placed = this.tokens.filter(isPlaced);
    let [from, to] = [0, this.end];
    if (placed.length) {
      const [first, stop] = around(placed);
      [from, to] = [Math.max(0, placed[first].start - CHARACTERS_AROUND), placed[stop - 1].end + CHARACTERS_AROUND];
      if (to > this.end && this.end < this.found.n_characters) {
        this.start = from; this.characters = [...await this.part(from)];
      }
    }
    // Of a conversation the tokens are those of its template, which is another text.
    this.isPlaced = placed.length > 0 && this.placed().length > 0 && this.placed().every((token) => this.at(token.start, token.end) === token.text);
    if (this.tokens.length && !this.isPlaced) {
      this.row.append(el("h3", {}, "The tokens of its row, as the model reads them"), el("p", { class: "excerpt", dir: "auto" }, shaded(this.tokens)));
    }
    [this.from, this.to] = this.isPlaced ? [Math.max(from, this.start), Math.min(to, this.end)] : [this.start, this.end];
    this.draw();
    const isMarked = this.text.querySelector("mark") !== null;
    if (this.tokens.length) this.about.append(shadeLegend(isMarked ? "; underlined: shared with the query" : ""));
    else if (isMarked) this.about.append(el("p", { class: "soft" }, "Underlined: shared with the query."));
  }

  placed() { return this.tokens.filter((token) => isPlaced(token) && token.start >= this.start && token.end <= this.end); }

  at(from, to) { return this.characters.slice(from - this.start, to - this.start).join(""); }

  async extend(direction) {
    if (direction > 0) {
      if (this.to === this.end) this.characters.push(...await this.part(this.end));
      this.to = this.end;
    } else {
      if (this.from === this.start) {
        const start = Math.max(0, this.start - this.size);
        this.characters.unshift(...[...await this.part(start)].slice(0, this.start - start));
        this.start = start;
      }
      this.from = this.start;
    }
    const height = this.text.scrollHeight;
    this.draw();
    if (direction < 0) this.text.scrollTop += this.text.scrollHeight - height;
    this.text.focus({ preventScroll: true });
  }

  draw() {
    const { n_characters: n } = this.found;
    this.earlier.hidden = this.from === 0; this.later.hidden = this.to >= n;
    this.earlier.textContent = `Earlier text (${whole(this.from)} characters)`;
    this.later.textContent = `Later text (${whole(n - this.to)} characters)`;
    this.text.replaceChildren(...this.pieces(), "");
  }

  // The shown text as text nodes, shaded tokens, and marks around either.
  pieces() {
    const shown = this.characters.slice(this.from - this.start, this.to - this.start);
    const tokens = this.isPlaced ? this.placed().filter((token) => token.end > this.from && token.start < this.to) : [];
    const marks = this.marks(shown.join("")), largest = largestPart(this.tokens);
    const cuts = new Set([0, shown.length, ...marks.flat()]);
    for (const token of tokens) cuts.add(Math.max(0, token.start - this.from)).add(Math.min(shown.length, token.end - this.from));
    for (let i = PIECE; i < shown.length; i += PIECE) cuts.add(i);
    const places = [...cuts].sort((a, b) => a - b), made = [];
    let token = 0, mark = 0, inside = null;
    places.slice(1).forEach((stop, i) => {
      const start = places[i], text = shown.slice(start, stop).join("");
      while (token < tokens.length && tokens[token].end - this.from <= start) token += 1;
      while (mark < marks.length && marks[mark][1] <= start) { mark += 1; inside = null; }
      const isToken = token < tokens.length && tokens[token].start - this.from <= start;
      const piece = isToken ? shadedToken(tokens[token], text, largest) : el("span", {}, text);
      if (mark === marks.length || marks[mark][0] > start) { made.push(piece); return; }
      if (!inside) made.push(inside = el("mark", { class: "shared" }));
      inside.append(piece);
    });
    return made;
  }

  // Where the shared passages lie, [start, stop) in the shown characters, the first ones first.
  marks(text) {
    const found = [];
    for (const { text: passage } of this.matches) {
      const wanted = passage.trim(), length = [...wanted].length;
      if (!length) continue;
      let start = 0, last = 0; // the same place in characters, and in the string's units
      for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, last)) {
        start += [...text.slice(last, at)].length;
        found.push([start, start + length]);
        start += length; last = at + wanted.length;
      }
    }
    found.sort((a, b) => a[0] - b[0]);
    let end = 0;
    return found.filter(([start, stop]) => start >= end && (end = stop));
  }
}

// Tokens of an answer of a preference have places in texts of their own.
function isPlaced(token) { return token.text !== "" && token.start !== null && !token.answer; }

// The documents of an answer: their scores, and the text around the tokens that matter.

import { clean, el, number, shade, signed, whole } from "./dom.js";

const TOKENS_AROUND = 60;
const LARGEST_SHOWN = 8, LAYERS_NAMED = 3;

export function largestPart(tokens) {
  return tokens.reduce((most, token) => Math.max(most, Math.abs(token.part)), 0);
}

// Tokens as a text, shaded by their parts.
export function shaded(tokens) {
  const largest = largestPart(tokens);
  return tokens.map((token) => shadedToken(token, token.text, largest));
}

// A token, or some of its characters.
export function shadedToken(token, text, largest) {
  const made = el("span", { title: `${token.text || token.token}: ${signed(token.part)}` }, text);
  made.style.background = shade(token.part, largest);
  return made;
}

// The span of tokens whose parts are the largest together.
export function around(tokens, n = TOKENS_AROUND) {
  const sizes = tokens.map((token) => Math.abs(token.part));
  let sum = sizes.slice(0, n).reduce((a, b) => a + b, 0), best = sum, start = 0;
  for (let i = n; i < sizes.length; i += 1) {
    sum += sizes[i] - sizes[i - n];
    if (sum > best * (1 + 1e-9)) [best, start] = [sum, i - n + 1];
  }
  return [start, Math.min(tokens.length, start + n)];
}

function largestTokens(tokens) {
  const best = [...tokens].sort((a, b) => Math.abs(b.part) - Math.abs(a.part)).slice(0, LARGEST_SHOWN);
  return el("ul", {}, best.map((token) =>
    el("li", {}, el("code", {}, JSON.stringify(clean(token.text || token.token))), ` ${signed(token.part)}`)));
}

function strip(layers) {
  const parts = Object.entries(layers), largest = Math.max(...parts.map(([, part]) => Math.abs(part)));
  const best = [...parts].sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, LAYERS_NAMED);
  const names = best.map(([name, part]) => `${name} ${signed(part)}`).join(", ");
  const cells = parts.map(([name, part]) => {
    const cell = el("span", { title: `${name}: ${signed(part)}` });
    cell.style.background = shade(part, largest);
    return cell;
  });
  return [
    el("div", { class: "strip", role: "img", "aria-label": `Parts of ${parts.length} layers; the largest: ${names}` }, cells),
    el("p", { class: "soft names" }, `${parts.length > best.length ? "Most of it" : "Layers"}: ${names}`),
  ];
}

// What the colours of tokens mean, and what else is said.
export function shadeLegend(rest) {
  const sample = (part) => { const made = el("i", {}); made.style.background = shade(part, 1); return made; };
  return el("p", { class: "soft" }, el("span", { class: "shades" }, sample(1), " raises the document's score, ", sample(-1), ` lowers it${rest}`));
}

function excerptOf(hit) {
  if (hit.tokens?.length) {
    const [start, stop] = around(hit.tokens);
    const made = el("p", { class: "excerpt", dir: "auto" }, start > 0 && "… ",
      shaded(hit.tokens).slice(start, stop), stop < hit.tokens.length && " …");
    if (stop - start === hit.tokens.length) return [made];
    const all = el("details", { "data-key": "all" }, el("summary", {}, `All ${whole(hit.tokens.length)} tokens of its row`));
    all.addEventListener("toggle", () => {
      if (all.open && all.children.length === 1) all.append(el("p", { class: "excerpt", dir: "auto" }, shaded(hit.tokens)));
    });
    return [made, all];
  }
  return hit.text ? [el("p", { class: "excerpt", dir: "auto" }, hit.text.slice(0, 400))] : [];
}

function tokensOf(hit) {
  if (!hit.tokens) return [];
  const made = el("details", { "data-key": "numbers" }, el("summary", {}, "Tokens and layers in numbers"));
  made.addEventListener("toggle", () => {
    if (!made.open || made.children.length > 1) return;
    made.append(el("h4", {}, "In the document"), largestTokens(hit.tokens));
    if (hit.query_tokens) {
      made.append(el("h4", {}, "In the query"),
        el("p", { class: "excerpt", dir: "auto" }, shaded(hit.query_tokens)), largestTokens(hit.query_tokens));
    }
    const difference = hit.recomputed_score - hit.score;
    made.append(el("p", {}, `Recomputed score ${signed(hit.recomputed_score)}; less that of the stored row: ${signed(difference)}.`));
    const layers = Object.entries(hit.layers).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, LARGEST_SHOWN);
    made.append(el("h4", {}, "Layers"), el("ul", {}, layers.map(([name, part]) => el("li", {}, `${name} ${signed(part)}`))));
  });
  return [made];
}

function matchesOf(hit) {
  if (!hit.text_matches) return [];
  if (!hit.text_matches.length) return [el("p", { class: "soft" }, "Shares no passage with the query.")];
  const longer = hit.text_matches.filter((match) => match.tokens > 1), shown = longer.length ? longer : hit.text_matches;
  const passages = shown.map((match, number) => [
    number > 0 && ", ", el("mark", {}, el("bdi", {}, match.text)), ` (in ${whole(match.documents)} document${match.documents === 1 ? "" : "s"})`]).flat();
  return [longer.length ? el("p", {}, "Shares ", passages) : el("p", { class: "soft" }, "Shares single tokens alone: ", passages)];
}

// One document. `open` is called with it, `ask` with its id.
function hitOf(hit, { open, ask }) {
  const label = `document ${hit.id}`;
  return el("li", { class: "hit", "data-id": hit.id },
    el("div", { class: "facts" },
      el("b", {}, hit.rank), el("span", { class: "score" }, signed(hit.score)),
      hit.domain !== null && el("bdi", { class: "name" }, hit.domain),
      el("span", { class: "soft" }, `loss ${number(hit.loss)}`),
      el("span", { class: "soft" }, `id ${hit.id}`), el("bdi", { class: "soft name" }, hit.key),
      hit.text_score !== undefined && el("span", { class: "soft" }, `text ${number(hit.text_score)}`)),
    excerptOf(hit), hit.layers ? strip(hit.layers) : [], matchesOf(hit), tokensOf(hit),
    el("div", { class: "row" },
      el("button", { type: "button", "aria-label": `Open ${label}`, onclick: () => open(hit) }, "Open"),
      el("button", { type: "button", "aria-label": `Ask with ${label}`, onclick: () => ask(hit.id) }, "Ask with this document")));
}

export function hitLists(hits, actions) {
  const ends = { top: "Highest scores", bottom: "Lowest scores" };
  return Object.entries(ends).flatMap(([end, title]) => {
    const found = hits.filter((hit) => hit.end === end);
    return found.length ? [el("h3", {}, title), el("ol", { class: "hits" }, found.map((hit) => hitOf(hit, actions)))] : [];
  });
}

// --- a picture of the answer ---

export function picture(question, hits) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const width = 1000, line = 22, canvas = document.createElement("canvas");
  canvas.width = width; canvas.height = line * (3 + 2.4 * hits.length);
  const pen = canvas.getContext("2d");
  pen.fillStyle = colour("paper"); pen.fillRect(0, 0, width, canvas.height);
  pen.fillStyle = colour("ink"); pen.font = "bold 15px sans-serif";
  pen.fillText(clean(question).replace(/\s+/g, " ").slice(0, 110), 12, line);
  hits.forEach((hit, place) => {
    const y = line * (2.6 + 2.4 * place);
    pen.fillStyle = colour("ink"); pen.font = "14px sans-serif";
    pen.fillText(`${hit.end} ${hit.rank}`, 12, y); pen.fillText(signed(hit.score), 90, y);
    pen.fillStyle = colour("soft");
    pen.fillText(clean(`${hit.domain ?? ""}   loss ${number(hit.loss)}   id ${hit.id}   ${hit.key}`).slice(0, 100), 190, y);
    pen.font = "13px monospace";
    drawText(pen, hit, y + line, width, colour);
  });
  return new Promise((done) => canvas.toBlob(done));
}

function drawText(pen, hit, y, width, colour) {
  const tokens = hit.tokens?.length ? hit.tokens : [{ text: hit.text ?? "", part: 0 }];
  const [start, stop] = around(tokens), largest = largestPart(tokens);
  let x = 90;
  for (const token of tokens.slice(start, stop)) {
    const text = clean(token.text).replace(/\s+/g, " "), wide = pen.measureText(text).width;
    if (x + wide > width - 12) break;
    if (token.part && largest) {
      pen.fillStyle = `rgb(${colour(token.part > 0 ? "positive" : "negative")} / ${(Math.abs(token.part) / largest) * 0.4})`;
      pen.fillRect(x, y - 13, wide, 17);
    }
    pen.fillStyle = colour("ink"); pen.fillText(text, x, y); x += wide;
  }
}

// One document, in a dialog.

import { get } from "./api.js";
import { el, number, whole } from "./dom.js";

const dialog = document.getElementById("document");

export async function showDocument(index, id, ask) {
  const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const body = el("div", {}, el("p", { role: "status" }, "Reading ..."));
  dialog.replaceChildren(el("h2", { id: "document-title" }, `Document ${id}`), body, el("div", { class: "row" }, close));
  if (!dialog.open) dialog.showModal();
  try {
    const found = await get(`/api/outputs/${index}/documents/${id}`);
    const text = el("p", { class: "excerpt", dir: "auto" }, found.text);
    body.replaceChildren(
      el("p", { class: "facts" }, el("bdi", { class: "name" }, found.domain ?? "no domain"), el("span", {}, `loss ${number(found.loss)}`),
        el("span", {}, `${whole(found.n_tokens)} target tokens`), el("span", {}, found.status), el("bdi", { class: "name" }, found.key)),
      found.problem ? el("p", { class: "problem" }, found.problem) : text);
    if (found.text.length < found.n_characters) body.append(more(index, id, text, found));
    const question = found.text.slice(0, found.n_question);
    if (question.trim()) close.before(el("button", { type: "button", class: "primary", onclick: () => { dialog.close(); ask(question); } }, "Ask with this document"));
  } catch (error) {
    body.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
  }
}

function more(index, id, text, found) {
  let start = found.start + found.text.length;
  const button = el("button", { type: "button", onclick: async () => {
    const next = await get(`/api/outputs/${index}/documents/${id}?start=${start}`);
    text.append(el("span", {}, next.text)); start += next.text.length;
    button.hidden = start >= next.n_characters || !next.text.length;
  } }, `More of its ${whole(found.n_characters)} characters`);
  return button;
}

export async function questionOf(index, id) {
  const found = await get(`/api/outputs/${index}/documents/${id}`);
  if (found.problem) throw new Error(found.problem);
  return found.text.slice(0, found.n_question);
}

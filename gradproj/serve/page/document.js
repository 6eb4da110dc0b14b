// One document, in a dialog.

import { get } from "./api.js";
import { el, number, signed, whole } from "./dom.js";
import { DocumentText } from "./text.js";

const dialog = document.getElementById("document");

const pathOf = (index, id) => `/api/outputs/${index}/documents/${id}`;

// `hit` is what an answer says of it, if it comes from one; `ask` is called with a text to ask with.
export async function showDocument(index, id, hit, ask) {
  const close = el("button", { type: "button", onclick: () => dialog.close() }, "Close");
  const body = el("div", {}, el("p", { role: "status" }, "Reading ..."));
  dialog.replaceChildren(el("h2", { id: "document-title" }, `Document ${id}`), body, el("div", { class: "row" }, close));
  if (!dialog.open) dialog.showModal();
  try {
    const found = await get(pathOf(index, id));
    const part = async (start) => (await get(`${pathOf(index, id)}?start=${start}`)).text;
    const text = new DocumentText(found, hit ?? {}, part);
    if (!found.problem) await text.begin();
    body.replaceChildren(
      el("p", { class: "facts" }, hit && el("span", { class: "score" }, `score ${signed(hit.score)}`),
        el("bdi", { class: "name" }, found.domain ?? "no domain"), el("span", {}, `loss ${number(found.loss)}`),
        el("span", {}, `${whole(found.n_tokens)} target tokens`), el("span", {}, found.status), el("bdi", { class: "name" }, found.key)),
      found.problem ? el("p", { class: "problem" }, found.problem) : text.element);
    const question = beginning(found);
    if (question.trim()) close.before(el("button", { type: "button", class: "primary", onclick: () => { dialog.close(); ask(question); } }, "Ask with this document"));
  } catch (error) {
    body.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
  }
}

export async function questionOf(index, id) {
  const found = await get(pathOf(index, id));
  if (found.problem) throw new Error(found.problem);
  return beginning(found);
}

// What can be asked with; in characters, not in the units of a string.
function beginning(found) { return [...found.text].slice(0, found.n_question).join(""); }

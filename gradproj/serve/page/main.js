// The page: its views, its permanent link, its theme.

import { get, keepToken, takeToken } from "./api.js";
import { Panel } from "./ask.js";
import { questionOf, showDocument } from "./document.js";
import { el } from "./dom.js";
import { showJob } from "./job.js";
import { showMap } from "./map.js";
import { showStore } from "./store.js";

const VIEWS = ["ask", "store", "map", "job"];
const problem = document.getElementById("problem");
const choice = document.getElementById("output");
let outputs = [], panels = [], view = "", shown = new Map(), isAskedAgain = false;

function fail(error) {
  problem.textContent = error?.message ?? ""; problem.hidden = !error;
}

// --- the permanent link: #ask=[{"text": ...}, ...], one question a panel ---

function questionsOf(hash) {
  const [, text] = /^#ask=(.*)$/.exec(hash) ?? [];
  if (!text) return null;
  try {
    const made = JSON.parse(decodeURIComponent(text));
    return Array.isArray(made) && made.length && made.every(isQuestion) ? made.slice(0, 2) : null;
  } catch { return null; }
}

function isQuestion(x) {
  const texts = (list) => list === undefined || (Array.isArray(list) && list.every((one) => typeof one === "string"));
  const text = (one) => one === undefined || typeof one === "string";
  const number = (one) => one === undefined || typeof one === "number";
  return x && typeof x === "object" && [x.text, x.prompt, x.completion, x.score].every(text) && (text(x.damping) || number(x.damping)) &&
    [x.output, x.top_k, x.bottom_k].every(number) && texts(x.layers) && texts(x.domains) &&
    (x.messages === undefined || (Array.isArray(x.messages) && x.messages.every((turn) => turn && typeof turn === "object")));
}

function keepLink() {
  const asked = panels.filter((panel) => panel.asked).map((panel) => panel.asked);
  const link = `#ask=${encodeURIComponent(JSON.stringify(asked))}`;
  if (!asked.length || location.hash === link) return;
  // A new question after another: Back returns to that one.
  const isNext = !isAskedAgain && location.hash.startsWith("#ask=");
  history[isNext ? "pushState" : "replaceState"](null, "", link);
}

// --- questions ---

const overlap = el("p", { role: "status" });
const compare = el("button", { type: "button" }, "Compare with a second question");

function drawAsk(questions) {
  const place = document.getElementById("view-ask");
  const callbacks = {
    open: (output, id, hit) => openDocument(outputs.indexOf(output), id, hit),
    ask: async (panel, id) => {
      try { askWith(panel, await questionOf(outputs.indexOf(panel.output), id)); } catch (error) { fail(error); }
    },
    changed: keepLink, answered: () => { showOverlap(); learnMore(); },
  };
  panels = questions.map((question) => new Panel(outputs, question, callbacks));
  compare.onclick = () => drawAgain(panels.length === 1);
  compare.textContent = panels.length === 1 ? "Compare with a second question" : "One question alone";
  overlap.textContent = "";
  place.replaceChildren(el("div", { class: "row" }, compare, overlap), el("div", { class: panels.length > 1 ? "panels two" : "panels" }, panels.map((x) => x.element)));
}

function drawAgain(two) {
  const first = panels[0].question(), hadAnswer = panels[0].asked;
  const second = { ...first, output: Math.min(1, outputs.length - 1) };
  drawAsk(two ? [first, second] : [first]);
  if (hadAnswer) askAgain(panels.slice(0, 1));
}

// Asks what the address holds already.
function askAgain(some) {
  isAskedAgain = true;
  some.forEach((panel) => panel.ask());
  isAskedAgain = false;
}

function askWith(panel, text) {
  const { messages: _, prompt: __, completion: ___, ...rest } = panel.question();
  panel.draw({ ...rest, text });
  panel.form.scrollIntoView({ block: "start" });
  panel.fields.text.focus({ preventScroll: true });
  panel.ask();
}

function showOverlap() {
  if (panels.length < 2 || !panels.every((panel) => panel.isFinal)) { overlap.textContent = ""; return; }
  const [one, other] = panels.map((panel) => new Set(panel.hits.filter((hit) => hit.end === "top").map((hit) => hit.id)));
  const n = [...one].filter((id) => other.has(id)).length;
  overlap.textContent = `${n} of ${Math.max(one.size, other.size)} highest documents are in both answers.`;
}

// What is known of an output once its model is loaded.
async function learnMore() {
  if (outputs.every((output) => output.takes_chat !== null)) return;
  try { (await get("/api/outputs")).outputs.forEach((found, i) => Object.assign(outputs[i], found)); } catch { /* as before */ }
}

function openDocument(index, id, hit) {
  showDocument(index, id, hit, (text) => {
    show("ask");
    const panel = panels.find((x) => outputs.indexOf(x.output) === index) ?? panels[0];
    panel.fields.output.value = String(index);
    askWith(panel, text);
  });
}

// --- views ---

async function show(name) {
  view = VIEWS.includes(name) ? name : "ask";
  for (const each of VIEWS) document.getElementById(`view-${each}`).hidden = each !== view;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === view) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  choice.parentElement.hidden = view === "ask" || outputs.length < 2;
  fail(null);
  if (view === "ask") { keepLink(); return; }
  const index = Number(choice.value || 0), place = document.getElementById(`view-${view}`), key = `${view} ${index}`;
  if (shown.get(view) === key && view !== "job") return;
  shown.set(view, key);
  const open = (id) => openDocument(index, id);
  try {
    if (view === "store") await showStore(place, index, outputs[index], open);
    if (view === "map") await showMap(place, index, outputs[index], open);
    if (view === "job") await showJob(place, index, () => view === "job" && Number(choice.value || 0) === index);
  } catch (error) {
    shown.delete(view); place.replaceChildren(); fail(error);
  }
}

function followAddress() {
  if (takeToken()) { location.reload(); return; }
  if (!outputs.length) return;
  const questions = questionsOf(location.hash);
  if (!questions) {
    show(location.hash.slice(1));
    if (location.hash.startsWith("#ask=")) fail(new Error("The address holds no question that can be read."));
    return;
  }
  drawAsk(questions); show("ask");
  askAgain(panels);
}

// --- theme ---

function setTheme(isDark) {
  document.documentElement.dataset.theme = isDark ? "dark" : "light";
  document.getElementById("theme").setAttribute("aria-pressed", String(isDark));
}

const kept = localStorage.getItem("gradproj-theme");
setTheme(kept ? kept === "dark" : matchMedia("(prefers-color-scheme: dark)").matches);
document.getElementById("theme").addEventListener("click", () => {
  const isDark = document.documentElement.dataset.theme !== "dark";
  localStorage.setItem("gradproj-theme", isDark ? "dark" : "light"); setTheme(isDark);
});

// --- start ---

// Asks for the token; the address keeps its question.
function askForToken() {
  const field = el("input", { type: "password", autocomplete: "off", size: 20 });
  const form = el("form", { class: "row" }, el("label", {}, "Token ", field), el("button", { class: "primary", type: "submit" }, "Open"));
  form.addEventListener("submit", (event) => { event.preventDefault(); keepToken(field.value); location.reload(); });
  problem.after(form); field.focus();
}

takeToken();
window.addEventListener("hashchange", followAddress);
try {
  outputs = (await get("/api/outputs")).outputs;
  const bad = outputs.filter((output) => output.problem);
  outputs.forEach((output, i) => choice.append(el("option", { value: i }, output.title)));
  choice.addEventListener("change", () => show(view));
  drawAsk(questionsOf(location.hash) ?? [{ output: 0 }]);
  followAddress();
  if (bad.length) fail(new Error(bad.map((output) => `${output.title}: ${output.problem}`).join("\n")));
} catch (error) {
  fail(error);
  if (error.status === 401) askForToken();
}
document.body.dataset.ready = "yes";

// A question and its answer; two panels show two of them side by side.

import { events } from "./api.js";
import { download, el, whole } from "./dom.js";
import { hitLists, picture, shadeLegend } from "./hits.js";

const KINDS = { text: "Text", completion: "Prompt and completion", chat: "Chat turns" };
const ROLES = ["system", "user", "assistant"];
const K = 10;

export class Panel {
  // `outputs` are the server's; `open(output, id, hit)` shows a document, `changed()` follows a change.
  constructor(outputs, question, { open, ask, changed, answered }) {
    this.outputs = outputs; this.changed = changed; this.answered = answered;
    this.actions = { open: (hit) => open(this.output, hit.id, hit), ask: (id) => ask(this, id) };
    this.hits = []; this.stop = null; this.isFinal = false;
    this.form = el("form", {});
    this.news = el("div", { class: "news", role: "status" });
    this.bar = el("progress", { max: 1, value: 0, hidden: true, "aria-label": "Documents scanned" });
    this.words = el("span", {});
    this.cancel = el("button", { type: "button", hidden: true, onclick: () => this.stop?.abort() }, "Cancel");
    this.exports = el("div", { class: "row", hidden: true });
    this.list = el("div", {});
    this.about = el("div", {});
    this.news.append(this.bar, this.words, this.cancel);
    this.element = el("section", { "aria-label": "Question and answer" },
      this.form, this.news, this.exports, this.about, this.list);
    this.form.addEventListener("submit", (event) => { event.preventDefault(); this.ask(); });
    this.form.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); this.ask(); }
    });
    this.draw(question);
  }

  get output() { return this.outputs[Number(this.fields.output.value)] ?? this.outputs[0]; }

  // Draws the form of a question, as the permanent link holds it.
  draw(question) {
    const facts = this.outputs[question.output ?? 0] ?? this.outputs[0];
    this.fields = {
      output: select(this.outputs.map((x, i) => [i, x.title]), question.output ?? 0),
      // Without a chat template turns make no text; it is not known before the model is loaded.
      kind: select(Object.entries(KINDS).filter(([kind]) => kind !== "chat" || facts.takes_chat !== false), kindOf(question)),
      text: el("textarea", { "aria-label": "Text", dir: "auto", placeholder: "A text: which documents lower its loss?" }),
      prompt: el("textarea", { "aria-label": "Prompt", dir: "auto" }),
      completion: el("textarea", { "aria-label": "Completion", dir: "auto" }),
      score: select(scoresOf(facts), question.score ?? ""),
      damping: el("input", { size: 8, value: question.damping ?? "auto" }),
      layers: el("input", { size: 24, placeholder: "all; such as h.3,mlp", value: (question.layers ?? []).join(",") }),
      top: el("input", { type: "number", min: 0, max: 200, value: question.top_k ?? K }),
      bottom: el("input", { type: "number", min: 0, max: 200, value: question.bottom_k ?? 5 }),
      tokens: el("input", { type: "checkbox" }), matches: el("input", { type: "checkbox" }),
    };
    const fields = this.fields;
    fields.text.value = question.text ?? "";
    fields.prompt.value = question.prompt ?? ""; fields.completion.value = question.completion ?? "";
    fields.tokens.checked = question.tokens ?? true;
    fields.matches.checked = question.text_matches ?? facts.has_text_index ?? false;
    this.turns = el("div", {});
    for (const turn of question.messages ?? [{ role: "user", content: "" }, { role: "assistant", content: "" }]) this.addTurn(turn);
    const texts = {
      text: fields.text,
      completion: el("div", {}, el("label", { class: "block" }, "Prompt ", fields.prompt), el("label", { class: "block" }, "Completion ", fields.completion)),
      chat: el("div", {}, this.turns, el("button", { type: "button", onclick: () => this.addTurn({ role: "user", content: "" }) }, "Add a turn")),
    };
    const show = () => Object.entries(texts).forEach(([kind, part]) => { part.hidden = kind !== fields.kind.value; });
    fields.kind.addEventListener("change", show); show();
    fields.output.addEventListener("change", () => this.draw({ ...this.question(), score: undefined, domains: undefined }));
    const domains = [...new Set([...(question.domains ?? []), ...(facts.domains ?? [])])]; // the ticked ones in view
    this.domains = domains.length ? domainChoice(domains, question.domains) : null;
    this.form.replaceChildren(
      el("div", { class: "row" }, this.outputs.length > 1 && el("label", {}, "Output ", fields.output), el("label", {}, "Ask with ", fields.kind)),
      ...Object.values(texts),
      el("div", { class: "row" }, el("label", {}, "Score ", fields.score), el("label", {}, "Highest ", fields.top), el("label", {}, "Lowest ", fields.bottom),
        el("label", {}, fields.tokens, "Tokens that matter"), facts.has_text_index && el("label", {}, fields.matches, "Shared text")),
      el("details", { open: Boolean(question.layers?.length || question.domains?.length || (question.damping ?? "auto") !== "auto") },
        el("summary", {}, "Layers, domains, damping"),
        el("div", { class: "row" }, el("label", {}, "Layers ", fields.layers), el("label", {}, "Damping ", fields.damping)),
        this.domains && el("fieldset", {}, el("legend", {}, "Domains (none ticked: all)"), this.domains)),
      el("div", { class: "row" }, el("button", { class: "primary", type: "submit" }, "Ask"), el("span", { class: "soft" }, "or Ctrl+Enter")));
  }

  addTurn({ role, content }) {
    const text = el("textarea", { "aria-label": "Turn", dir: "auto" });
    text.value = typeof content === "string" ? content : "";
    const turn = el("div", { class: "turn" },
      el("div", { class: "row" }, el("label", {}, "Role ", select(ROLES.map((x) => [x, x]), role)),
        el("button", { type: "button", onclick: () => turn.remove() }, "Remove")), text);
    this.turns.append(turn);
  }

  // The fields of the API's question.
  question() {
    const fields = this.fields, kind = fields.kind.value, asked = { output: Number(fields.output.value) };
    if (kind === "text") asked.text = fields.text.value;
    else if (kind === "completion") { asked.prompt = fields.prompt.value; asked.completion = fields.completion.value; }
    else asked.messages = [...this.turns.children].map((turn) => ({ role: turn.querySelector("select").value, content: turn.querySelector("textarea").value }));
    if (fields.score.value) asked.score = fields.score.value;
    const isGradient = !["text", "hidden"].includes(fields.score.value);
    const layers = fields.layers.value.split(",").map((x) => x.trim()).filter(Boolean);
    if (layers.length) asked.layers = layers;
    const domains = this.domains ? [...this.domains.querySelectorAll("input:checked")].map((x) => x.value) : [];
    if (domains.length) asked.domains = domains;
    if (fields.damping.value.trim() && fields.damping.value.trim() !== "auto") asked.damping = fields.damping.value.trim();
    asked.top_k = Number(fields.top.value); asked.bottom_k = Number(fields.bottom.value);
    asked.tokens = fields.tokens.checked && isGradient && !fields.score.value.includes("+");
    asked.text_matches = fields.matches.checked;
    return asked;
  }

  async ask() {
    this.stop?.abort();
    const stop = this.stop = new AbortController(), question = this.question();
    if (!question.top_k && !question.bottom_k) {
      this.about.replaceChildren(el("p", { class: "problem", role: "alert" }, "Highest and Lowest are both 0: there is no document to show."));
      return;
    }
    this.asked = question; this.hits = []; this.isFinal = false;
    this.about.replaceChildren(); this.list.replaceChildren(); this.exports.hidden = true;
    this.bar.hidden = this.cancel.hidden = false; this.bar.removeAttribute("value");
    this.say("Asking ...");
    this.changed();
    try {
      const answer = await events("/api/query", { ...question, show_text: true }, stop.signal, (event) => this.take(event));
      this.show(answer.hits, true);
      this.say(`${whole(answer.hits.length)} document${answer.hits.length === 1 ? "" : "s"}.`);
      this.about.append(...this.meaning(answer));
    } catch (error) {
      if (stop.signal.aborted) { if (this.stop === stop) this.say("Cancelled: these are the documents so far."); }
      else {
        this.about.replaceChildren(el("p", { class: "problem", role: "alert" }, error.message));
        this.say(this.hits.length ? "The answer did not come to its end: these are the documents so far." : "");
      }
    } finally {
      if (this.stop === stop) this.bar.hidden = this.cancel.hidden = true;
    }
    this.answered();
  }

  say(text) { this.words.textContent = text; }

  take(event) {
    if (event.event === "queued") this.say(`Waiting: ${whole(event.ahead)} ahead, ${whole(event.running)} running.`);
    if (event.event === "asked") this.query = event.queries[0];
    if (event.event === "progress" && event.what === "waits for the model") {
      this.say("Waiting for the model, which loads or works for another question ...");
    } else if (event.event === "progress") {
      this.bar.value = event.done / Math.max(event.total, 1);
      const isDone = event.done >= event.total;
      this.say(isDone ? "Finishing ..." : `${whole(event.done)} of ${whole(event.total)} ${event.what === "texts" ? "texts for their tokens" : event.what}`);
    }
    if (event.event === "partial") this.show(event.hits, false);
  }

  show(hits, isFinal) {
    this.hits = hits; this.isFinal = isFinal;
    replaceKept(this.list, hitLists(hits, this.actions));
    this.exports.hidden = hits.length === 0;
    this.exports.replaceChildren(
      el("button", { type: "button", onclick: () => this.save() }, "Save JSON lines"),
      el("button", { type: "button", onclick: async () => download("answer.png", await picture(this.title(), this.hits)) }, "Save picture"),
      el("button", { type: "button", onclick: (event) => this.copyLink(event.target) }, "Copy link"));
  }

  meaning({ summary, notes }) {
    const loss = this.query?.loss;
    return [
      this.asked.tokens && shadeLegend("; the strips below the texts are the layers, the first one left"),
      this.query && el("p", { class: "soft" }, `The query has ${whole(this.query.n_tokens)} target tokens${loss == null ? "" : `, loss ${loss.toFixed(3)} nats per token`}.`),
      el("details", {}, el("summary", {}, "What the scores mean"), el("pre", {}, summary.join("\n"), notes.length ? `\n\n${notes.join("\n")}` : "")),
    ].filter(Boolean);
  }

  title() {
    const asked = this.asked;
    return asked.text ?? (asked.messages ? asked.messages.map((x) => x.content).join(" / ") : `${asked.prompt} >> ${asked.completion}`);
  }

  save() {
    download("answer.jsonl", new Blob(this.hits.map((hit) => `${JSON.stringify(hit)}\n`), { type: "application/x-ndjson" }));
  }

  async copyLink(button) {
    try { await navigator.clipboard.writeText(location.href); button.textContent = "Link copied"; } catch { button.textContent = "The address bar has the link"; }
  }
}

// Replaces a list; what was open in a document stays open, and the focus stays in its document.
function replaceKept(list, parts) {
  const keyOf = (details) => `${details.closest(".hit").dataset.id} ${details.dataset.key}`;
  const open = new Set([...list.querySelectorAll(".hit details[open]")].map(keyOf));
  const focused = list.contains(document.activeElement) ? document.activeElement : null;
  const place = focused?.closest(".hit")?.dataset.id, number = place && [...list.querySelectorAll(`[data-id="${place}"] button`)].indexOf(focused);
  list.replaceChildren(...parts);
  for (const details of list.querySelectorAll(".hit details")) if (open.has(keyOf(details))) details.open = true;
  if (place) [...list.querySelectorAll(`[data-id="${place}"] button`)].at(Math.max(number, 0))?.focus({ preventScroll: true });
}

function select(options, chosen) {
  const made = el("select", {}, options.map(([value, label]) => el("option", { value }, label)));
  // A link may ask for what is not there: the server says so, rather than another answer being shown.
  if (!options.some(([value]) => String(value) === String(chosen))) made.append(el("option", { value: chosen }, chosen));
  made.value = String(chosen);
  return made;
}

function kindOf(question) {
  return question.messages ? "chat" : question.prompt !== undefined ? "completion" : "text";
}

function scoresOf(facts) {
  const scores = [["", `default (${facts.score ?? "kfac"})`], ...(facts.scores ?? []).map((x) => [x, x])];
  if (facts.has_hidden_states) scores.push(["hidden", "hidden states"]);
  if (facts.has_text_index) scores.push(["text", "shared text"], [`${facts.score}+text`, `${facts.score} + text`]);
  return scores;
}

function domainChoice(domains, chosen = []) {
  return el("div", { class: "domains", role: "group", tabindex: 0, "aria-label": "Domains" }, domains.map((name) => {
    const box = el("input", { type: "checkbox", checked: chosen.includes(name) });
    box.value = name;
    return el("label", {}, box, el("bdi", {}, name));
  }));
}

// Progress of the job that writes a store, live.

import { get } from "./api.js";
import { el, number, whole } from "./dom.js";

const EVERY_MS = 3000;

// Shows the status again and again while `isShown()`.
export async function showJob(place, index, isShown) {
  let isFirst = true;
  while (isFirst || isShown()) {
    if (isFirst || !document.hidden) place.replaceChildren(...lines(await get(`/api/outputs/${index}/status`)));
    isFirst = false;
    await new Promise((done) => setTimeout(done, EVERY_MS));
  }
}

function lines(status) {
  const n = status.n_committed_samples, total = Math.max(status.n_samples, 1), speed = status.speed;
  const left = speed.left_s === null || status.complete ? "" : `, about ${duration(speed.left_s)} left`;
  return [
    el("h2", {}, status.complete ? "The job is complete" : "The job's progress"),
    el("p", {}, el("progress", { max: total, value: n, "aria-label": "Documents committed" }),
      ` ${whole(n)} of ${whole(status.n_samples)} documents (${((100 * n) / total).toFixed(1)} %), ${whole(status.n_committed)} of ${whole(status.n_units)} units`),
    speed.n_ranks && !status.complete ? el("p", {}, `${number(speed.samples_per_s)} documents/s, ${whole(Math.round(speed.tokens_per_s))} tokens/s by ${speed.n_ranks} rank(s)${left}`) : "",
    status.by_status && el("p", { class: "soft" }, Object.entries(status.by_status).map(([name, count]) => `${whole(count)} ${name}`).join(", ")),
    !status.complete && el("p", {}, "Questions are answered from the rows that are there."),
    status.failed && el("p", { class: "problem" }, `The last start failed: ${status.failed.error}`),
    ...status.problems.map((problem) => el("p", { class: "problem" }, problem)),
    status.claimed.length ? claims(status.claimed) : "",
  ].filter(Boolean);
}

function claims(claimed) {
  const columns = ["unit", "documents done", "rank", "host", "process"];
  return el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": "Ranks at work" }, el("table", {},
    el("thead", {}, el("tr", {}, columns.map((x) => el("th", { scope: "col" }, x)))),
    el("tbody", {}, claimed.map((claim) => el("tr", {}, [claim.unit, `${claim.n_done === null ? "–" : whole(claim.n_done)} of ${whole(claim.n_samples)}`,
      claim.owner?.rank ?? "–", claim.owner?.host ?? "–", claim.process].map((x) => el("td", {}, x)))))));
}

function duration(seconds) {
  return seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

// The store: domains, distributions, outliers.

import { events } from "./api.js";
import { el, number, shade, svg, whole } from "./dom.js";

export async function showStore(place, index, output, open) {
  const news = el("p", { role: "status" }, "Scanning the store ...");
  place.replaceChildren(el("h2", {}, "Store"), ...facts(output), news);
  const answer = await events(`/api/outputs/${index}/overview`, null, undefined, (event) => {
    if (event.event === "queued") news.textContent = `Waiting: ${event.ahead} ahead.`;
    if (event.event === "progress") news.textContent = `${whole(event.done)} of ${whole(event.total)} documents scanned.`;
  });
  news.remove();
  const made = answer.overview;
  place.append(
    ...(made.damage ? [el("p", { class: "problem", role: "alert" }, made.damage)] : []),
    el("h2", {}, "Documents"), table(["status", "documents", ""], made.statuses),
    el("h2", {}, "Losses and norms"),
    el("div", { class: "charts" }, made.histograms.map(histogram)),
    made.groups.length > 1 ? quantiles(made) : "",
    el("h2", {}, "Domains"),
    made.domains.lines.length ? table(made.domains.columns, made.domains.lines) : el("p", {}, made.no_matrix),
    ...made.matrices.map(matrix),
    el("h2", {}, "Outliers"),
    ...(made.texts_note ? [el("p", { class: "soft" }, made.texts_note)] : []),
    ...made.outliers.map((one) => outliers(one, open)));
}

function facts(output) {
  return [el("p", {}, `${whole(output.rows)} of ${whole(output.documents)} documents have a row; ` +
    `${whole(output.layers.length)} layers; ${whole(output.domains.length)} domains. `, el("span", { class: "soft" }, output.path))];
}

function scroll(label, child) {
  return el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": label }, child);
}

function table(columns, lines) {
  return scroll(columns[0], el("table", {}, el("thead", {}, el("tr", {}, columns.map((x) => el("th", { scope: "col" }, x)))),
    el("tbody", {}, lines.map((line) => el("tr", {}, line.map((cell) => el("td", {}, el("bdi", {}, cell))))))));
}

function matrix({ title, names, values }) {
  // Colours end at the largest value off the diagonal.
  const others = values.flatMap((row, i) => row.filter((x, j) => i !== j && x !== null).map(Math.abs));
  const largest = Math.max(...others, 1e-30);
  const power = largest >= 1000 || largest < 0.01 ? Math.floor(Math.log10(largest)) : 0;
  const cell = (value, i, j) => {
    const made = el("td", { title: `${names[i]} and ${names[j]}: ${number(value)}` }, value === null ? "" : (value / 10 ** power).toFixed(2));
    made.style.background = shade(value, largest);
    return made;
  };
  const head = el("tr", {}, el("th", {}), names.map((_, j) => el("th", { scope: "col" }, j + 1)));
  const lines = values.map((row, i) => el("tr", {}, el("th", { scope: "row" }, `${i + 1} `, el("bdi", {}, names[i])), row.map((x, j) => cell(x, i, j))));
  return el("div", {}, el("h3", {}, title + (power ? `, in 1e${power}` : "")), scroll(title, el("table", { class: "matrix" }, el("thead", {}, head), el("tbody", {}, lines))));
}

function histogram({ label, log, edges, counts }) {
  const width = 320, height = 130, most = Math.max(...counts, 1), step = width / counts.length;
  const place = (x) => (log ? Math.log(x / edges[0]) / Math.log(edges.at(-1) / edges[0]) : (x - edges[0]) / (edges.at(-1) - edges[0])) * width;
  const middle = edges[edges.length >> 1];
  return el("figure", {}, el("figcaption", {}, label), svg("svg", { viewBox: `0 0 ${width} ${height + 20}`, role: "img", "aria-label": `Histogram: ${label}` },
    ...counts.map((n, i) => svg("rect", { class: "bar", x: i * step, y: height - (n / most) * height, width: step * 0.9, height: (n / most) * height })),
    svg("line", { class: "axis", x1: 0, y1: height, x2: width, y2: height }),
    ...[[edges[0], "start"], [middle, "middle"], [edges.at(-1), "end"]].map(([x, anchor]) =>
      svg("text", { x: place(x), y: height + 15, "text-anchor": anchor }, number(x, 3)))));
}

function quantiles({ groups, quantiles: names }) {
  const heads = names.map((q) => `${q * 100} %`);
  const lines = groups.map((group) => [group.name, whole(group.documents), ...group.loss.map((x) => number(x, 3)), ...group.grad_norm.map((x) => number(x, 3))]);
  return el("details", {}, el("summary", {}, "Quantiles by domain"),
    table(["domain", "documents", ...heads.map((x) => `loss ${x}`), ...heads.map((x) => `norm ${x}`)], lines));
}

function outliers({ title, about, column, documents }, open) {
  const head = el("tr", {}, [column, "domain", "loss", "id", "key", "text"].map((x) => el("th", { scope: "col" }, x)));
  const lines = documents.map((found) => el("tr", {}, el("td", {}, found.value), el("td", {}, el("bdi", {}, found.domain ?? "–")), el("td", {}, found.loss),
    el("td", {}, el("button", { type: "button", "aria-label": `Open document ${found.id}`, onclick: () => open(found.id) }, found.id)),
    el("td", {}, el("bdi", {}, found.key)), el("td", { class: "text" }, el("bdi", {}, (found.excerpt ?? "").slice(0, 160)))));
  return el("div", {}, el("h3", {}, title), el("p", { class: "soft" }, about), scroll(title, el("table", {}, el("thead", {}, head), el("tbody", {}, lines))));
}

// A map of sampled documents: drag to move, pinch, Ctrl and wheel, or + and - to zoom, click to open.

import { events } from "./api.js";
import { clean, download, el, number, svg, whole } from "./dom.js";

// Told apart by most people with a colour vision deficiency (Okabe and Ito), then by the words below.
const COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#8f6bb3", "#a0522d"];
const SHAPES = ["M-3 0A3 3 0 1 0 3 0A3 3 0 1 0 -3 0Z", "M-2.8-2.8H2.8V2.8H-2.8Z", "M0-3.8L3.6 2.8H-3.6Z", "M0-4.2L3.2 0L0 4.2L-3.2 0Z",
  "M-1.2-3.8H1.2V-1.2H3.8V1.2H1.2V3.8H-1.2V1.2H-3.8V-1.2H-1.2Z", "M0 3.8L-3.6-2.8H3.6Z"];
const PATHS = SHAPES.map((shape) => new Path2D(shape));
const OTHER = "#8a8f98"; // of domains beyond all pairs of a colour and a shape
const NEAR = 14, LISTED = 30;

export async function showMap(place, index, output, open) {
  const news = el("p", { role: "status" }, "Reading a sample of rows ...");
  place.replaceChildren(el("h2", {}, "Map of documents"), news);
  const answer = await events(`/api/outputs/${index}/map`, null, undefined, (event) => {
    if (event.event === "queued") news.textContent = `Waiting: ${event.ahead} ahead.`;
    if (event.event === "progress") news.textContent = `${whole(event.done)} of ${whole(event.total)} ${event.what} read.`;
  });
  new DocumentMap(place, answer.map, output, news, open);
}

class DocumentMap {
  constructor(place, data, output, news, open) {
    this.data = data; this.news = news; this.open = open; this.hovered = -1;
    this.only = this.glanced = null; // domains: of the pressed button, and of the one under the pointer or the focus
    this.canvas = el("canvas", { id: "map-canvas", tabindex: 0, role: "application",
      "aria-label": "Map of documents: arrows move, plus and minus zoom, 0 shows all; the documents in view are listed below" });
    this.fingers = new Map(); // pointer -> where it is
    this.list = el("ol", {});
    const [first, second] = data.explained.map((x) => `${(100 * x).toFixed(1)} %`);
    place.append(
      el("p", { class: "soft" }, `${data.ids.length < output.rows ? `${whole(data.ids.length)} documents at random` : `All ${whole(data.ids.length)} documents with a row`}, each row at length 1 in the score's metric: the two directions in which they differ most (${first} and ${second} of the squared distances).`),
      el("div", { class: "row" }, [["Closer", 1.5], ["Farther", 1 / 1.5]].map(([label, factor]) => el("button", { type: "button", onclick: () => this.zoom(factor) }, label)),
        el("button", { type: "button", onclick: () => this.all() }, "Show all"),
        el("button", { type: "button", onclick: () => this.canvas.toBlob((blob) => download("map.png", blob)) }, "Save picture")),
      el("p", { class: "soft" }, "Drag to move; Ctrl and the wheel, two fingers, or + and − zoom; click a document to open it."),
      this.canvas, this.legend(), el("details", {}, el("summary", {}, `Documents in view (the first ${LISTED})`), this.list));
    place.append(news);
    news.textContent = "";
    this.listen();
    new ResizeObserver(() => this.draw()).observe(this.canvas);
    new MutationObserver(() => this.draw()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
    this.all();
  }

  // The largest domains have a colour each, further ones the same colours in other shapes.
  legend() {
    const counts = new Map();
    for (const code of this.data.domain) counts.set(code, (counts.get(code) ?? 0) + 1);
    const largest = [...counts].sort((a, b) => b[1] - a[1]), n = COLOURS.length;
    this.looks = new Map(largest.map(([code], i) => [code, i < n * SHAPES.length ? [COLOURS[i % n], Math.floor(i / n)] : [OTHER, 0]]));
    const group = el("div", { class: "legend", role: "group", "aria-label": "Domains: press one to see it alone" });
    group.append(...largest.map(([code, count]) => this.legendButton(group, code, count)));
    return group;
  }

  legendButton(group, code, count) {
    const [colour, shape] = this.looks.get(code);
    const sample = svg("svg", { viewBox: "-5 -5 10 10", width: 13, height: 13, "aria-hidden": "true" }, svg("path", { d: SHAPES[shape], fill: colour }));
    const glance = (seen) => () => { this.glanced = seen; this.draw(); };
    const button = el("button", { type: "button", "aria-pressed": "false",
      onpointerenter: glance(code), onpointerleave: glance(null), onfocus: glance(code), onblur: glance(null), onclick: () => {
        this.only = this.only === code ? null : code;
        for (const other of group.children) other.setAttribute("aria-pressed", String(other === button && this.only !== null));
        this.draw();
      } }, sample, el("bdi", {}, this.name(code)), ` ${whole(count)}`);
    return button;
  }

  name(code) { return code < 0 ? "no domain" : this.data.domains[code]; }

  all() {
    const { x, y } = this.data, low = Math.min(...x), high = Math.max(...x), bottom = Math.min(...y), top = Math.max(...y);
    this.middle = [(low + high) / 2, (bottom + top) / 2];
    this.span = [Math.max(high - low, 1e-9) * 1.08, Math.max(top - bottom, 1e-9) * 1.08];
    this.draw();
  }

  zoom(factor, at = this.middle) {
    this.middle = this.middle.map((m, i) => at[i] + (m - at[i]) / factor);
    this.span = this.span.map((s) => s / factor);
    this.draw();
  }

  toScreen(i) {
    const { width, height } = this.box;
    return [((this.data.x[i] - this.middle[0]) / this.span[0] + 0.5) * width, (0.5 - (this.data.y[i] - this.middle[1]) / this.span[1]) * height];
  }

  toData([x, y]) {
    const { width, height } = this.box;
    return [this.middle[0] + (x / width - 0.5) * this.span[0], this.middle[1] + (0.5 - y / height) * this.span[1]];
  }

  // Moves what is under a finger with it; with another finger held still, zooms.
  drag(from, to, other) {
    if (other) {
      const far = (place) => Math.max(Math.hypot(place[0] - other[0], place[1] - other[1]), 1);
      this.zoom(far(to) / far(from), this.toData(other));
      return;
    }
    const [old, now] = [this.toData(from), this.toData(to)];
    this.middle = this.middle.map((m, i) => m + old[i] - now[i]);
    this.draw();
  }

  draw() {
    const box = this.box = { width: this.canvas.clientWidth, height: this.canvas.clientHeight };
    if (!box.width) return;
    const scale = window.devicePixelRatio || 1, pen = this.canvas.getContext("2d");
    this.canvas.width = box.width * scale; this.canvas.height = box.height * scale;
    const style = getComputedStyle(document.documentElement);
    pen.scale(scale, scale);
    pen.fillStyle = style.getPropertyValue("--paper"); pen.fillRect(0, 0, box.width, box.height);
    const inView = [], seen = this.glanced ?? this.only;
    this.data.ids.forEach((_, i) => {
      const [x, y] = this.toScreen(i), code = this.data.domain[i], [colour, shape] = this.looks.get(code);
      if (x < 0 || y < 0 || x > box.width || y > box.height) return;
      if (this.only === null || this.only === code) inView.push(i);
      pen.globalAlpha = seen === null || seen === code ? 0.8 : 0.08;
      pen.fillStyle = colour;
      pen.translate(x, y); pen.fill(PATHS[shape]); pen.translate(-x, -y);
    });
    pen.globalAlpha = 1;
    if (this.hovered >= 0) {
      const [x, y] = this.toScreen(this.hovered);
      pen.strokeStyle = style.getPropertyValue("--ink"); pen.lineWidth = 2;
      pen.beginPath(); pen.arc(x, y, 7, 0, 7); pen.stroke();
    }
    this.list.replaceChildren(...inView.slice(0, LISTED).map((i) => el("li", {}, el("button", { type: "button", onclick: () => this.open(this.data.ids[i]) }, this.label(i)))));
  }

  label(i) {
    return clean(`id ${this.data.ids[i]}, ${this.name(this.data.domain[i])}, loss ${number(this.data.loss[i])}`);
  }

  nearest(event) {
    let best = -1, least = NEAR ** 2;
    this.data.ids.forEach((_, i) => {
      if (this.only !== null && this.only !== this.data.domain[i]) return;
      const [x, y] = this.toScreen(i), far = (x - event.offsetX) ** 2 + (y - event.offsetY) ** 2;
      if (far < least) [best, least] = [i, far];
    });
    return best;
  }

  // The wheel and one finger move the page, so that the map can be scrolled past.
  listen() {
    let moved = false, before = null;
    const canvas = this.canvas, fingers = this.fingers;
    const place = (event) => [event.offsetX, event.offsetY];
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return;
      event.preventDefault(); this.zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, this.toData(place(event)));
    }, { passive: false });
    canvas.addEventListener("touchmove", (event) => { if (event.touches.length > 1) event.preventDefault(); }, { passive: false });
    canvas.addEventListener("pointerdown", (event) => {
      if (!fingers.size) [moved, before] = [false, [this.middle, this.span]];
      fingers.set(event.pointerId, place(event)); canvas.setPointerCapture(event.pointerId);
    });
    canvas.addEventListener("pointermove", (event) => {
      const from = fingers.get(event.pointerId);
      if (!from) {
        const found = this.nearest(event);
        if (found !== this.hovered) { this.hovered = found; this.news.textContent = found < 0 ? "" : this.label(found); this.draw(); }
        return;
      }
      const to = place(event), other = [...fingers].find(([pointer]) => pointer !== event.pointerId)?.[1];
      if (!moved && Math.hypot(to[0] - from[0], to[1] - from[1]) <= 4) return;
      moved = true;
      fingers.set(event.pointerId, to);
      this.drag(from, to, other);
    });
    const lift = (event) => {
      if (!fingers.delete(event.pointerId) || fingers.size || moved) return;
      const found = this.nearest(event);
      if (found >= 0) this.open(this.data.ids[found]);
    };
    canvas.addEventListener("pointerup", lift);
    canvas.addEventListener("pointercancel", (event) => { // the finger scrolls the page
      if (fingers.delete(event.pointerId)) [this.middle, this.span] = before;
      this.draw();
    });
    canvas.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-0.1, 0], ArrowRight: [0.1, 0], ArrowUp: [0, 0.1], ArrowDown: [0, -0.1] }[event.key];
      if (moves) { this.middle = this.middle.map((m, i) => m + moves[i] * this.span[i]); this.draw(); }
      else if (event.key === "+" || event.key === "=") this.zoom(1.5);
      else if (event.key === "-") this.zoom(1 / 1.5);
      else if (event.key === "0") this.all();
      else return;
      event.preventDefault();
    });
  }
}

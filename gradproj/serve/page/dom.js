// Elements, and texts of documents made safe to show. Nothing here or elsewhere parses HTML.

// Control characters, and characters that change the direction of what follows them.
const UNSAFE = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const LONGEST = 20000;

export function clean(text) {
  const cut = String(text).slice(0, LONGEST);
  return cut.replace(UNSAFE, "\ufffd");
}

// el("p", {class: "x", onclick: f}, "text", child): attributes, listeners, children.
export function el(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value === true ? "" : clean(value));
  }
  for (const child of children.flat()) {
    if (child === undefined || child === null || child === false) continue;
    made.append(child instanceof Node ? child : clean(child));
  }
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  for (const child of children) made.append(child instanceof Node ? child : clean(child));
  return made;
}

// A score: four digits, with its sign.
export function signed(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 0.001 || size >= 1e6)
    ? size.toExponential(3) : size.toLocaleString("en", { maximumSignificantDigits: 4 });
  return (value < 0 ? "−" : "+") + text;
}

export function number(value, digits = 4) {
  if (value === null || value === undefined) return "–";
  return value.toLocaleString("en", { maximumSignificantDigits: digits });
}

export function whole(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

// The colour of a part between -largest and largest: blue above 0, orange below.
export function shade(value, largest) {
  if (!value || !largest) return "";
  const root = getComputedStyle(document.documentElement);
  const most = Number(root.getPropertyValue("--most-shade"));
  const alpha = Math.min(1, Math.abs(value) / largest) * most;
  return `rgb(var(--${value > 0 ? "positive" : "negative"}) / ${alpha.toFixed(3)})`;
}

export function download(name, blob) {
  const link = el("a", { download: name });
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// Small helpers for elements, numbers and files.

export const $ = (id) => document.getElementById(id);

const PROPERTIES = new Set(["className", "textContent", "hidden", "disabled", "value", "checked", "htmlFor"]);

// An element; `on...` functions are listeners. Never sets `style` as an attribute: the page's policy refuses it.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (PROPERTIES.has(name)) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function option(value, text) {
  return make("option", { value, textContent: text });
}

// 0.04 s, 1.23 s, 14.8 s, 2 min 5 s
export function seconds(value) {
  if (value < 10) return `${value.toFixed(2)} s`;
  if (value < 60) return `${value.toFixed(1)} s`;
  const whole = Math.round(value);
  return `${Math.floor(whole / 60)} min ${whole % 60} s`;
}

export function about(value) {
  return value < 60 ? `${Math.max(1, Math.round(value))} s` : seconds(value);
}

export function median(values) {
  const sorted = [...values].sort((one, other) => one - other);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

// By hand, since the page's policy lets fetch() read nothing from data: addresses.
export function blobOf(base64, type = "image/png") {
  const text = atob(base64.slice(base64.indexOf(",") + 1));
  return new Blob([Uint8Array.from(text, (character) => character.charCodeAt(0))], { type });
}

export function newCanvas(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

export function enlarge(url, alt, text) {
  $("zoom-image").src = url;
  $("zoom-image").alt = alt;
  $("zoom-text").textContent = text;
  $("zoom").showModal();
}

// Bound once; a click beside the image closes it too.
export function bindZoom() {
  $("zoom-close").addEventListener("click", () => $("zoom").close());
  $("zoom").addEventListener("click", (event) => {
    if (event.target === $("zoom")) $("zoom").close();
  });
}

export function moveTo(element) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  element.scrollIntoView({ block: "nearest", behavior: still ? "auto" : "smooth" });
}

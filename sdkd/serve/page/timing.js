// Where the time of an image went: a bar of its parts, and their numbers.

import { make, seconds } from "./dom.js";

const PARTS = [["text_s", "text"], ["steps_s", "steps"], ["decode_s", "decode"]];

// Waiting is no part of drawing.
export function drawingTime(timing) {
  return PARTS.reduce((sum, [part]) => sum + timing[part], 0);
}

// `longest`: the time that fills the whole width, so that two bars can be held against each other.
export function timingBar(timing, longest = drawingTime(timing)) {
  const bar = make("div", { className: "timing-bar", "aria-hidden": "true" });
  const numbers = make("dl", { className: "timing-numbers" });
  for (const [part, name] of PARTS) {
    const piece = make("i", { className: name });
    piece.style.width = `${longest > 0 ? (100 * timing[part]) / longest : 0}%`;
    bar.append(piece);
    numbers.append(make("div", { className: name }, make("dt", { textContent: name }), make("dd", { textContent: seconds(timing[part]) })));
  }
  const whole = make("strong", { className: "timing-total", textContent: seconds(drawingTime(timing)) });
  const notes = [];
  if (timing.batch > 1) notes.push(`${timing.batch} images drawn in the same call`);
  if (timing.queued_s >= 0.05) notes.push(`waited ${seconds(timing.queued_s)} before`);
  const note = notes.length ? make("p", { className: "timing-note", textContent: notes.join(", ") }) : null;
  return make("div", { className: "timing" }, make("div", { className: "timing-head" }, whole, numbers), bar, note);
}

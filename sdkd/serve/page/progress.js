// What is drawn now: how far it is, how long it takes, and what it looks like so far.

import { $, about } from "./dom.js";

let spoken = 0;

// For screen readers only now and then: a line for every step would drown everything else.
export function say(text) {
  $("status").textContent = text;
}

export function begin(title) {
  spoken = 0;
  $("progress").hidden = false;
  $("progress").dataset.state = "waiting";
  $("preview").hidden = true;
  $("progress-title").textContent = title;
  $("progress-text").textContent = "Sent";
  $("progress-bar").removeAttribute("value");
  say(title);
}

function steps({ step, steps: all, fraction, eta_s: left, preview }) {
  const percent = Math.floor(100 * fraction);
  const rest = left === null ? "" : `, about ${about(left)} left`;
  $("progress").dataset.state = "running";
  $("progress-bar").value = fraction;
  $("progress-text").textContent = `Step ${step} of ${all}${rest}`;
  document.title = `${percent} % – sdkd`;
  if (preview) {
    $("preview").src = preview;
    $("preview").alt = `Preview at step ${step} of ${all}`;
    $("preview").hidden = false;
  }
  if (percent - spoken >= 25) {
    spoken = percent - (percent % 25);
    say(`${spoken} percent${rest}`);
  }
}

export function watch(kind, data) {
  if (kind === "queued") {
    const others = data.position === 1 ? "1 image is" : `${data.position} images are`;
    $("progress-text").textContent = data.position > 0 ? `Waiting: ${others} drawn before` : "Starting";
  }
  if (kind === "progress") steps(data);
}

export function cancelling() {
  $("progress-text").textContent = "Cancelling…";
}

export function end(text) {
  $("progress").hidden = true;
  document.title = "sdkd";
  say(text);
}

// Two images laid over one another, with a divider between them that is moved: where they differ shows at once.

import { $ } from "./dom.js";

function place() {
  const at = $("divider").value;
  $("overlay-b").style.clipPath = `inset(0 0 0 ${at}%)`;
  $("overlay-line").style.left = `${at}%`;
}

export function bindWipe() {
  $("divider").addEventListener("input", place);
  $("overlay-close").addEventListener("click", () => $("overlay").close());
}

// Of each side { url, name, said }; `shape`: width by height. The stage takes it on, so that the divider is where it seems.
export function layOver(sides, shape) {
  $("overlay-stage").style.width = `min(90vw, ${76 * shape}vh)`;
  for (const [letter, { url, name, said }] of [["a", sides[0]], ["b", sides[1]]]) {
    $(`overlay-${letter}`).src = url;
    $(`overlay-${letter}`).alt = said;
    $(`overlay-name-${letter}`).textContent = name;
  }
  $("divider").value = 50;
  place();
  $("overlay").showModal();
  $("divider").focus();
}

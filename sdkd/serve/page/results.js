// The gallery: an image, its settings and its times; newest first.

import { $, blobOf, enlarge, make } from "./dom.js";
import { timingBar } from "./timing.js";

export function fileName(model, seed) {
  return `${model.replace(/[^\w.-]+/g, "-")}-seed-${seed}.png`;
}

// A picture that opens enlarged; `said`: what screen readers say of it.
export function picture(image, said, text) {
  const url = URL.createObjectURL(blobOf(image.png));
  const shown = make("img", { src: url, alt: said, width: image.width, height: image.height });
  const button = make("button", {
    type: "button", className: "shot", title: "Enlarge", onclick: () => enlarge(url, said, text),
  }, shown);
  return { url, button };
}

// What the server reports of an image, and what was sent where it says nothing.
export function shownSettings(image, wanted) {
  const told = image.settings;
  const entries = [
    ["seed", String(image.seed)],
    ["steps", told.steps ?? wanted.steps],
    ["guidance", told.guidance_scale ?? wanted.guidance_scale],
    ["size", `${image.width} × ${image.height}`],
    ["scheduler", (told.scheduler ?? "").replace(/Scheduler$/, "")],
    ["strength", told.strength],
    ["LoRA", told.loras],
    ["mask", wanted.mask ? "yes" : null],
  ];
  return entries.filter(([, value]) => value !== undefined && value !== null && value !== "");
}

function settingsList(image, wanted) {
  const rows = shownSettings(image, wanted).map(([name, value]) =>
    make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })));
  return make("dl", { className: "settings" }, ...rows);
}

function release(card) {
  URL.revokeObjectURL(card.dataset.url);
  card.remove();
}

export function removeAll(list) {
  [...list.children].forEach(release);
  showEmpty();
}

function showEmpty() {
  const none = $("results").childElementCount === 0;
  $("results-empty").hidden = !none;
  $("clear-results").hidden = none;
}

// `name`: of model and target. `uses`: { reuse(wanted), input(blob) }, what the buttons do.
export function addResult(image, wanted, name, uses) {
  const said = `${wanted.prompt} (${name}, seed ${image.seed})`;
  const { url, button } = picture(image, wanted.prompt, said);
  const again = { ...wanted, seed: image.seed, width: image.width, height: image.height };
  const act = (className, textContent, onclick) => make("button", { type: "button", className, textContent, onclick });
  const download = make("a", { className: "link download", href: url, download: fileName(wanted.model, image.seed), textContent: "Download" });
  const remove = make("button", {
    type: "button", className: "icon remove", "aria-label": `Remove the image of seed ${image.seed}`, title: "Remove", textContent: "×",
    onclick: () => {
      const next = card.nextElementSibling ?? card.previousElementSibling;
      release(card);
      showEmpty();
      (next?.querySelector("button") ?? $("prompt")).focus();
    },
  });
  const card = make(
    "li", { className: "result", "data-seed": image.seed, "data-batch": image.timing.batch, "data-url": url },
    button,
    make("div", { className: "about" },
      make("div", { className: "who" }, make("strong", { textContent: name }), download, remove),
      make("p", { className: "words", textContent: wanted.prompt, title: wanted.prompt }),
      wanted.negative_prompt ? make("p", { className: "words not", textContent: `Not: ${wanted.negative_prompt}` }) : null,
      settingsList(image, wanted),
      ...(image.notes ?? []).map((note) => make("p", { className: "notes", textContent: note })),
      timingBar(image.timing),
      make("div", { className: "buttons" },
        act("reuse", "Re-use settings", () => uses.reuse(again)),
        act("as-input", "Use as input", () => uses.input(blobOf(image.png))),
      ),
    ),
  );
  $("results").prepend(card);
  showEmpty();
}

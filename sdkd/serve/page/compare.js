// Side by side: two models or targets draw the same prompt from the same seed, one after the other.

import { $, make, median, seconds } from "./dom.js";
import { modelFields } from "./fields.js";
import { nameOf } from "./models.js";
import { fileName, picture, shownSettings } from "./results.js";
import { drawingTime, timingBar } from "./timing.js";
import { layOver } from "./wipe.js";

const EVEN = 1.02; // closer than that, neither is called faster

function sideFields(letter, title) {
  const id = (name) => `compare-${name}-${letter}`;
  const number = (name, text, attributes) =>
    make("div", { className: "field" }, make("label", { htmlFor: id(name), textContent: text }),
      make("input", { id: id(name), type: "number", required: "", ...attributes }));
  const select = (name, text, hint = null) =>
    make("div", { className: "field" }, make("label", { htmlFor: id(name), textContent: text }),
      make("select", { id: id(name) }), hint);
  return make(
    "fieldset", { className: `group side ${letter}` }, make("legend", { textContent: title }),
    select("model", "Model and target", make("p", { className: "hint", id: id("hint") })),
    make("div", { className: "row three" },
      number("steps", "Steps", { min: "1", step: "1", inputmode: "numeric" }),
      number("guidance", "Guidance scale", { min: "0", step: "any", inputmode: "decimal" }),
      select("scheduler", "Scheduler")),
  );
}

function measuringFields() {
  const rounds = make("select", { id: "compare-rounds" },
    ...[1, 3, 5].map((count) => make("option", { value: String(count), textContent: count === 1 ? "Once" : `${count} times, median` })));
  return make(
    "fieldset", { className: "group plain" }, make("legend", { className: "unseen", textContent: "Measuring" }),
    make("div", { className: "field" }, make("label", { htmlFor: "compare-rounds", textContent: "Draw each" }), rounds),
    make("label", { className: "check" },
      make("input", { type: "checkbox", id: "compare-warm", checked: true }), " Warm up first: a short drawing of each that does not count"),
  );
}

// The pair that says most at first: the default model in plain PyTorch, or whatever else there is, against the default.
function firstPair(about) {
  const own = about.models[0];
  const others = about.models.filter((model) => model.id !== own.id);
  const eager = others.find((model) => model.name === own.name && model.target === "eager");
  const other = eager ?? others.find((model) => model.name === own.name) ?? others[0] ?? own;
  return own.target === "eager" ? [own.id, other.id] : [other.id, own.id];
}

export function compareFields(about, changed) {
  $("two-models").replaceChildren(sideFields("a", "Left"), sideFields("b", "Right"), measuringFields());
  const pair = firstPair(about);
  const sides = ["a", "b"].map((letter, place) => {
    const names = ["model", "steps", "guidance", "scheduler", "hint"];
    const elements = Object.fromEntries(names.map((name) => [name, $(`compare-${name}-${letter}`)]));
    const fields = modelFields(elements, about, changed);
    fields.choose(pair[place]);
    return fields;
  });
  return {
    chosen: () => sides.map((side) => side.chosen()),
    read: () => sides.map((side) => side.read()),
    reset: () => sides.forEach((side) => side.reset()),
    refresh: () => sides.forEach((side) => side.refresh()),
    rounds: () => Number($("compare-rounds").value),
    warm: () => $("compare-warm").checked,
  };
}

// Names of both sides; the same model twice is told apart by what differs.
export function sideNames(models, wantedSides) {
  const names = models.map(nameOf);
  if (names[0] !== names[1]) return names;
  const [left, right] = wantedSides;
  if (left.steps !== right.steps) return names.map((name, place) => `${name}, ${wantedSides[place].steps} steps`);
  return [`${names[0]} (left)`, `${names[1]} (right)`];
}

export function randomSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0];
}

// Two steps that take part; of an input image only the share `strength` of the steps is drawn.
function shortened(wanted) {
  return { ...wanted, steps: Math.min(wanted.steps, Math.ceil(2 / (wanted.strength ?? 1))) };
}

// Draws both sides in turn and gives { image, timing, merged } of each. `drawOne(wanted, title)` draws, and throws when cancelled.
export async function drawSides(wantedSides, names, { rounds, warm }, drawOne) {
  const taken = wantedSides.map(() => []);
  if (warm) {
    for (const [place, wanted] of wantedSides.entries()) await drawOne(shortened(wanted), `Warming up ${names[place]}`);
  }
  for (let round = 0; round < rounds; round++) {
    for (const [place, wanted] of wantedSides.entries()) {
      const which = rounds > 1 ? `, ${round + 1} of ${rounds}` : "";
      const { images } = await drawOne(wanted, `Drawing with ${names[place]}${which}`);
      taken[place].push(images[0]);
    }
  }
  return taken.map((images) => {
    const timing = { ...images[0].timing };
    for (const part of ["text_s", "steps_s", "decode_s"]) timing[part] = median(images.map((image) => image.timing[part]));
    const times = images.map((image) => drawingTime(image.timing));
    return { image: images[0], timing: { ...timing, queued_s: 0 }, times, merged: images.some((image) => image.timing.batch > 1) };
  });
}

// { ratio, faster (0 or 1, null when even), figure, word, text }
export function verdict(totals, names) {
  const faster = totals[0] <= totals[1] ? 0 : 1;
  const slower = 1 - faster;
  const ratio = totals[slower] / totals[faster];
  if (!(ratio >= EVEN)) return { ratio: 1, faster: null, figure: "1.0×", word: "as fast", text: `${names[0]} and ${names[1]} are equally fast` };
  const figure = `${ratio.toFixed(ratio < 1.1 ? 2 : ratio < 10 ? 1 : 0)}×`;
  return { ratio, faster, figure, word: "faster", text: `${names[faster]} is faster than ${names[slower]}` };
}

function figureOf(side, wanted, name, longest, won) {
  const said = `${wanted.prompt} (${name}, seed ${side.image.seed})`;
  const { url, button } = picture(side.image, said, said);
  const told = shownSettings(side.image, wanted).filter(([key]) => ["steps", "guidance", "scheduler"].includes(key));
  const spread = side.times.length > 1
    ? make("p", { className: "timing-note", textContent: `median of ${side.times.length}, ${seconds(Math.min(...side.times))} to ${seconds(Math.max(...side.times))}` })
    : null;
  return make(
    "figure", { className: won ? "side won" : "side", "data-url": url, "data-model": wanted.model },
    button,
    make("figcaption", {},
      make("div", { className: "who" }, make("strong", { textContent: name }),
        make("a", { className: "link download", href: url, download: fileName(wanted.model, side.image.seed), textContent: "Download" })),
      make("p", { className: "few", textContent: told.map(([key, value]) => `${key} ${value}`).join(", ") }),
      timingBar(side.timing, longest), spread),
  );
}

export function removeComparisons() {
  for (const figure of document.querySelectorAll("#comparisons [data-url]")) URL.revokeObjectURL(figure.dataset.url);
  $("comparisons").replaceChildren();
  showEmpty();
}

function showEmpty() {
  const none = $("comparisons").childElementCount === 0;
  $("comparisons-empty").hidden = !none;
  $("clear-comparisons").hidden = none;
}

export function addComparison(sides, wantedSides, models, reuse) {
  const names = sideNames(models, wantedSides);
  const totals = sides.map((side) => drawingTime(side.timing));
  const { ratio, faster, figure, word, text } = verdict(totals, names);
  const [wanted] = wantedSides;
  const merged = sides.some((side) => side.merged)
    ? make("p", { className: "warning", textContent: "Images of others were drawn in the same call: these times say little. Draw again." })
    : null;
  const headline = make("p", { className: faster === null ? "ratio" : "ratio better", "data-ratio": ratio.toFixed(3) },
    make("b", { textContent: `${figure} ${word}` }),
    make("span", {}, make("strong", { textContent: text }), make("small", { textContent: `${seconds(totals[faster ?? 0])} against ${seconds(totals[1 - (faster ?? 0)])} an image, waiting and loading not counted` })));
  const longest = Math.max(...totals);
  const figures = sides.map((side, place) => figureOf(side, wantedSides[place], names[place], longest, place === faster));
  const over = () => layOver(figures.map((shown, place) => (
    { url: shown.dataset.url, name: names[place], said: `${wanted.prompt} (${names[place]})` }
  )), sides[0].image.width / sides[0].image.height);
  $("comparisons").prepend(make(
    "li", { className: "comparison", "data-seed": sides[0].image.seed },
    headline, merged,
    make("div", { className: "beside" }, ...figures),
    make("div", { className: "under" },
      make("p", { className: "words", textContent: wanted.prompt, title: wanted.prompt }),
      make("p", { className: "few", textContent: `seed ${sides[0].image.seed}, ${sides[0].image.width} × ${sides[0].image.height}` }),
      make("button", { type: "button", className: "link over-one-another", textContent: "Lay over one another", onclick: over }),
      make("button", { type: "button", className: "link reuse", textContent: "Fix this seed", onclick: () => reuse(sides[0].image.seed) })),
  ));
  showEmpty();
}

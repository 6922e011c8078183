// The page of `sdkd serve`: reads the form, draws, shows.

import { Cancelled, draw, request } from "./client.js";
import { addComparison, compareFields, drawSides, randomSeed, removeComparisons, sideNames } from "./compare.js";
import { $, bindZoom, moveTo, seconds } from "./dom.js";
import { modelFields, sizeFields } from "./fields.js";
import { settingsOf } from "./file_settings.js";
import { inputImage } from "./input.js";
import { bindLoras, fillLoras, readLoras } from "./loras.js";
import { nameOf } from "./models.js";
import * as progress from "./progress.js";
import { addResult, removeAll } from "./results.js";
import { drawingTime } from "./timing.js";
import { bindWipe } from "./wipe.js";

let about = null;
let one = null; // the fields of "Generate"
let two = null; // those of "Side by side"
let sizes = null;
let running = null; // { cancel } of what is drawn now
let comparing = false;
const input = inputImage((width, height) => sizes?.fitTo(width, height), showError);

function showError(text) {
  $("error").textContent = text;
  if (text) moveTo($("error"));
}

const chosenModels = () => (comparing ? two.chosen() : [one.chosen()]);

function modelsChanged() {
  const chosen = chosenModels();
  sizes.use(chosen);
  input.allow(chosen[0].takes.filter((kind) => chosen.every((model) => model.takes.includes(kind))));
  const negative = chosen.every((model) => model.negative_prompt !== false);
  $("negative").disabled = !negative;
  $("negative-hint").hidden = negative;
  showState();
}

function showState() {
  const ready = about !== null && running === null;
  const focused = document.activeElement;
  $("generate").disabled = !ready;
  $("compare-generate").disabled = !ready || !sizes.possible();
  $("generate").hidden = comparing;
  $("compare-generate").hidden = !comparing;
  $("cancel").disabled = running === null;
  // A control that is switched off would lose the keyboard's place.
  if (focused?.disabled && focused.closest("#bar")) (running === null ? $(comparing ? "compare-generate" : "generate") : $("cancel")).focus();
}

function chooseTab(compare) {
  comparing = compare;
  for (const [name, on] of [["generate", !compare], ["compare", compare]]) {
    $(`${name}-tab`).setAttribute("aria-selected", String(on));
    $(`${name}-tab`).tabIndex = on ? 0 : -1;
    $(`${name}-panel`).hidden = !on;
  }
  $("one-model").hidden = $("one-model").disabled = compare; // hidden fields must not hold up the form
  $("two-models").hidden = !compare;
  for (const set of $("two-models").querySelectorAll("fieldset")) set.disabled = !compare;
  if (about !== null) modelsChanged();
}

// What both tabs send.
function shared() {
  const found = { prompt: $("prompt").value, ...sizes.read(), ...input.read() };
  const loras = readLoras();
  if ($("negative").value.trim() && !$("negative").disabled) found.negative_prompt = $("negative").value;
  if ($("seed").value !== "") found.seed = Number($("seed").value);
  if (loras.length) found.loras = loras;
  return found;
}

// One drawing at a time: `work(drawOne)` runs until it is over, fails or is cancelled.
async function busy(work) {
  let current = null;
  let stopped = false;
  running = {
    cancel: () => {
      stopped = true;
      progress.cancelling();
      return current?.cancel();
    },
  };
  showError("");
  showState();
  const drawOne = (wanted, title, watch = () => null) => {
    if (stopped) throw new Cancelled();
    progress.begin(title);
    moveTo($("progress"));
    current = draw(wanted, (kind, data) => {
      progress.watch(kind, data);
      watch(kind, data);
    });
    return current.finished;
  };
  try {
    progress.end(await work(drawOne));
  } catch (error) {
    progress.end(error instanceof Cancelled ? "Cancelled" : "");
    if (!(error instanceof Cancelled)) showError(error.message);
  } finally {
    running = null;
    showState();
  }
}

function markLoaded(model) {
  model.loaded = true;
  one.refresh();
  two.refresh();
}

function keepSeed(seed) {
  $("seed-last").dataset.seed = seed;
  $("seed-last").disabled = false;
}

async function generate() {
  const wanted = { ...shared(), ...one.read(), n: Number($("count").value) };
  const model = one.chosen();
  const title = wanted.n > 1 ? `Drawing ${wanted.n} images with ${nameOf(model)}` : `Drawing with ${nameOf(model)}`;
  await busy(async (drawOne) => {
    const { timing } = await drawOne(wanted, title, (kind, image) => {
      if (kind !== "image") return;
      addResult(image, wanted, nameOf(model), { reuse, input: useAsInput });
      keepSeed(image.seed);
      markLoaded(model);
    });
    return `Done in ${seconds(drawingTime(timing))}`;
  });
}

async function compare() {
  const base = { ...shared(), n: 1 };
  base.seed ??= randomSeed();
  const wantedSides = two.read().map((side) => ({ ...base, ...side }));
  const models = two.chosen();
  const how = { rounds: two.rounds(), warm: two.warm() };
  await busy(async (drawOne) => {
    const sides = await drawSides(wantedSides, sideNames(models, wantedSides), how, drawOne);
    addComparison(sides, wantedSides, models, (seed) => ($("seed").value = seed));
    keepSeed(base.seed);
    models.forEach(markLoaded);
    return `Both are drawn. ${document.querySelector("#comparisons .ratio b").textContent}: ${document.querySelector("#comparisons .ratio strong").textContent}`;
  });
}

function start() {
  if (about === null) return load();
  if (running !== null || (comparing && !sizes.possible())) return null;
  const problem = input.problem();
  if (problem) return showError(problem);
  if (!$("form").reportValidity()) return null;
  return comparing ? compare() : generate();
}

function fill(wanted) {
  $("prompt").value = wanted.prompt;
  $("negative").value = wanted.negative_prompt ?? "";
  one.fill(wanted);
  modelsChanged();
  sizes.fill(wanted.width, wanted.height);
  $("seed").value = wanted.seed;
  $("count").value = 1;
  fillLoras(wanted.loras ?? []);
  $("prompt").focus();
  progress.say("Settings taken over");
}

async function reuse(wanted) {
  fill(wanted);
  await input.fill(wanted);
}

async function useSettingsOfFile() {
  showError("");
  try {
    const wanted = await settingsOf(input.file(), about.models, one.chosen());
    if (wanted === null) return showError("There are no settings in this file.");
    chooseTab(false);
    return fill(wanted);
  } catch (error) {
    return showError(error.message);
  }
}

async function useAsInput(blob) {
  if (!chosenModels().every((model) => model.takes.includes("image"))) return showError("The chosen model takes no input image.");
  await input.load(blob);
  moveTo($("input"));
  return progress.say("Taken as the input image");
}

function useDefaults() {
  if (about === null) return;
  one.reset();
  two.reset();
  sizes.reset();
}

// The server's models and limits; again whenever it could not be reached before.
async function load() {
  showError("");
  try {
    about = await (await request("api/about")).json();
  } catch (error) {
    showError(`${error.message} Press Generate to try again.`);
    $("generate").disabled = $("compare-generate").disabled = false;
    return;
  }
  $("version").textContent = about.version;
  $("count").max = about.limits.n;
  $("prompt").maxLength = $("negative").maxLength = about.limits.prompt_characters;
  sizes = sizeFields(about, () => input.resize(Number($("width").value), Number($("height").value)));
  one = modelFields({ model: $("model"), steps: $("steps"), guidance: $("guidance"), scheduler: $("scheduler"), hint: $("model-hint") }, about, modelsChanged);
  one.choose(about.models[0].id);
  two = compareFields(about, modelsChanged);
  bindLoras(about);
  chooseTab(comparing);
  document.documentElement.dataset.ready = "true";
}

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    start();
  }
  if (event.key === "Escape" && running) running.cancel();
}

function bind() {
  $("form").noValidate = true; // start() checks, however it is called
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    start();
  });
  document.addEventListener("keydown", onKey);
  $("cancel").addEventListener("click", () => running?.cancel());
  $("generate-tab").addEventListener("click", () => chooseTab(false));
  $("compare-tab").addEventListener("click", () => chooseTab(true));
  $("tabs").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    chooseTab(!comparing);
    $(comparing ? "compare-tab" : "generate-tab").focus();
  });
  $("seed-last").addEventListener("click", () => ($("seed").value = $("seed-last").dataset.seed));
  $("seed-random").addEventListener("click", () => ($("seed").value = ""));
  $("defaults").addEventListener("click", useDefaults);
  $("clear-results").addEventListener("click", () => removeAll($("results")));
  $("clear-comparisons").addEventListener("click", removeComparisons);
  $("image-settings").addEventListener("click", useSettingsOfFile);
  bindZoom();
  bindWipe();
}

bind();
load();

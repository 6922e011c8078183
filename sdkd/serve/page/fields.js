// The fields that depend on a model: its steps, guidance scale and scheduler, and the size of the image.

import { $, option } from "./dom.js";
import * as models from "./models.js";

const number = (field) => (field.value === "" ? null : Number(field.value));

// A model with its steps, guidance scale and scheduler, in the given elements. What was set by hand stays as it is when
// the model changes; the rest becomes the new model's own.
export function modelFields(elements, about, changed) {
  const byHand = new Set();
  const chosen = () => about.models.find((model) => model.id === elements.model.value);

  function useOwn() {
    const model = chosen();
    const scheduler = elements.scheduler.value;
    elements.scheduler.replaceChildren(...models.schedulerOptions(model, about.schedulers));
    elements.scheduler.value = byHand.has("scheduler") && about.schedulers.includes(scheduler) ? scheduler : "";
    elements.steps.max = Math.max(about.limits.steps, model.steps);
    if (!byHand.has("steps")) elements.steps.value = model.steps;
    if (!byHand.has("guidance")) elements.guidance.value = model.guidance_scale;
    elements.hint.textContent = models.hintOf(model);
  }

  elements.model.replaceChildren(...models.modelOptions(about.models));
  for (const name of ["steps", "guidance", "scheduler"]) {
    elements[name].addEventListener("input", () => byHand.add(name));
  }
  elements.model.addEventListener("change", () => {
    useOwn();
    changed();
  });

  return {
    chosen,
    refresh: () => (elements.hint.textContent = models.hintOf(chosen())),
    choose(id) {
      if (about.models.some((model) => model.id === id)) elements.model.value = id;
      useOwn();
    },
    reset() {
      byHand.clear();
      useOwn();
    },
    read() {
      const scheduler = elements.scheduler.value;
      const found = { model: elements.model.value, steps: number(elements.steps), guidance_scale: number(elements.guidance) };
      return scheduler ? { ...found, scheduler } : found;
    },
    fill(wanted) {
      this.choose(wanted.model);
      elements.steps.value = wanted.steps;
      elements.guidance.value = wanted.guidance_scale;
      elements.scheduler.value = wanted.scheduler ?? "";
      if (elements.scheduler.selectedIndex < 0) { // a class of diffusers that has no short name
        elements.scheduler.append(option(wanted.scheduler, wanted.scheduler));
        elements.scheduler.value = wanted.scheduler;
      }
      for (const name of ["steps", "guidance", "scheduler"]) byHand.add(name);
    },
  };
}

// Width and height, held to what the chosen models draw.
export function sizeFields(about, changed) {
  const [width, height, list] = [$("width"), $("height"), $("presets")];
  let used = [];
  let rules = null;
  let byHand = false;

  const size = () => [number(width), number(height)];

  function check() {
    const [across, down] = size();
    const fits = across === null || down === null || models.allowed(rules, across, down);
    width.setCustomValidity(fits ? "" : `This size cannot be drawn: ${models.sizeHint(rules)}`);
    list.value = [...list.options].some(({ value }) => value === size().join("x")) ? size().join("x") : "";
    $("swap").disabled = across === down || !models.allowed(rules, down, across);
    changed();
  }

  function set(across, down) {
    [width.value, height.value] = [across, down];
    check();
  }

  function useRules() {
    for (const [field, side] of [[width, "width"], [height, "height"]]) {
      const [least, most] = rules.areas.length ? models.span(rules, side) : [rules.multiple, rules.multiple];
      Object.assign(field, { min: least, max: most, step: rules.multiple, readOnly: least === most });
    }
    const offered = models.presets(rules, used);
    const other = option("", "Other");
    other.hidden = true;
    list.replaceChildren(...offered.map((pair) => option(pair.join("x"), pair.join(" × "))), other);
    $("presets-field").hidden = $("swap").hidden = offered.length < 2;
    $("size-hint").textContent = models.sizeHint(rules);
  }

  for (const field of [width, height]) {
    field.addEventListener("input", () => {
      byHand = true;
      check();
    });
  }
  list.addEventListener("change", () => {
    byHand = true;
    set(...list.value.split("x").map(Number));
  });
  $("swap").addEventListener("click", () => {
    byHand = true;
    set(...size().reverse());
  });

  return {
    read: () => ({ width: number(width), height: number(height) }),
    possible: () => rules !== null && rules.areas.length > 0,
    use(chosen) {
      used = chosen;
      rules = models.sizeRules(chosen, about.limits);
      useRules();
      const own = chosen.map((model) => [model.width, model.height]).find((pair) => models.allowed(rules, ...pair));
      const kept = byHand && models.allowed(rules, ...size());
      set(...(kept ? size() : (own ?? models.presets(rules, chosen)[0] ?? size())));
    },
    reset() {
      byHand = false;
      this.use(used);
    },
    fill(across, down) {
      byHand = true;
      set(across, down);
    },
    // To the shape of an image, unless a size was set by hand.
    fitTo(across, down) {
      const found = byHand ? null : models.sizeFor(rules, used, across, down);
      if (found) set(...found);
    },
  };
}

// What the models of the server can do: sizes, and names for people.

import { make, option } from "./dom.js";

export function nameOf(model) {
  return `${model.name} · ${model.target}`;
}

// Options of a select: a group for each name that has several targets.
export function modelOptions(models) {
  const groups = new Map();
  for (const model of models) groups.set(model.name, [...(groups.get(model.name) ?? []), model]);
  return [...groups].flatMap(([name, targets]) => {
    const options = targets.map((model) => option(model.id, nameOf(model)));
    return targets.length > 1 ? [make("optgroup", { label: name }, ...options)] : options;
  });
}

// What draws where none is named: that of its generation settings, else that of its files.
export function ownScheduler(model) {
  return model.scheduler ?? model.own_scheduler;
}

export function schedulerOptions(model, schedulers) {
  return [option("", `Own: ${ownScheduler(model).replace(/Scheduler$/, "")}`), ...schedulers.map((name) => option(name, name))];
}

export function hintOf(model) {
  const parts = [`Its own: ${model.steps} steps, guidance scale ${model.guidance_scale}`];
  if (model.few_steps) parts.push("distilled for few steps");
  if (!model.loaded) parts.push("loads with its first image");
  return `${parts.join("; ")}.`;
}

// Areas of sizes: each has [least, most] of width and height. Without built ranges any size goes that the server allows.
function areasOf(model, limits) {
  const most = Math.floor((2 * Math.sqrt(limits.pixels)) / model.multiple) * model.multiple;
  if (!model.ranges.length) return [{ width: [model.multiple, most], height: [model.multiple, most] }];
  return model.ranges.map(({ width, height }) => ({ width: [width[0], width[2]], height: [height[0], height[2]] }));
}

const common = ([low, high], [least, most]) => [Math.max(low, least), Math.min(high, most)];

// Sizes that every one of the models draws.
export function sizeRules(models, limits) {
  let areas = areasOf(models[0], limits);
  for (const model of models.slice(1)) {
    const others = areasOf(model, limits);
    areas = areas.flatMap((area) =>
      others.map((other) => ({ width: common(area.width, other.width), height: common(area.height, other.height) })),
    );
  }
  areas = areas.filter(({ width, height }) => width[0] <= width[1] && height[0] <= height[1]);
  return { areas, multiple: Math.max(...models.map((model) => model.multiple)), pixels: limits.pixels };
}

const within = (value, [least, most]) => value >= least && value <= most;

export function allowed(rules, width, height) {
  if (width % rules.multiple || height % rules.multiple || width * height > rules.pixels) return false;
  return rules.areas.some((area) => within(width, area.width) && within(height, area.height));
}

export function span(rules, side) {
  return [Math.min(...rules.areas.map((area) => area[side][0])), Math.max(...rules.areas.map((area) => area[side][1]))];
}

const SHAPES = [[1, 1], [1.5, 1], [1, 1.5], [2, 1], [1, 2], [1.5, 1.5], [2, 2]];

// Sizes worth a place in a list: what was built as the best size, and the usual shapes around the model's own.
export function presets(rules, models) {
  const round = (value) => Math.round(value / rules.multiple) * rules.multiple;
  const wanted = models.flatMap((model) => [
    [model.width, model.height],
    ...model.ranges.map(({ width, height }) => [width[1], height[1]]),
    ...SHAPES.map(([across, down]) => [round(model.width * across), round(model.height * down)]),
  ]);
  const corners = rules.areas.flatMap(({ width, height }) => [[width[0], height[0]], [width[1], height[1]]]);
  if (models.every((model) => model.ranges.length)) wanted.push(...corners);
  const found = new Map(wanted.filter(([width, height]) => allowed(rules, width, height)).map((size) => [size.join("x"), size]));
  return [...found.values()].slice(0, 12);
}

export function sizeHint(rules) {
  if (!rules.areas.length) return "There is no size that both models draw.";
  const side = ([least, most]) => (least === most ? `${least}` : `${least}–${most}`);
  const parts = rules.areas.map(({ width, height }) => `${side(width)} × ${side(height)}`);
  const fixed = rules.areas.every(({ width, height }) => width[0] === width[1] && height[0] === height[1]);
  if (fixed) return `Built for ${parts.join(", ")} px.`;
  return `${parts.join(" or ")} px, in steps of ${rules.multiple}.`;
}

// The allowed size whose shape is nearest to that of an image; its own size where it can be.
export function sizeFor(rules, models, width, height) {
  if (allowed(rules, width, height)) return [width, height];
  const apart = ([across, down]) => Math.abs(Math.log((across / down) * (height / width)));
  return presets(rules, models).sort((one, other) => apart(one) - apart(other))[0] ?? null;
}

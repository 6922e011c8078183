// The settings inside a PNG that was drawn here before, as a request: what is not in the file is left out.

import { request } from "./client.js";
import { ownScheduler } from "./models.js";

function modelOf(settings, models) {
  const named = models.filter((model) => model.name === settings.model);
  return (named.find((model) => model.target === settings.target) ?? named[0])?.id;
}

// "chalk:0.5, ink:1"; a name may hold colons.
function lorasOf(settings) {
  const parts = settings.loras ? settings.loras.split(", ") : [];
  return parts.map((part) => ({ name: part.slice(0, part.lastIndexOf(":")), strength: Number(part.slice(part.lastIndexOf(":") + 1)) }));
}

function wantedOf(settings, models, chosen) {
  const id = modelOf(settings, models) ?? chosen.id;
  const model = models.find((each) => each.id === id);
  const [height, width] = (settings.size ?? `${model.height}x${model.width}`).split("x").map(Number);
  const own = settings.scheduler === ownScheduler(model);
  return {
    prompt: settings.prompt ?? "", negative_prompt: settings.negative_prompt, model: id, width, height, seed: settings.seed ?? "",
    steps: settings.steps ?? model.steps, guidance_scale: settings.guidance_scale ?? model.guidance_scale,
    scheduler: own ? undefined : settings.scheduler, loras: lorasOf(settings),
  };
}

async function base64Of(blob) {
  const bytes = new Uint8Array(await blob.arrayBuffer());
  let text = "";
  for (let at = 0; at < bytes.length; at += 32768) text += String.fromCharCode(...bytes.subarray(at, at + 32768)); // the most arguments
  return btoa(text);
}

// null where the file holds none.
export async function settingsOf(blob, models, chosen) {
  const headers = { "Content-Type": "application/json" };
  const body = JSON.stringify({ png: await base64Of(blob) });
  const { settings } = await (await request("api/png-info", { method: "POST", headers, body })).json();
  return Object.keys(settings).length ? wantedOf(settings, models, chosen) : null;
}

// The input image: chosen, dropped, pasted or taken from a result; shown, and sent, as it is cropped to the size.

import { $, blobOf } from "./dom.js";
import { maskEditor } from "./mask.js";

const STRENGTHS = { image: 0.75, mask: 1 };

export function inputImage(chosen, failed) {
  const mask = maskEditor();
  const canvas = $("source-canvas");
  let bitmap = null;
  let file = null;
  let size = [1, 1];
  let takes = [];
  let byHand = false;

  const masked = () => bitmap !== null && takes.includes("mask") && $("mask-on").checked;
  const used = () => bitmap !== null && takes.includes("image");

  function showStrength() {
    if (!byHand) $("strength").value = masked() ? STRENGTHS.mask : STRENGTHS.image;
    $("strength-value").textContent = Number($("strength").value).toFixed(2);
  }

  function show() {
    const possible = takes.includes("image");
    $("input-hint").hidden = possible;
    $("input-hint").textContent = "This model takes no input image: text only.";
    $("drop").hidden = !possible || bitmap !== null;
    $("editor").hidden = !used();
    $("image-settings").hidden = file?.type !== "image/png";
    $("mask-section").hidden = !takes.includes("mask");
    $("mask-tools").hidden = $("mask-canvas").hidden = !masked();
    showStrength();
  }

  // The middle of the image in the shape of the size, on white where it is transparent.
  function crop() {
    [canvas.width, canvas.height] = size;
    mask.resize(...size);
    if (bitmap === null) return;
    const scale = Math.max(size[0] / bitmap.width, size[1] / bitmap.height);
    const [across, down] = [bitmap.width * scale, bitmap.height * scale];
    const context = canvas.getContext("2d");
    Object.assign(context, { fillStyle: "white", imageSmoothingQuality: "high" });
    context.fillRect(0, 0, ...size);
    context.drawImage(bitmap, (size[0] - across) / 2, (size[1] - down) / 2, across, down);
  }

  async function load(blob) {
    try {
      bitmap = await createImageBitmap(blob);
    } catch {
      failed(`${blob.name ?? "This file"} is not an image that this browser can read.`);
      return;
    }
    file = blob;
    mask.clear();
    chosen(bitmap.width, bitmap.height);
    crop();
    show();
  }

  function clear() {
    bitmap = file = null;
    $("image-file").value = "";
    $("mask-on").checked = false;
    mask.clear();
    show();
  }

  function take(files) {
    const found = [...(files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (found && takes.includes("image")) load(found);
    return found !== undefined;
  }

  $("image-file").addEventListener("change", (event) => take(event.target.files));
  document.addEventListener("paste", (event) => take(event.clipboardData?.files));
  const over = (on) => (event) => {
    event.preventDefault();
    $("input").classList.toggle("over", on);
  };
  $("input").addEventListener("dragover", over(true));
  $("input").addEventListener("dragleave", over(false));
  $("input").addEventListener("drop", (event) => {
    over(false)(event);
    if (!take(event.dataTransfer.files)) failed("That is not an image file.");
  });
  // Dropped beside the field, a file would replace the page.
  for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());
  $("image-remove").addEventListener("click", () => {
    clear();
    $("image-file").focus();
  });
  $("mask-on").addEventListener("change", show);
  $("strength").addEventListener("input", () => {
    byHand = true;
    showStrength();
  });

  return {
    load,
    clear,
    file: () => file,
    allow(kinds) {
      takes = kinds;
      show();
    },
    resize(across, down) {
      if (!(across > 0 && down > 0)) return;
      size = [across, down];
      crop();
    },
    // Why the form cannot be sent as it is, or null.
    problem: () => (masked() && !mask.painted() ? "Paint the area that is to be drawn again, or switch the mask off." : null),
    read() {
      if (!used()) return {};
      const found = { image: canvas.toDataURL("image/png"), strength: Number($("strength").value) };
      return masked() ? { ...found, mask: mask.read() } : found;
    },
    // As an earlier request had it.
    async fill(wanted) {
      clear();
      if (!wanted.image) return;
      await load(blobOf(wanted.image));
      byHand = true;
      $("strength").value = wanted.strength;
      $("mask-on").checked = Boolean(wanted.mask);
      show();
      if (wanted.mask) mask.fill(await createImageBitmap(blobOf(wanted.mask)));
    },
  };
}

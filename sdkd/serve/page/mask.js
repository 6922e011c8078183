// A mask that is painted over the input image. The canvas holds what is painted in one colour, transparent elsewhere; the
// PNG that is sent is white where painted and black elsewhere.

import { $, newCanvas } from "./dom.js";

const COLOUR = "#ff2d78";
const UNDO = 20;

export function maskEditor() {
  const canvas = $("mask-canvas");
  const ring = $("brush-ring");
  const past = [];
  let context = canvas.getContext("2d", { willReadFrequently: true });
  let last = null;

  const snapshot = () => context.getImageData(0, 0, canvas.width, canvas.height);
  const width = () => (Number($("brush-size").value) / 100) * Math.min(canvas.width, canvas.height);

  function remember() {
    past.push(snapshot());
    if (past.length > UNDO) past.shift();
    $("mask-undo").disabled = false;
  }

  function place(event) {
    const box = canvas.getBoundingClientRect();
    return [((event.clientX - box.left) * canvas.width) / box.width, ((event.clientY - box.top) * canvas.height) / box.height];
  }

  function stroke(from, to) {
    context.globalCompositeOperation = $("eraser").checked ? "destination-out" : "source-over";
    Object.assign(context, { lineWidth: width(), strokeStyle: COLOUR, fillStyle: COLOUR });
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    context.stroke();
    context.beginPath(); // a line without length draws no cap, and a tap has to leave a dot
    context.arc(...to, width() / 2, 0, 2 * Math.PI);
    context.fill();
    context.globalCompositeOperation = "source-over";
  }

  function moveRing(event) {
    const box = canvas.getBoundingClientRect();
    const across = (width() * box.width) / canvas.width;
    ring.hidden = event.pointerType === "touch";
    Object.assign(ring.style, {
      width: `${across}px`, height: `${across}px`, left: `${event.clientX - box.left}px`, top: `${event.clientY - box.top}px`,
    });
  }

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.setPointerCapture(event.pointerId);
    remember();
    last = place(event);
    stroke(last, last);
  });
  canvas.addEventListener("pointermove", (event) => {
    moveRing(event);
    if (last === null) return;
    const next = place(event);
    stroke(last, next);
    last = next;
  });
  for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (last = null));
  canvas.addEventListener("pointerleave", () => (ring.hidden = true));

  function showSize() {
    $("brush-size-value").textContent = `${$("brush-size").value} %`;
  }
  $("brush-size").addEventListener("input", showSize);
  showSize();

  function clear() {
    context.clearRect(0, 0, canvas.width, canvas.height);
  }

  function painted() {
    return snapshot().data.some((value, place) => place % 4 === 3 && value > 0);
  }

  // "xor" with a full rectangle: opaque where it was transparent, and the other way round.
  function invert() {
    context.globalCompositeOperation = "xor";
    context.fillStyle = COLOUR;
    context.fillRect(0, 0, canvas.width, canvas.height);
    context.globalCompositeOperation = "source-over";
  }

  function undo() {
    if (past.length) context.putImageData(past.pop(), 0, 0);
    $("mask-undo").disabled = past.length === 0;
  }

  function forget() {
    past.length = 0;
    $("mask-undo").disabled = true;
  }

  const remembered = (change) => () => {
    remember();
    change();
  };
  $("mask-clear").addEventListener("click", remembered(clear));
  $("mask-invert").addEventListener("click", remembered(invert));
  $("mask-undo").addEventListener("click", undo);

  return {
    painted,
    clear() {
      clear();
      forget();
    },
    resize(across, down) {
      if (canvas.width === across && canvas.height === down) return;
      const old = newCanvas(canvas.width, canvas.height);
      old.getContext("2d").drawImage(canvas, 0, 0);
      [canvas.width, canvas.height] = [across, down];
      context = canvas.getContext("2d", { willReadFrequently: true });
      context.drawImage(old, 0, 0, across, down);
      forget();
    },
    read() {
      const out = newCanvas(canvas.width, canvas.height);
      const drawing = out.getContext("2d");
      const fill = (operation, colour) => {
        Object.assign(drawing, { globalCompositeOperation: operation, fillStyle: colour });
        drawing.fillRect(0, 0, out.width, out.height);
      };
      drawing.drawImage(canvas, 0, 0);
      fill("source-in", "white");
      fill("destination-over", "black");
      return out.toDataURL("image/png");
    },
    // From a mask that was sent before: bright is painted.
    fill(bitmap) {
      clear();
      forget();
      context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
      const pixels = snapshot();
      const [red, green, blue] = [1, 3, 5].map((start) => parseInt(COLOUR.slice(start, start + 2), 16));
      for (let at = 0; at < pixels.data.length; at += 4) pixels.data.set([red, green, blue, pixels.data[at]], at);
      context.putImageData(pixels, 0, 0);
    },
  };
}

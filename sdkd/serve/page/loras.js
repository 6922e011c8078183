// Rows of LoRAs, each with its strength.

import { $, make, option } from "./dom.js";

let names = [];
let most = 0;
let made = 0;

function addRow(name, strength) {
  const number = ++made;
  const shown = make("output", { htmlFor: `lora-strength-${number}`, textContent: strength.toFixed(2) });
  const slider = make("input", {
    id: `lora-strength-${number}`, type: "range", min: "0", max: "2", step: "0.05", value: String(strength),
    oninput: () => (shown.textContent = Number(slider.value).toFixed(2)),
  });
  const select = make("select", { id: `lora-name-${number}` }, ...names.map((each) => option(each, each)));
  select.value = name;
  const remove = make("button", {
    type: "button", className: "icon", "aria-label": `Remove LoRA ${number}`, title: "Remove", textContent: "×",
    onclick: () => {
      row.remove();
      showAdd();
      $("lora-add").focus();
    },
  });
  const row = make(
    "div", { className: "lora" },
    make("label", { className: "unseen", htmlFor: `lora-name-${number}`, textContent: `LoRA ${number}` }), select, remove,
    make("label", { htmlFor: `lora-strength-${number}` }, "Strength ", shown), slider,
  );
  $("lora-list").append(row);
  showAdd();
  return select;
}

// Each LoRA goes once, and the server says how many go together.
function showAdd() {
  $("lora-add").hidden = $("lora-list").childElementCount >= Math.min(names.length, most);
}

function unused() {
  const taken = new Set(readLoras().map(({ name }) => name));
  return names.find((name) => !taken.has(name));
}

export function bindLoras(about) {
  names = about.loras;
  most = about.limits.loras ?? names.length;
  $("loras").hidden = names.length === 0;
  $("lora-add").onclick = () => addRow(unused(), 1).focus();
}

export function readLoras() {
  return [...$("lora-list").children].map((row) => ({
    name: row.querySelector("select").value, strength: Number(row.querySelector("input").value),
  }));
}

export function fillLoras(wished) {
  $("lora-list").replaceChildren();
  showAdd();
  for (const { name, strength } of wished) if (names.includes(name)) addRow(name, strength);
}

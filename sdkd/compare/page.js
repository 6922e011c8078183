"use strict";
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));
  const one = (id) => document.getElementById(id);

  // The table: buttons in the headings sort; the best value comes first, and a second press turns the order round.
  const table = one("table");
  const body = table.tBodies[0];
  const headings = all("thead th", table);
  const value = (row, index) => {
    const text = row.cells[index].dataset.sort;
    return text === "" ? null : Number(text);
  };
  headings.forEach((heading, index) => {
    const button = heading.querySelector("button");
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const first = button.dataset.better === "high" ? "descending" : "ascending";
      const order = before === null ? first : before === "ascending" ? "descending" : "ascending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", order);
      const sign = order === "ascending" ? 1 : -1;
      const rows = Array.from(body.rows).sort((a, b) => {
        const [x, y] = [value(a, index), value(b, index)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (x - y);
      });
      body.append(...rows);
      one("sort-status").textContent = `Sorted by ${button.dataset.name}, ${order}`;
    });
  });

  // The images: the picture itself, or its difference from another one, made by blending in the browser.
  const gallery = one("gallery");
  const shots = all(".shot", gallery);
  const source = (key) => {
    const found = shots.find((shot) => shot.dataset.key === key);
    return found ? found.querySelector("img").src : null;
  };
  const paint = (place, shot) => {
    const view = gallery.dataset.view;
    const other = view === "image" ? null : source(shot.dataset[view]);
    all(".over", place).forEach((image) => image.remove());
    place.classList.toggle("amplified", other !== null);
    if (other !== null) {
      const image = new Image();
      image.src = other;
      image.alt = "";
      image.className = "over";
      place.append(image);
    }
    return view === "image" || other !== null;
  };
  const caption = (shot) => gallery.dataset.view === "teacher" ? shot.dataset.captionTeacher : shot.dataset.caption;
  const paintAll = () => shots.forEach((shot) => {
    const shown = paint(shot, shot);
    shot.dataset.without = gallery.dataset.view === "eager" ? "no other to subtract" : "not a student";
    shot.classList.toggle("without", !shown);
    shot.closest("figure").querySelector("figcaption").textContent = caption(shot) || "\u00a0";
  });
  all("#views input").forEach((input) => input.addEventListener("change", () => {
    gallery.dataset.view = input.value;
    paintAll();
  }));

  // One image, large; the arrow keys show the same prompt of the other subjects in its place.
  const zoom = one("zoom");
  const stage = zoom.querySelector(".stage");
  let current = null;
  const row = () => all(".shot", current.closest(".shots"));
  const show = (shot) => {
    current = shot;
    const image = shot.querySelector("img").cloneNode();
    stage.replaceChildren(image);
    paint(stage, shot);
    one("zoom-label").textContent = shot.dataset.label;
    one("zoom-caption").textContent = caption(shot);
    one("zoom-prompt").textContent = shot.dataset.prompt;
  };
  const step = (by) => {
    const every = row();
    show(every[(every.indexOf(current) + by + every.length) % every.length]);
  };
  shots.forEach((shot) => shot.addEventListener("click", () => {
    show(shot);
    zoom.showModal();
  }));
  one("previous").addEventListener("click", () => step(-1));
  one("next").addEventListener("click", () => step(1));
  zoom.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (by) step(by);
  });
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close();
  });
  zoom.addEventListener("close", () => current && current.focus());

  // The command: copied where the browser allows it.
  const copy = one("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      await navigator.clipboard.writeText(one("command").textContent);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
  }
  document.documentElement.dataset.ready = "true";
})();

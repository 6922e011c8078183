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

  // The images: the picture itself, its reference in its place, or their difference, made brighter by the browser.
  const gallery = one("gallery");
  const shots = all(".shot", gallery);
  const differences = JSON.parse(one("differences").textContent);
  const choices = all(".choices");
  const inputs = (name) => all("input", choices.find((choice) => choice.dataset.choice === name));
  const known = (name) => choices.some((choice) => choice.dataset.choice === name);
  const state = { show: "image", against: gallery.dataset.against };
  const original = (shot) => shot.querySelector("img:not(.over)");
  const overlay = (shot) => {
    const key = shot.dataset[state.against];
    if (state.show === "image" || !key) return null;
    const other = shots.find((one) => one.dataset.key === key);
    const image = new Image();
    image.className = "over";
    if (state.show === "reference") {
      image.src = original(other).src;
      image.alt = original(other).alt;
    } else {
      image.src = differences[shot.dataset.key][state.against];
      image.alt = `Difference of ${shot.dataset.label} from ${other.dataset.label}, ${state.show} times as bright`;
      image.style.filter = `brightness(${state.show})`;
    }
    return image;
  };
  const paint = (place, shot) => {
    const over = overlay(shot);
    all(".over", place).forEach((image) => image.remove());
    if (over) place.append(over);
    const without = state.show !== "image" && !over;
    place.dataset.without = state.against === "teacher" ? "not compared with the teacher" : "no reference";
    place.classList.toggle("without", without);
    original(place).toggleAttribute("hidden", Boolean(over));
  };
  const caption = (shot) => (state.against === "teacher" ? shot.dataset.captionTeacher : shot.dataset.captionEager) || "";
  const paintAll = () => {
    shots.forEach((shot) => {
      paint(shot, shot);
      shot.closest("figure").querySelector("figcaption").textContent = caption(shot) || "\u00a0";
    });
    choices.forEach((choice) => all("input", choice).forEach((input) => {
      input.checked = input.value === state[choice.dataset.choice];
    }));
    if (current) show(current);
  };
  const choose = (name, to) => {
    state[name] = to;
    paintAll();
    one("view-status").textContent = choices.map((choice) => all("input", choice).find((input) => input.checked))
      .map((input) => input.getAttribute("aria-label")).slice(0, known("against") ? 2 : 1).join(", against ");
  };
  choices.forEach((choice) => all("input", choice).forEach((input) => {
    input.addEventListener("change", () => choose(choice.dataset.choice, input.value));
  }));

  // One image, large. Left and right: other subjects in its place; up and down: image, reference, difference.
  const zoom = one("zoom");
  const stage = zoom.querySelector(".stage");
  let current = null;
  const show = (shot) => {
    current = shot;
    const image = original(shot).cloneNode();
    stage.replaceChildren(image);
    paint(stage, shot);
    one("zoom-label").textContent = shot.dataset.label;
    one("zoom-caption").textContent = caption(shot);
    one("zoom-prompt").textContent = shot.dataset.prompt;
  };
  const turn = (every, now, by) => every[(every.indexOf(now) + by + every.length) % every.length];
  const step = (by) => show(turn(all(".shot", current.closest(".shots")), current, by));
  const flip = (by) => known("show") && choose("show", turn(inputs("show").map((input) => input.value), state.show, by));
  shots.forEach((shot) => shot.addEventListener("click", () => {
    show(shot);
    zoom.showModal();
  }));
  one("previous").addEventListener("click", () => step(-1));
  one("next").addEventListener("click", () => step(1));
  zoom.addEventListener("keydown", (event) => {
    const act = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => flip(-1), ArrowDown: () => flip(1),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  });
  zoom.addEventListener("click", (event) => {
    if (event.target === zoom) zoom.close();
  });
  zoom.addEventListener("close", () => {
    current.focus();
    current = null;
  });

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

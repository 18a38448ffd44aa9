"use strict";
// What the page does beside being read: it says what a mark stands for, shows one metric at a time, sorts tables, and
// turns times into those of the reader. Without it all is there, one below the other.
(() => {
  const all = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  for (const [number, drawing] of all(".drawing").entries()) {
    const told = document.createElement("p");
    told.className = "told dim";
    told.setAttribute("role", "status");
    if (number === 0) told.textContent = "Point at a mark, or tap it, to read what it stands for.";
    drawing.parentElement.after(told);
    const tell = (event) => {
      const mark = event.target.closest(".mark");
      if (!mark || !drawing.contains(mark)) return;
      for (const other of all(".mark.chosen", drawing)) other.classList.remove("chosen");
      mark.classList.add("chosen");
      told.textContent = mark.querySelector("title").textContent;
    };
    for (const kind of ["pointerover", "click", "focusin"]) drawing.addEventListener(kind, tell);
  }

  for (const choices of all(".choices[data-of]")) {
    const panels = all(`[data-panel="${choices.dataset.of}"]`);
    const buttons = all("button", choices);
    const choose = (number) => {
      panels.forEach((panel, place) => { panel.hidden = place !== number; });
      buttons.forEach((button, place) => button.setAttribute("aria-pressed", String(place === number)));
    };
    buttons.forEach((button, number) => button.addEventListener("click", () => choose(number)));
    choices.hidden = false;
    choose(0);
  }

  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const heads = all("th", table);
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      button.addEventListener("click", () => {
        const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
        for (const other of heads) other.removeAttribute("aria-sort");
        head.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
        const isNumber = head.classList.contains("number");
        const rows = Array.from(body.rows);
        rows.sort((one, other) => {
          const [a, b] = [value(one), value(other)];
          // What is not known comes last, whichever way it goes.
          if (a === "" || b === "") return Number(a === "") - Number(b === "");
          return sign * (isNumber ? Number(a) - Number(b) : a < b ? -1 : a > b ? 1 : 0);
        });
        body.append(...rows);
      });
    });
  }

  const zone = document.getElementById("zone");
  const times = all("[data-time]").map((node) => [node, node.textContent]);
  zone.hidden = false;
  zone.addEventListener("click", () => {
    const isLocal = zone.getAttribute("aria-pressed") !== "true";
    zone.setAttribute("aria-pressed", String(isLocal));
    for (const [node, text] of times) {
      const at = new Date(node.dataset.time);
      const local = new Date(at.getTime() - at.getTimezoneOffset() * 60000).toISOString();
      const whole = local.slice(0, 19).replace("T", " ");
      node.textContent = !isLocal ? text : text.length === 19 ? whole : text.length === 11 ? whole.slice(5, 16) : whole.slice(11, 19);
    }
  });
})();

// Tables that sort and copy, figures that save, a filter of settings; the page is whole without it.
(() => {
  const button = (text, act) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.addEventListener("click", act);
    return made;
  };
  // The number or text of a cell, without its interval.
  const value = (cell) => (cell.firstChild ? (cell.querySelector("small") ? cell.firstChild : cell).textContent : "").trim();
  const units = { "µs": 1e-6, ms: 1e-3, min: 60, h: 3600, days: 86400, kB: 1e3, MB: 1e6, GB: 1e9 };
  const number = (text) => {
    const parts = text.replace(/\u202f/g, "").match(/^([+-]?\d+\.?\d*)\s*([a-zµ]*)/i);
    return parts ? parts[1] * (units[parts[2]] || 1) : null;
  };

  function sort(table, column, head) {
    const down = head.getAttribute("aria-sort") !== "descending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => value(row.cells[column]);
    const order = (a, b) => {
      const [x, y] = [number(key(a)), number(key(b))];
      if ((x === null) !== (y === null)) return x === null ? 1 : -1;
      const up = x === null ? key(a).localeCompare(key(b)) : x - y;
      return (x === null) === down ? up : -up;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort(order));
  }

  function csv(table) {
    const wide = [...table.tHead.rows[0].cells].map((_, i) =>
      [...table.tBodies[0].rows].some((row) => row.cells[i]?.querySelector("small")));
    const quote = (text) => (/[",\n]/.test(text) ? '"' + text.replaceAll('"', '""') + '"' : text);
    const line = (row) => [...row.cells].flatMap((cell, i) => {
      const range = cell.tagName === "TD" ? cell.querySelector("small")?.textContent ?? "" : value(cell) + " interval";
      return wide[i] ? [value(cell), range] : [value(cell)];
    }).map(quote).join(",");
    return [...table.rows].map(line).join("\n") + "\n";
  }

  function save(text, kind, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: kind }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }
  const file = (text, end) => (text || "figure").replace(/[^a-z0-9]+/gi, "-").slice(0, 60).replace(/^-|-$/g, "").toLowerCase() + end;

  for (const box of document.querySelectorAll(".scroll")) {
    const table = box.querySelector("table");
    [...table.tHead.rows[0].cells].forEach((head, i) => {
      const below = head.querySelector("small");
      below?.remove();
      head.replaceChildren(button(head.textContent, () => sort(table, i, head)), ...(below ? [below] : []));
    });
    const copy = button("Copy as CSV", async () => {
      try {
        await navigator.clipboard.writeText(csv(table));
        copy.textContent = "Copied";
      } catch {
        save(csv(table), "text/csv", file(box.getAttribute("aria-label"), ".csv"));
        copy.textContent = "Saved";
      }
      setTimeout(() => (copy.textContent = "Copy as CSV"), 2000);
    });
    copy.setAttribute("aria-live", "polite");
    const tools = document.createElement("p");
    const more = document.createElement("span");
    more.textContent = "more columns: scroll sideways ↔";
    tools.className = "tools";
    tools.append(copy, more);
    box.after(tools);
    new ResizeObserver(() => {
      more.hidden = box.scrollWidth <= box.clientWidth + 1;
      if (more.hidden) box.removeAttribute("tabindex");
      else box.tabIndex = 0;
    }).observe(box);
  }

  for (const figure of document.querySelectorAll("figure")) {
    const shown = () => [...figure.querySelectorAll("svg.chart")].find((s) => s.getClientRects().length);
    const tools = document.createElement("p");
    tools.className = "tools";
    tools.append(button("Save as SVG", () => {
      const svg = shown();
      const copy = svg.cloneNode(true);
      const hidden = [...svg.children].map((part) => getComputedStyle(part).display === "none");
      [...copy.children].forEach((part, i) => hidden[i] && part.remove());
      copy.insertAdjacentHTML("afterbegin", '<style></style><rect class="ground" width="100%" height="100%"/>');
      copy.firstChild.textContent = document.getElementById("chart-css").textContent;
      save(new XMLSerializer().serializeToString(copy), "image/svg+xml", file(svg.getAttribute("aria-label"), ".svg"));
    }));
    figure.append(tools);
  }

  const find = document.getElementById("find");
  find?.addEventListener("input", () => {
    for (const row of document.querySelectorAll(".settings tbody tr"))
      row.hidden = !row.textContent.toLowerCase().includes(find.value.toLowerCase());
  });
  find?.parentElement.removeAttribute("hidden");
})();

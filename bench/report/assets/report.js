"use strict";
// press a column's name to sort by it, again to turn the order round; without JavaScript tables stay as they are
for (const head of document.querySelectorAll("th")) {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending", body = head.closest("table").tBodies[0];
    const key = (row) => row.cells[head.cellIndex].firstChild?.textContent ?? "";
    const number = (row) => parseFloat(key(row).replace(/,/g, ""));
    const rows = [...body.rows].sort((a, b) => (number(a) - number(b)) || key(a).localeCompare(key(b), "en", { numeric: true }));
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...(down ? rows.reverse() : rows));
  });
}

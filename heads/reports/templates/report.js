"use strict";
// A click, Enter or space on a column's name sorts its table: numbers by value, what is undefined last.
(function () {
  function value(row, column) {
    var cell = row.cells[column];
    var given = cell && cell.getAttribute("data-v");
    if (given === null || given === undefined) given = cell ? cell.textContent.trim() : "";
    var number = given === "" ? NaN : Number(given);
    return { text: given, number: number, empty: given === "" || given === "–" };
  }
  function compare(a, b) {
    if (a.empty || b.empty) return a.empty && b.empty ? 0 : a.empty ? 2 : -2;
    if (!isNaN(a.number) && !isNaN(b.number)) return a.number < b.number ? -1 : a.number > b.number ? 1 : 0;
    var order = a.text.localeCompare(b.text, undefined, { numeric: true });
    return order < 0 ? -1 : order > 0 ? 1 : 0;
  }
  function sort(table, head, column) {
    var down = head.getAttribute("aria-sort") === "descending";
    var first = head.getAttribute("data-first") || "descending";
    var way = head.hasAttribute("aria-sort") ? (down ? "ascending" : "descending") : first;
    table.querySelectorAll("th[aria-sort]").forEach(function (th) { th.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", way);
    var body = table.tBodies[table.tBodies.length - 1];
    var rows = Array.prototype.map.call(body.rows, function (row, place) {
      return { row: row, place: place, value: value(row, column) };
    });
    rows.sort(function (a, b) {
      var order = compare(a.value, b.value);
      if (Math.abs(order) === 2) return order;
      return (way === "descending" ? -order : order) || a.place - b.place;
    });
    rows.forEach(function (entry) { body.appendChild(entry.row); });
  }
  document.querySelectorAll("table.sortable").forEach(function (table) {
    Array.prototype.forEach.call(table.tHead.rows[table.tHead.rows.length - 1].cells, function (head, column) {
      if (head.hasAttribute("data-fixed")) return;
      var button = document.createElement("button");
      button.type = "button";
      while (head.firstChild) button.appendChild(head.firstChild);
      head.appendChild(button);
      button.addEventListener("click", function () { sort(table, head, column); });
    });
  });
  // A click on an image enlarges it in place; another, or Escape, puts it back.
  document.addEventListener("click", function (event) {
    var pair = event.target.closest(".pair");
    if (pair) pair.parentNode.classList.toggle("large");
  });
  document.addEventListener("keydown", function (event) {
    if (event.key !== "Escape") return;
    document.querySelectorAll(".large").forEach(function (figure) { figure.classList.remove("large"); });
  });
})();

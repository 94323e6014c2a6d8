// Sorting by a click on a column's head, and a panel that says where a number comes from. The page is complete without.
"use strict";

function sortTable(head) {
  const table = head.closest("table");
  const column = [...head.parentNode.children].indexOf(head);
  const descending = head.getAttribute("aria-sort") !== "descending";
  for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const body = table.tBodies[0];
  // Names of groups and mean rows stay where they are; rows are sorted between them.
  let part = [];
  const flush = (anchor) => {
    part.sort((a, b) => compareCells(a.children[column], b.children[column], descending));
    for (const row of part) body.insertBefore(row, anchor);
    part = [];
  };
  for (const row of [...body.rows]) {
    if (row.classList.contains("groupname") || row.classList.contains("rule")) flush(row);
    else part.push(row);
  }
  flush(null);
}

function compareCells(a, b, descending) {
  const x = cellValue(a), y = cellValue(b);
  if (x === null || y === null) return (x === null) - (y === null); // what is missing stays below
  const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
  return descending ? -order : order;
}

function cellValue(cell) {
  if (cell.dataset.sort !== undefined) return cell.dataset.sort === "" ? null : Number(cell.dataset.sort);
  return cell.textContent.trim();
}

function showOrigin(link) {
  const panel = document.getElementById("origin");
  const list = panel.querySelector("ul");
  list.replaceChildren();
  panel.querySelector("strong").textContent = link.closest("td").title.split("\n")[0] + ": " + link.textContent;
  for (const name of link.dataset.records.split(" ")) {
    const item = document.createElement("li");
    const anchor = document.createElement("a");
    anchor.href = "#" + recordId(name);
    anchor.textContent = name;
    item.append(anchor);
    list.append(item);
  }
  panel.hidden = false;
}

function recordId(name) {
  return "record-" + name.replaceAll("/", "--").replaceAll("=", "-").replaceAll(",", "-");
}

function openTarget() {
  let element = location.hash ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  for (; element; element = element.parentElement) if (element.tagName === "DETAILS") element.open = true;
}

document.addEventListener("click", (event) => {
  const head = event.target.closest("table.sortable tr.heads th");
  if (head) sortTable(head);
  const link = event.target.closest("td a[data-records]");
  if (link) { event.preventDefault(); showOrigin(link); }
  if (event.target.closest("#origin button")) document.getElementById("origin").hidden = true;
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.getElementById("origin").hidden = true;
  if (event.key === "Enter" && event.target.matches("tr.heads th")) sortTable(event.target);
});
for (const head of document.querySelectorAll("table.sortable tr.heads th")) {
  head.tabIndex = 0;
  head.title = "Sort by this column";
}
window.addEventListener("hashchange", openTarget);
window.addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details.opens")) part.open = true;
  for (const image of document.querySelectorAll("img")) image.loading = "eager";
});
openTarget();

"use strict";
// A click on a head sorts by that column, a second one turns it round; cells without a value stay
// last. What is typed above a table leaves only the rows that hold it.
document.querySelectorAll("table").forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const scale = {k: 1e3, M: 1e6, G: 1e9};
  const text = (row, i) => row.cells[i].dataset.v ?? row.cells[i].textContent.trim();
  const number = s => {  // "1.23 M", "< 0.001", "+1.2 ± 0.3", "1,234", "4e-05"
    const m = /^[<≤]?\s*([+-]?[\d,]*\.?\d+(?:e[+-]?\d+)?)(?:\s([kMG])(?!\w))?/.exec(s);
    return m ? parseFloat(m[1].replaceAll(",", "")) * (scale[m[2]] ?? 1) : NaN;
  };
  const sort = i => {
    const up = heads[i].ariaSort !== "ascending";
    heads.forEach(head => head.removeAttribute("aria-sort"));
    heads[i].ariaSort = up ? "ascending" : "descending";
    const rows = [...body.rows].map(row => [row, text(row, i), number(text(row, i))]);
    const filled = rows.filter(r => r[1] !== "" && r[1] !== "–");
    const numeric = filled.filter(r => !isNaN(r[2])).length * 2 >= filled.length;
    const empty = r => numeric ? isNaN(r[2]) : !filled.includes(r);
    rows.sort((a, b) => {
      if (empty(a) || empty(b)) return empty(a) - empty(b);
      return (up ? 1 : -1) * (numeric ? a[2] - b[2] : a[1].localeCompare(b[1]));
    });
    body.append(...rows.map(r => r[0]));
  };
  const name = heads.findIndex(h => ["Attention", "contestant"].includes(h.textContent));
  if (name >= 0)  // stays in sight when the table is scrolled sideways
    for (const row of table.rows) row.cells[name].classList.add("named");
  heads.forEach((head, i) => {
    head.tabIndex = 0;
    head.onclick = () => sort(i);
    head.onkeydown = e => { if (e.key === "Enter") sort(i); };
  });
  if (body.rows.length < 3) return;
  const filter = document.createElement("input");
  Object.assign(filter, {className: "filter", type: "search", placeholder: "Filter rows"});
  filter.setAttribute("aria-label", "Filter rows");
  filter.oninput = () => {
    const words = filter.value.toLowerCase().split(/\s+/);
    for (const row of body.rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  };
  (table.closest(".scroll") ?? table).before(filter);
});

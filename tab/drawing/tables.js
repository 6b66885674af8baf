"use strict";
// A click on a head sorts by that column, a second one turns it round; cells without a value stay
// last. What is typed above a table leaves only the rows that hold it; what is seen can be copied.
document.querySelectorAll("table").forEach(table => {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const scale = {k: 1e3, M: 1e6, G: 1e9};
  const words = cell => (cell.firstChild?.textContent === undefined ? "" : [...cell.childNodes]
    .filter(node => node.className !== "here").map(node => node.textContent).join("").trim());
  const titles = heads.map(words);
  const text = (row, i) => row.cells[i].dataset.v ?? words(row.cells[i]);
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
  const name = titles.findIndex(title => ["Attention", "contestant"].includes(title));
  if (name >= 0)  // stays in sight when the table is scrolled sideways
    for (const row of table.rows) row.cells[name].classList.add("named");
  for (const row of body.rows) if (row.id && name >= 0) {
    const link = document.createElement("a");
    Object.assign(link, {href: `#${row.id}`, className: "here", textContent: "#", title: "Link to this row"});
    row.cells[name].append(link);
  }
  heads.forEach((head, i) => {
    head.tabIndex = 0;
    head.onclick = () => sort(i);
    head.onkeydown = e => { if (e.key === "Enter") sort(i); };
  });
  const seen = () => [titles, ...[...body.rows].filter(row => !row.hidden)
    .map(row => [...row.cells].map(words))];
  const forms = {
    CSV: rows => rows.map(row => row.map(cell =>
      /[",\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell).join(",")).join("\n") + "\n",
    Markdown: ([head, ...rows]) => [head, head.map(() => "---"), ...rows].map(row =>
      `| ${row.map(cell => cell.replaceAll("|", "\\|")).join(" | ")} |`).join("\n") + "\n",
  };
  const above = document.createElement("div");
  above.className = "above";
  if (body.rows.length > 2) {
    const filter = document.createElement("input");
    Object.assign(filter, {className: "filter", type: "search", placeholder: "Filter rows"});
    filter.setAttribute("aria-label", "Filter rows");
    filter.oninput = () => {
      const wanted = filter.value.toLowerCase().split(/\s+/);
      for (const row of body.rows)
        row.hidden = !wanted.every(word => row.textContent.toLowerCase().includes(word));
    };
    above.append(filter);
  }
  for (const [form, write] of Object.entries(forms)) {
    const button = document.createElement("button");
    Object.assign(button, {textContent: form, title: `Copy the rows that are shown as ${form}`});
    button.onclick = async () => {
      try {
        await navigator.clipboard.writeText(write(seen()));
        button.textContent = "Copied";
      } catch {  // some browsers give no clipboard to a page that is a file
        button.textContent = "This browser does not allow it";
      }
      setTimeout(() => { button.textContent = form; }, 1500);
    };
    above.append(button);
  }
  (table.closest(".scroll") ?? table).before(above);
});

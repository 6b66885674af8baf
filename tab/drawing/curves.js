"use strict";
// Curves over epochs, time, noise: means with the range of their seeds, the one pointed at in colour.
kinds.curves = (figure, chart) => {
  const longest = Math.max(...chart.series.map(s => s.x.length));
  if (longest >= 10 && !figure.querySelector(".tools .zoom")) {
    const button = tool(figure, "Zoom", "Leave out the first fifth", () => {
      button.ariaPressed = String(button.ariaPressed !== "true");
      kinds.curves(figure, chart);
    });
    button.className = "zoom";
    button.ariaPressed = "false";
  }
  const zoomed = figure.querySelector(".tools .zoom")?.ariaPressed === "true";
  const series = chart.series.filter(s => chart.own || !hidden.has(s.key)).map(s => ({...s,
    points: s.x.map((x, i) => ({x, y: s.y[i], low: s.low?.[i] ?? s.y[i], high: s.high?.[i] ?? s.y[i]}))
      .filter(p => p.y !== null).slice(zoomed ? Math.floor(s.x.length / 5) : 0)}));
  const all = series.flatMap(s => s.points);
  figure.hidden = !all.length;
  if (!all.length) return;
  const few = series.length <= 4;
  const xs = all.map(p => p.x), heights = all.flatMap(p => few ? [p.low, p.high] : [p.y]);
  const whole = ["epoch", "severity"].includes(chart.xlabel);
  let [first, last] = [Math.min(...xs), Math.max(...xs)];
  if (first === last) [first, last] = ends(xs);
  const f = frame(figure,
    {ends: chart.xlog ? logEnds(xs) : [first, last], label: chart.xlabel, log: chart.xlog, whole,
      at: chart.xat, names: chart.xnames},
    {ends: chart.ylog ? logEnds(heights) : ends(heights), label: chart.ylabel, log: chart.ylog},
    chart.named ? 150 : 14);
  const look = s => ({...data.looks[s.key], ...s.look});
  const draw = points => points.map((p, i) => `${i ? "L" : "M"}${f.X(p.x)},${f.Y(p.y)}`).join("");
  const limit = y => Math.min(Math.max(y, f.T - 8), f.H - f.B);
  for (const s of series) {
    const group = svg("g", f.root, {"data-key": s.key, class: "series mark"});
    if (s.low) {
      const up = s.points.map((p, i) => `${i ? "L" : "M"}${f.X(p.x)},${limit(f.Y(p.high))}`);
      const down = s.points.map(p => `L${f.X(p.x)},${limit(f.Y(p.low))}`).reverse();
      svg("path", group, {class: few ? "range" : "range many", d: `${up.join("")}${down.join("")}Z`,
        fill: look(s).color});
    }
    svg("path", group, {...stroke(look(s)), d: draw(s.points), class: "line"});
    if (s.dots || s.points.length === 1) for (const p of s.points) svg("circle", group,
      {cx: f.X(p.x), cy: f.Y(p.y), r: s.dots ? 2.6 : 4, fill: look(s).color});
  }
  let below = -Infinity;  // names at the ends of the lines keep their distance
  const named = chart.named ? series.map(s => ({s, end: s.points.at(-1)})) : [];
  for (const {s, end} of named.sort((a, b) => b.end.y - a.end.y)) {
    below = Math.max(f.Y(end.y) + 4, below + 14);
    svg("text", f.root, {x: f.W - 144, y: below, class: "mark", style: `fill: ${look(s).color}`}, look(s).name);
  }
  const marks = svg("g", f.root, {class: "marks"});
  hover(f.root, event => {
    const at = f.at(event);
    marks.replaceChildren();
    const near = nearest(series.flatMap(s => s.points.map(p => ({s, p, px: f.X(p.x), py: f.Y(p.y)}))), at);
    if (!chart.own) light(near.s.key);
    const lit = [...f.root.querySelectorAll(".series.lit")];
    lit.forEach(group => marks.before(group));  // above the others
    const dot = (s, p) => svg("circle", marks, {cx: f.X(p.x), cy: f.Y(p.y), r: 4, fill: look(s).color,
      class: "mark"});
    const range = p => p.low < p.high ? ` (${show(p.low)}–${show(p.high)})` : "";
    if (!chart.shared) {
      dot(near.s, near.p);
      tell(event, look(near.s).name, [[chart.xlabel, chart.xnames?.[near.p.x] ?? show(near.p.x)],
        [chart.ylabel, show(near.p.y) + range(near.p)], ...(near.s.facts ?? [])]);
      return;
    }
    svg("line", marks, {class: "grid", x1: f.X(near.p.x), x2: f.X(near.p.x), y1: f.T, y2: f.H - f.B});
    const here = series.flatMap(s => s.points.filter(p => p.x === near.p.x).map(p => ({s, p})))
      .sort((a, b) => b.p.y - a.p.y);
    here.forEach(q => chart.own || q.s === near.s ? dot(q.s, q.p) : null);
    tell(event, `${chart.xlabel} ${show(near.p.x)}`, here.map(q =>
      [look(q.s).name, show(q.p.y) + range(q.p), q.s === near.s]));
  }, () => marks.replaceChildren());
};

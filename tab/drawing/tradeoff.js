"use strict";
// Mechanisms as circles between two quantities of choice.
const better = (a, b, q) => q.more ? a > b : a < b;
const dominated = (p, all, qs) => all.some(o => o !== p
  && qs.every(q => !better(p.values[q.key], o.values[q.key], q))
  && qs.some(q => better(o.values[q.key], p.values[q.key], q)));

// Solid: no other is at least as good in all of chart.pareto. Dashed: the front of these axes.
kinds.tradeoff = (figure, chart) => {
  if (!figure.axes) {
    figure.axes = {};
    const bar = html("div", figure, {className: "axes"});
    for (const [axis, start] of [["y", "accuracy"], ["x", "time"]]) {
      const label = html("label", bar, {textContent: `${axis}: `}), select = html("select", label);
      chart.quantities.forEach(q => html("option", select, {value: q.key, textContent: q.label}));
      select.value = start;
      select.onchange = () => kinds.tradeoff(figure, chart);
      figure.axes[axis] = select;
    }
  }
  const q = axis => chart.quantities.find(q => q.key === figure.axes[axis].value);
  const qx = q("x"), qy = q("y");
  const points = chart.points.filter(p => !hidden.has(p.key));
  figure.hidden = !points.length;
  if (!points.length) return;
  const arrow = q => `${q.label} ${q.more ? "↑" : "↓"}`, of = q => points.map(p => p.values[q.key]);
  const axis = (q, count) => {  // logarithmic where one value would squeeze the others
    const all = of(q), log = Math.min(...all) > 0 && Math.max(...all) > 8 * Math.min(...all);
    return {ends: log ? logEnds(all) : ends(all, count), label: arrow(q), log};
  };
  const f = frame(figure, axis(qx, 7), axis(qy));
  const front = points.filter(p => !dominated(p, points, [qx, qy]))
    .sort((a, b) => a.values[qx.key] - b.values[qx.key]);
  svg("path", f.root, {class: "front", d: front.map((p, i) =>
    `${i ? "L" : "M"}${f.X(p.values[qx.key])},${f.Y(p.values[qy.key])}`).join("")});
  const most = Math.max(...points.map(p => p.values[chart.area])), boxes = [];
  const placed = points.map(p => ({...p, px: f.X(p.values[qx.key]), py: f.Y(p.values[qy.key]),
    r: 4 + 9 * Math.sqrt(p.values[chart.area] / most),
    solid: !dominated(p, points, chart.quantities.filter(q => chart.pareto.includes(q.key)))}));
  for (const p of placed) {
    const look = data.looks[p.key];
    const group = svg("g", f.root, {"data-key": p.key, class: "mark circle"});
    svg("circle", group, {cx: p.px, cy: p.py, r: p.r, fill: look.color,
      "fill-opacity": p.solid ? .85 : .12, stroke: look.color, "stroke-width": 1.6});
  }
  // A name stands right, left, above or below; one that would cover something is left out.
  for (const p of placed) {
    const text = svg("text", f.root, {class: "name"}, data.looks[p.key].name + (p.disturbed ? " *" : ""));
    const w = text.getComputedTextLength(), d = p.r + 4;
    const spot = [[p.px + d, p.py], [p.px - d - w, p.py], [p.px - w / 2, p.py - d - 5],
      [p.px - w / 2, p.py + d + 5]].find(([x, y]) => x > f.L && x + w < f.W && y > f.T
      && !boxes.some(b => Math.abs(b.y - y) < 13 && x < b.x + b.w && b.x < x + w)
      && !placed.some(o => o !== p && Math.abs(o.py - y) < o.r + 5
        && x < o.px + o.r && o.px - o.r < x + w));
    if (!spot) { text.remove(); continue; }
    const [x, y] = spot;
    boxes.push({x, y, w});
    text.setAttribute("x", x);
    text.setAttribute("y", y + 4);
  }
  hover(f.root, event => {
    const p = nearest(placed, f.at(event));
    light(p.key);
    tell(event, data.looks[p.key].name, [...chart.quantities.map(q =>
      [q.label, show(p.values[q.key]) + (q.key === "time" && p.disturbed ? " *" : "")]),
    ...(p.disturbed ? [starred] : [])]);
  });
};

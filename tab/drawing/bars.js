"use strict";
// Times as fast as the best rival, on a logarithmic axis on which that rival stands at 1×.
kinds.bars = (figure, chart) => {
  const W = figure.clientWidth, line = 24, top = 8, foot = 40;
  const c = canvas(figure, top + chart.bars.length * line + foot), {root} = c, bottom = c.H - foot;
  const left = Math.min(190, W * .36), right = 120;
  const all = [1, ...chart.bars.flatMap(b => [b.low, b.high])];
  const reach = [Math.min(...all) / 1.1, Math.max(...all) * 1.1];
  if (reach[1] / reach[0] < 4) { reach[0] = Math.min(reach[0], .7); reach[1] = Math.max(reach[1], 2.2); }
  const X = scale(reach, [left, W - right], true);
  for (const t of logTicks(...reach)) {
    svg("line", root, {class: "grid", x1: X(t), x2: X(t), y1: top, y2: bottom});
    svg("text", root, {x: X(t), y: bottom + 15, "text-anchor": "middle"}, `${show(t)}×`);
  }
  svg("text", root, {x: left, y: bottom + 33}, `times as fast as ${chart.rival} (log) →`);
  chart.bars.forEach((b, i) => {
    const y = top + i * line + line / 2, [a, z] = [X(1), X(b.value)].sort((p, q) => p - q);
    const row = svg("g", root, {class: "row", "data-bar": i});
    svg("rect", row, {class: "hit", x: 0, y: y - line / 2, width: W, height: line});
    svg("text", row, {x: left - 8, y: y + 4, "text-anchor": "end", class: b.ours ? "name strong" : "name"}, b.name);
    const mark = svg("g", row, {class: "mark", fill: chart.colours[b.ours ? 0 : 1]});
    svg("rect", mark, {x: a, y: y - 7, width: Math.max(z - a, 1.5), height: 14});
    svg("line", row, {class: "whisker", x1: X(b.low), x2: X(b.high), y1: y, y2: y});
    svg("text", row, {x: Math.max(X(b.high), X(1)) + 7, y: y + 4, class: b.ours ? "number strong" : "number"},
      `${show(+b.value.toPrecision(3))}×, ${show(+b.ms.toPrecision(3))} ms`);
  });
  svg("line", root, {class: "zero", x1: X(1), x2: X(1), y1: top, y2: bottom});
  hover(root, event => {
    const row = event.target.closest("[data-bar]"), b = row && chart.bars[+row.dataset.bar];
    if (!b) { tip.hidden = true; return; }
    tell(event, b.name, [[`times as fast as ${chart.rival}`, `${show(b.value)}×`],
      ["10th to 90th percentile", `${show(b.low)}–${show(b.high)}`], ["median", `${show(b.ms)} ms`]]);
  });
};

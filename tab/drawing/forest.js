"use strict";
// Differences with intervals, a line each; beside them the verdict and the ratio of times.
kinds.forest = (figure, chart) => {
  const W = figure.clientWidth, narrow = W < 720, times = W >= 940;
  const line = narrow ? 46 : 25, head = narrow ? 44 : 40, foot = 40;
  const ladder = chart.rows.findIndex(r => r.control);
  const gap = ladder > 0 ? 30 : 0;
  const c = canvas(figure, head + chart.rows.length * line + gap + foot), {root} = c;
  const right = narrow ? 8 : times ? 520 : 330, left = narrow ? 8 : 190;
  const bottom = c.H - foot, X = scale(chart.extent, [left, W - right]);
  const [low, high] = chart.extent, word = (x, y, text, more = {}) => svg("text", root, {x, y, ...more}, text);

  svg("rect", root, {class: "band", x: X(-chart.margin), width: X(chart.margin) - X(-chart.margin),
    y: head - 8, height: bottom - head + 8});
  for (const t of ticks(low, high, narrow ? 5 : 8)) {
    svg("line", root, {class: "grid", x1: X(t), x2: X(t), y1: head - 8, y2: bottom});
    word(X(t), bottom + 15, (t > 0 ? "+" : "") + show(t), {"text-anchor": "middle"});
  }
  svg("line", root, {class: "zero", x1: X(0), x2: X(0), y1: head - 8, y2: bottom});
  word((left + W - right) / 2, bottom + 33, "points of test accuracy", {"text-anchor": "middle"});
  word(X(0) + 7, head - 16, "better →");
  word(X(0) - 7, head - 16, "← worse", {"text-anchor": "end"});
  const columns = {difference: W - right + 18, verdict: W - right + 168, time: W - 198};
  if (!narrow) {
    word(0, head - 16, `${chart.control} at 0`);
    word(columns.difference, head - 16, "difference ↑");
    word(columns.verdict, head - 16, "verdict");
  } else word(0, 12, `${chart.control} at 0`);
  const timed = chart.rows.filter(r => r.time !== null);
  const reach = [1, ...timed.flatMap(r => [r.time, r.time_low, r.time_high])].filter(Boolean);
  const T = scale(logEnds(reach), [columns.time, W - 80], true);
  if (times && timed.length) {
    word(columns.time, head - 16, "time ratio (×, log) ↓");
    svg("line", root, {class: "zero", x1: T(1), x2: T(1), y1: head - 8, y2: bottom});
    const wide = Math.max(...reach) > 8 * Math.min(...reach);  // then powers of ten have room
    for (const t of logTicks(...logEnds(reach)).filter(t => !wide || Number.isInteger(Math.log10(t))))
      word(T(t), bottom + 15, `${t}×`, {"text-anchor": "middle"});
  }
  const ratio = r => r.time === null ? "" : `${r.time.toFixed(2)}×${r.disturbed ? " *" : ""}`;

  chart.rows.forEach((r, i) => {
    const top = head + i * line + (ladder > 0 && i >= ladder ? gap : 0);
    const y = top + (narrow ? 30 : 11), colour = chart.verdicts[r.kind];
    if (i === ladder && gap) {
      word(0, top - 10, chart.controls, {class: "group"});
      svg("line", root, {class: "grid", x1: 0, x2: W, y1: top - 27, y2: top - 27});
    }
    const link = svg("a", root, {href: `#${r.link}`, "data-key": r.key, class: "row"});
    svg("rect", link, {class: "hit", x: 0, y: top - (narrow ? 0 : 2), width: W, height: line});
    const name = svg("text", link, {x: 0, y: narrow ? top + 16 : y + 4, class: "name"}, r.name);
    if (narrow) {
      const said = [`${r.words} ${r.kind}`, ...(r.time === null ? [] : [ratio(r)])].join(" · ");
      const figures = svg("text", link, {x: W, y: top + 16, "text-anchor": "end", class: "number"}, said);
      name.classList.add("strong");
      const room = W - name.getComputedTextLength() - 8, wanted = figures.getComputedTextLength();
      const size = parseFloat(getComputedStyle(figures).fontSize);
      figures.style.fontSize = `${size * Math.min(1, room / wanted)}px`;  // a long name leaves less
    }
    const mark = svg("g", link, {class: "mark", stroke: colour, fill: colour});
    if (r.low !== null) {
      const [a, b] = [Math.max(r.low, low), Math.min(r.high, high)];
      svg("line", mark, {x1: X(a), x2: X(b), y1: y, y2: y, "stroke-width": 2.4});
      for (const [cut, x, d] of [[r.low < low, X(low), 6], [r.high > high, X(high), -6]])
        if (cut) svg("path", mark, {d: `M${x + d},${y - 5}L${x},${y}L${x + d},${y + 5}`, fill: "none", "stroke-width": 2});
    }
    if (r.difference >= low && r.difference <= high) dot(mark, r.kind, X(r.difference), y);
    if (narrow) return;
    svg("text", link, {x: columns.difference, y: y + 4, class: "number"}, r.words);
    svg("text", link, {x: columns.verdict, y: y + 4, class: "mark strong", style: `fill: ${colour}`}, r.verdict);
    if (r.time === null) return;
    if (times) {
      const span = svg("g", link, {class: "span"});
      if (r.time_low !== null) svg("line", span, {x1: T(r.time_low), x2: T(r.time_high), y1: y, y2: y});
      svg("circle", span, {cx: T(r.time), cy: y, r: 3.6, class: r.disturbed ? "open" : ""});
    }
    if (times) svg("text", link, {x: W - 64, y: y + 4, class: "number"}, ratio(r));
  });
  hover(root, event => {
    const row = event.target.closest("[data-key]");
    const r = row && chart.rows.find(r => r.key === row.dataset.key);
    light(r ? r.key : null);
    if (!r) { tip.hidden = true; return; }
    const range = r.time_low === null ? "" : ` (${r.time_low.toFixed(2)}–${r.time_high.toFixed(2)})`;
    tell(event, r.name, [["test accuracy", `${r.test.toFixed(1)} %`], ["difference", `${r.words} points`],
      ["verdict", r.verdict], ...(r.time === null ? [] : [["time ratio", ratio(r) + range]]),
      ...(r.disturbed ? [starred] : [])]);
  });
};
// A shape for each verdict, as colours are not told apart by all.
const dot = (parent, kind, x, y) => {
  const shape = {worse: `M${x},${y - 6.5}l6.5,6.5l-6.5,6.5l-6.5,-6.5z`,
    equivalent: `M${x - 5},${y - 5}h10v10h-10z`}[kind];
  if (shape) svg("path", parent, {d: shape});
  else svg("circle", parent, {cx: x, cy: y, r: 5, "stroke-width": 2, class: kind === "better" ? "" : "open"});
};

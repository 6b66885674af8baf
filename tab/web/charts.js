"use strict";
(() => {
const data = JSON.parse(document.getElementById("data").textContent);
const hidden = new Set(), drawn = [];
let lit = null;  // the mechanism under the pointer in the list

const html = (tag, parent, fields = {}) =>
  parent.appendChild(Object.assign(document.createElement(tag), fields));
const svg = (tag, parent, attributes, text) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return parent.appendChild(node);
};
const stroke = look => ({stroke: look.color, "stroke-width": look.width, fill: "none",
  "stroke-dasharray": look.dash, "stroke-linejoin": "round"});
const show = x => Math.abs(x) >= 1e4
  ? new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3}).format(x)
  : String(+x.toPrecision(4));
const ticks = (low, high, count) => {
  const raw = (high - low) / count, ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(k => k * ten >= raw) * ten, out = [];
  for (let t = Math.ceil(low / step - 1e-9); t * step <= high + step * 1e-9; t++) out.push(t * step);
  return out;
};
const range = (values, room) => {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  return [low - room * (high - low), high + room * (high - low)];
};

const tip = html("div", document.body, {className: "tip", hidden: true});
const tell = (event, head, lines) => {
  tip.replaceChildren();
  html("b", tip, {textContent: head});
  for (const [name, value] of lines) {
    const line = html("div", tip);
    html("span", line, {textContent: name});
    html("span", line, {textContent: value});
  }
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  const y = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6);
  tip.style.left = `${Math.max(x, 4)}px`; tip.style.top = `${Math.max(y, 4)}px`;
};

// Axes on an empty drawing -> it, and what places a value.
const frame = (figure, [x0, x1], [y0, y1], xlabel, ylabel) => {
  figure.querySelector("svg")?.remove();
  const W = Math.max(figure.clientWidth, 240), H = figure.parentNode.classList.contains("small") ? 190 : 300, L = 50, R = 14, T = 22, B = 42;
  const root = svg("svg", figure, {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": figure.querySelector("figcaption").textContent});
  const X = v => L + (v - x0) / (x1 - x0) * (W - L - R);
  const Y = v => H - B - (v - y0) / (y1 - y0) * (H - T - B);
  for (const t of ticks(y0, y1, 5)) {
    svg("line", root, {class: "grid", x1: L, x2: W - R, y1: Y(t), y2: Y(t)});
    svg("text", root, {x: L - 6, y: Y(t) + 4, "text-anchor": "end"}, show(t));
  }
  const whole = t => !["epoch", "severity"].includes(xlabel) || Number.isInteger(t);
  for (const t of ticks(x0, x1, W > 400 ? 7 : 4).filter(whole))
    svg("text", root, {x: X(t), y: H - B + 17, "text-anchor": "middle"}, show(t));
  svg("text", root, {x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle"}, xlabel);
  svg("text", root, {x: 4, y: 12}, ylabel);
  const at = event => {
    const box = root.getBoundingClientRect();
    return [(event.clientX - box.left) * W / box.width, (event.clientY - box.top) * H / box.height];
  };
  return {root, X, Y, at, W, H, L, R, T, B};
};
const hover = (root, move, leave) => {
  root.onpointermove = root.onpointerdown = move;
  root.onpointerleave = () => { tip.hidden = true; leave(); };
};
const nearest = (points, [x, y]) => points.reduce((best, p) => {
  const d = Math.hypot(p.px - x, p.py - y);
  return !best || d < best.d ? {...p, d} : best;
}, null);
const faint = key => lit && lit !== key ? " faint" : "";

const lines = (figure, chart) => {
  const series = chart.series.filter(s => chart.whole || !hidden.has(s.key)).map(s => ({...s,
    points: s.x.map((x, i) => ({x, y: s.y[i]})).filter(p => p.y !== null)}));
  const all = series.flatMap(s => s.points);
  figure.hidden = !all.length;
  if (!all.length) return;
  // The first fifth of long curves may run out of the picture: there all rise or fall together.
  const late = series.flatMap(s => s.points.length >= 10 && !chart.whole
    ? s.points.slice(Math.floor(s.points.length / 5)) : s.points);
  const f = frame(figure, range(all.map(p => p.x), .02), range(late.map(p => p.y), .06),
    chart.xlabel, chart.ylabel);
  const inside = p => f.Y(p.y) >= f.T - 9 && f.Y(p.y) <= f.H - f.B + 2;
  const look = s => ({...data.looks[s.key], ...s.look});
  for (const s of series) {
    const seen = s.points.filter(inside);
    const path = seen.map((p, i) => `${i ? "L" : "M"}${f.X(p.x)},${f.Y(p.y)}`).join("");
    svg("path", f.root, {...stroke(look(s)), d: path, class: `mark${faint(s.key)}`});
    if (s.dots || seen.length === 1) for (const p of seen) svg("circle", f.root, {cx: f.X(p.x),
      cy: f.Y(p.y), r: s.dots ? 2.2 : 4, fill: look(s).color, class: `mark${faint(s.key)}`});
  }
  const marks = svg("g", f.root, {class: "mark"});
  const dot = (s, p) => inside(p) && svg("circle", marks, {cx: f.X(p.x), cy: f.Y(p.y), r: 3.5,
    fill: look(s).color});
  hover(f.root, event => {
    const at = f.at(event);
    marks.replaceChildren();
    const found = series.flatMap(s => s.points.map(p => ({s, p, px: f.X(p.x),
      py: chart.shared ? at[1] : f.Y(p.y)})));
    const {s, p} = nearest(found, at);
    if (!chart.shared) {
      dot(s, p);
      return tell(event, look(s).name,
        [[chart.xlabel, show(p.x)], [chart.ylabel, show(p.y)], ...(s.facts ?? [])]);
    }
    svg("line", marks, {class: "grid", x1: f.X(p.x), x2: f.X(p.x), y1: f.T, y2: f.H - f.B});
    const here = found.filter(q => q.p.x === p.x).sort((a, b) => b.p.y - a.p.y);
    here.forEach(q => dot(q.s, q.p));
    tell(event, `${chart.xlabel} ${show(p.x)}`, here.map(q => [look(q.s).name, show(q.p.y)]));
  }, () => marks.replaceChildren());
};

const better = (a, b, q) => q.more ? a > b : a < b;
const dominated = (p, all, qs) => all.some(o => o !== p
  && qs.every(q => !better(p.values[q.key], o.values[q.key], q))
  && qs.some(q => better(o.values[q.key], p.values[q.key], q)));

// Solid: no other is at least as good in all of chart.pareto. Dashed: the front of these axes.
const tradeoff = (figure, chart) => {
  if (!figure.axes) {
    figure.axes = {};
    const bar = html("div", figure, {className: "axes"});
    for (const [axis, start] of [["y", "accuracy"], ["x", "time"]]) {
      const label = html("label", bar, {textContent: `${axis}: `}), select = html("select", label);
      chart.quantities.forEach(q => html("option", select, {value: q.key, textContent: q.label}));
      select.value = start;
      select.onchange = () => tradeoff(figure, chart);
      figure.axes[axis] = select;
    }
  }
  const q = axis => chart.quantities.find(q => q.key === figure.axes[axis].value);
  const qx = q("x"), qy = q("y");
  const points = chart.points.filter(p => !hidden.has(p.key));
  figure.hidden = !points.length;
  if (!points.length) return;
  const f = frame(figure, range(points.map(p => p.values[qx.key]), .12),
    range(points.map(p => p.values[qy.key]), .14), qx.label, qy.label);
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
    svg("circle", f.root, {cx: p.px, cy: p.py, r: p.r, class: `mark${faint(p.key)}`,
      fill: look.color, "fill-opacity": p.solid ? .85 : .12, stroke: look.color, "stroke-width": 1.6});
  }
  // A name stands right, left, above or below; one that would cover something is left out.
  for (const p of placed) {
    const text = svg("text", f.root, {class: "name"}, data.looks[p.key].name);
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
    tell(event, data.looks[p.key].name, chart.quantities.map(q =>
      [q.label, show(p.values[q.key])]));
  }, () => {});
};

const draw = () => drawn.forEach(f => f());
const list = document.querySelector(".show");  // missing where every chart shows one mechanism
for (const [key, look] of list ? Object.entries(data.looks) : []) {
  const button = html("button", list, {ariaPressed: "true"});
  const sample = svg("svg", button, {width: 22, height: 8, class: "mark"});
  svg("line", sample, {...stroke(look), x1: 0, x2: 22, y1: 4, y2: 4});
  button.append(look.name);
  button.onclick = () => {
    hidden.has(key) ? hidden.delete(key) : hidden.add(key);
    button.ariaPressed = String(!hidden.has(key));
    draw();
  };
  button.onpointerenter = () => { lit = key; draw(); };
  button.onpointerleave = () => { lit = null; draw(); };
}
document.querySelectorAll("figure[data-chart]").forEach(figure => {
  const chart = data.charts[+figure.dataset.chart];
  const mine = () => (chart.quantities ? tradeoff : lines)(figure, chart);
  drawn.push(mine);
  mine();
});
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw(); } });
})();

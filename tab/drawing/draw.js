"use strict";
// What every chart is drawn with: SVG in the page's own width, axes, a tip, each figure as a file.
const data = JSON.parse(document.getElementById("data").textContent);
const kinds = {};  // kind of a chart -> what draws it: (figure, chart)
const hidden = new Set();  // mechanisms that a press on their name took away
const drawn = [];

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
const step = (low, high, count) => {
  const raw = (high - low) / count, ten = 10 ** Math.floor(Math.log10(raw));
  return [1, 2, 5, 10].find(k => k * ten >= raw * .999) * ten;
};
const ticks = (low, high, count) => {
  const by = step(low, high, count), out = [];
  for (let t = Math.ceil(low / by - 1e-9); t * by <= high + by * 1e-9; t++) out.push(t * by);
  return out;
};
const logTicks = (low, high) => {
  const all = [];
  for (let e = Math.floor(Math.log10(low)); 10 ** e <= high; e++)
    for (const k of [1, 2, 5]) all.push(k * 10 ** e);
  const inside = all.filter(t => t >= low * .999 && t <= high * 1.001);
  const tens = inside.filter(t => t.toExponential().startsWith("1e"));
  return inside.length > 7 && tens.length > 1 ? tens : inside;
};
// Ends of an axis: on the tick beyond the values, so that the axis starts where its label says.
const ends = (values, count = 5) => {
  let low = Math.min(...values), high = Math.max(...values);
  if (low === high) { low -= Math.abs(low) / 10 || 1; high += Math.abs(high) / 10 || 1; }
  const by = step(low, high, count);
  return [Math.floor(low / by + 1e-9) * by, Math.ceil(high / by - 1e-9) * by];
};
const logEnds = values => {
  const low = Math.min(...values), high = Math.max(...values);
  return [low / 1.15, high * 1.15];
};
const scale = ([low, high], [from, to], log) => {
  const f = log ? Math.log : x => x;
  return v => from + (f(v) - f(low)) / (f(high) - f(low)) * (to - from);
};

const tip = html("div", document.body, {className: "tip", hidden: true});
const tell = (event, head, lines) => {
  tip.replaceChildren();
  html("b", tip, {textContent: head});
  for (const [name, value, strong] of lines) {
    const line = html("div", tip, {className: strong ? "strong" : ""});
    html("span", line, {textContent: name});
    html("span", line, {textContent: value});
  }
  tip.hidden = false;
  const x = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
  const y = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 6);
  tip.style.left = `${Math.max(x, 4)}px`; tip.style.top = `${Math.max(y, 4)}px`;
};
const starred = ["*", "other work made this time more than 1.5× as long"];  // a line of a tip
// The mechanism pointed at keeps its colour, in all charts; the others turn grey.
const light = key => {
  document.body.classList.toggle("pointing", key !== null);
  document.querySelectorAll("[data-key]").forEach(
    node => node.classList.toggle("lit", node.dataset.key === key));
};
const hover = (root, move, leave = () => {}) => {
  root.onpointermove = root.onpointerdown = move;
  root.onpointerleave = () => { tip.hidden = true; light(null); leave(); };
};
const nearest = (points, [x, y]) => points.reduce((best, p) => {
  const d = Math.hypot(p.px - x, p.py - y);
  return !best || d < best.d ? {...p, d} : best;
}, null);

const canvas = (figure, H) => {
  figure.querySelector(":scope > svg")?.remove();
  const W = Math.max(figure.clientWidth, 240);
  const root = svg("svg", figure, {viewBox: `0 0 ${W} ${H}`, role: "img",
    "aria-label": figure.querySelector("figcaption").textContent});
  const at = event => {
    const box = root.getBoundingClientRect();
    return [(event.clientX - box.left) * W / box.width, (event.clientY - box.top) * H / box.height];
  };
  return {root, W, H, at};
};
// Axes on an empty drawing -> it, and what places a value. x, y: {ends, label, log, whole}
const frame = (figure, x, y, R = 14) => {
  const kind = figure.parentNode.classList, L = 50, T = 24, B = 42;
  const {root, W, H, at} = canvas(figure, kind.contains("small") ? 190 : kind.contains("wide") ? 400 : 300);
  const X = scale(x.ends, [L, W - R], x.log), Y = scale(y.ends, [H - B, T], y.log);
  for (const t of y.log ? logTicks(...y.ends) : ticks(...y.ends, 5)) {
    svg("line", root, {class: "grid", x1: L, x2: W - R, y1: Y(t), y2: Y(t)});
    svg("text", root, {x: L - 6, y: Y(t) + 4, "text-anchor": "end"}, show(t));
  }
  const along = x.at ?? (x.log ? logTicks(...x.ends) : ticks(...x.ends, W > 400 ? 7 : 4))
    .filter(t => !x.whole || Number.isInteger(t));
  for (const t of along)
    svg("text", root, {x: X(t), y: H - B + 17, "text-anchor": "middle"}, x.names?.[t] ?? show(t));
  svg("text", root, {x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle"},
    x.label + (x.log ? " (log)" : ""));
  svg("text", root, {x: 4, y: 12}, y.label + (y.log ? " (log)" : ""));
  return {root, X, Y, at, W, H, L, R, T, B};
};

const save = (name, blob) => {
  const link = html("a", document.body, {href: URL.createObjectURL(blob), download: name});
  link.click();
  URL.revokeObjectURL(link.href);
  link.remove();
};
// A drawing that needs no style sheet, on white whatever the page's colours are.
const standalone = root => {
  const copy = root.cloneNode(true), box = root.viewBox.baseVal;
  document.documentElement.classList.add("light");
  const [from, to] = [root, copy].map(n => [n, ...n.querySelectorAll("*")]);
  const paint = ["fill", "stroke", "stroke-width", "stroke-dasharray", "fill-opacity", "opacity",
    "font-size", "font-weight", "font-style", "visibility"];
  to.forEach((node, i) => {
    const style = getComputedStyle(from[i]);
    for (const name of paint) node.style.setProperty(name, style.getPropertyValue(name));
    node.removeAttribute("class");
  });
  document.documentElement.classList.remove("light");
  copy.setAttribute("width", box.width);
  copy.setAttribute("height", box.height);
  copy.style.fontFamily = "system-ui, sans-serif";
  const ground = svg("rect", copy, {width: "100%", height: "100%", fill: "#fff"});
  copy.prepend(ground);
  svg("title", copy, {}, root.getAttribute("aria-label"));
  return new XMLSerializer().serializeToString(copy);
};
const tool = (figure, text, title, press) => {
  const bar = figure.querySelector(".tools") ?? html("div", figure, {className: "tools"});
  const button = html("button", bar, {textContent: text, title});
  button.onclick = press;
  return button;
};
const redraw = () => drawn.forEach(f => f());

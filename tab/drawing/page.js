"use strict";
// Draws every figure of the page, and the list of mechanisms that takes them away and brings them back.
const there = new Set(data.charts.filter(chart => !chart.own)  // with something to take away
  .flatMap(chart => chart.series ?? chart.points ?? []).map(one => one.key));
document.querySelectorAll(".show").forEach(list => {
  for (const [key, look] of Object.entries(data.looks).filter(([key]) => there.has(key))) {
    const button = html("button", list, {ariaPressed: "true"});
    const sample = svg("svg", button, {width: 22, height: 8, class: "mark"});
    svg("line", sample, {...stroke(look), x1: 0, x2: 22, y1: 4, y2: 4});
    button.append(look.name);
    button.onclick = () => {
      hidden.has(key) ? hidden.delete(key) : hidden.add(key);
      button.ariaPressed = String(!hidden.has(key));
      redraw();
    };
    button.onpointerenter = () => light(key);
    button.onpointerleave = () => light(null);
  }
});
document.querySelectorAll("figure[data-chart]").forEach(figure => {
  const chart = data.charts[+figure.dataset.chart], mine = () => kinds[chart.kind](figure, chart);
  drawn.push(mine);
  mine();
  const name = chart.title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "");
  tool(figure, "SVG", "Save this figure as SVG", () => save(`${name}.svg`,
    new Blob([standalone(figure.querySelector(":scope > svg"))], {type: "image/svg+xml"})));
});
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });

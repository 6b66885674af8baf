"""report.html in headless Chromium: what a reader can do, and that nothing leaves the page."""

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from patience import PATIENCE
from small_report import page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--no-pdf-header-footer"),
]

READER = """<script>{
const said = {}, errors = [], copied = [], saved = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("unhandledrejection", e => errors.push(String(e.reason)));
console.error = console.warn = (...words) => errors.push(words.join(" "));
const clipboard = {writeText: async text => copied.push(text)};
Object.defineProperty(navigator, "clipboard", {value: clipboard});
window.Blob = class { constructor(parts, {type}) { saved.push([parts.join(""), type]); } };
URL.createObjectURL = () => "#";
const press = (words, within = document) =>
  [...within.querySelectorAll("button")].find(b => b.textContent === words).click();
const hover = (plot, part = null) => {
  const b = (part ?? plot).getBoundingClientRect(), at = {bubbles: true,
    clientX: b.left + b.width / 2, clientY: b.top + b.height / 2};
  (part ?? plot).dispatchEvent(new PointerEvent("pointermove", at));
  const tip = document.querySelector(".tip");
  return tip.hidden ? null : [...tip.children].map(line => line.textContent);
};
const figure = title => [...document.querySelectorAll("figure[data-chart]")]
  .find(f => f.textContent.includes(title));
HTMLAnchorElement.prototype.click = () => {};
const tell_all = () => {
  document.documentElement.dataset.said = JSON.stringify({...said, copied, errors});
};
addEventListener("load", () => {
  try { read(); } catch (e) { errors.push(e.stack); }
  tell_all();
});
const read = () => {
  const table = document.querySelector("table"), rows = () => [...table.tBodies[0].rows];
  const names = () => rows().map(r => r.cells[1].firstChild.textContent);
  const head = [...table.tHead.rows[0].cells].find(h => h.textContent.startsWith("Test acc."));
  head.click(); said.up = names(); head.click(); said.down = names();
  const filter = document.querySelector("input.filter");
  filter.value = "self"; filter.dispatchEvent(new Event("input"));
  said.filtered = rows().filter(r => !r.hidden).length;
  press("CSV"); press("Markdown");
  said.order = [...document.querySelectorAll("main > section > h2")].map(h => h.textContent);
  said.plots = document.querySelectorAll("figure[data-chart] > svg").length;

  const forest = figure("difference from no attention").querySelector("svg");
  const row = [...forest.querySelectorAll("a.row")].find(a => a.textContent.startsWith("Linear"));
  said.forest = hover(forest, row.querySelector(".hit"));
  said.lit = [...document.querySelectorAll(".lit")].every(n => n.dataset.key === "linear")
    && document.querySelectorAll(".lit").length;
  const starred = [...forest.querySelectorAll("a.row")]
    .find(a => a.textContent.startsWith("Local"));
  said.starred = [starred.textContent, ...hover(forest, starred.querySelector(".hit"))];
  said.named = figure("accuracy and cost").textContent.includes("Local *");
  forest.dispatchEvent(new PointerEvent("pointerleave"));
  said.dark = document.querySelectorAll(".lit").length;
  said.link = document.querySelector(row.getAttribute("href")).textContent.includes("Linear");

  const tradeoff = figure("accuracy and cost");
  said.tradeoff = hover(tradeoff.querySelector("svg"));
  const y = tradeoff.querySelector("select");
  y.value = "pgd"; y.dispatchEvent(new Event("change"));
  said.axis = tradeoff.querySelector("svg").textContent.includes("PGD-20");
  const loss = figure("training loss"), paths = () => loss.querySelectorAll("svg path.line").length;
  said.shown = paths(); document.querySelector(".show button").click(); said.hidden = paths();
  said.loss = hover(loss.querySelector("svg"));

  for (const f of document.querySelectorAll("figure[data-chart]")) press("SVG", f);
  said.saved = [];
  for (const [text, type] of saved) {
    const made = new DOMParser().parseFromString(text, type);
    const count = what => made.querySelectorAll(what).length;
    said.saved.push([made.documentElement.tagName, count("parsererror, [class]"),
      text.includes("var(--"), count("path, circle")]);
  }
  const main = document.querySelector("main");
  main.style.width = "1160px";  // that of a desktop, whose tables have 1,128
  said.tables = [...document.querySelectorAll(".scroll")].map(part => part.scrollWidth);
  main.style.width = "";
  said.wide = document.documentElement.scrollWidth - innerWidth;
  said.fetched = performance.getEntriesByType("resource").filter(r => !r.name.startsWith("data:"));
};
}</script></head>"""

NARROW = """<script>addEventListener("load", () => {
  const box = text => text.getBoundingClientRect();
  const rows = [...document.querySelectorAll("a.row")].map(a => a.querySelectorAll("text"));
  document.documentElement.dataset.said =
    JSON.stringify(rows.map(([name, said]) => [box(name).right, box(said).left]));
})</script></head>"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


def chromium(folder, *words: str) -> str:
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder / 'profile'}", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE).stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    text = page(folder).replace("</head>", READER, 1)
    (folder / "page.html").write_text(text, encoding="utf-8")
    return folder


def said_by(folder, name: str, width: int):
    where = (folder / name).as_uri()
    dom = chromium(folder, "--dump-dom", f"--window-size={width},900", where)
    return json.loads(unescape(re.search('data-said="(.*?)"', dom).group(1)))


@pytest.fixture(scope="module")
def said(written) -> dict:
    return said_by(written, "page.html", 500)


def test_on_a_phone_no_name_runs_into_its_figures(tmp_path):
    (tmp_path / "narrow.html").write_text(
        page(tmp_path).replace("</head>", f"<style>body {{ width: 300px }}</style>{NARROW}", 1)
    )
    rows = said_by(tmp_path, "narrow.html", 500)  # Chromium's window is no narrower
    assert len(rows) == 3 and all(right < left for right, left in rows), rows


def test_a_star_says_what_it_means(said):
    row, *tip = said["starred"]
    assert row.endswith("× *") and "other work made this time" in tip[-1] and said["named"]
    assert "other work" not in "".join(said["forest"])


def test_nothing_is_fetched_and_nothing_fails(said):
    assert said["errors"] == [] and said["fetched"] == []
    assert said["wide"] <= 0  # the page is no wider than a window of 500 pixels


def test_tables_sort_and_filter(said):
    up = ["Local", "Control", "Self-Attention", "Linear"]
    assert said["up"] == up and said["down"] == up[::-1] and said["filtered"] == 1


def test_tables_fit_a_desktop(said):
    assert len(said["tables"]) == 3 and max(said["tables"]) <= 1128


def test_tables_are_copied_as_they_are_seen(said):
    csv, markdown = said["copied"]
    head, row = csv.splitlines()
    assert head.startswith("Rank,Attention,") and row.startswith("2,Self-Attention,")
    assert head.count(",") == row.count(",")
    head, rule, row = markdown.splitlines()
    assert head.startswith("| Rank | Attention |") and row.startswith("| 2 | Self-Attention |")
    assert set(rule) == set("| -") and "#" not in csv + markdown  # not the link of a row


def test_the_forest_plot_comes_first_and_points_at_rows(said):
    assert said["order"][0] == "The answer at a glance" and said["plots"] == 7
    assert said["forest"][0] == "Linear" and said["link"]
    assert "test accuracy61.5 %" in said["forest"][1]
    assert said["lit"] >= 5 and said["dark"] == 0  # in the forest and in the other charts


def test_charts_tell_hide_and_change(said):
    assert len(said["tradeoff"]) >= 4 and said["axis"]
    assert said["shown"] - said["hidden"] == 1
    assert said["loss"][0].startswith("epoch") and len(said["loss"]) == said["hidden"] + 1


def test_each_figure_is_saved_as_svg(said):
    assert len(said["saved"]) == 7
    for tag, faults, needs_a_page, marks in said["saved"]:
        assert (tag, faults, needs_a_page) == ("svg", 0, False) and marks


def test_it_prints(written):
    out = written / "page.pdf"
    chromium(written, f"--print-to-pdf={out}", (written / "page.html").as_uri())
    assert out.read_bytes().startswith(b"%PDF") and out.stat().st_size > 20_000

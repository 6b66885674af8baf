"""report.html: its structure by parsing, its behaviour in headless Chromium."""

import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from test_report import FACTS, run

from tab.bench.measure import Row
from tab.bench.results import save
from tab.report import markdown
from tab.report.charts import NOTE as BELOW
from tab.report.charts import Group, charts, looks
from tab.report.html import answers, html
from tab.report.tables import ranking
from tab.results import Grid

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NOTE = "drawn <script>document.title = 'broken'</script>"


def page(tmp_path, **more) -> str:
    kinds = {"none": 0.50, "self": 0.55, "local": 0.45, "linear": 0.60}
    runs = [
        run(kind, accuracy + s / 50 + ("i" in kind) * s / 100, 10 + len(kind), seed=s)
        for kind, accuracy in kinds.items()
        for s in (0, 1)
    ]
    facts = FACTS | {"dataset": FACTS["dataset"] | {"note": NOTE}}
    text = markdown.report(runs, facts, Grid("fair", ["cnn"], [*kinds], 2, "shapes", "cpu"), {})
    noise = {r.id: ([0.0, 0.5, 1.0], [r.accuracy, 0.3, 0.2]) for r in runs}
    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((4, 4, 3)))
    pictures = {tmp_path / "a.png": 'a "quoted" <caption>'}
    ranked = {"cnn": ranking(runs, "cnn")}
    groups = [Group("Charts", BELOW, charts(runs, runs, "test", noise))]
    return html(text, ranked, looks(kinds), groups, pictures, more.get("bench"))


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_structure(tmp_path):
    rows = [Row("a", "tab", seconds={"both": [1.0]}, floor={"both": 1.0})]
    save(tmp_path / "bench/x.json", rows, None, "cpu", "tab bench <x>")
    text = page(tmp_path, bench=tmp_path / "bench")
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert found.open == [] and tags.count("table") == 3  # ranking, statistics, kernels
    assert tags.count("script") == 3 and NOTE not in text  # data and our own two
    assert sum("data-chart" in attrs for _, attrs in found.tags) == 5
    sources = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert sources and all(source.startswith("data:") for source in sources)
    assert {"alt": 'a "quoted" <caption>'}.items() <= next(
        a for t, a in found.tags if t == "img"
    ).items()
    with pytest.raises(ValueError, match="no result of `tab bench`"):
        page(tmp_path, bench=tmp_path)


def test_answers():
    one = ranking([run("none", 0.5), run("self", 0.55)], "cnn")
    assert (
        "Self-Attention did best, 5.0 points above no attention. That is one"
        in answers({"cnn": one})[0]
    )
    assert "no answer" in answers({"cnn": ranking([run("self")], "cnn")})[0]
    runs = [run(a, b + d, seed=s) for s, b in enumerate((0.4, 0.5, 0.45))
            for a, d in (("none", 0), ("self", -0.1 + s / 1000))]  # fmt: skip
    said = answers({"cnn": ranking(runs, "cnn")})[0]
    assert re.search(r"9\.9 points below no attention \(95 % interval -10\.1 to -9\.7", said)
    assert said.endswith("so attention hurt.")


CLICKS = """<script>
const said = [], errors = [];
addEventListener("error", e => errors.push(e.message));
addEventListener("load", () => {
  const table = document.querySelector("table"), rows = () => [...table.tBodies[0].rows];
  const names = () => rows().map(r => r.cells[1].textContent).join();
  const head = [...table.tHead.rows[0].cells].find(h => h.textContent === "Test acc.");
  head.click(); said.push(names()); head.click(); said.push(names());
  const filter = document.querySelector("input.filter");
  filter.value = "self"; filter.dispatchEvent(new Event("input"));
  said.push(rows().filter(r => !r.hidden).length);
  const plots = [...document.querySelectorAll("figure[data-chart] > svg")];
  said.push(plots.length);
  for (const plot of plots.slice(0, 2)) {
    const b = plot.getBoundingClientRect();
    plot.dispatchEvent(new PointerEvent("pointermove",
      {clientX: b.left + b.width / 2, clientY: b.top + b.height / 2}));
    const tip = document.querySelector(".tip");
    said.push(tip.hidden, tip.children.length);
  }
  const paths = () => document.querySelectorAll("figure[data-chart='1'] > svg path").length;
  said.push(paths()); document.querySelector(".show button").click(); said.push(paths());
  const fetched = performance.getEntriesByType("resource");
  said.push(fetched.filter(r => !r.name.startsWith("data:")).length);
  document.title = [...said, ...errors].join("|");
});
</script></head>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_in_a_browser(tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(tmp_path).replace("</head>", CLICKS, 1), encoding="utf-8")
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --dump-dom"
    command = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    title = re.search("<title>(.*?)</title>", dom).group(1).split("|")
    up = "Local,Control,Self-Attention,Linear"
    assert title[:4] == [up, ",".join(reversed(up.split(","))), "1", "5"], title
    assert title[4] == title[6] == "false" and int(title[5]) >= 4 and title[7] == "5"
    assert title[8:] == ["4", "3", "0"]  # a curve hidden, nothing fetched, no error

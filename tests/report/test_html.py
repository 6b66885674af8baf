"""report.html: its structure by parsing, its behaviour in headless Chromium."""

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from small_report import FACTS, run

from tab.analysis.corruptions import OWN
from tab.bench.results import environment, save
from tab.bench.rows import Row
from tab.compare.plan import Grid
from tab.layers import attention_names
from tab.report import markdown
from tab.report.chart_data import NOTE as BELOW
from tab.report.chart_data import Group, charts, looks
from tab.report.html import LIMIT, answers, html_page
from tab.report.sweep import sweep_charts, sweep_section
from tab.report.tables import ranking
from tab.sweep.trials import RungTrial

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
NAMES = attention_names()
NOTE = "drawn <script>document.title = 'broken'</script>"


def measured(run) -> dict:
    """A robustness.json."""
    return {
        "noise": {"settings": {"sigma": [0.0, 0.5, 1.0]}, "accuracy": [run.accuracy, 0.3, 0.2]},
        "attacks": {"pgd": 0.0, "suspicions": []},
        **{f"own/{kind}": {"accuracy": [0.5, 0.4, 0.3, 0.2, 0.1]} for kind in OWN},
    }


def page(tmp_path, **more) -> str:
    kinds = {"none": 0.50, "self": 0.55, "local": 0.45, "linear": 0.60}
    runs = [
        run(kind, accuracy + s / 50 + ("i" in kind) * s / 100, 10 + len(kind), seed=s)
        for kind, accuracy in kinds.items()
        for s in (0, 1)
    ]
    facts = FACTS | {"dataset": FACTS["dataset"] | {"note": NOTE}}
    text = markdown.report(runs, facts, Grid("fair", ["cnn"], [*kinds], 2, "shapes", "cpu"), {})
    matplotlib.image.imsave(tmp_path / "a.png", np.zeros((4, 4, 3)))
    pictures = {tmp_path / "a.png": 'a "quoted" <caption>'}
    ranked = {"cnn": ranking(runs, "cnn")}
    groups = [Group("Charts", BELOW, charts(runs, runs, "test", {r.id: measured(r) for r in runs}))]
    return html_page(text, ranked, looks(kinds), groups, pictures, more.get("bench"))


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
    save(tmp_path / "bench/x.json", rows, None, environment("cpu"), "tab bench <x>")
    text = page(tmp_path, bench=tmp_path / "bench")
    found = Page(text)
    tags = [tag for tag, _ in found.tags]
    assert found.open == [] and tags.count("table") == 3  # ranking, statistics, kernels
    assert tags.count("script") == 3 and NOTE not in text  # data and our own two
    assert sum("data-chart" in attrs for _, attrs in found.tags) == 6
    sources = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert sources and all(source.startswith("data:") for source in sources)
    assert {"alt": 'a "quoted" <caption>'}.items() <= next(
        a for t, a in found.tags if t == "img"
    ).items()
    with pytest.raises(ValueError, match="no result of `tab bench`"):
        page(tmp_path, bench=tmp_path)


def test_axes_of_the_tradeoff():
    runs = [run("none"), run("self", 0.6), run("local", 0.4)]
    found = {r.id: measured(r) for r in runs}

    def axes() -> dict[str, str]:
        chart = charts(runs, runs, "test", found)[0]
        return {q["key"]: q["label"] for q in chart["quantities"]}

    assert list(axes()) == ["accuracy", "time", "parameters", "flops", "noise", "pgd", "own"]
    assert "not CIFAR-10-C" in axes()["own"] and axes()["pgd"] == "accuracy under PGD-20 (%)"
    values = charts(runs, runs, "test", found)[0]["points"][1]["values"]
    assert values["noise"] == pytest.approx(25) and values["own"] == pytest.approx(30)
    assert values["pgd"] == 0.0
    found["cnn-self-s0"]["attacks"]["suspicions"] = ["FGSM does more than PGD"]
    assert "perhaps masked" in axes()["pgd"]
    del found["cnn-local-s0"]["own/blur"]
    assert "own" not in axes()  # not known of all


def test_a_large_comparison_stays_small(tmp_path):
    """120 runs: 12 mechanisms × 2 models × 5 seeds, of 250 epochs, with a sweep and pictures."""
    noise = np.random.default_rng(0)
    runs = []
    for model, attention, seed in itertools.product(("mlp", "cnn"), NAMES, range(5)):
        runs.append(run(attention, noise.uniform(0.4, 0.6), 10, seed, model))
    runs += [
        run("none", noise.uniform(0.4, 0.6), 10, s, m) for s in range(5) for m in ("mlp", "cnn")
    ]
    for r in runs:
        x = noise.random((250, 3))
        r.rows[:] = [
            {"epoch": e + 1, "train_loss": a, "test_accuracy": b, "cumulative_training_time": e + c}
            for e, (a, b, c) in enumerate(x)
        ]
    params = {"lr": 0.001, "hidden": 256, "num_heads": 8}
    trials = {
        (m, a): [RungTrial(n, 0, 3, "done", noise.random(), params) for n in range(20)]
        for m in ("mlp", "cnn")
        for a in NAMES
    }
    files = {}
    for i in range(4):  # as pictures of filters are: noise in blocks of a few pixels
        files[tmp_path / f"{i}.png"] = f"picture {i}"
        image = noise.random((300, 400, 3)).repeat(3, 0).repeat(3, 1)
        matplotlib.image.imsave(tmp_path / f"{i}.png", image)
    found = {r.id: measured(r) for r in runs}
    grid = Grid("fair", ["mlp", "cnn"], NAMES, 5, "shapes", "cpu")
    ranked = {model: ranking(runs, model) for model in grid.models}
    text = markdown.report(runs, FACTS, grid, {}, [sweep_section(trials, "")])
    groups = [Group("Charts", BELOW, charts(runs, runs, "test", found)), sweep_charts(trials)]

    def made(**limit) -> str:
        return html_page(text, ranked, looks(grid.attentions), groups, files, None, **limit)

    whole = made()
    assert len(whole.encode()) < LIMIT and whole.count("<img") == 4
    less = made(limit=len(whole.encode()) - 1000)
    assert less.count("<img") == 3 and "so that this page stays below" in less
    assert re.search(r"left out here.*lies in <code>.*\d\.png</code>", less)
    assert "This page is larger than" in made(limit=1000)


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
  const [y] = document.querySelectorAll("figure[data-chart='0'] select");
  y.value = "pgd"; y.dispatchEvent(new Event("change"));
  said.push(document.querySelector("figure[data-chart='0'] svg").textContent.includes("PGD-20"));
  const paths = () => document.querySelectorAll("figure[data-chart='1'] > svg path").length;
  said.push(paths()); document.querySelector(".show button").click(); said.push(paths());
  said.push(document.documentElement.scrollWidth <= innerWidth);
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
    options += " --window-size=500,900"  # as narrow as it goes
    command = [CHROMIUM, *options.split(), f"--user-data-dir={tmp_path / 'profile'}", path.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    title = re.search("<title>(.*?)</title>", dom).group(1).split("|")
    up = "Local,Control,Self-Attention,Linear"
    assert title[:4] == [up, ",".join(reversed(up.split(","))), "1", "6"], title
    assert title[4] == title[6] == "false" and int(title[5]) >= 4 and title[7] == "5"
    assert title[8] == "true"  # another axis
    # a curve hidden, the page no wider than the window, nothing fetched, no error
    assert title[9:] == ["4", "3", "true", "0"]

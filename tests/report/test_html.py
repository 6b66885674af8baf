"""report.html by parsing: its structure, and that it stays small."""

import itertools
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
from small_report import FACTS, NOTE, measured, page, run

from tab.bench.results import environment, save
from tab.bench.rows import Row
from tab.compare.plan import Grid
from tab.drawing.page import CHARTS
from tab.layers import attention_names
from tab.report import markdown
from tab.report.chart_data import NOTE as BELOW
from tab.report.chart_data import Group, charts, looks, tradeoff_group
from tab.report.html import LIMIT, html_page
from tab.report.html_tables import Html
from tab.report.sweep import sweep_charts, sweep_section
from tab.sweep.trials import RungTrial

NAMES = attention_names()


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
    assert found.open == [] and tags.count("table") == 4  # ranking, costs, statistics, kernels
    assert tags.count("script") == 2 + len(CHARTS) and NOTE not in text
    assert sum("data-chart" in attrs for _, attrs in found.tags) == 7
    sources = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert sources and all(source.startswith(("data:", "#")) for source in sources)
    ids = [attrs["id"] for _, attrs in found.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) and {"cnn-self-attention", "cnn-local"} <= set(ids)
    links = {source for source in sources if source.startswith("#")}  # the contents
    assert {link[1:] for link in links} <= set(ids) and "#kernels" in links
    assert {"alt": 'a "quoted" <caption>'}.items() <= next(
        a for t, a in found.tags if t == "img"
    ).items()
    with pytest.raises(ValueError, match="no result of `tab bench`"):
        page(tmp_path, bench=tmp_path)


def test_a_command_is_not_broken_within_an_option():
    said = Html()("`tab compare --seeds 5 <x>` and `a-b`")
    assert '<code>tab compare <span class="option">--seeds</span> 5 &lt;x&gt;</code>' in said
    assert "<code>a-b</code>" in said


def test_axes_of_the_tradeoff():
    runs = [run("none"), run("self", 0.6), run("local", 0.4)]
    found = {r.id: measured(r) for r in runs}

    def axes() -> dict[str, str]:
        chart = tradeoff_group(runs, found).charts[0]
        return {q["key"]: q["label"] for q in chart["quantities"]}

    assert list(axes()) == ["accuracy", "time", "parameters", "flops", "noise", "pgd", "own"]
    assert "not CIFAR-10-C" in axes()["own"] and axes()["pgd"] == "accuracy under PGD-20 (%)"
    values = tradeoff_group(runs, found).charts[0]["points"][1]["values"]
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
            {
                "epoch": e + 1,
                "train_loss": a,
                "test_accuracy": b,
                "seconds": 1.0,
                "cumulative_training_time": e + c,
            }
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
    text = markdown.report(runs, FACTS, grid, {}, [sweep_section(trials, "")])
    groups = [Group("Charts", BELOW, charts(runs, runs, "test", found)), sweep_charts(trials)]

    def made(**limit) -> str:
        return html_page(text, looks(grid.attentions), groups, files, None, **limit)

    whole = made()
    assert len(whole.encode()) < LIMIT and whole.count("<img") == 4
    less = made(limit=len(whole.encode()) - 1000)
    assert less.count("<img") == 3 and "so that this page stays below" in less
    assert re.search(r"left out here.*lies in <code>.*\d\.png</code>", less)
    assert "This page is larger than" in made(limit=1000)

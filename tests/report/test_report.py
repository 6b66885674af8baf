"""The report's numbers, words and pictures, from hand-written runs; noise on a real model."""

import contextlib
import io
import itertools
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from small_report import FACTS, run
from torch import nn

from tab.analysis.robustness import NOISE, noise_curve
from tab.cli.progress import Bars
from tab.compare.plan import Grid
from tab.data.batches import Batches
from tab.data.load import Split
from tab.data.statistics import statistics
from tab.layers import attention_names
from tab.recipe.recipe import load_recipe
from tab.report import markdown, pictures, style, weights
from tab.report.averages import Mean, Median, count
from tab.report.build import _from_numbers
from tab.report.chart_data import charts
from tab.report.forest import forest_group, forest_picture
from tab.report.headline import answers
from tab.report.tables import best_control_table, markdown_table, ranking, statistics_table

# --- numbers --------------------------------------------------------------------------------------


def test_mean_and_interval():
    mean = Mean.of([0.5, 0.6, 0.7])
    assert mean.value == pytest.approx(0.6)
    assert mean.half == pytest.approx(4.30265 * 0.1 / math.sqrt(3), rel=1e-3)
    assert Mean.of([0.5]) == Mean(0.5, None) and Mean.of([]) is None
    assert Mean(-0.0312, 0.004).show("+z.1f", 100, " %") == "-3.1 ± 0.4 %"
    assert Mean(-0.0001, 0.004).show("+z.1f", 100) == "+0.0 ± 0.4"  # nothing is -0.0


def test_one_disturbed_run_does_not_move_a_time():
    time = Median.of([20.0, 19.0, 51.0])
    assert time.show(".0f", unit=" s") == "20 s (19–51)" and time.spread == (1.0, 31.0)
    assert Median.of([3.0]) == Median(3.0) and Median.of([]) is None
    assert Median(3.0).show(".2f") == "3.00" and Median(3.0).spread == (0.0, 0.0)


def test_ranking_orders_and_pairs_seeds():
    runs = [
        *(run("none", 0.50 + 0.1 * s, 10.0 + s, s) for s in (0, 1)),
        *(run("self", 0.53 + 0.1 * s, 20.0 + 2 * s, s) for s in (0, 1)),
        run("local", 0.9, model="mlp"),
    ]
    best, control = ranking(runs, "cnn")
    assert (best.attention, best.rank, control.attention) == ("self", 1, "none")
    # Seeds differ by 10 points, the paired differences not at all.
    assert best.test.half > 0.5
    assert best.points.value == pytest.approx(0.03)
    assert best.points.half is None  # which says nothing of how others would differ
    assert best.ratio.value == best.ratio.low == best.ratio.high == pytest.approx(2)
    assert best.seconds == Median(21.0, 20.0, 22.0)
    assert control.points is None and control.ratio is None


def test_runs_that_failed_are_last_and_those_that_diverged_are_chance():
    runs = [run("none", 0.4), run("self", 0.6), run("self", 0.9, seed=1, status="diverged")]
    runs += [run("local", status="failed")]
    table = ranking(runs, "cnn")
    assert [entry.attention for entry in table] == ["none", "self", "local"]
    assert table[1].test.value == pytest.approx((0.6 + 0.1) / 2)
    assert table[1].notes == "diverged, counted as chance (seed 1)"
    text = markdown_table(table)
    assert "| – | Local | – |" in text and text.endswith("| failed (seed 0) |")
    assert "| Note |" in text and "Peak memory" not in text  # of a CPU, it is the process's


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("lost", [{"local"}, {"none"}, {"none", "self"}])
def test_a_mechanism_whose_runs_all_diverged_is_drawn(lost, seeds, tmp_path):
    """It has the accuracy of chance, and no training time."""
    runs = [
        run(a, seed=s, status="diverged" if a in lost else "done")
        for a in ("none", "self", "local")
        for s in range(seeds)
    ]
    for each in runs:
        if each.diverged:
            each.rows[-1]["train_loss"] = math.nan
    grid = Grid("fair", ["cnn"], ["none", "self", "local"], seeds, "shapes", "cpu")
    table = ranking(runs, "cnn")
    assert {e.attention for e in table if e.seconds is None and e.test} == lost
    shown = _from_numbers(tmp_path, runs, grid)
    assert forest_picture(tmp_path / "forest.png", "cnn", table)
    assert {path.name for path in tmp_path.glob("*.png")} >= {f"{name}.png" for name in shown}
    found = [forest_group({"cnn": table}), charts(runs, runs, "test", {})]
    assert json.dumps(found, allow_nan=False)  # as report.html has them
    assert markdown.report(runs, FACTS, grid, shown)


def test_equal_scores_share_a_rank():
    runs = [run("none", 0.5), run("self", 0.5), run("local", 0.4)]
    assert [entry.rank for entry in ranking(runs, "cnn")] == [1, 1, 3]


def test_count():
    shown = [count(n) for n in (None, 7, 1500, 2_345_678, 3e9)]
    assert shown == ["–", "7", "1.5 k", "2.35 M", "3 G"]


# --- words ----------------------------------------------------------------------------------------


def test_summary_of_one_seed_is_honest():
    text = markdown.summary("cnn", ranking([run("none", 0.5), run("self", 0.55, 25.0)], "cnn"))
    assert "Self-Attention scored best, 55.0 %, +5.0 points against the control's 50.0 %" in text
    assert "2.50× the control's time" in text and "One seed: no interval" in text


def test_summary_when_the_control_wins_or_is_missing():
    runs = [run("none", 0.7), run("self", 0.6), run("local", 0.5)]
    text = markdown.summary("cnn", ranking(runs, "cnn"))
    assert "no attention beat the control" in text and "-10.0 points" in text
    assert "nothing says whether" in markdown.summary("cnn", ranking(runs[1:], "cnn"))
    assert "no run has finished" in markdown.summary("mlp", ranking(runs, "mlp"))


def test_summary_of_seeds_gives_verdicts():
    noise = (0.0, 0.01, 0.02)
    runs = [run("none", 0.5 + e, seed=s) for s, e in enumerate(noise)]
    runs += [run("self", 0.6 + 1.1 * e, seed=s) for s, e in enumerate(noise)]
    runs += [run("local", 0.5 + e, seed=s) for s, e in enumerate(reversed(noise))]
    text = markdown.summary("cnn", ranking(runs, "cnn"))
    assert "correction over 2): better: Self-Attention; undecided: Local." in text


def test_summary_names_the_best_row_that_is_no_attention():
    noise = (0.0, 0.004, 0.001, 0.003)
    truths = {"none": 0.5, "ffn": 0.56, "self": 0.53, "local": 0.6, "none_again": 0.5}
    runs = [
        run(attention, truth + e + 0.001 * len(attention) * e**0.5, seed=s)
        for attention, truth in truths.items()
        for s, e in enumerate(noise)
    ]
    table = ranking(runs, "cnn")
    text = markdown.summary("cnn", table)
    assert "correction over 3): better: Local, Token-wise FFN, Self-Attention." in text
    assert "The control against itself, with other seeds: equivalent within ±0.5" in text
    assert "are no attention: better: Local; worse: Self-Attention." in text
    assert len(statistics_table(table).splitlines()) == 2 + len(truths)
    header, _, *lines = best_control_table(table).splitlines()
    assert header.startswith("| Attention | Best control | Above it (points) ↑ |")
    placed = [line.split("|")[1].strip() for line in lines]
    assert placed == ["Local", "Self-Attention"]
    (answer,) = answers({"cnn": table})
    assert answer.startswith(
        "**CNN:** **2 of 2** attention mechanisms are better than no attention"
    )
    assert (
        "**1 of 2** is better than the best row that is no attention, Token-wise FFN: Lo" in answer
    )


def test_one_seed_beside_a_control_of_many_is_one_seed():
    runs = [run("none", 0.5 + 0.01 * s, seed=s) for s in range(3)] + [run("self", 0.55)]
    text = markdown.summary("cnn", ranking(runs, "cnn"))
    assert "One seed: no interval" in text and "undecided" not in text


def test_sizes_are_said():
    control, other = run("none"), run("self", 0.6)
    other.summary["parameters"] = 5_090_000
    assert markdown.sizes(ranking([control, other], "cnn")) == (
        "Size: parameters within 2 % of the control's for every mechanism; "
        "FLOPs within 2 % of the control's for every mechanism."
    )
    other.summary["flops"] = 9_100
    text = markdown.sizes(ranking([control, other], "cnn"))
    assert "FLOPs differ from the control's by more than 2 %: 1.30× (Self-Attention)." in text
    assert markdown.sizes(ranking([other], "cnn")) == ""


def test_report_says_data_failures_and_pictures():
    runs = [run("none"), run("self", status="failed"), run("local", status="diverged")]
    grid = Grid("fair", ["cnn"], ["none", "self", "local"], 1, "shapes", "cpu")
    text = markdown.report(runs, FACTS, grid, {"loss": "Training loss"})
    assert "drawn, not CIFAR-10" in text and "Z80, 1 thread a run" in text
    assert "![Training loss](pictures/loss.png)" in text
    assert "`cnn-self-s0` failed: Oops: boom" in text
    assert "**Diverged** (the loss was not finite): `cnn-local-s0` in epoch 3." in text
    assert "| Local | 10.0 |" in text  # a row of chance


# --- pictures -------------------------------------------------------------------------------------


def test_twelve_mechanisms_look_different():
    names = [*attention_names(), "theirs", "others"]
    looks = {(line["color"], line["linestyle"]) for line in (style.look(n, names) for n in names)}
    assert len(looks) == len(names) >= 14


@pytest.mark.parametrize("at", [0.0, 0.5, 0.99])
def test_labels_do_not_overlap_and_keep_the_order(at, tmp_path):
    lines = [style.look(name, []) for name in attention_names()[1:]]
    with style.figure(tmp_path / "labels.png", 1) as (_, (ax,)):
        ax.set_ylim(0, 1)
        ends = [(1.0, at + 1e-4 * i, f"line {i}", line) for i, line in enumerate(lines)]
        style.label_ends(ax, ends)
        boxes = [text.get_window_extent() for text in ax.texts]
        assert [text.get_text() for text in ax.texts] == [f"line {i}" for i in range(len(lines))]
        assert all(a.y1 <= b.y0 + 0.5 for a, b in itertools.pairwise(boxes))
        frame = ax.get_window_extent()
        assert boxes[0].y0 > frame.y0 - 10 and boxes[-1].y1 < frame.y1 + 10


def test_every_picture_is_drawn(tmp_path):
    names = ("none", "self", "local", "theirs")
    runs = [run(a, 0.4 + 0.02 * i, 9 + i, s, m) for s in (0, 1) for i, a in enumerate(names)
            for m in ("mlp", "cnn")]  # fmt: skip
    pictures.per_epoch(tmp_path / "loss.png", runs, "train_loss", "training loss", "loss")
    pictures.against_time(tmp_path / "time.png", runs, "test_accuracy", "time", "accuracy")
    pictures.bars(tmp_path / "bars.png", ranking(runs, "cnn"), "CNN")
    sigma = {"sigma": [0.0, 0.5, 1.0]}
    curve = {r.id: {"settings": sigma, "accuracy": [0.5, 0.4, 0.2]} for r in runs}
    pictures.noise(tmp_path / "noise.png", runs, curve, "noise")
    maps = {"self": torch.rand(4, 9, 9), "none": torch.eye(9)[None], "theirs": "none, as it fails"}
    image = torch.randint(256, (32, 32, 3), dtype=torch.uint8)
    weights.attention_picture(tmp_path / "attention.png", maps, image, "attention")
    filters = {"self": torch.randn(30, 3, 3, 3), "none": torch.randn(5, 3, 32, 32)}
    weights.filters_picture(tmp_path / "filters.png", filters, "filters")
    names = {"loss", "time", "bars", "noise", "attention", "filters"}
    assert {path.stem for path in tmp_path.iterdir()} == names  # and nothing half-written
    for path in tmp_path.iterdir():
        image = matplotlib.image.imread(path)
        assert image.shape[1] > 300 and image[..., :3].std() > 0.02, path


def test_mosaic_shows_the_strongest_first():
    filters = torch.zeros(3, 3, 8, 8)
    filters[0] += 0.1
    filters[2] -= 5.0
    picture = weights.mosaic(filters, across=2)  # 2 × 2 tiles of 8 with gaps of 1
    assert picture.shape == (17, 17, 3)
    assert np.allclose(picture[:8, :8], 0.0)  # filter 2, at its own minimum
    assert np.allclose(picture[:8, 9:], 1.0)  # filter 0, at its own maximum
    assert np.allclose(picture[9:, :8], 0.5)  # filter 1, all zero
    assert np.allclose(picture[9:, 9:], 1.0)  # no filter


@pytest.mark.parametrize(
    ("gives", "words"),
    [
        (NotImplementedError(), "no attention matrix"),
        (IndexError("of its own"), "IndexError: of its own"),
        (torch.ones(3), "ValueError: its shape is (3,)"),
        (torch.ones(1, 4, 3, 3), "ValueError: its shape is (1, 4, 3, 3)"),
    ],
)
def test_a_layer_without_a_matrix_says_why(gives, words):
    class Without(nn.Module):
        attention = property(lambda self: self)

        def tokens(self, x):
            return x

        def attention_matrix(self, x):
            if isinstance(gives, Exception):
                raise gives
            return gives

    fault = not isinstance(gives, NotImplementedError)
    with pytest.warns(match="of Without is not drawn") if fault else contextlib.nullcontext():
        found = weights.attention_weights(Without(), torch.zeros(1, 2, 2))
    assert found.startswith(words)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_curve_counts_all_images_and_adds_sigma(generator):
    """A model that answers by the sign of one pixel: P(right) = Φ(|x|/σ) is known."""

    class Sign(nn.Module):
        def forward(self, x):
            pixel = x[:, 0, 0, 0]
            return torch.stack([-pixel, pixel], 1)

    labels = torch.arange(4000) % 2
    images = (labels * 255).to(torch.uint8)[:, None, None, None].expand(-1, 32, 32, 3).contiguous()
    mean, std = statistics(images)  # normalised pixels are -1 and 1
    test = Batches(Split(images, labels), batch_size=300, mean=mean, std=std)
    curve = noise_curve(Sign(), test)
    assert curve[0] == 1.0
    for sigma, accuracy in zip(NOISE[1:], curve[1:], strict=True):
        right = 0.5 * (1 + math.erf(1 / sigma / math.sqrt(2)))
        assert accuracy == pytest.approx(
            right, abs=4 * math.sqrt(right * (1 - right) / 4000) + 1e-3
        )
    assert noise_curve(Sign(), test) == curve
    assert noise_curve(Sign(), test, seed=1) != curve


# --- bars -----------------------------------------------------------------------------------------


def test_bars_on_a_terminal():
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=140)
    config = load_recipe("quick").run_config("cnn", "none", 0)
    with Bars(console) as bars:
        bars.start(2, 3)
        bars.begin(config)
        bars.epoch(config, {**run().rows[0], "epoch": 2})
        bars.progress.refresh()
        assert bars.progress.tasks[0].completed == 2 and bars.progress.tasks[0].total == 6
        bars.end(run())
        assert bars.progress.tasks[0].completed == 3
    assert "cnn-none-s0" in text.getvalue() and "test 16.7%" in text.getvalue()


def test_curves_against_time_are_at_its_median():
    runs = [run("none", 0.5, seed=s) for s in range(3)]
    times = {0: [1.0, 2.0], 1: [1.2, 2.2], 2: [29.0, 30.0]}
    x, y = pictures.averaged(runs, lambda run: (times[run.seed], [0.1 * run.seed, 0.5]))
    assert x.tolist() == [1.2, 2.2] and y.shape == (3, 2)

"""Robustness in the report: what was measured on the same stands in one table, and nothing else."""

import json
from pathlib import Path

import numpy as np
import pytest

from tab.analysis.corruptions import OWN
from tab.analysis.robustness_file import FILE, read
from tab.compare.runs import Run
from tab.report import attacks
from tab.report.attacks import attack_picture
from tab.report.comparable import keep_comparable
from tab.report.robustness import (
    corrupted,
    corruption_error,
    relative_corruption_error,
    robustness_section,
    severity_picture,
)


def figures(pgd, images=100, data="d", model="m", files="f"):
    on = {"data": data, "images": images, "model": model}
    attack = {"fgsm": 0.2, "pgd": pgd, "random": 0.6, "images": images, "suspicions": []}
    fog = {"settings": {"files": files, "model": model}, "accuracy": [0.5] * 5}
    return {"attacks": {"settings": on, **attack}, "cifar10c/fog": fog}


def test_figures_of_other_data_images_files_or_weights_are_not_mixed():
    found = {f"cnn-none-s{s}": figures(0.1) for s in range(3)}
    weights = dict.fromkeys([*found, "a", "b", "c", "d"], "m")
    found |= {"a": figures(0.9, images=10), "b": figures(0.9, data="other")}
    found |= {"c": figures(0.1, files="other"), "d": figures(0.9, model="old")}
    kept, lines = keep_comparable(found, weights)
    assert {run for run, sections in kept.items() if "attacks" in sections} == {*found} - set("abd")
    assert {run for run, sections in kept.items() if "cifar10c/fog" in sections} == {*found} - set(
        "cd"
    )
    assert lines == [
        "- attacks, measured with images 10 where others have 100: `a`",
        "- attacks, measured on another data set: `b`",
        "- attacks, measured with weights that are no longer the run's: `d`",
        "- cifar10c, measured on other files: `c`",
        "- cifar10c, measured with weights that are no longer the run's: `d`",
    ]
    runs = [Run("cnn", "none", s, Path(f"cnn-none-s{s}"), "done") for s in range(3)]
    runs += [Run("cnn", "self", 0, Path("a"), "done")]
    text = robustness_section(runs, kept, lines)
    assert "| Control | 20.0 ± 0.0 | 10.0 ± 0.0 |" in text and "90.0" not in text
    assert "Left out" in text and "100 test images" in text and " or " not in text
    before = {"x": {"noise": {"settings": {"seed": 0}}}, "y": {"noise": {"settings": {"seed": 0,
              "data": "d", "images": 9, "model": "m"}}}}  # fmt: skip
    assert keep_comparable(before, {"x": "m", "y": "m"}) == (before, [])


def test_the_report_shows_what_is_there(tmp_path):
    def run_of(attention, accuracy, suspicions=()) -> Run:
        path = tmp_path / f"cnn-{attention}-s0"
        path.mkdir()
        attack = {"fgsm": 0.2, "pgd": 0.1, "random": 0.6, "images": 100}
        found = {f"own/{kind}": {"accuracy": [accuracy] * 5} for kind in OWN}
        found |= {"attacks": {**attack, "suspicions": list(suspicions)}}
        (path / FILE).write_text(json.dumps(found | {"calibration": {"ece": 0.05}}))
        return Run("cnn", attention, 0, path, "done")

    def read_all(*runs):
        return runs, {run.id: read(run.path) for run in runs}

    def section(*runs):
        return robustness_section(*read_all(*runs), [])

    control, variant = run_of("none", 0.5), run_of("self", 0.6, ["gradients vanish"])
    text = section(control, variant)
    assert "| Self-Attention | 5.0 | 20.0 | 10.0 | 60.0 | 60.0 | 80.0 |" in text
    assert "| Control | 5.0 | 20.0 | 10.0 | 60.0 | 50.0 | 100.0 |" in text
    assert "not CIFAR-10-C" in text and "CIFAR-10.1" not in text and "100 test images" in text
    assert "- gradients vanish: `cnn-self-s0`" in text and "no measure of robustness" in text
    assert "No sign of masked gradients" in section(control)
    assert "mean over 5 kinds" in severity_picture(tmp_path / "s.png", *read_all(control, variant))
    assert (tmp_path / "s.png").is_file()
    bare = Run("cnn", "none", 1, tmp_path / "gone", "done")
    assert section(bare) == "" == severity_picture(tmp_path / "t.png", *read_all(bare))


def test_mce_by_hand():
    kinds = ("a", "b")
    control = {"c/a": {"accuracy": [0.5] * 5}, "c/b": {"accuracy": [0.8] * 5}}
    found = {"c/a": {"accuracy": [0.75] * 5}, "c/b": {"accuracy": [0.6] * 5}}
    assert corruption_error(found, control, "c", kinds) == pytest.approx((0.5 + 2) / 2)
    assert corrupted(found, "c", kinds) == pytest.approx(0.675)
    assert corrupted({}, "c", kinds) is None is corruption_error({}, control, "c", kinds)


def test_relative_mce_by_hand():
    kinds = ("a", "b")
    control = {"c/a": {"accuracy": [0.5] * 5}, "c/b": {"accuracy": [0.8] * 5}}
    found = {"c/a": {"accuracy": [0.75] * 5}, "c/b": {"accuracy": [0.6] * 5}}
    assert relative_corruption_error(found, control, "c", kinds) is None  # no clean accuracy
    control["noise"], found["noise"] = {"accuracy": [0.9]}, {"accuracy": [0.8]}
    wanted = (0.05 / 0.4 + 0.2 / 0.1) / 2
    assert relative_corruption_error(found, control, "c", kinds) == pytest.approx(wanted)


def pgd(accuracy, seed=0, n=400):
    """Of one run: at each ε the first images are right, in an order of the seed's."""
    order = np.random.default_rng(seed).permutation(n)
    rows = [order < round(share * n) for share in accuracy]
    right = [np.packbits(row).tobytes().hex() for row in rows]
    return {"pgd": {"accuracy": [row.mean() for row in rows], "right": right, "images": n}}


def test_the_curve_over_epsilon_has_a_verdict_where_the_control_is_at_half(tmp_path):
    control, other = [0.8, 0.7, 0.6, 0.4, 0.2, 0.0], [0.8, 0.8, 0.8, 0.8, 0.7, 0.1]
    runs, found = [], {}
    for attention, accuracy in (("none", control), ("self", other), ("linear", control)):
        for seed in range(4):
            run = Run("cnn", attention, seed, tmp_path / f"cnn-{attention}-s{seed}", "done")
            runs.append(run)
            found[run.id] = pgd(accuracy, seed)
    text = robustness_section(runs, found, [])
    assert "ε 0.25/255" in text and "from the control at ε 2/255" in text
    lines = {line.split(" | ")[0]: line for line in text.splitlines()}
    assert "| 80.0 | 70.0 | 60.0 | 40.0 | 20.0 | 0.0 | – |" in lines["| Control"]
    assert "+40.0 \\[" in lines["| Self-Attention"] and "better |" in lines["| Self-Attention"]
    assert "better" not in lines["| Linear"]
    assert "PGD-20" in attack_picture(tmp_path / "pgd.png", runs, found)
    assert (tmp_path / "pgd.png").is_file() and not attack_picture(tmp_path / "no.png", runs, {})


def test_the_cut_cache_stands_beside_its_controls(tmp_path):
    cache = {"accuracy": [0.6] * 6, "recent": [0.5] * 6, "random": [0.4] * 6, "images": 50}
    runs = [Run("cnn", "multi_head", s, tmp_path / f"cnn-multi_head-s{s}", "done") for s in (0, 1)]
    text = robustness_section(runs, {run.id: {"cache": cache} for run in runs}, [])
    assert "| H2O: heavy hitters and latest | 60.0 ± 0.0 |" in text
    assert "| at random | 40.0 ± 0.0 |" in text and "50 test images" in text


def test_the_control_again_pairs_by_what_it_drew(tmp_path, monkeypatch):
    """Its seed 0 has other weights and batches than the control's seed 0."""
    seen = []

    real = attacks.differences
    monkeypatch.setattr(
        attacks, "differences", lambda rows, c: seen.extend(r.seeds for r in rows) or real(rows, c)
    )
    runs, found = [], {}
    for attention, shift in (("none", 0), ("none_again", 1000)):
        for seed in range(3):
            path = tmp_path / f"cnn-{attention}-s{seed}"
            runs.append(Run("cnn", attention, seed, path, "done", draws=seed + shift))
            found[runs[-1].id] = pgd([0.8, 0.7, 0.6, 0.4, 0.2, 0.0], seed + shift)
    robustness_section(runs, found, [])
    assert seen == [(1000, 1001, 1002)]

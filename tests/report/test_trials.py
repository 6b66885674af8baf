"""A sweep beside a comparison, from its trials.csv alone."""

import tomllib

import pytest
from paths import ROOT

from tab.cli.tables import sweep_table
from tab.report.sweep import sweep_charts, sweep_section, told
from tab.sweep.trials import RungTrial, read_trials, winner_of, write_trials

EXAMPLE = ROOT / "results" / "examples" / "sweep"


def test_trials_of_a_sweep(tmp_path):
    found = read_trials(EXAMPLE)
    assert len(found) == 24 and [m for m, _ in found] == ["mlp"] * 12 + ["cnn"] * 12
    won = winner_of(found["mlp", "none"])
    assert (won.configuration, won.rung, won.score) == (5, 2, 0.348)
    chosen = tomllib.loads((EXAMPLE / "winners.toml").read_text())
    for pair, trials in found.items():  # the same as the sweep wrote
        rate = chosen["attention"][pair[1]][pair[0]]["lr"]
        assert float(winner_of(trials).params["lr"]) == pytest.approx(rate, rel=5e-3)
    text = sweep_section(found, told(EXAMPLE))
    assert "JPEG copy of CIFAR-10" in text
    assert "| MLP | Control | 28.0 (of 6) | 30.8 (of 3) | 34.8 (of 1) | – | 34.8 | lr " in text
    chart = sweep_charts(found).charts[0]
    assert chart["title"] == "MLP Control: 34.8 %" and len(chart["series"]) == 6
    assert "winner" in chart["series"][-1]["look"]["name"]
    assert chart["series"][-1]["x"] == [1, 2, 4]
    with pytest.raises(ValueError, match=r"no trials\.csv: give the directory of a sweep"):
        read_trials(tmp_path)
    (tmp_path / "trials.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no record of a sweep"):
        read_trials(tmp_path)
    lost = [RungTrial(0, 0, 1, "failed", None, {}), RungTrial(1, 0, 1, "diverged", None, {})]
    assert winner_of(lost) is None
    assert "| – | 2 | – | – |" in sweep_section({("mlp", "self"): lost}, "")


def test_what_is_read_is_written_again_and_shown_in_the_terminal(tmp_path):
    found = read_trials(EXAMPLE)
    drawn = (EXAMPLE / "trials.csv").read_text().splitlines()[0].split(",")[9:]
    write_trials(tmp_path / "trials.csv", found, drawn)
    assert read_trials(tmp_path) == found
    table = sweep_table(found, (1, 2, 4), "a sweep", {})
    cells = {
        (m, a): list(column)
        for m, a, *column in zip(*(c.cells for c in table.columns), strict=True)
    }
    assert cells["MLP", "Control"] == ["28.0 → 30.8 → 34.8", "lr 0.00232, hidden 64"]


def test_what_was_drawn_comes_back_as_it_was(tmp_path):
    drawn = {"flag": True, "other": False, "whole": 4, "number": 0.5, "word": "relu"}
    found = {("mlp", "self"): [RungTrial(0, 0, 1, "done", 0.5, drawn)]}
    write_trials(tmp_path / "trials.csv", found, drawn)
    (trial,) = read_trials(tmp_path)["mlp", "self"]
    assert [(k, repr(v)) for k, v in trial.params.items()] == [
        (k, repr(v)) for k, v in drawn.items()
    ]

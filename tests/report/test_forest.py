"""The answer at a glance: the forest plot's rows, and the headline that the verdicts allow."""

import matplotlib.image
from small_report import run

from tab.analysis.same_function import Alike
from tab.compare.verdicts import BETTER, EQUIVALENT, ONE_SEED, UNDECIDED, WORSE, kind
from tab.report.forest import Row, extent, forest_group, forest_picture, rows
from tab.report.headline import answers
from tab.report.tables import ranking
from tab.statistics import MARGIN

NOISE = (0.0, 0.004, 0.001, 0.003)


def ranked(seeds=4, **truths):
    runs = [
        run(attention, truth + e + 0.002 * len(attention) * e**0.5, seed=s)
        for attention, truth in truths.items()
        for s, e in enumerate(NOISE[:seeds])
    ]
    return {"cnn": ranking(runs, "cnn")}


TRUTHS = {"none": 0.5, "linear": 0.6, "self": 0.5, "multi_head": 0.499, "ffn": 0.56, "local": 0.4}


def test_rows_are_the_verdicts_that_the_table_has_and_controls_stand_apart():
    entries = ranked(**TRUTHS)["cnn"]
    found = rows(entries)
    order = [row.key for row in found]
    assert order[0] == "linear" and order[-2:] == ["local", "ffn"] and "none" not in order
    assert [row.control for row in found] == [False] * 4 + [True]
    by_key = {entry.attention: entry for entry in entries}
    for row in found:
        verdict = by_key[row.key].verdict
        assert (row.verdict, row.low) == (verdict.verdict, 100 * verdict.difference_low)
        assert row.kind == kind(row.verdict) and row.time == by_key[row.key].ratio.value
    assert found[0].kind == "better" and found[3].kind == "worse"


def test_every_verdict_is_one_of_four_kinds():
    words = [BETTER, f"{BETTER}, by less than 0.5", WORSE, EQUIVALENT, UNDECIDED, ONE_SEED]
    kinds = ["better", "better", "worse", "equivalent", "undecided", ""]
    assert [kind(word) for word in words] == kinds


def test_times_that_other_work_decided_are_marked():
    runs = [run(a, seed=s, seconds=10.0 + 9 * s * (a == "self")) for a in ("none", "self", "local")
            for s in (0, 1)]  # fmt: skip
    marks = {row.key: row.disturbed for row in rows(ranking(runs, "cnn"))}
    assert marks == {"self": True, "local": False}


def row(low: float, high: float) -> Row:
    middle = (low + high) / 2
    return Row(
        "x", "X", False, 50.0, middle, low, high, "better", "better", 1.0, 1.0, 1.0, False, "x"
    )


def test_no_difference_is_minus_nothing():
    assert row(-0.02, 0.01).words == "+0.0 [+0.0, +0.0]"


def test_one_row_far_off_leaves_the_others_their_room():
    near = [row(x - 1, x + 1) for x in (-0.5, 0.0, 0.5, 1.0)]
    low, high = extent(near)
    assert low < -1.5 and high > 2 and high - low < 4.5
    low, high = extent([*near, row(-42, -38)])
    assert -12 < low < -1.5 and 2 < high < 3
    tiny = extent([row(-0.01, 0.01)])
    assert tiny[0] < -100 * MARGIN and tiny[1] > 100 * MARGIN  # the band is always seen


def test_the_picture_is_png_and_svg_whose_words_are_text(tmp_path):
    entries = ranked(**TRUTHS)["cnn"]
    caption = forest_picture(tmp_path / "a.png", "cnn", entries)
    assert caption.startswith("CNN: difference from no attention.") and "±0.5" in caption
    assert matplotlib.image.imread(tmp_path / "a.png")[..., :3].std() > 0.02
    text = (tmp_path / "a.svg").read_text()
    assert "<text" in text and "Self-Attention" in text and "Controls: no attention" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "a.svg"]


def test_without_the_control_there_is_no_plot(tmp_path):
    entries = ranked(self=0.5, local=0.6)
    assert forest_group(entries) is None
    assert forest_picture(tmp_path / "a.png", "cnn", entries["cnn"]) == ""
    assert answers(entries) == [
        "**CNN:** nothing here was compared with the control, so there is no answer."
    ]


def test_one_seed_has_rows_without_an_interval(tmp_path):
    entries = ranked(1, none=0.5, self=0.55)
    (only,) = rows(entries["cnn"])
    assert (only.low, only.high, only.kind, only.words) == (None, None, "", "+5.0")
    assert forest_picture(tmp_path / "a.png", "cnn", entries["cnn"])
    (said,) = answers(entries)
    assert "Self-Attention scored highest of 1 attention mechanism, +5.0 points" in said
    assert said.endswith("it settles nothing.")


def test_the_headline_counts_verdicts_and_nothing_else():
    entries = ranked(**TRUTHS)
    (said,) = answers(entries)
    kinds = [row.kind for row in rows(entries["cnn"]) if not row.control]
    assert said.startswith(
        f"**CNN:** **{kinds.count('better')} of 4** attention mechanisms is better"
    )
    assert "; 1 is worse: Local" in said and "no attention, Token-wise FFN: Linear (+" in said
    assert "**1 of 4** is better than the best row that is no attention" in said


def test_names_of_one_function_are_named_as_one():
    alike = [Alike("cnn", ("self", "multi_head"), 0.0), Alike("mlp", ("local", "linear"), 0.0)]
    (said,) = answers(ranked(**TRUTHS), alike)
    assert "Multi-Head = Self-Attention" in said or "Self-Attention = Multi-Head" in said
    assert "The 4 names are 3 functions here (Self-Attention = Multi-Head)" in said
    assert "Local = Linear" not in said


def test_a_run_that_diverged_widens_its_row_alone():
    runs = [
        run(a, 0.5 + x * (1 + i), seed=s)
        for s, x in enumerate(NOISE)
        for i, a in enumerate(("none", "self", "local"))
    ]
    runs[4] = run("self", seed=1, status="diverged")
    found = {row.key: row for row in rows(ranking(runs, "cnn"))}
    assert found["self"].low < -40 and found["self"].kind == "undecided"
    assert -2 < found["local"].low < found["local"].high < 2

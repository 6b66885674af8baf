"""Verdicts of constructed runs, read off the intervals, and the files that they come from."""

import dataclasses
import io
import itertools

import numpy as np
import pytest

from tab.compare.runs import Run, read_run
from tab.compare.verdicts import BETTER, EQUIVALENT, ONE_SEED, UNDECIDED, WORSE, verdicts, words
from tab.data.load import load_dataset
from tab.recipe.recipe import load_recipe
from tab.statistics import (
    MARGIN,
    t_interval,
)
from tab.train.loop import train
from tab.train.training_run import ANSWERS


def run_of(folder, attention, seed, right) -> Run:
    path = folder / f"cnn-{attention}-s{seed}"
    path.mkdir(parents=True, exist_ok=True)
    np.savez(path / ANSWERS, predicted=np.where(right, 1, 0).astype(np.uint8),
             label=np.ones(len(right), np.uint8))  # fmt: skip
    summary = {"final_test_accuracy": float(np.mean(right))}
    return Run("cnn", attention, seed, path, "done", summary=summary)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """2000 images, 5 seeds: better by 6 points; the same but for 2 images; by chance; one seed."""
    folder, generator = tmp_path_factory.mktemp("runs"), np.random.default_rng(3)
    made = []
    for seed in range(5):
        control = generator.random(2000) < 0.6 + 0.01 * seed
        wrong = np.flatnonzero(~control)
        more = generator.choice(wrong, 120 + 3 * seed, replace=False)
        better, near = control.copy(), control.copy()
        better[more] = True
        near[wrong[: seed % 2]] = True
        variants = {"none": control, "self": better, "local": near}
        variants["linear"] = generator.random(2000) < 0.6 + 0.01 * seed
        variants["sparse"] = control  # another name of the control
        if seed == 0:
            variants["flex"] = better
        made += [run_of(folder, name, seed, right) for name, right in variants.items()]
    return made


def test_verdicts_of_constructed_runs(runs):
    found = verdicts(runs, "cnn")
    assert {a: v.verdict for a, v in found.items()} == {
        **{"none": "", "self": BETTER, "local": UNDECIDED, "linear": UNDECIDED},
        **{"sparse": EQUIVALENT, "flex": ONE_SEED},
    }
    best = found["self"]
    assert best.interval_over == "seeds and images" and (best.seeds, best.pairs) == (5, 5)
    assert best.difference == pytest.approx(0.063, abs=1e-9)
    assert 0.04 < best.difference_low < 0.063 < best.difference_high < 0.085
    assert best.p < best.p_adjusted <= 5 * best.p and best.p_mcnemar < 1e-6
    assert found["sparse"].p == 1.0 == found["sparse"].p_mcnemar
    assert found["flex"].difference_low is None and found["flex"].p_mcnemar < 1e-6
    # Local differs on two images; beside a row that varies as linear does, five seeds do not tell.
    alike = verdicts([run for run in runs if run.attention in ("none", "local")], "cnn")
    assert alike["local"].verdict == EQUIVALENT


def test_runs_that_did_not_keep_their_answers_rest_on_seeds(runs):
    old = [dataclasses.replace(run, path=run.path.parent / "gone" / run.id) for run in runs]
    some = [run for run in old if run.attention in ("none", "self", "sparse")]
    found = verdicts([run for run in some if run.attention != "sparse"], "cnn")
    assert found["self"].verdict == BETTER and found["self"].p_mcnemar is None
    assert found["self"].interval_over == "seeds"
    by_seed = {(r.attention, r.seed): r.accuracy for r in runs}
    gains = [by_seed["self", s] - by_seed["none", s] for s in range(5)]
    ends = (found["self"].difference_low, found["self"].difference_high)
    assert ends == pytest.approx(t_interval(gains), rel=1e-9)
    # Equal accuracies are not equal answers, and of how many images is not known.
    alone = verdicts([run for run in some if run.attention != "self"], "cnn")["sparse"]
    assert alone.verdict == UNDECIDED and alone.difference_low is None
    # With others that did, it is known of which.
    mixed = verdicts([r for r in runs if r.attention != "self"] + old, "cnn")
    assert mixed["local"].interval_over == "seeds"


def test_without_a_control_there_is_no_verdict(runs):
    found = verdicts([r for r in runs if r.attention == "self"], "cnn")["self"]
    assert found.verdict == "" and found.difference is None and found.accuracy_low < 0.69
    assert verdicts([], "cnn") == {} == verdicts(runs, "mlp")


def test_words_are_read_off_the_interval():
    assert words((0.001, 0.02), 5) == BETTER and words((-0.02, -0.001), 5) == WORSE
    assert words((0.001, 0.004), 5) == "better, by less than 0.5"
    assert words((-0.004, 0.0049), 5) == EQUIVALENT
    assert words((-0.004, MARGIN), 5) == words((-0.004, 0.02), 5) == UNDECIDED
    assert words(None, 5) == UNDECIDED and words(None, 1) == ONE_SEED


def normal_runs(folder, generator, table: dict[str, tuple[float, int]], images=1000) -> list[Run]:
    """attention -> (its true accuracy, seeds)."""
    made = []
    for attention, (truth, seeds) in table.items():
        for seed in range(seeds):
            right = generator.random(images) < truth + 0.002 * generator.standard_normal()
            made.append(run_of(folder, attention, seed, right))
    return made


@pytest.mark.parametrize("seeds", [2, 3, 8])
def test_p_interval_and_verdict_never_contradict(seeds, tmp_path):
    generator, said = np.random.default_rng(seeds), set()
    for study in range(12):
        gap = 0.01 * study
        table = {"none": (0.5, 2 * seeds), "self": (0.5 + gap, seeds), "local": (0.5 - gap, seeds)}
        table |= {"linear": (0.5, seeds), "none_again": (0.5, seeds), "ffn": (0.5 + gap / 2, seeds)}
        runs = normal_runs(tmp_path / str(study), generator, table)
        for v in verdicts(runs, "cnn").values():
            if v.attention == "none":
                continue
            said.add(v.verdict)
            assert (v.verdict.split(",")[0] == BETTER) == (v.difference_low > 0)
            assert (v.verdict.split(",")[0] == WORSE) == (v.difference_high < 0)
            assert (v.p_adjusted <= 0.05) == (v.difference_low > 0 or v.difference_high < 0)
            inside = v.difference_low > -MARGIN and v.difference_high < MARGIN
            assert (v.p_equivalent <= 0.05) == inside
            if v.best_control:
                assert (v.best_control_verdict == BETTER) == (v.best_control_low > 0)
                assert v.best_control_low <= v.best_control_difference <= v.best_control_high
    assert UNDECIDED in said and (seeds == 2 or {BETTER, WORSE} <= said)


def test_an_attention_has_to_beat_each_control(tmp_path):
    """Better than none, no better than a layer that is no attention; the other above both."""
    table = {"none": (0.50, 8), "ffn": (0.60, 8), "self": (0.60, 8), "local": (0.75, 8)}
    runs = normal_runs(tmp_path, np.random.default_rng(0), table)
    found = verdicts(runs, "cnn")
    assert [found[a].verdict for a in ("ffn", "self", "local")] == [BETTER] * 3
    assert [found[a].best_control for a in table] == ["", "", "ffn", "ffn"]
    assert found["self"].best_control_verdict == UNDECIDED
    assert found["local"].best_control_verdict == BETTER
    assert found["local"].best_control_difference == pytest.approx(0.15, abs=0.03)
    # With one control there is no best one: the verdict against it says it already.
    few = verdicts([run for run in runs if run.attention != "ffn"], "cnn")
    assert few["self"].best_control == "" and few["self"].verdict == BETTER


def test_the_control_against_itself_stands_alone(tmp_path):
    """It shares no seed with the control, though its runs are numbered alike, and it makes no
    other interval wider, nor is it one of the controls to beat."""
    table = {"none": (0.5, 8), "ffn": (0.5, 5), "self": (0.5, 5), "none_again": (0.5, 5)}
    runs = normal_runs(tmp_path, np.random.default_rng(1), table)
    runs = [
        dataclasses.replace(run, draws=run.seed + 1000 * (run.attention == "none_again"))
        for run in runs
    ]
    found = verdicts(runs, "cnn")
    again = found.pop("none_again")
    assert (again.pairs, again.best_control, found["self"].pairs) == (0, "", 5)
    assert again.p == again.p_adjusted and found["self"].p < found["self"].p_adjusted
    assert verdicts([run for run in runs if run.attention != "none_again"], "cnn") == found


def test_a_run_that_diverged_counts_as_chance(runs):
    def lost(run: Run) -> Run:
        if (run.attention, run.seed) != ("local", 2):
            return run
        return dataclasses.replace(run, status="diverged", summary={}, classes=4)

    with_it = verdicts([lost(run) for run in runs], "cnn")
    rest = [r.accuracy for r in runs if r.attention == "local" and r.seed != 2]
    local = with_it["local"]
    assert local.accuracy_mean == pytest.approx((sum(rest) + 0.25) / 5)
    assert (local.seeds, local.verdict, local.interval_over) == (5, UNDECIDED, "seeds and images")
    # Its spread is not that of the others, whose intervals are as they would be beside any row.
    without = verdicts([run for run in runs if run.attention != "local"], "cnn")
    both = [v["self"].difference_high - v["self"].difference_low for v in (with_it, without)]
    assert both[0] == pytest.approx(both[1], rel=0.1)
    # All that a comparison without a test set can say of a run that diverged is that it did.
    unscored = [dataclasses.replace(lost(run), summary={}) for run in runs]
    assert verdicts(unscored, "cnn") == {}


def test_a_run_knows_its_draws_and_its_chance(tmp_path, one_thread):
    tiny = {"train.epochs": 1, "train.batch_size": 20, "data.images": 40, "data.validation": 20}
    for attention, draws in (("none", 3), ("none_again", 1003)):
        config = load_recipe("quick", tiny).run_config("mlp", attention, 3)
        train(config, load_dataset("shapes:100/20"), tmp_path / "runs" / config.id)
        run = read_run(tmp_path, "mlp", attention, 3)
        assert (run.draws, run.classes, run.counts) == (draws, 10, True)
    assert dataclasses.replace(run, status="diverged").accuracy == 0.1


@pytest.mark.parametrize("damage", [b"", b"PK\3\4 and then", "pickled"])
def test_damaged_answers_are_named(damage, tmp_path):
    run = run_of(tmp_path, "none", 0, np.ones(4, bool))
    if damage == "pickled":
        file = io.BytesIO()
        np.savez(file, predicted=np.array([{}], dtype=object), label=np.zeros(1))
        damage = file.getvalue()
    (run.path / ANSWERS).write_bytes(damage)
    with pytest.raises(ValueError, match=r"test.npz is damaged.*remove it"):
        run.right()


def test_equal_answers_to_twenty_images_are_no_equivalence(tmp_path):
    """Two seeds, or three: the control under another name, which nothing tells apart."""
    right = np.arange(20) % 3 > 0
    for seeds in (2, 3):
        pairs = itertools.product(("none", "self"), range(seeds))
        few = [run_of(tmp_path, a, s, right) for a, s in pairs]
        assert verdicts(few, "cnn")["self"].verdict == UNDECIDED
    right = np.arange(10_000) % 3 > 0
    pairs = itertools.product(("none", "self"), range(3))
    many = [run_of(tmp_path, a, s, right) for a, s in pairs]
    assert verdicts(many, "cnn")["self"].verdict == EQUIVALENT

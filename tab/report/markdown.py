"""report.md: what was compared, a summary in words made from the numbers, tables and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..analysis.same_function import Alike
from ..compare.disturbance import RULE
from ..compare.plan import Grid
from ..compare.runs import Run
from ..recipe.names import is_control_again
from ..statistics import LEVEL, MARGIN
from .headline import answers
from .origin import machine, origin
from .tables import (
    Standing,
    best_control_table,
    costs_table,
    markdown_table,
    name,
    ranking,
    statistics_table,
)
from .text import PERCENT, code, counted, plain
from .tuning import tuned_or_not
from .unfinished import unfinished

FIRST = ("forest", "costs")  # pictures that stand below the answer
MATCHED = 0.02  # sizes this near to the control's count as the same
MATCH = f"{100 * MATCHED:g} %"


def data_title(name: str) -> str:
    """'the pictures in cars' of 'folder:cars', what --data DIR is called in files."""
    return f"the pictures in {path}" if (path := name.removeprefix("folder:")) != name else name


def report(
    runs: list[Run],
    facts: dict,
    grid: Grid,
    shown: dict[str, str],
    sections: Sequence[str] = (),
    alike: Sequence[Alike] = (),
) -> str:
    """shown: name of a picture in pictures/ -> its caption. sections: more, after the tables.
    alike: the names of one function, which the answer names as one."""
    ranked = {model: ranking(runs, model) for model in grid.models}
    epochs = max((max(run.epochs, len(run.rows)) for run in runs), default=0)
    seeds = counted(grid.seeds, "seed")
    several = any(e.verdict and e.verdict.seeds > 1 for mine in ranked.values() for e in mine)
    parts = [
        f"# Attention compared on {plain(data_title(facts['dataset']['name']))}",
        "\n>\n".join(f"> {answer}" for answer in answers(ranked, alike)),
        *(picture(file, shown[file]) for file in shown if file.startswith(FIRST)),
        f"Recipe {code(grid.recipe)}, {epochs} epochs, {seeds}. "
        f"{machine(facts, runs)}, torch {facts['torch']}, "
        f"Python {facts['python']}, TAB {facts['tab']}"
        + (f" ({facts['commit'][:10]})." if facts["commit"] else "."),
        tuned_or_not(grid),
        *origin(facts, runs),
        *unfinished(runs),
    ]
    for model, entries in ranked.items():
        parts += [f"## {model.upper()}", summary(model, entries), markdown_table(entries)]
        parts += [disturbance(entries)]
        if costs := costs_table(entries):
            parts += ["What each of them took:", costs]
        parts += [sizes(entries)]
    parts += [explanation(grid.seeds, grid.batch_seeds, several)]
    if several:
        parts += ["## Statistics"]
        parts += [
            part
            for model, entries in ranked.items()
            if any(entry.verdict for entry in entries)
            for part in _statistics(model, entries)
        ]
        parts += [what_it_means(ranked)]
    parts += sections
    later = [file for file in shown if not file.startswith(FIRST)]
    parts += ["## Pictures" if later else "", *(picture(file, shown[file]) for file in later)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _statistics(model: str, entries: list[Standing]) -> list[str]:
    parts = [f"**{model.upper()}**, against the control:", statistics_table(entries)]
    if best := best_control_table(entries):
        parts += [f"**{model.upper()}**, against the best row that is no attention:", best]
    return parts


def picture(file: str, caption: str) -> str:
    """Its first sentence stands for it where it cannot be seen."""
    alone = plain(caption.split(". ")[0])
    return f"![{alone}](pictures/{file}.png)\n\n*{plain(caption)}*"


def disturbance(entries: list[Standing]) -> str:
    """What a star in the table means, if there is one."""
    slow = [name(e.attention) for e in entries if _disturbed(e)]
    return f"\\* {RULE} Here: {', '.join(slow)}." if slow else ""


def _disturbed(entry: Standing) -> bool:
    return any(time is not None and time.disturbed for time in (entry.seconds, entry.ratio))


def summary(model: str, entries: list[Standing]) -> str:
    """One paragraph: the best, the control, and what the difference is worth."""
    ranked = [entry for entry in entries if entry.test]
    upper = model.upper()
    if not ranked:
        return f"**{upper}:** no run has finished with a test accuracy."
    best, control = ranked[0], next((e for e in ranked if e.attention == "none"), None)
    text = f"**{upper}:** {name(best.attention)} scored best, {best.test.show('.1f', 100, ' %')}"
    if len(ranked) == 1:
        text += "; nothing else finished."
    elif control is None:
        text += "; the control is not among the runs, so nothing says whether attention helped"
        text += f". The last is {last_of(ranked)}."
    elif control is best:
        second = ranked[1]
        text += f": no attention beat the control. The nearest is {name(second.attention)}"
        text += f", {points(second)}; the last is {last_of(ranked)}."
    else:
        text += f", {points(best)} against the control's {control.test.show('.1f', 100, ' %')}"
        beaten = sum(e.test.value > control.test.value for e in ranked)
        text += f"; {beaten} of {len(ranked) - 1} mechanisms scored above it. "
        text += f"The last is {last_of(ranked)}."
    return f"{text}{_times(ranked)} {verdict(ranked)}"


def _times(ranked: list[Standing]) -> str:
    """From which time ratio to which, of those that say something of the mechanism."""
    timed = [entry for entry in ranked if entry.ratio]
    fair = [entry for entry in timed if not entry.ratio.disturbed]
    text = ""
    if fair:
        low, high = min(fair, key=ratio), max(fair, key=ratio)
        text += f" Training took {ratio(low):.2f}× the control's time ({name(low.attention)})"
        text += f" to {ratio(high):.2f}× ({name(high.attention)})" if high is not low else ""
        text += "."
    if len(fair) < len(timed):
        left = "; that leaves out " if fair else " No time ratio can be told: "
        lost = ", ".join(name(e.attention) for e in timed if e.ratio.disturbed)
        text = text.removesuffix(".") + left + f"{lost}, as other work decided the times."
    return text


def verdict(ranked: list[Standing]) -> str:
    """What may be concluded from that many seeds."""
    if all(entry.verdict.seeds == 1 for entry in ranked if entry.attention != "none"):
        return (
            "One seed: no interval. Another seed can reorder mechanisms that lie close, so small "
            "differences here mean nothing yet."
        )
    judged = [v for e in ranked if (v := e.verdict) and v.difference_low is not None]
    again = [(v.attention, v.verdict) for v in judged if is_control_again(v.attention)]
    others = [(v.attention, v.verdict) for v in judged if not is_control_again(v.attention)]
    best = [(v.attention, v.best_control_verdict) for v in judged if v.best_control_low is not None]
    said = {
        f"Against the control (Dunnett's correction over {len(others)})": others,
        "The control against itself, with other seeds": again,
        "Against the best of the rows that are no attention": best,
    }
    return " ".join(f"{heading}: {by_verdict(found)}" for heading, found in said.items() if found)


def by_verdict(found: Iterable[tuple[str, str]]) -> str:
    """better: Linear, Local; undecided: Sparse."""
    said: dict[str, list[str]] = {}
    for attention, words in found:
        said.setdefault(words, []).append(name(attention))
    return "; ".join(f"{words}: {', '.join(names)}" for words, names in said.items()) + "."


def points(entry: Standing) -> str:
    return f"{entry.points.show('+.1f', 100)} points"


def last_of(ranked: list[Standing]) -> str:
    return f"{name(ranked[-1].attention)} with {ranked[-1].test.show('.1f', 100, ' %')}"


def ratio(entry: Standing) -> float:
    return entry.ratio.value


def explanation(seeds: int, at_once: int = 1, several: bool = True) -> str:
    """several: any row has two seeds."""
    text = (
        "Ranked by the final test accuracy; an arrow shows which way is better. Train accuracy is "
        "the mean over the last epoch as the weights moved. Time ratio: training time over the "
        "control's."
    )
    if seeds > 1 and several:
        text += (
            " ± is half the width of a 95 % interval; those of vs control hold together. Times are "
            "medians of seeds (least–largest), as other work lengthens single runs. Ratios pair "
            "the seeds."
        )
    if min(at_once, seeds) > 1:
        text += (
            f" Times are shares: up to {at_once} seeds of a mechanism were trained at once as one "
            "stacked model, and each counts for an even part of its seconds, not for what it would "
            "take alone. Peak memory is that of all."
        )
    return text


def sizes(entries: list[Standing]) -> str:
    """Which of parameters and FLOPs are the same as the control's, and who is off."""
    control = next((e for e in entries if e.attention == "none"), None)
    if control is None:
        return ""
    said = []
    for what, key in (("parameters", "parameters"), ("FLOPs", "flops")):
        base = control.value(key)
        ratios = {e.attention: e.value(key) / base for e in entries if e.value(key) and base}
        if len(ratios) < 2:
            continue
        off: dict[str, list[str]] = {}
        for attention, x in sorted(ratios.items(), key=lambda item: item[1]):
            if abs(x - 1) > MATCHED:
                off.setdefault(f"{x:.2f}×", []).append(name(attention))
        if not off:
            said.append(f"{what} within {MATCH} of the control's for every mechanism")
        else:
            listed = ", ".join(f"{x} ({', '.join(who)})" for x, who in off.items())
            said.append(f"{what} differ from the control's by more than {MATCH}: {listed}")
    return f"Size: {'; '.join(said)}." if said else ""


def what_it_means(ranked: dict[str, list[Standing]]) -> str:
    """The statistics in words."""
    found = [entry.verdict for entries in ranked.values() for entry in entries if entry.verdict]
    over = {v.interval_over for v in found if v.interval_over}
    kinds = {
        "seeds and images": "of seeds and of test images",
        "seeds": "of seeds alone, as the answers image by image were not kept",
    }
    by = ", or ".join(text for name, text in kinds.items() if name in over) or "not known"
    margin, alpha = f"±{100 * MARGIN:g} points", f"{1 - LEVEL:g}"
    text = (
        "Points of test accuracy. Seeds pair: with one seed all variants see the same images in "
        "the same order, and start from the same weights where no width was matched. Test and "
        f"interval rest on one variance, which is {by}; each part of it has its own t. The "
        "intervals of the differences hold together, for all mechanisms of a model at once, with "
        f"probability {PERCENT} (Dunnett); the verdict is read off them: better, the interval "
        f"lies above 0; worse, below; equivalent, within {margin}; undecided, none of these: more "
        f"seeds or images may show it. p: of no difference; p (Dunnett) ≤ {alpha} is better or "
        "worse. Equivalence: p (Dunnett) of a difference of more than the margin. McNemar: exact "
        "mid-p over images, of these trained models alone; no verdict rests on it."
    )
    if any(v.best_control for v in found):
        text += (
            " Best control: the row that is no attention which this one is least above; the "
            "interval is of the difference from the truly best of them, and holds likewise. Better "
            "than the best means better than each of them."
        )
    return text

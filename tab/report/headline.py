"""The answer in words that the statistics allow: how many are better than no attention."""

from __future__ import annotations

from collections.abc import Sequence

from ..analysis.same_function import Alike
from ..compare.verdicts import kind
from ..recipe.names import is_attention
from .tables import Standing, name
from .text import PERCENT, counted

WORDS = {  # of a kind of verdict: of one, of several
    "better": ("is better than no attention", "are better than no attention"),
    "worse": ("is worse", "are worse"),
    "equivalent": ("is equivalent to it", "are equivalent to it"),
    "undecided": ("is undecided", "are undecided"),
}


def answers(ranked: dict[str, list[Standing]], alike: Sequence[Alike] = ()) -> list[str]:
    """Markdown, a paragraph for each model. alike: names of one function (Identity.twins)."""
    return [
        f"**{model.upper()}:** {_answer(entries, [g for g in alike if g.model == model])}"
        for model, entries in ranked.items()
    ]


def _answer(entries: list[Standing], alike: list[Alike]) -> str:
    judged = [
        e
        for e in entries
        if is_attention(e.attention) and e.verdict and e.verdict.difference is not None
    ]
    if not judged:
        return "nothing here was compared with the control, so there is no answer."
    judged.sort(key=lambda e: -e.verdict.difference)
    if all(not kind(e.verdict.verdict) for e in judged):
        mechanisms = counted(len(judged), "attention mechanism")
        return (
            f"{name(judged[0].attention)} scored highest of {mechanisms}, {_points(judged[0])} "
            "from no attention. That is one seed, without an interval: it settles nothing."
        )
    text = _counts(judged, alike)
    over = [e for e in judged if e.verdict.best_control_low is not None]
    if over:
        controls = {e.verdict.best_control for e in over}
        named = f", {name(*controls)}" if len(controls) == 1 else ""
        verdicts = [e.verdict.best_control_verdict for e in over]
        n = sum(kind(v) == "better" for v in verdicts)
        is_ = "is" if n == 1 else "are"
        text += (
            f" **{n} of {len(over)}** {is_} better than the best row that is no attention{named}"
        )
        won = [e for e, v in zip(over, verdicts, strict=True) if kind(v) == "better"]
        text += f": {_names(won, alike, _above)}." if won else "."
    return text + _one_function(judged, alike)


def _counts(judged: list[Standing], alike: list[Alike]) -> str:
    """**1 of 11** attention mechanisms is better than no attention: Linear (+1.9, +1.3 to +2.5);
    2 are worse: …"""
    groups: dict[str, list[Standing]] = {one: [] for one in WORDS}
    for entry in judged:
        groups.setdefault(kind(entry.verdict.verdict), []).append(entry)
    first = groups.pop("better")
    text = f"**{len(first)} of {len(judged)}** attention mechanisms "
    text += WORDS["better"][len(first) != 1]
    text += f": {_names(first, alike, _points)}" if first else ""
    for verdict, found in groups.items():
        if found:
            said = WORDS[verdict][len(found) != 1] if verdict else "had one seed, and no verdict"
            text += f"; {len(found)} {said}: {_names(found, alike)}"
    if first:
        text += f" (points of test accuracy, with intervals of {PERCENT} that hold together)"
    return f"{text}."


def _names(entries: list[Standing], alike: list[Alike], of=None) -> str:
    """Those of one function stand as one: "Self-Attention = Multi-Head"."""
    said: dict[object, list[str]] = {}
    for entry in entries:
        group = next(
            (g.attentions for g in alike if entry.attention in g.attentions), entry.attention
        )
        more = f" ({of(entry)})" if of else ""
        said.setdefault(group, []).append(name(entry.attention) + more)
    return ", ".join(" = ".join(names) for names in said.values())


def _one_function(judged: list[Standing], alike: list[Alike]) -> str:
    mine = {e.attention for e in judged}
    groups = [[a for a in g.attentions if a in mine] for g in alike]
    groups = [g for g in groups if len(g) > 1]
    if not groups:
        return ""
    functions = len(mine) - sum(len(g) - 1 for g in groups)
    listed = "; ".join(" = ".join(map(name, g)) for g in groups)
    return (
        f" The {len(mine)} names are {counted(functions, 'function')} here ({listed}): what parts "
        "names of one function is chance."
    )


def _points(entry: Standing) -> str:
    found = entry.verdict
    return _signed(found.difference, found.difference_low, found.difference_high)


def _above(entry: Standing) -> str:
    found = entry.verdict
    return _signed(found.best_control_difference, found.best_control_low, found.best_control_high)


def _signed(value: float, low: float | None, high: float | None) -> str:
    ends = "" if low is None else f", {100 * low:+z.1f} to {100 * high:+z.1f}"
    return f"{100 * value:+z.1f} points{ends}" if low is None else f"{100 * value:+z.1f}{ends}"

"""Which figures of robustness.json may stand side by side: those measured on the same."""

from __future__ import annotations

from ..analysis.robustness_file import differing
from .text import code

Found = dict[str, dict]  # robustness.json of one run
WORDS = {
    "data": "on another data set",
    "files": "on other files",
    "model": "with weights that are no longer the run's",
}


def keep_comparable(
    found: dict[str, Found], weights: dict[str, str | None]
) -> tuple[dict[str, Found], list[str]]:
    """(run id -> its sections, a line for what was left out).

    Of each section those are kept that were measured as most runs were, of equals as the first; and
    on the weights that the run has, by weights[run id].
    """
    kept = {run: dict(sections) for run, sections in found.items()}
    left: dict[tuple[str, str], list[str]] = {}  # (section, why) -> runs
    for name in dict.fromkeys(name for sections in found.values() for name in sections):
        made = {run: f[name].get("settings", {}) for run, f in found.items() if name in f}
        usual = _usual([_but_model(settings) for settings in made.values()])
        for run, settings in made.items():
            why = [_why(key, settings, usual) for key in differing(_but_model(settings), usual)]
            why += [WORDS["model"]] * bool(differing(settings, settings | {"model": weights[run]}))
            if why:
                del kept[run][name]
                left.setdefault((name.split("/")[0], " and ".join(why)), []).append(run)
    lines = [
        f"- {section}, measured {why}: {', '.join(map(code, dict.fromkeys(runs)))}"
        for (section, why), runs in left.items()
    ]
    return kept, lines


def _but_model(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if key != "model"}


def _usual(made: list[dict]) -> dict:
    """What most agree with; of equals the first."""
    return max(made, key=lambda s: sum(not differing(s, other) for other in made), default={})


def _why(key: str, settings: dict, usual: dict) -> str:
    if key in WORDS:
        return WORDS[key]
    return f"with {key} {settings.get(key, 'unstated')} where others have {usual.get(key, 'none')}"

"""A sweep's record: one Optuna study for each (model, attention), in a journal file or PostgreSQL.

One trial is one configuration at one rung: enqueued (WAITING) with what it is, asked (RUNNING) with
a lease when its training begins, told when it has ended:

    COMPLETE   scored at the last rung, so that best_trial is of full budget
    PRUNED     scored at a lower rung; it went on as another trial, or not
    FAIL       status "diverged" or "failed": the end of that configuration;
               status "lost": its driver stopped, an equal trial is enqueued instead

Optuna's own pruners only stop trials; here nothing is stopped, the best are enqueued again.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from .space import Axis, Range, size
from .storage import optuna
from .trials import RungTrial

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial, TrialState

SAMPLERS = ("random", "tpe")
TRIES = 1000  # draws in a row that give nothing new before a space counts as exhausted


@dataclass(frozen=True)
class Entry:
    """One configuration at one rung of a bracket: what is to be trained, or was."""

    configuration: int
    bracket: int
    step: int  # of its bracket: each ends before the next begins
    rung: int
    epochs: int  # in all
    parent: str  # the checkpoint it goes on from; "" at first
    params: dict[str, object]


@dataclass(frozen=True)
class Ended:
    """How an entry ended."""

    entry: Entry
    status: str  # done | diverged | failed
    score: float | None  # validation accuracy at the rung's last epoch
    curve: dict[int, float]  # epoch -> validation accuracy, of the epochs of this rung
    seconds: float
    error: str = ""


class PairRecord:
    """The study of one (model, attention)."""

    def __init__(self, study: optuna.Study, axes: dict[str, Axis]):
        self.study, self.axes = study, axes
        self.distributions = {name: _distribution(axis) for name, axis in axes.items()}
        self._asked: dict[tuple[int, int], Trial] = {}

    @classmethod
    def open(
        cls, storage: optuna.storages.BaseStorage, name: str, axes: dict[str, Axis], *, mine: bool
    ) -> PairRecord:
        """The study `name`. Only a driver may start it."""
        if mine:
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize",
                sampler=optuna.samplers.RandomSampler(0),  # never asked: all is enqueued whole
                load_if_exists=True,
            )
        else:
            try:
                study = optuna.load_study(study_name=name, storage=storage)
            except KeyError:
                raise ValueError(f"the storage holds no study {name!r}: nothing ran yet") from None
        return cls(study, axes)

    def recover(self) -> None:
        """Ends the trials that a driver left RUNNING. The caller holds the lock."""
        for trial in self._trials(optuna.trial.TrialState.RUNNING):
            self._fail(trial, "lost")

    def anew(self) -> None:
        """What ended until now counts no more: other code trained it. The caller holds the lock."""
        while self._trials(optuna.trial.TrialState.WAITING):
            self._fail(self.study.ask(fixed_distributions=self.distributions), "lost")
        self.study.set_user_attr("since", len(self.study.get_trials(deepcopy=False)))

    def enqueue(self, entry: Entry) -> None:
        """Unless it waits already. (Optuna's skip_if_exists looks at params alone: it would drop
        every promotion.)"""
        waiting = {_key(trial) for trial in self._trials(optuna.trial.TrialState.WAITING)}
        if (entry.configuration, entry.rung) not in waiting:
            self.study.enqueue_trial(dict(entry.params), user_attrs=asdict(entry))

    def begin(self, entry: Entry) -> None:
        """RUNNING, with a lease. Optuna hands out what waits in order: should a later one begin
        first, those before it are taken too."""
        key = (entry.configuration, entry.rung)
        while key not in self._asked:
            trial = self.study.ask(fixed_distributions=self.distributions)
            trial.set_user_attr("lease", lease())
            if (found := _key(trial)) == (None, None):
                raise RuntimeError(
                    f"the study {self.study.study_name} has no waiting trial for {key}: was it "
                    "changed by another program?"
                )
            self._asked[found] = trial

    def tell(self, ended: Ended, *, last: bool) -> None:
        """last: of the top rung."""
        self.begin(ended.entry)
        trial = self._asked.pop((ended.entry.configuration, ended.entry.rung))
        for epoch, value in ended.curve.items():
            trial.report(value, step=epoch)
        trial.set_user_attr("seconds", ended.seconds)
        if ended.status != "done":
            self._fail(trial, ended.status, ended.error)
        elif last:
            self.study.tell(trial, ended.score)
        else:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)

    def ended(self) -> dict[tuple[int, int], Ended]:
        """(configuration, rung) -> its end."""
        state = optuna.trial.TrialState
        over = self._trials(state.COMPLETE, state.PRUNED, state.FAIL)
        trials = [t for t in over if t.user_attrs.get("status") != "lost"]
        return {_key(trial): _ended(trial) for trial in trials if _key(trial) != (None, None)}

    def trials(self) -> list[RungTrial]:
        """What has ended, by configuration and rung, for trials.csv and pictures."""
        return [
            RungTrial(
                configuration=number,
                rung=rung,
                epochs=end.entry.epochs,
                status=end.status,
                score=end.score,
                params=end.entry.params,
                bracket=end.entry.bracket,
                seconds=end.seconds,
                curve=end.curve,
            )
            for (number, rung), end in sorted(self.ended().items())
        ]

    def draw(
        self, count: int, possible: Callable[[dict], bool], *, sampler: str, seed: int, step: Step
    ) -> list[dict]:
        """Up to `count` new configurations: each possible, none that an earlier step drew.

        A function of the seed and of what ended in earlier steps, so that a resumed sweep draws the
        same. Drawing happens in a study in memory: what was refused leaves no trace in the record.
        """
        # In an order that no kill changes: lost trials have equals with higher numbers.
        ours = [t for t in self._trials() if _key(t) != (None, None)]
        before = sorted((t for t in ours if _step(t) < step), key=lambda t: (_step(t), _key(t)))
        scratch = optuna.create_study(direction="maximize", sampler=_sampler(sampler, seed))
        if sampler == "tpe":
            state = optuna.trial.TrialState
            kept = (state.COMPLETE, state.PRUNED)
            scratch.add_trials([t for t in before if t.state in kept])
        seen, drawn, tries = {_same(t.user_attrs["params"]) for t in before}, [], 0
        while len(drawn) < count and len(seen) < size(self.axes) and tries < TRIES:
            trial = scratch.ask(fixed_distributions=self.distributions)
            tries += 1
            if _same(trial.params) in seen:
                continue
            seen.add(_same(trial.params))
            if possible(trial.params):
                drawn.append(dict(trial.params))
                tries = 0
        return drawn

    def importance(self) -> dict[str, float]:
        """Parameter -> its share of the variance of the score at the first rung (fANOVA; Hutter et
        al. 2014); {} where fewer than ten configurations were scored there. Optuna's default,
        PED-ANOVA, looks at the best tenth: two trials of twenty."""
        scored = [e for e in self.ended().values() if e.score is not None and e.entry.rung == 0]
        varied = {k: v for k, v in self.distributions.items() if not v.single()}
        if len(scored) < 10 or not varied:
            return {}
        first = optuna.create_study(direction="maximize")
        for e in scored:
            first.add_trial(
                optuna.trial.create_trial(
                    params={k: e.entry.params[k] for k in varied},
                    distributions=varied,
                    value=e.score,
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(first, evaluator=evaluator)
        return {name: float(share) for name, share in shares.items()}

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those that count."""
        since = self.study.user_attrs.get("since", 0)
        every = self.study.get_trials(deepcopy=False, states=states or None)
        return [trial for trial in every if trial.number >= since]

    def _fail(self, trial: Trial | FrozenTrial, status: str, error: str = "") -> None:
        trial = optuna.Trial(self.study, trial._trial_id)
        trial.set_user_attr("status", status)
        if error:
            trial.set_user_attr("error", error)
        self.study.tell(trial, state=optuna.trial.TrialState.FAIL)


Step = tuple[int, int]  # (bracket, step)


def lease() -> str:
    """Who trains: should it die, this says what was lost."""
    return f"{socket.gethostname()}:{os.getpid()} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def seed_of(*parts: object) -> int:
    """A seed for one step of one pair, from the sweep's."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


# --- trials ---------------------------------------------------------------------------------------


def _key(trial: Trial | FrozenTrial) -> tuple[int | None, int | None]:
    """(configuration, rung); (None, None) of a trial that another program added."""
    return trial.user_attrs.get("configuration"), trial.user_attrs.get("rung")


def _step(trial: FrozenTrial) -> Step:
    return trial.user_attrs["bracket"], trial.user_attrs["step"]


def _same(params: dict) -> str:
    return repr(sorted(params.items()))


def _ended(trial: FrozenTrial) -> Ended:
    attrs = trial.user_attrs
    entry = Entry(**{field.name: attrs[field.name] for field in fields(Entry)})
    failed = trial.state == optuna.trial.TrialState.FAIL
    return Ended(
        entry,
        attrs.get("status", "failed") if failed else "done",
        None if failed else trial.value,
        dict(trial.intermediate_values),
        attrs.get("seconds", 0.0),
        attrs.get("error", ""),
    )


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    if name == "random":
        return optuna.samplers.RandomSampler(seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=5)


def _distribution(axis: Axis) -> optuna.distributions.BaseDistribution:
    kinds = optuna.distributions
    if not isinstance(axis, Range):
        return kinds.CategoricalDistribution(axis)
    whole = type(axis.low) is int and type(axis.high) is int
    kind = kinds.IntDistribution if whole else kinds.FloatDistribution
    return kind(axis.low, axis.high, log=axis.log)

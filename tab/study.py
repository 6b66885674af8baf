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

import contextlib
import hashlib
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from .space import Axis, Range, size

try:
    import optuna
except ImportError as error:
    raise ImportError(
        'a sweep needs Optuna: pip install "transformer-attention-bench[sweep]"'
    ) from error
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.samplers import RandomSampler, TPESampler
from optuna.trial import FrozenTrial, Trial, TrialState

optuna.logging.set_verbosity(optuna.logging.WARNING)
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

    def attrs(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "params"}


@dataclass(frozen=True)
class Ended:
    """How an entry ended."""

    entry: Entry
    status: str  # done | diverged | failed
    score: float | None  # validation accuracy at the rung's last epoch
    curve: dict[int, float]  # epoch -> validation accuracy, of the epochs of this rung
    seconds: float
    error: str = ""


class Record:
    """The study of one (model, attention)."""

    def __init__(self, study: optuna.Study, axes: dict[str, Axis]):
        self.study, self.axes = study, axes
        self.distributions = {name: _distribution(axis) for name, axis in axes.items()}
        self._asked: dict[tuple[int, int], Trial] = {}

    @classmethod
    def open(
        cls, storage: optuna.storages.BaseStorage, name: str, axes: dict[str, Axis], *, mine: bool
    ) -> Record:
        """The study `name`. Only a driver may start it."""
        if mine:
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                direction="maximize",
                sampler=RandomSampler(0),  # never asked: what is enqueued has all its values
                load_if_exists=True,
            )
        else:
            try:
                study = optuna.load_study(study_name=name, storage=storage)
            except KeyError:
                raise ValueError(f"the storage holds no study {name!r}: nothing ran yet") from None
        return cls(study, axes)

    def recover(self) -> int:
        """Ends the trials that a driver left RUNNING; -> how many. The caller holds the lock."""
        lost = self._trials(TrialState.RUNNING)
        for trial in lost:
            self._fail(trial, "lost")
        self._asked.clear()
        return len(lost)

    def enqueue(self, entry: Entry) -> None:
        """Unless it waits already. (Optuna's skip_if_exists looks at params alone: it would drop
        every promotion.)"""
        waiting = {_key(trial) for trial in self._trials(TrialState.WAITING)}
        if (entry.configuration, entry.rung) not in waiting:
            self.study.enqueue_trial(dict(entry.params), user_attrs=entry.attrs())

    def begin(self, entry: Entry) -> None:
        """RUNNING, with a lease. Optuna hands out what waits in order: should a later one begin
        first, those before it are taken too."""
        key = (entry.configuration, entry.rung)
        while key not in self._asked:
            trial = self.study.ask(fixed_distributions=self.distributions)
            trial.set_user_attr("lease", lease())
            found = (trial.user_attrs.get("configuration"), trial.user_attrs.get("rung"))
            if found == (None, None):
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
            self.study.tell(trial, state=TrialState.PRUNED)

    def lose(self, entry: Entry) -> None:
        """The entry's training was cut short by no fault of its own: it can be enqueued again."""
        self.begin(entry)
        self._fail(self._asked.pop((entry.configuration, entry.rung)), "lost")

    def ended(self) -> dict[tuple[int, int], Ended]:
        """(configuration, rung) -> its end."""
        states = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
        trials = [t for t in self._trials(*states) if t.user_attrs.get("status") != "lost"]
        return {_key(trial): _ended(trial) for trial in trials if "rung" in trial.user_attrs}

    def draw(
        self, count: int, possible: Callable[[dict], bool], *, sampler: str, seed: int, step: Step
    ) -> list[dict]:
        """Up to `count` new configurations: each possible, none that an earlier step drew.

        A function of the seed and of what ended in earlier steps, so that a resumed sweep draws the
        same. Drawing happens in a study in memory: what was refused leaves no trace in the record.
        """
        before = [t for t in self._trials() if (-1, -1) < _step(t) < step]
        scratch = optuna.create_study(direction="maximize", sampler=_sampler(sampler, seed))
        if sampler == "tpe":
            kept = (TrialState.COMPLETE, TrialState.PRUNED)
            scratch.add_trials([t for t in before if t.state in kept])
        seen, drawn, tries = {_same(t.params or _queued(t)) for t in before}, [], 0
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
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _fail(self, trial: Trial | FrozenTrial, status: str, error: str = "") -> None:
        trial = Trial(self.study, trial._trial_id)
        trial.set_user_attr("status", status)
        if error:
            trial.set_user_attr("error", error)
        self.study.tell(trial, state=TrialState.FAIL)


Step = tuple[int, int]  # (bracket, step)


def lease() -> str:
    """Who trains: should it die, this says what was lost."""
    return f"{socket.gethostname()}:{os.getpid()} since {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def seed_of(*parts: object) -> int:
    """A seed for one step of one pair, from the sweep's."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


# --- storage --------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(url: str, path: Path, name: str, *, mine: bool) -> Iterator[optuna.storages.BaseStorage]:
    """The storage of the sweep `name`: the database at `url`, or the journal file `path`."""
    if url:
        with postgresql(url, name, mine=mine) as storage:
            yield storage
    else:
        yield journal(path, mine=mine)


def journal(path: Path, *, mine: bool) -> optuna.storages.BaseStorage:
    """The journal file. mine: the caller is the only driver, so that what a killed one left (a lock
    of the file, half a line at its end) is cleared; Optuna would wait for the first and never read
    past the second."""
    if mine:
        path.with_name(path.name + ".lock").unlink(missing_ok=True)
        if path.exists() and not (data := path.read_bytes()).endswith(b"\n"):
            os.truncate(path, data.rfind(b"\n") + 1)
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.storages.JournalStorage(backend)


@contextlib.contextmanager
def postgresql(url: str, name: str, *, mine: bool) -> Iterator[optuna.storages.BaseStorage]:
    """The database at `url`. mine: held for the sweep `name` by an advisory lock, which the server
    drops with the connection."""
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url).set(drivername="postgresql+psycopg")
        storage = optuna.storages.RDBStorage(parsed.render_as_string(hide_password=False))
    except ImportError as error:
        raise ImportError('PostgreSQL needs psycopg: pip install "psycopg[binary]"') from error
    except sqlalchemy.exc.OperationalError as error:
        raise ValueError(f"no database at {without_password(url)}: {error.orig}") from None
    with storage.engine.connect() as connection:
        connection.detach()  # from the pool, which would keep it open, and the lock with it
        key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
        question = sqlalchemy.text("SELECT pg_try_advisory_lock(:key)")
        if mine and not connection.execute(question, {"key": key}).scalar():
            raise ValueError(
                f"the sweep {name!r} in {without_password(url)} has another driver; wait for it, "
                "or start a sweep in a directory of another name"
            )
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()


def without_password(url: str) -> str:
    import sqlalchemy

    try:
        parsed = sqlalchemy.make_url(url)
    except sqlalchemy.exc.ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() != "postgresql":
        raise ValueError(f"storage = {url!r}: give postgresql://USER@HOST/DATABASE")
    parts = (parsed.host, parsed.port, parsed.database, parsed.query)
    kept = sqlalchemy.URL.create("postgresql", parsed.username, None, *parts)
    return kept.render_as_string()


# --- trials ---------------------------------------------------------------------------------------


def _key(trial: FrozenTrial) -> tuple[int, int]:
    return trial.user_attrs.get("configuration"), trial.user_attrs.get("rung")


def _step(trial: FrozenTrial) -> Step:
    return trial.user_attrs.get("bracket", -1), trial.user_attrs.get("step", -1)


def _queued(trial: FrozenTrial) -> dict:
    """The params of a trial that was never asked: Optuna keeps them aside."""
    return trial.system_attrs.get("fixed_params", {})


def _same(params: dict) -> str:
    return repr(sorted(params.items()))


def _ended(trial: FrozenTrial) -> Ended:
    attrs = trial.user_attrs
    keys = ("configuration", "bracket", "step", "rung", "epochs", "parent")
    entry = Entry(**{key: attrs[key] for key in keys}, params=dict(trial.params))
    failed = trial.state == TrialState.FAIL
    return Ended(
        entry,
        attrs.get("status", "failed") if failed else "done",
        None if failed else trial.value,
        dict(trial.intermediate_values),
        attrs.get("seconds", 0.0),
        attrs.get("error", ""),
    )


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    return RandomSampler(seed) if name == "random" else TPESampler(seed=seed, n_startup_trials=5)


def _distribution(axis: Axis) -> BaseDistribution:
    if not isinstance(axis, Range):
        return CategoricalDistribution(axis)
    whole = type(axis.low) is int and type(axis.high) is int
    kind = IntDistribution if whole else FloatDistribution
    return kind(axis.low, axis.high, log=axis.log)

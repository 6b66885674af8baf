"""Tasks of tokens that separate mechanisms by construction: recall, copy, needle.

Generated, a function of the seed alone. A sequence has N places, and each place a key and a value,
either of which may be blank (key 0, value VALUES): x (N, 2). The last Q places ask: their values
are blank, and what is to be answered there is one of VALUES = 16 values. Answers are found nowhere
else than in the sequence, so that a layer which brings nothing from place to place stays at 1/16.
Nothing needs to be causal: the answers are no part of the input.

What is tested is the full task. In training, recall and needle have fewer pairs in most sequences,
from 1 on and even in the logarithm (as the training sets of Arora et al. 2023 mix lengths), blanks
in the places of the others, and recall then asks for a pair more than once: from the full task
alone, where a key is one of N/2, attention at N = 256 learned nothing in 600 steps.

    recall    N/2 pairs of different keys with random values, then the same keys in another order,
              without values: which value stood with this key? The state of a mechanism has to hold
              N/2 pairs (multi-query associative recall, Arora et al. 2023, "Zoology"; there key and
              value are two tokens, which takes one more layer to join them)
    copy      N/2 values without keys, then N/2 blanks: the value N/2 places before. What is looked
              at depends on the place alone, so that a static mix can do it
    needle    N − 1 pairs, then the key of one of them, which stands there once: Q = 1. The state
              need not hold all, if it can tell what will be asked; no mechanism can
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

VALUES = 16
BLANK = VALUES  # as a value; as a key, 0
TASKS = ("recall", "copy", "needle")
SIZES = (20000, 2000)  # sequences to train on and to test on, if none are given


@dataclass(frozen=True)
class SequenceSplit:
    """tokens int64 (M, N, 2): key and value of each place; labels int64 (M, Q): the values that the
    last Q places ask for."""

    tokens: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.tokens)


def named(spec: str) -> bool:
    """Whether `spec` is one of these tasks."""
    return spec.split(":")[0] in TASKS


def parse(spec: str) -> tuple[str, int, int, int]:
    """ "recall:256:4000/500" -> task, N, sequences to train on, to test on; N = 64 if not said."""
    found = re.fullmatch(r"(\w+)(?::(\d+))?(?::(\d+)/(\d+))?", spec)
    if not found or found[1] not in TASKS:
        raise ValueError(
            f"{spec!r}: give {', '.join(TASKS)}, TASK:TOKENS or TASK:TOKENS:TRAIN/TEST, such as "
            "recall:256:20000/2000"
        )
    n, train, test = (
        int(x) if x else y for x, y in zip(found.groups()[1:], (64, *SIZES), strict=True)
    )
    if n < 4 or n % 2 or min(train, test) < 1:
        raise ValueError(
            f"{spec!r}: the number of tokens is even and at least 4, and there is at least one "
            f"sequence to train on and one to test on; got {n}, {train}, {test}"
        )
    return found[1], n, train, test


def draw(task: str, n: int, count: int, *, stream: int) -> SequenceSplit:
    """stream: 0 for training, 1 for test."""
    rng = np.random.default_rng([TASKS.index(task), n, stream])
    x = np.empty((count, n, 2), np.int64)
    x[..., 0], x[..., 1] = 0, BLANK
    half = n // 2
    if task == "copy":
        x[:, :half, 1] = labels = rng.integers(VALUES, size=(count, half))
        return SequenceSplit(torch.from_numpy(x), torch.from_numpy(labels))
    pairs = half if task == "recall" else n - 1
    asked = n - pairs
    # How many pairs a sequence has: in training from 1 on, even in the logarithm.
    most = np.full((count, 1), pairs)
    held = most if stream else np.exp(rng.random((count, 1)) * np.log(pairs + 1)).astype(np.int64)
    rank = _shuffled(rng, count, pairs)
    keys = _shuffled(rng, count, n)[:, :pairs] + 1
    values = rng.integers(VALUES, size=(count, pairs))
    there = rank < held
    x[:, :pairs, 0], x[:, :pairs, 1] = np.where(there, keys, 0), np.where(there, values, BLANK)
    # Each pair in turn, from one of them on, in another order.
    turn = (_shuffled(rng, count, asked) + rng.integers(held, size=(count, 1))) % held
    where = np.take_along_axis(np.argsort(rank, 1), turn, 1)  # the place of that rank
    x[:, pairs:, 0] = np.take_along_axis(keys, where, 1)
    labels = np.take_along_axis(values, where, 1)
    return SequenceSplit(torch.from_numpy(x), torch.from_numpy(labels))


def _shuffled(rng: np.random.Generator, count: int, n: int) -> np.ndarray:
    """(count, n): 0 … n − 1 in an order of its own for each."""
    return rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)


def answer_places(split: SequenceSplit) -> Tensor:
    """(M, Q): the place where the answer to each question stands."""
    keys, asked = split.tokens[..., 0], split.labels.shape[1]
    if not keys.any():  # copy
        return torch.arange(asked).expand(len(split), -1)
    known, wanted = keys[:, :-asked], keys[:, -asked:]
    return (known[:, None] == wanted[..., None]).int().argmax(-1)


def most_common(split: SequenceSplit) -> float:
    """The share of right answers of one who sees all values of a sequence and no keys, and always
    says the most common of them."""
    values = split.tokens[..., 1]
    given = values != BLANK
    counts = torch.stack([(given & (values == v)).sum(1) for v in range(VALUES)])  # (VALUES, M)
    return (counts.amax(0) / given.sum(1)).mean().item()


def fingerprint(*splits: SequenceSplit) -> str:
    """Of all tokens and labels."""
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.tokens, split.labels):
            digest.update(repr(tuple(tensor.shape)).encode())
            digest.update(tensor.numpy().data)
    return digest.hexdigest()[:16]


class SequenceBatches:
    """One split cut into batches (x (B, N, 2) int64, y (B, Q) int64) on `device`; the order is a
    function of (seed, epoch). As `Batches`, of images."""

    def __init__(
        self,
        split: SequenceSplit,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        device: str | torch.device = "cpu",
        index: Tensor | None = None,
    ):
        index = torch.arange(len(split)) if index is None else index
        samples = len(index) // batch_size * batch_size if drop_last else len(index)
        if samples == 0:
            raise ValueError(
                f"no batch: {len(index)} sequences, batch_size {batch_size}, drop_last "
                f"{drop_last}; take a batch_size of at most {max(len(index), 1)}"
            )
        self.device, self.index, self.seed = torch.device(device), index, seed
        self.batch_size, self.samples, self.shuffle = batch_size, samples, shuffle
        self.tokens, self.labels = split.tokens.to(self.device), split.labels.to(self.device)

    @property
    def answers(self) -> int:
        """Questions in an epoch."""
        return self.samples * self.labels.shape[1]

    def __len__(self) -> int:
        return -(-self.samples // self.batch_size)

    def epoch(self, epoch: int):
        index = self.index
        if self.shuffle:
            generator = torch.Generator().manual_seed(((self.seed << 20) + epoch) % 2**64)
            index = index[torch.randperm(len(index), generator=generator)]
        for part in index[: self.samples].to(self.device).split(self.batch_size):
            yield self.tokens[part], self.labels[part]

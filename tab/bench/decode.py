"""`tab bench decode`: one token more, from what each mechanism remembers of N tokens.

Correct first: of CHECKED tokens, the last STEPS decoded one by one must be those of the whole
sequence in float64. Then all take turns, a token each, so that nobody finds his own cache in the
processor's from the step before, as nobody does between the layers of a model.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .decoders import DECODERS, ROUNDS, STEPS, Decoder, Setting, Step, split
from .measure import TOLERANCE, take_turns
from .rows import Row

CHECKED = 512


def measure(
    setting: Setting,
    *,
    budget: float,
    min_rounds: int = 5,
    only: Callable[[str], bool] = lambda name: True,
    seed: int = 0,
) -> list[Row]:
    """A row for each contestant. budget: seconds of timing for each."""
    rows, runners, sizes = [], {}, {}
    drawn = functools.cache(lambda latent: setting.draw(setting.tokens + 1, latent, seed))
    for one in filter(lambda d: only(d.name), DECODERS):
        row = Row(setting.name, one.name, batch=setting.batch, tokens=setting.tokens)
        rows.append(row)
        try:
            with torch.inference_mode():
                _check(one, setting, row, seed)
                if row.skipped is None:
                    prompt, token = split(drawn(one.latent), 1)
                    step, sizes[one.name] = one.begin(setting, prompt)
                    step(*token)
                    runners[one.name] = (lambda: None), partial(_call, step, token)
        except Exception as error:  # a rival may fail in any way; the table says how
            row.skipped = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
    with torch.inference_mode():
        times, pace = take_turns(runners, setting.device, budget, min_rounds, ROUNDS, None, seed)
    for row in rows:
        if row.contestant in times:
            row.timed("forward", times[row.contestant], pace)
            row.held_bytes = sizes[row.contestant]()
    return rows


def _call(step: Step, token: tuple[Tensor, ...], _: None) -> Tensor:
    return step(*token)


def _check(one: Decoder, setting: Setting, row: Row, seed: int) -> None:
    """Its error; who is wrong is skipped."""
    if setting.kv_heads != setting.heads and not one.grouped:
        row.skipped = "takes as many heads of k and v as of q"
        return
    n = min(CHECKED, setting.tokens)
    small = replace(setting, tokens=n)
    drawn = small.draw(n, one.latent, seed + 1)
    exact = replace(small, dtype=torch.float64)
    truth = one.whole(exact, tuple(x.double() for x in drawn))[:, :, n - STEPS :]
    prompt, *tokens = split(drawn, STEPS)
    step, _ = one.begin(small, prompt)
    given = torch.cat([step(*token) for token in tokens], 2)
    row.error = ((given.double() - truth).abs().max() / truth.abs().max()).item()
    bound = TOLERANCE[setting.dtype] if _judged(one, setting) else sys.float_info.max
    if not row.error <= bound:
        row.skipped = f"wrong: error {row.error:.1e} of the largest value"


def _judged(one: Decoder, setting: Setting) -> bool:
    """Whose choice turns on the rounding of a score is not judged in half precision."""
    return setting.dtype == torch.float32 or one.name != "tab h2o"

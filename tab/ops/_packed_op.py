"""An op on a packed batch: the same op on each of its sequences, one call for neighbours of one
length.

`packed(op, …)` makes the ops `x_packed_fwd` and `x_packed_bwd` beside `x_fwd` and `x_bwd`. They
take the same arguments, and `cu_seqlens` behind the tensors. To PyTorch they are ops like others:
torch.compile and torch.export see one call, and only the call itself reads the lengths.

Where C++ has a kernel for the whole batch, tab_packed::x_packed_fwd of the same schema, that runs
in place of one call for each length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor

from ._check import accumulate
from ._extensions import why_not
from ._op import Op

# How a tensor of an op lies in a packed batch, by its name in the schemas.
TOKENS = {  # (1, …, T, …): the dimension of the tokens
    "q": 2, "k": 2, "v": 2, "o": 2, "lse": 2, "den": 2, "q_nope": 2, "q_rope": 2,
    "log_decay": 2, "c_kv": 1, "k_rope": 1, "key_mask": 1,
}  # fmt: skip
SEQUENCES = {"s0", "z0", "c0", "s", "z", "c", "max_logits"}  # (S, …)
SHARED = {"projection", "w_uk", "w_uv", "slopes"}  # the same for all
CONSTANT = {"key_mask", "projection", "c0", "slopes"}  # without gradient

Group = tuple[int, int]  # how many sequences, and their one length
Parts = Sequence[Tensor | None]


class Packed(Op):
    """Its kernels are those of `base`, and there where those are: it calls them."""

    def __init__(
        self, called: str, base: Op, name: str, schema: str, each: Callable, flops: Callable
    ):
        self.called, self.base = called, base
        shapes = None if base.shapes is None else packed_shapes(base.shapes)
        super().__init__(name, schema, each("reference"), flops=flops, shapes=shapes)
        kinds = [x.name for x in self.overload._schema.arguments]
        self.places = kinds.index("q" if "q" in kinds else "q_nope"), kinds.index("cu_seqlens")
        torch.library.define(f"tab_packed::{name}", schema)
        self.whole: Callable | None = None  # C++ for all sequences at once; find_kernels fills it
        # Triton: (ends, *arguments) -> the results, or None where it does not take them. What
        # kernels.register_packed was given.
        self.together: Callable | None = None
        self.implement("cpp", self._on_cpu(each("auto")))
        self.implement("triton", self._on_gpu(each("auto")))
        self.takes, self.own = base.takes, False

    def _ends(self, args: tuple) -> list[int]:
        """Checked against the tokens."""
        q, ends = self.places
        return check_ends(self.called, args[ends], args[q].shape[2])

    def _on_cpu(self, one_by_one: Callable) -> Callable:
        def run(*args):
            if self.whole is None:
                return one_by_one(*args)
            self._ends(args)
            return self.whole(*args)

        return run

    def _on_gpu(self, one_by_one: Callable) -> Callable:
        def run(*args):
            if self.together is None:
                return one_by_one(*args)
            ends = self._ends(args)  # read once: a GPU is waited for
            found = self.together(ends, *args)
            return one_by_one(*args, ends=ends) if found is None else found

        return run

    def find_kernels(self) -> None:
        there = "auto", "reference", "cpp", "triton"
        self.reasons = {backend: why_not(self.base.name, backend) for backend in there}
        self.reasons["cuda"] = "it has no packed batches; call it for each sequence"
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"tab_packed::{self.name}", "CPU"):
            self.whole = getattr(torch.ops.tab_packed, self.name).default


def packed(
    called: str,
    op: Op,
    by: Op,
    gradients: Callable,
    constant: int = 0,
    fit: Callable | None = None,
) -> Op:
    """`op` on packed batches, with gradients by `by`.

    called: the public function, whose name errors about the ends have.
    gradients, constant: what `op.differentiable` was given.
    fit: (tokens of a sequence, *options) -> the options, where they depend on its length.
    """
    schema, n = op.overload._schema, op.tensors
    names, options = (
        [x.name for x in part] for part in (schema.arguments[:n], schema.arguments[n:])
    )
    results = [x.name for x in schema.returns]
    kept = results[: len(results) - constant]  # those that get a gradient
    learned = [x for x in names if x not in CONSTANT]
    saved, grads = [*names, *results], [f"d{x}" for x in kept]
    unknown = {*saved} - {*TOKENS, *SEQUENCES, *SHARED}
    if unknown:
        raise ValueError(f"{op.name}: _packed_op.py does not know how {unknown} lie when packed")

    def forward(backend: str) -> Callable:
        def one(tokens, *args):
            return op.below(backend if tokens else "reference", *args)

        return partial(each_group, called, one, names, results, fit)

    def backward(backend: str) -> Callable:
        def one(tokens, *args):
            own, given = args[: len(saved)], args[len(saved) :][: len(kept)]
            if tokens:
                got = gradients(backend, given, *own, *args[len(saved) + len(kept) :])
                every = dict(zip(names, got, strict=False))
            else:
                every = _passed_on(
                    dict(zip(names, own, strict=False)), dict(zip(kept, given, strict=True))
                )
            return [every.get(x) for x in learned]

        return partial(each_group, called, one, [*saved, *kept], learned, fit)

    def formula(base: Op, given: list[str], labels: list[str]) -> Callable:
        wanted = [x.name for x in base.overload._schema.arguments]

        def flops(*args, **_) -> int:
            counts = []

            def one(tokens, *each):
                shapes = [x.shape if isinstance(x, Tensor) else x for x in each]
                known = dict(zip([*labels, *options], shapes, strict=True))
                counts.append(base.flops(*map(known.get, wanted)))
                return ()

            each_group(called, one, given, [], fit, *args)
            return sum(counts)

        flops._get_raw = True  # type: ignore[attr-defined]  # the counter gives tensors, not shapes
        return flops

    name = op.name.removesuffix("_fwd")
    inside, returns = str(schema).split("(", 1)[1].split(") -> ")
    every = inside.split(", ")
    tensors, rest = every[:n], ["Tensor cu_seqlens", *every[n:]]
    fwd = Packed(
        called, op, f"{name}_packed_fwd", f"({', '.join([*tensors, *rest])}) -> {returns}",
        forward, formula(op, names, names),
    )  # fmt: skip
    tensors += [f"Tensor {x}" for x in results] + [f"Tensor? {x}" for x in grads]
    returns = ", ".join(f"Tensor d{x}" for x in learned)
    bwd = Packed(
        called, by, f"{name}_packed_bwd", f"({', '.join([*tensors, *rest])}) -> ({returns})",
        backward, formula(by, [*saved, *kept], [*saved, *grads]),
    )  # fmt: skip

    def all_gradients(backend, grads, *args):
        if all(x is None for x in grads):
            return ()
        own, cu_seqlens, rest = args[:n], args[n], args[n + 1 :]
        outs, rest = rest[: len(results)], rest[len(results) :]
        found = dict(
            zip(learned, bwd.below(backend, *own, *outs, *grads, cu_seqlens, *rest), strict=True)
        )
        return tuple(None if x is None else found.get(y) for x, y in zip(own, names, strict=True))

    fwd.differentiable(all_gradients, by=bwd, constant=constant)
    return fwd


def packed_shapes(text: str) -> str:
    """The shapes of an op (_shapes.py) where a batch is packed."""
    lines = []
    for line in map(str.strip, text.splitlines()):
        names, _, sizes = line.partition(": ")
        states = {x.removeprefix("d") for x in names.split()} & SEQUENCES
        lines.append(f"{names}: S-1{sizes.removeprefix('B')}" if states else line)
    return "\n".join([*lines, "cu_seqlens: S", "where: B == 1 and S > 0"])


def _passed_on(own: dict[str, Tensor | None], grads: dict[str, Tensor | None]) -> dict:
    """Gradients of sequences without tokens: the state s0 goes through as it is, to s."""
    return {
        name: None
        if x is None
        else torch.zeros_like(x)
        if (d := grads.get(name[:-1])) is None
        else d
        for name, x in own.items()
    }


def each_group(
    op: str, one: Callable, given: Sequence[str], wanted: Sequence[str], fit: Callable | None,
    *args: Any, ends: list[int] | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """one(tokens, *tensors, *options) for every group of sequences -> its results, packed.

    args: the tensors, which are called `given`, cu_seqlens, the options; ends: cu_seqlens as
    numbers, where they were read. one's results are called `wanted`; None stands for the gradient
    of a tensor that was not there.
    """
    tensors, cu_seqlens, options = args[: len(given)], args[len(given)], args[len(given) + 1 :]
    q = tensors[0]
    if q.is_meta:  # lengths are values; the shapes are those of one sequence
        groups, sequences = [(1, q.shape[2])], cu_seqlens.shape[0] - 1
    else:
        groups = cut(check_ends(op, cu_seqlens, q.shape[2]) if ends is None else ends)
        sequences = sum(count for count, _ in groups)
        groups = groups or [(0, 0)]
    parts = [split(x, name, groups) for x, name in zip(tensors, given, strict=True)]
    outs = [
        one(tokens, *part, *(options if fit is None else fit(tokens, *options)))
        for (_, tokens), *part in zip(groups, *parts, strict=True)
    ]
    columns = zip(*outs, strict=True)
    return tuple(join(x, name, sequences, q) for name, x in zip(wanted, columns, strict=True))


def cut(ends: list[int]) -> list[Group]:
    """The sequences, neighbours of one length together."""
    lengths = [b - a for a, b in pairwise(ends)]
    return [(len(list(same)), length) for length, same in groupby(lengths)]


def check_ends(op: str, cu_seqlens: Tensor, tokens: int) -> list[int]:
    """The ends as numbers, or a ValueError that names what is wrong with them."""
    ends = cu_seqlens.tolist()
    if ends[0] == 0 and ends[-1] == tokens and ends == sorted(ends):
        return ends
    back = next((i for i, (a, b) in enumerate(pairwise(ends), 1) if b < a), 0)
    if ends[0] != 0:
        fault = f"it starts at {ends[0]}"
    elif back:
        fault = f"cu_seqlens[{back}] = {ends[back]} follows {ends[back - 1]}"
    else:
        fault = f"it ends at {ends[-1]}"
    raise ValueError(
        f"{op} wants cu_seqlens to start at 0, never to fall, and to end at {tokens}, the number "
        f"of tokens; {fault}"
    )


def split(x: Tensor | None, name: str, groups: list[Group]) -> Parts:
    """Views, one a group: (count, …, length, …), or (count, …) of what each sequence has one of.
    One split, whose gradient is one concatenation; slices would fill a whole tensor each."""
    if x is None or name in SHARED:
        return [x] * len(groups)
    if x.is_meta:
        return [x if name in TOKENS else x.new_empty(1, *x.shape[1:])]
    if name in SEQUENCES:
        return x.split([count for count, _ in groups])
    dim = TOKENS[name]
    parts = x.split([count * length for count, length in groups], dim)
    return [
        part if count == 1 else part.unflatten(dim, (count, length)).squeeze(0).movedim(dim - 1, 0)
        for part, (count, length) in zip(parts, groups, strict=True)
    ]


def join(parts: Parts, name: str, sequences: int, q: Tensor) -> Tensor:
    """The inverse of `split`; what is shared is summed. Tensors (1, H, T, D) are token-major."""
    first, *others = [x for x in parts if x is not None] or [q.new_empty(0)]  # for None
    if parts[0] is None or (not others and name in SHARED):
        return first
    if name in SHARED:
        return sum((x.to(accumulate(x)) for x in others), first.to(accumulate(first))).to(
            first.dtype
        )
    if first.is_meta:
        return first if name in TOKENS else first.new_empty(sequences, *first.shape[1:])
    if name in SEQUENCES:
        return torch.cat([first, *others]) if others else first
    dim = TOKENS[name]
    rows = [x.movedim(dim, 1).flatten(0, 1) for x in (first, *others)]  # (count · length, …)
    x = (torch.cat(rows) if others else rows[0])[None].movedim(1, dim)
    return x if x.dim() == 4 else x.contiguous()

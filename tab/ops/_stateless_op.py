"""An op without its last outputs, the state that it leaves or the gradient of the one it is given.

A kernel that has a head to itself keeps the state on chip or in a cache: to write it, though nobody
asks for it, is a third of what linear attention of 64 tokens moves. What needs no state calls these
ops. In CUDA C++ their kernels are those of the op itself, whose last outputs are dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ._autograd import once_only, register
from ._op import Op


class Stateless(Op):
    """The outputs of `base` at the places `keep`, by the same arguments."""

    def __init__(self, base: Op, keep: Sequence[int]):
        name, kind = base.name.rsplit("_", 1)
        arguments, returns = str(base.overload._schema).split("(", 1)[1].split(") -> ")
        each = returns.strip("()").split(", ")
        outputs = [each[i] for i in keep]

        def cut(f: Callable) -> Callable:
            def run(*args):
                found = f(*args)
                return found[keep[0]] if len(keep) == 1 else tuple(found[i] for i in keep)

            return run

        super().__init__(
            f"{name}_stateless_{kind}", f"({arguments}) -> ({', '.join(outputs)})",
            cut(base.reference), flops=base.flops, shapes=base.shapes,
        )  # fmt: skip
        self.own = False
        self.implement("cuda", cut(lambda *args: base.below("cuda", *args)))
        self.base_run = cut(base.run)


def stateless_forward(fwd: Op) -> Op:
    """x_stateless_fwd beside x_fwd, which runs where there are gradients: they need the state."""
    forward = Stateless(fwd, (0,))
    forward.run = forward.base_run
    register(forward, forward.run)
    return forward


def stateless(
    fwd: Op, bwd: Op, kept: int, gradients: Callable | None = None, outputs: Sequence[int] = (0,),
    constant: int = 0,
) -> tuple[Op, Op]:  # fmt: skip
    """x_stateless_fwd beside x_fwd, and x_stateless_bwd, whose first `kept` outputs are those.

    gradients, constant: as of `Op.differentiable`, where they need no state that x_fwd leaves.
    outputs: the places of those of x_fwd that stay.
    """
    forward, backward = Stateless(fwd, outputs), Stateless(bwd, range(kept))
    if gradients is not None:
        forward.differentiable(gradients, constant=constant)
    else:
        forward.run = forward.base_run
        register(forward, forward.run)
    register(backward, once_only(backward, fwd.name).apply)
    return forward, backward

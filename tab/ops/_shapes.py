"""What the tensors of an op look like: a text for each mechanism, and the check that is made of it.

The public functions check what users give. An op can be called past them, as torch.ops.tab.* or
from a graph, and a kernel that follows shapes which do not fit reads memory that is not the
tensor's. So an op that was told its shapes asks here before it calls a kernel that is launched from
Python. (C++ and CUDA C++ ask themselves: csrc/common.h.)

    q: B H N D              tensors of one shape, by their names in the schema; a letter is a size,
    k v: B K N D            the same wherever it stands
    key_mask: B N bool      the type, too: its bytes are read
    where: H % K == 0       of the sizes and the op's options
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ._check import shapes


def check_of(op: str, schema: torch.FunctionSchema, text: str) -> Callable[..., None]:
    """(*arguments of the op) -> nothing, or a ValueError that prints the text and what was given.

    It is compiled from the text, since every call of a kernel waits for it.
    """
    known, conditions = _read(text)
    names = [x.name for x in schema.arguments]
    needed = [x.name for x in schema.arguments if str(x.type) == "Tensor" and x.name in known]
    lines, tests, bound = [], [], set()
    for x in needed:  # sizes get their values here
        parts = [y if y.isalpha() and y not in bound else f"{x}_{i}"
                 for i, y in enumerate(known[x][0])]  # fmt: skip
        lines.append(f"{', '.join(parts)}, = {x}.shape")
        bound.update(parts)
        tests += [f"{part} == {y}" for part, y in zip(parts, known[x][0], strict=True) if part != y]
    for x in names:
        if x in known and x not in needed:
            test = f"{x}.shape == ({', '.join(known[x][0])},)"
            tests.append(f"({x} is None or {test}{known[x][1] and f' and {x}.dtype is boolean'})")
    tests += [f"({x})" for x in conditions]

    def refuse(*args) -> None:
        given = {x: y for x, y in zip(names, args, strict=True) if isinstance(y, Tensor)}
        wanted = [f"{x} ({', '.join(known[x][0])}){known[x][1]}" for x in given if x in known]
        rules = "".join(f", where {x}" for x in conditions)
        raise ValueError(f"{op} wants {', '.join(wanted)}{rules}; got {shapes(**given)}")

    arguments, space = ", ".join(names), {"boolean": torch.bool, "refuse": refuse}
    exec(
        f"""def check({arguments}):
    try:
        {"; ".join(lines)}
        if {" and ".join(tests)}:
            return
    except ValueError:  # of another number of dimensions
        pass
    refuse({arguments})""",
        space,
    )
    return space["check"]  # type: ignore[return-value]


def _read(text: str) -> tuple[dict[str, tuple[list[str], str]], list[str]]:
    """-> name of a tensor -> its sizes, and " bool" or ""; the conditions."""
    known: dict[str, tuple[list[str], str]] = {}
    conditions: list[str] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        names, rule = line.split(": ")
        if names == "where":
            conditions.append(rule)
            continue
        sizes = rule.removesuffix(" bool")
        known |= {x: (sizes.split(), rule[len(sizes) :]) for x in names.split()}
    return known, conditions

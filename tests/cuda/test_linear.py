"""Linear attention in CUDA C++, run on the CPU (emulated.py) and held against float64."""

import pytest
import torch
from emulated import FLOOR, TYPES, heads, inputs, pointer, run, struct

from tab.ops.linear import backward_reference, forward_reference

NAMES = "o", "s", "z", "dq", "dk", "dv", "ds0", "dz0"
LINEAR = struct(
    "Linear",
    "int heads n d dv feature_map causal; float eps; pointer mask; Heads q k v; pointer s0 z0",
)
FORWARD = struct("Forward", "Linear in; Heads o; pointer s z")
BACKWARD = struct(
    "Backward", "Linear in; Heads do o; pointer ds dz; Heads dq dk dv_out; pointer ds0 dz0"
)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("n", "d", "dv", "feature_map", "state"),
    [(1, 3, 2, 0, True), (5, 16, 136, 1, False), (63, 33, 65, 2, True), (63, 65, 33, 0, False),
     (64, 64, 64, 0, False), (64, 130, 72, 0, True)],
)  # fmt: skip
def test_linear(n, d, dv, feature_map, state, dtype, causal, generator):
    b, h, eps = 2, 2, 0.5
    q, k, v = inputs(generator, b, h, n, d, dv, dtype)
    do = inputs(generator, b, h, n, d, dv, dtype)[2]
    if feature_map == 2:  # features are positive
        q, k = q.abs(), k.abs()
    s0, ds = (torch.randn(b, h, d, dv, generator=generator) for _ in range(2))
    z0, dz = (torch.rand(b, h, d, generator=generator) for _ in range(2))
    if not state:
        s0 = z0 = ds = dz = None
    mask = torch.rand(b, n, generator=generator) > 0.3
    exact = [None if x is None else x.double() for x in (q, k, v, s0, z0, do, ds, dz)]
    rest = mask, *exact[3:5], feature_map, causal, eps
    o, s, z = forward_reference(*exact[:3], *rest)
    wanted = o, s, z, *backward_reference(*exact[5:], *exact[:3], o, s, z, *rest)
    options, given = (feature_map, causal, eps, mask.data_ptr()), o.to(dtype)
    read = LINEAR(h, n, d, dv, *options, *map(heads, (q, k, v)), pointer(s0), pointer(z0))

    def forward(o, s, z):
        return FORWARD(read, heads(o), s.data_ptr(), z.data_ptr())

    def backward(dq, dk, dv, ds0, dz0):
        outputs = *map(heads, (dq, dk, dv)), ds0.data_ptr(), dz0.data_ptr()
        return BACKWARD(read, heads(do), heads(given), pointer(ds), pointer(dz), *outputs)

    states = s.float().flatten(0, 1), z.float()  # three dimensions: contiguous
    results = run("linear_fwd", forward, q, [v, *states])
    results += run("linear_bwd", backward, q, [q, k, v, *states])
    for name, x, truth in zip(NAMES, results, wanted, strict=True):
        scale = max(1.0, truth.abs().max().item())
        error = (x.double().view_as(truth) - truth).abs().max().item() / scale
        assert error < 2 * FLOOR[dtype], f"{name}: relative error {error:.2g}"

"""The ops called past the public functions, torch.ops.tab.* and the Op objects, with tensors whose
shapes do not fit: a kernel that follows them reads memory that is nobody's."""

import pytest
import torch

from tab import BlockPattern
from tab.ops import OPS

B, H, K, N, D, E, F, P, R = 2, 4, 2, 6, 8, 5, 12, 4, 16


def x(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def calls():
    """Op -> tensors and options; no two sizes are alike that need not be."""
    q, k, v, do = x(B, H, N, D), x(B, K, N, D), x(B, K, N, E), x(B, H, N, E)
    mask, slopes, dlse = torch.ones(B, N, dtype=torch.bool), x(H).abs(), x(B, H, N)
    s, z, w = x(B, K, D, E), x(B, K, D).abs(), x(F, D)
    yield from both("linear", (q, k, v, mask, s, z), (0, True, 0.1), (do, s, z))
    fs, fz = x(B, K, F, E), x(B, K, F).abs()
    given = q, k, v, w, mask, fs, fz, fz
    yield from both("performer", given, (0, True, 0.0), (do, fs, fz), 4)
    tensors = q, k, v, -x(B, K, N, 1).abs(), mask, s
    yield "gated_linear_fwd", tensors, (0.3,)
    yield "gated_linear_bwd", (do, s, *tensors), (0.3,)
    normalized, tensors = "gated_linear_normalized", (*tensors, z)
    yield f"{normalized}_fwd", tensors, ()
    yield f"{normalized}_bwd", (do, s, z, *tensors[:4], do, dlse, *tensors[4:]), ()
    q1, k1, v1 = x(1, H, N, D), x(1, H, N, D), x(1, H, N, E)
    s, ends = x(3, H, D, E), torch.tensor([0, 1, 4, N])
    tensors = q1, k1, v1, -x(1, H, N, 1).abs(), mask[:1], s
    yield "gated_linear_packed_fwd", (*tensors, ends), (0.3,)
    yield "gated_linear_packed_bwd", (*tensors, v1, s, v1, s, ends), (0.3,)
    tensors, z, den = (*tensors, x(3, H, D)), x(3, H, D), x(1, H, N)
    yield f"{normalized}_packed_fwd", (*tensors, ends), ()
    yield f"{normalized}_packed_bwd", (*tensors, v1, s, z, den, v1, s, z, ends), ()
    rules = mask, slopes
    yield from both("local", (q, k, v, *rules), (2, 1, 0, 0, False, 0.3, 5.0), (do,))
    pattern = BlockPattern.bigbird(N, heads=H, block_size=2).tensors
    yield from both("sparse", (q, k, v, *pattern, *rules), (2, False, 0.3, 5.0), (do,))
    latent = q, x(B, H, N, P), x(B, N, R), x(B, N, P), x(H, D, R), x(H, E, R)
    yield from both("mla", (*latent, mask), (0.3, True), (do, dlse), 6)
    yield from both("bent_mla", (*latent, *rules), (0.3, True, 5.0), (do, dlse), 6)
    cache, ends = x(B, N, R + P), torch.tensor([3, 6])
    yield "mla_decode", (q[:, :, 0], x(B, H, P), cache, ends, *latent[4:]), (0.3,)
    yield "h2o_choose", (q, x(B, H, N, D), mask), (2, 2, True, 2, 0.3)
    rows, counts = x(7, D), torch.tensor([3, 0, 4])
    yield "moe_grouped", (rows, x(3, E, D), counts), ()
    yield "moe_grouped_outer", (x(7, E), rows, counts), ()
    images = torch.arange(9 * 60).to(torch.uint8).view(9, 4, 5, 3)
    moves = torch.zeros(2, 3, dtype=torch.int8)
    yield "assemble", (images, torch.tensor([1, 7]), moves, x(3), x(3).abs()), ()


def both(name, tensors, options, grads, first=3):
    """Forward, and backward with what it left: behind so many tensors."""
    yield f"{name}_fwd", tensors, options
    outs = OPS[f"{name}_fwd"].reference(*tensors, *options)[: 2 if "mla" in name else None]
    options = options[:2] if name == "performer" else options
    yield f"{name}_bwd", (*grads, *tensors[:first], *outs, *tensors[first:]), options


CALLS = {name: (tensors, options) for name, tensors, options in calls()}
for name in ("linear", "gated_linear", "gated_linear_normalized"):
    for way in ("fwd", "bwd"):
        CALLS[f"{name}_stateless_{way}"] = CALLS[f"{name}_{way}"]
each = pytest.mark.parametrize("op", CALLS)


def misshapen(tensors):
    """The arguments with one tensor shorter or longer by one in one dimension, "TENSOR.DIMENSION",
    or without it; a mask that is none."""
    for i, given in enumerate(tensors):
        if given.dtype == torch.bool:
            yield f"{i} as numbers", (*tensors[:i], given.float(), *tensors[i + 1 :])
        for dim in range(given.dim()):
            longer = torch.cat([given, given.narrow(dim, 0, 1)], dim)
            shorter = given.narrow(dim, 1, given.shape[dim] - 1)
            for what, other in (
                (f"{i}.{dim}", shorter),
                (f"{i}.{dim}", longer),
                (f"{i} without {dim}", given.select(dim, 0)),
            ):
                yield what, (*tensors[:i], other, *tensors[i + 1 :])


def called(op, run, args):
    """What it returns; None where it is refused, in the op's name."""
    try:
        got = run(*args)
    except (ValueError, RuntimeError) as error:
        assert op.removeprefix("bent_").partition("_")[0] in str(error)
        return None
    return got if isinstance(got, tuple) else (got,)


FITTING = {  # sizes that one tensor alone has, so that the shapes fit, whatever they are
    "local_fwd": {"0.2", "2.3"},  # queries, values of v
    "sparse_fwd": {"0.2", "2.3"},  # a block of queries less one
    "mla_fwd": {"5.1"},
    "bent_mla_fwd": {"5.1"},
    "mla_decode": {"2.1", "5.1"},  # the cache may be longer than what is used
    "moe_grouped": {"0.0", "1.1"},  # rows of no expert, outputs
    "moe_grouped_outer": {"0.1", "1.1", "2.0"},  # and groups
    "assemble": {"0.0", "0.1", "0.2"},
}


@each
def test_triton(op):
    """Refused before anything is launched, but where it is another problem that fits."""
    pytest.importorskip("triton")
    from tab.kernels._launch import LAUNCHERS, load, recording

    load()
    assert set(CALLS) == set(LAUNCHERS)
    (tensors, options), kernel = CALLS[op], OPS[op].kernels["triton"]
    launched, fitting = [], set()
    with recording(lambda *args, **_: launched.append(args)):
        kernel(*tensors, *options)
        assert launched
        for what, args in misshapen(tensors):
            launched.clear()
            called(op, kernel, (*args, *options))
            fitting |= {what} if launched else set()
    assert fitting == FITTING.get(op, set())


@each
def test_strides(op):
    """A kernel is told the strides of what is not contiguous: it knows no others."""
    pytest.importorskip("triton")
    from tab.kernels._launch import load, recording

    load()
    (tensors, options), seen = CALLS[op], []
    for i, given in enumerate(tensors):
        apart = torch.stack([given, given], -1)[..., 0]
        with recording(lambda kernel, grid, *args, **_: seen.append(args)):
            OPS[op].kernels["triton"](*tensors[:i], apart, *tensors[i + 1 :], *options)
    for args in seen:
        for i, y in enumerate(args):
            if isinstance(y, torch.Tensor) and not y.is_contiguous():
                *outer, last = y.stride()
                told = [z if type(z) is int else None for z in args[i + 1 :][: y.dim()]]
                assert told == [*outer, last] or (told[:-1] == outer and 1 in (last, y.shape[-1]))


@each
def test_cpu(op):
    """C++, or where there is none the reference: an error, or the numbers of the reference; what a
    kernel does not read may have any shape."""
    tensors, options = CALLS[op]
    run = getattr(torch.ops.tab, op)
    whole = called(op, run, (*tensors, *options))
    for what, args in misshapen(tensors):
        given = called(op, run, (*args, *options))
        if given is not None and not alike(given, whole):
            assert alike(given, OPS[op].reference(*args, *options)), what


def alike(given, wanted):
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    return all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(given, wanted, strict=True)
    )

"""What packed batches may be: jagged nested tensors, no tokens at all; and what is refused."""

import pytest
import torch
from backends import reference_and_cpp
from packs import DV, LENGTHS, NAMES, H, call, cu, cut, dims, draw
from torch.testing import assert_close

import tab

T = sum(LENGTHS)
BACKENDS = reference_and_cpp("linear_fwd")
each = pytest.mark.parametrize("name", NAMES)


def jagged(x, dim, lengths=LENGTHS):
    """(1, …, T, …) -> nested (S, …, N_s, …) over the same memory."""
    offsets = cu(lengths, torch.int64)
    nested = torch.nested.nested_tensor_from_jagged(x[0].transpose(0, dim - 1), offsets)
    return nested.transpose(1, 2) if dim == 2 else nested


def nest(name, x, layout="bhnd"):
    """The operands as nested tensors of the same offsets, and weights as they are."""
    first = jagged(x[0], 2)
    given = [
        t
        if dim is None
        else torch.nested.nested_tensor_from_jagged(t[0].transpose(0, dim - 1), first.offsets())
        for t, dim in zip(x, dims(name), strict=True)
    ]
    if layout == "bnhd":
        return given
    return [t.transpose(1, 2) if dim == 2 else t for t, dim in zip(given, dims(name), strict=True)]


@each
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_jagged_nested_tensors(name, backend, layout):
    """In, out, and gradients."""
    x = draw(name, T)
    o = call(name, backend=backend, layout=layout, causal=True)(*nest(name, x, layout))
    want = call(name, backend=backend, cu_seqlens=cu(LENGTHS), causal=True)(*x)
    assert o.is_nested and o.layout == torch.jagged
    assert o.shape[0] == len(LENGTHS) and o.shape[3] == DV
    o = o.transpose(1, 2) if layout == "bhnd" else o
    rows = want[0].transpose(0, 1)
    if backend == "reference":  # its products take another way through other strides
        torch.testing.assert_close(o.values(), rows)
    else:
        assert torch.equal(o.values(), rows)
    got = torch.autograd.grad(o.values().sin().sum(), x)
    assert_close(got, torch.autograd.grad(rows.sin().sum(), x))


@each
def test_nested_like_the_input(name):
    """What comes out goes on with what went in, and has a part for each sequence."""
    q, *x = nest(name, draw(name, T))
    o = call(name)(q, *x)
    assert o.offsets() is q.offsets() and (o * o).shape[2] == q.shape[2]
    for part, alone in zip(o.unbind(), cut(name, draw(name, T), LENGTHS), strict=True):
        assert_close(part, call(name)(*alone)[0])


def test_made_by_torch_from_a_list():
    """Other offsets of the same lengths, and what SDPA takes."""
    q, k, v = (
        torch.nested.nested_tensor(
            [torch.randn(n, H, 8) for n in (4, 7)], layout=torch.jagged
        ).transpose(1, 2)
        for _ in range(3)
    )
    o = tab.local_attention(q, k, v, window=20)
    for parts in zip(o.unbind(), q.unbind(), k.unbind(), v.unbind(), strict=True):
        want = torch.nn.functional.scaled_dot_product_attention(*(x[None] for x in parts[1:]))
        assert_close(parts[0], want[0])


@pytest.mark.parametrize("name", ["local", "mla"])
def test_nested_lse_and_states(name):
    x = draw(name, T)
    _, lse = call(name, return_lse=True)(*nest(name, x))
    want = call(name, return_lse=True, cu_seqlens=cu(LENGTHS))(*x)
    assert lse.shape[:2] == (len(LENGTHS), H) and lse.dim() == 3
    assert torch.equal(lse.transpose(1, 2).values(), want[1][0].T)
    _, (s, z) = call("linear", return_state=True)(*nest("linear", draw("linear", T)))
    assert s.shape[0] == z.shape[0] == len(LENGTHS)


# --- nothing --------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0)], ids=str)
def test_no_tokens(name, lengths):
    x = draw(name, 0)
    o = call(name, cu_seqlens=cu(lengths))(*x)
    assert o.shape == (1, H, 0, DV)
    assert all(g.shape == t.shape for g, t in zip(torch.autograd.grad(o.sum(), x), x, strict=True))


@pytest.mark.parametrize("name", ["linear", "performer"])
def test_no_tokens_keep_the_state(name):
    _, state = call(name, cu_seqlens=cu((3, 4)), return_state=True)(*draw(name, 7))
    options = {"initial_state": state, "return_state": True}
    _, last = call(name, cu_seqlens=cu((0, 0)), **options)(*draw(name, 0))
    assert all(map(torch.equal, last, state))


# --- refused --------------------------------------------------------------------------------------

BAD = {  # lengths of 7 tokens
    "starts at 1": [1, 7],
    "starts at nothing": [],
    "ends at 6": [0, 6],
    "ends at 9": [0, 9],
    r"cu_seqlens\[2\] = 3 follows 5": [0, 5, 3, 7],
}


@each
@pytest.mark.parametrize("fault", BAD)
@pytest.mark.parametrize("tokens", [7, 0])
def test_ends_that_do_not_fit(name, fault, tokens):
    if fault == "starts at nothing":
        fault = r"\(S \+ 1,\) int32 or int64 on cpu.* got cu_seqlens \(0,\)"
    ends = torch.tensor(BAD.get(fault, []), dtype=torch.int32)
    with pytest.raises(ValueError, match=rf"^{name}_attention wants cu_seqlens .*{fault}"):
        call(name, cu_seqlens=ends)(*draw(name, tokens))


@each
@pytest.mark.parametrize(
    "ends",
    [torch.tensor([0.0, 7.0]), torch.tensor([[0, 7]]), [0, 7], torch.tensor([0, 7], device="meta")],
    ids=["float", "2d", "list", "device"],
)
def test_no_ends_at_all(name, ends):
    with pytest.raises(ValueError, match=r"wants cu_seqlens \(S \+ 1,\) int32 or int64 on cpu"):
        call(name, cu_seqlens=ends)(*draw(name, 7))


def test_two_batch_entries_or_none():
    q = torch.randn(2, H, 7, 8)
    with pytest.raises(ValueError, match=r"one behind the other in one .*q \(2, 4, 7, 8\)"):
        tab.linear_attention(q, q, q, cu_seqlens=cu((3, 4)))
    with pytest.raises(ValueError, match=r'q\[None\] .*layout="bnhd".*q \(4, 7, 8\)'):
        tab.linear_attention(q[0], q[0], q[0], cu_seqlens=cu((3, 4)))
    q, k = q[:1], q[:1, :, :5]  # cross-attention would have two kinds of ends
    with pytest.raises(ValueError, match=r"as many tokens of all.*k \(1, 4, 5, 8\)"):
        tab.linear_attention(q, k, k, cu_seqlens=cu((3, 4)))


def test_options_of_one_length():
    x = draw("local", 8)
    with pytest.raises(ValueError, match=r"takes no grid with cu_seqlens.*are a batch"):
        call("local", cu_seqlens=cu((4, 4)), grid=(2, 2))(*x)
    with pytest.raises(ValueError, match='takes no form="expand" with cu_seqlens'):
        call("mla", cu_seqlens=cu((4, 4)), form="expand")(*draw("mla", 8))
    with pytest.raises(ValueError, match="form='x': choose one of"):
        call("mla", cu_seqlens=cu((4, 4)), form="x")(*draw("mla", 8))
    why_not = tab.ops.OPS["linear_packed_fwd"].why_not
    assert why_not("cuda") == "it has no packed batches; call it for each sequence"


def test_states_of_another_number_of_sequences():
    x = draw("linear", 7)
    state = torch.ones(1, H, 8, DV), torch.ones(1, H, 8)
    with pytest.raises(
        ValueError, match=r"wants initial_state \(S \(2, 4, 8, 5\), z \(2, 4, 8\)\)"
    ):
        call("linear", cu_seqlens=cu((3, 4)), initial_state=state)(*x)


def test_nested_tensors_that_do_not_fit():
    q, k, v = nest("linear", draw("linear", T))
    with pytest.raises(ValueError, match="got cu_seqlens and nested tensors"):
        tab.linear_attention(q, k, v, cu_seqlens=cu(LENGTHS))
    with pytest.raises(ValueError, match=r"lengths of nested q in dimension 1.*layout=.bhnd"):
        tab.linear_attention(q, k, v, layout="bnhd")
    with pytest.raises(ValueError, match=r"all nested in jagged layout; k is nested: .*k.unbind"):
        tab.linear_attention(torch.randn(1, H, T, 8), k, v)
    strided = torch.nested.nested_tensor([torch.randn(H, n, 8) for n in (3, 4)])
    with pytest.raises(ValueError, match=r"q is nested: .*q.unbind\(\), layout=torch.jagged"):
        tab.linear_attention(strided, strided, strided)
    other = jagged(draw("linear", T)[1], 2, (1, T - 1))
    with pytest.raises(ValueError, match=r"of the same lengths: q has offsets .* k"):
        tab.linear_attention(q, other, other)
    holes = torch.nested.narrow(
        torch.randn(2, 6, 4, 8), 1, torch.tensor([0, 1]), torch.tensor([3, 4]), layout=torch.jagged
    )
    with pytest.raises(ValueError, match=r"q has holes; pass q.contiguous\(\)"):
        tab.linear_attention(holes, holes, holes, layout="bnhd")
    with pytest.raises(ValueError, match="layout='x': choose one of"):
        tab.linear_attention(q, k, v, layout="x")

"""`tab.swap_attention`: the attention of a model that is not TAB's, in place.

    torch   every nn.MultiheadAttention, as in nn.TransformerEncoderLayer and torchvision's ViT
    timm    every timm.layers.attention.Attention, as in timm's VisionTransformer

Only these very classes are understood: a subclass may compute anything. The projections are carried
over as the very parameters (their rows lie alike in all three: Q, K, V, each head by head), so that
an optimizer that holds them goes on with them. A module that was swapped has in its state_dict

    layer.qkv.weight (3·inner, C)   layer.qkv.bias      Q, K and V: in_proj_weight, in_proj_bias of
    layer.out.weight (C, inner)     layer.out.bias      torch; qkv and proj of timm
    layer.…                                             what the mechanism has beside these

so that weights saved before the swap are loaded before it, too.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import nn

from ...layers import Attention, HeadsAttention, attention_options, build_attention
from ...ops._typed import typed
from .modules import TimmAttention, TorchAttention


@typed
def swap_attention(
    model: nn.Module,
    attention: str,
    *,
    carry: bool = True,
    modules: Iterable[str] | None = None,
    seq_len: int | None = None,
    grid: tuple[int, int] | None = None,
    **options: object,
) -> nn.Module:
    """Replaces the attention of `model` in place by the mechanism called so; -> the model, or what
    takes its place where it is an attention itself. On an error nothing has been changed.

    carry: the weights of the q, k, v and output projections are carried over. Swapped to
        "multi_head" the model then computes what it computed before. False: the new layers start
        from weights of their own, as mechanisms without such projections must.
    modules: the names of those to swap, as `model.named_modules()` has them; None: all, and a
        module that looks like an attention but is of no known class is an error.
    seq_len: the most tokens N that the model will meet; read off a ViT of timm or torchvision,
        whose class and other prefix tokens count. grid: (rows, columns) of the tokens; read off a
        timm ViT without prefix tokens. With them the tokens are a line, and mechanisms that need a
        grid say so.
    options: of the layer; those that are not given have its defaults, and num_heads the model's.

    Token j of the batch takes part unless key_padding_mask hides it. What it holds then reaches no
    other token, and the attention's output there is 0; torch gives one or another value there.

    Raises ValueError, at the swap: nothing to swap; an unknown mechanism or option; what cannot be
    carried or kept: dropout of attention weights, norms of q and k, a gate, bias_k, add_zero_attn,
    kdim, hooks, projections that the mechanism lacks. In `forward`: attn_mask, is_causal, attention
    to another sequence, and need_weights=True, which is the default of nn.MultiheadAttention alone.

    >>> layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    >>> x = torch.randn(2, 16, 32)
    >>> y = layer(x)
    >>> same = tab.swap_attention(layer, "multi_head", seq_len=16)
    >>> torch.allclose(same(x), y, atol=1e-6)
    True
    >>> model = torch.nn.TransformerEncoder(
    ...     torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2
    ... )
    >>> model = tab.swap_attention(model, "performer", seq_len=16, num_features=32)
    >>> model(x, src_key_padding_mask=torch.arange(16) >= torch.tensor([[16], [9]])).shape
    torch.Size([2, 16, 32])
    """
    chosen = _chosen(model, None if modules is None else list(modules))
    made: dict[nn.Module, nn.Module] = {}
    for name, old in chosen.items():
        if old in made:  # shared by several places
            continue
        try:
            made[old] = _swapped(model, name, old, attention, carry, seq_len, grid, options)
        except ValueError as error:
            raise ValueError(f"{name or type(old).__name__}: {error}") from None
    for parent in [*model.modules()]:
        for name, child in [*parent._modules.items()]:
            if child in made:
                setattr(parent, name, made[child])
        if isinstance(parent, nn.TransformerEncoder):  # its fast path computes without our module
            parent.use_nested_tensor = False
    return made.get(model, model)


# --- what there is to swap ------------------------------------------------------------------------


def _timm() -> type[nn.Module] | None:
    """timm's class, where a model can be of it: where timm has been imported."""
    return getattr(sys.modules.get("timm.layers.attention"), "Attention", None)


def _chosen(model: nn.Module, modules: list[str] | None) -> dict[str, nn.Module]:
    every = dict(model.named_modules(remove_duplicate=False))
    known = (nn.MultiheadAttention, _timm())
    found = {name: module for name, module in every.items() if type(module) in known}
    if modules is not None:
        if wrong := [name for name in modules if name not in found]:
            there = ", ".join(map(repr, found)) or "none"
            raise ValueError(f"modules {', '.join(map(repr, wrong))}: to be swapped are {there}")
        return {name: found[name] for name in modules}
    others = [
        f"{name} ({type(module).__name__})"
        for name, module in every.items()
        if _like(type(module)) and not any(_nested(name, other) for other in found)
    ]
    what = "torch.nn.MultiheadAttention or timm.layers.attention.Attention"
    if not found:
        seen = f"; it has {', '.join(others[:3])}" if others else ""
        raise ValueError(f"{type(model).__name__} holds no {what}, which can be swapped{seen}")
    if others:
        raise ValueError(
            f"{', '.join(others[:3])}: of no class that can be swapped ({what}); name what is to "
            f"be swapped, with modules={[*found][:2]!r} for instance"
        )
    return found


def _like(kind: type) -> bool:
    return "attention" in kind.__name__.lower() or "attn" in kind.__name__.lower()


def _nested(one: str, other: str) -> bool:
    """Whether one of these names of modules lies in the other; "" is the model."""
    return f"{one}.".startswith(f"{other}." * bool(other)) or f"{other}.".startswith(
        f"{one}." * bool(one)
    )


# --- one of them ----------------------------------------------------------------------------------


def _swapped(model, name, old, attention, carry, seq_len, grid, options) -> nn.Module:
    """What takes the place of `old`, called `name` in `model`."""
    hooks = (old._forward_hooks, old._forward_pre_hooks, old._backward_hooks)
    if any(hooks):
        raise ValueError("it has hooks, which would be lost: remove them first")
    kind = TorchAttention if isinstance(old, nn.MultiheadAttention) else TimmAttention
    kind.refuse(old, model, name)
    qkv, out = kind.projections(old)
    read_len, read_grid, why = _tokens(model, name)
    if seq_len in (None, read_len):
        seq_len, grid = read_len, grid or read_grid
    if seq_len is None:
        raise ValueError(f"give seq_len, the most tokens that it will meet{why}")
    takes, heads = attention_options(attention), old.num_heads
    own = {"num_heads": heads} if "num_heads" in takes else {}
    inner = qkv.weight.shape[0] // 3
    if inner != qkv.weight.shape[1] and "inner_dim" in takes:
        own["inner_dim"] = inner
    if carry and (differ := [k for k in own if options.get(k, own[k]) != own[k]]):
        was = ", ".join(f"{k}={own[k]}, not {options[k]}" for k in differ)
        raise ValueError(f"its weights are for {was}: leave that out, or give carry=False")
    try:
        layer = build_attention(
            attention, qkv.weight.shape[1], seq_len=seq_len, grid=grid, **{**own, **options}
        )
    except ValueError as error:
        missed = grid is None and "grid" in str(error)
        raise ValueError(f"{error}{why if missed else ''}") from None
    if getattr(layer, "reads_stream", False):
        raise ValueError(
            f"{attention} with experts reads the residual stream too, which only models of TAB "
            "hand on: num_experts=0 is its attention alone"
        )
    layer.to(qkv.weight.device, qkv.weight.dtype)
    if carry:
        _carry(layer, attention, qkv, out)
    return kind(layer, attention, old).train(old.training)


def _carry(layer: Attention, attention: str, qkv: nn.Linear, out: nn.Linear) -> None:
    """Gives the layer these projections; a ValueError where it has none alike."""
    way_out = "carry=False starts it from weights of its own"
    if not isinstance(layer, HeadsAttention):
        raise ValueError(f"{attention} has no projections of q, k and v as this has: {way_out}")
    for mine, theirs, what in ((layer.qkv, qkv, "q, k and v"), (layer.out, out, "the output")):
        shape = tuple(mine.weight.shape) if isinstance(mine, nn.Linear) else "none"
        if shape != tuple(theirs.weight.shape):
            raise ValueError(
                f"{attention} projects {what} by {shape}, this by {tuple(theirs.weight.shape)}, "
                f"which cannot be carried over: {way_out}"
            )
    layer.qkv, layer.out = qkv, out
    if qkv.weight.is_meta:
        return
    # Is all of it used? A layer may read the weights of its projections and forget a bias.
    n = layer.grid[0] * layer.grid[1] if layer.grid else min(layer.seq_len, 8)
    mine = {k: p.detach().requires_grad_() for k, p in layer.named_parameters()}
    carried = {k: p for k, p in mine.items() if k.startswith(("qkv.", "out."))}
    x = torch.ones(1, n, layer.dim, device=qkv.weight.device, dtype=qkv.weight.dtype)
    layer.eval()
    with torch.enable_grad():
        y = torch.func.functional_call(layer, mine, (x,))
        found = torch.autograd.grad(y.sum(), [*carried.values()], allow_unused=True)
    if lost := [name for name, g in zip(carried, found, strict=True) if g is None]:
        raise ValueError(f"{attention} does not use {', '.join(lost)}, which it was given")


def _tokens(model: nn.Module, name: str) -> tuple[int | None, tuple[int, int] | None, str]:
    """(seq_len, grid, what to say of a grid) of the ViT that the module called so lies in, where
    that is one of timm or torchvision."""
    outer = [".".join(name.split(".")[:i]) for i in reversed(range(name.count(".") + 1))]
    for vit in map(model.get_submodule, outer):
        if hasattr(vit, "seq_length") and hasattr(vit, "conv_proj"):  # torchvision's, of one size
            return vit.seq_length, None, _line(vit.seq_length - 1, 1)
        if not hasattr(vit, "num_prefix_tokens") or not hasattr(vit, "patch_embed"):
            continue
        patches = getattr(vit.patch_embed, "num_patches", None)
        if patches is None or getattr(vit, "dynamic_img_size", False):
            return None, None, ": this model takes images of several sizes"
        extra, size = vit.num_prefix_tokens, tuple(vit.patch_embed.grid_size)
        if extra:
            return patches + extra, None, _line(patches, extra)
        if not isinstance(getattr(vit, "patch_drop", nn.Identity()), nn.Identity):
            return patches, None, " (the model drops patches, so that its tokens are no grid)"
        return patches, size, ""
    return None, None, ""


def _line(patches: int, extra: int) -> str:
    tokens = "1 prefix token" if extra == 1 else f"{extra} prefix tokens"
    said = f"beside its {patches} patches the model has {tokens}"
    return f" ({said}, so that its tokens are a line and no grid)"

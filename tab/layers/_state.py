"""What a layer keeps between steps, right in every dtype, on every device and on many ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist

from ..ops._autograd import exporting


class Stateful(nn.Module):
    """exact: buffers that no half type rounds; `double()` makes them float64, all else float32.

    counters: tensors that say what was seen since the last step. They are no buffers: DDP would
    overwrite each rank's by rank 0's, `to_empty` leave them undefined, `half()` round them, and
    no checkpoint, which is written between steps, needs them. They follow the weights' device.
    """

    exact: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()

    def _apply(self, fn, recurse: bool = True):
        before = {name: self.get_buffer(name) for name in self.exact}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self.get_buffer(name)
            if (dtype := torch.promote_types(new.dtype, torch.float32)) != new.dtype:
                self._buffers[name] = old.to(new.device, dtype)
        for name in self.counters:
            self.counter(name, next(self.parameters()).device)
        return self

    def counter(self, name: str, device: torch.device) -> Tensor:
        """The counter, moved to `device` if that is one with memory."""
        value = getattr(self, name)
        if value.device != device and device.type != "meta":
            value = value.to(device)
            setattr(self, name, value)
        return value

    def observes(self, x: Tensor) -> bool:
        """Whether this forward counts: in training, on real tokens, and each batch once."""
        # Who runs the exported layer has no after_step.
        return self.training and not (x.is_meta or exporting() or recomputing())


def recomputing() -> bool:
    """Whether this is the second forward of a checkpointed one, within its backward."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def over_ranks(x: Tensor, op: str, group: dist.ProcessGroup | None) -> Tensor:
    """x put together over the ranks of `group` (all by default): "SUM" or "MAX"."""
    if _several(group):
        x = x.clone()
        dist.all_reduce(x, getattr(dist.ReduceOp, op), group)
    return x


def from_first_rank(x: Tensor, group: dist.ProcessGroup | None) -> None:
    """x of every rank becomes that of the group's first."""
    if _several(group):
        dist.broadcast(x, group=group, group_src=0)


def _several(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def is_plain(linear: nn.Module) -> bool:
    """Whether it is torch's Linear and no more, so that its weight says all that calling it does:
    not one with hooks or pruned, parametrized, quantized, or with an adapter such as LoRA."""
    hooks = linear._forward_hooks or linear._forward_pre_hooks
    backward = linear._backward_hooks or linear._backward_pre_hooks
    return type(linear) is nn.Linear and not (hooks or backward)


def own_weight(linear: nn.Module) -> Tensor:
    """Its weight, to be changed in place; a ValueError where that is computed from others."""
    weight = linear._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"QK-Clip scales the weight of {linear} in place, but it is computed from other "
            "tensors (parametrized, pruned, or with an adapter), and the change would be lost: "
            "remove that, or call after_step() of the experts alone (layer.moe)"
        )
    return weight


def scale_rows(weight: Tensor, rows: Tensor) -> None:
    """weight (O, …) times rows (O,) in place, also where FSDP2 keeps a part of it on each rank."""
    rows = rows.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
    if hasattr(weight, "device_mesh"):  # a DTensor
        from torch.distributed.tensor import DTensor, Replicate

        mesh = weight.device_mesh
        rows = DTensor.from_local(rows, mesh, [Replicate()] * mesh.ndim, run_check=False)
    weight.mul_(rows)

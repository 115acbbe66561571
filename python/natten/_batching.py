# SPDX-License-Identifier: MIT
"""How an op is mapped (torch.func.vmap): fold the mapped axis into another one, run once, unfold.

    without a bias   into the batch                                     no copy where the mapped axis comes first
    with a bias      into the heads, so each element keeps its table    one copy of each tensor

Query head v * heads + h then reads key head v * heads_kv + h // group, as it must.
"""

import torch


def fold_rule(op, bias: int | None, head_axes: tuple[int, ...], out_head_axes: tuple[int, ...]):
    """The `vmap` rule of `op`. `bias`: position of the bias among the arguments, None if there is none; `head_axes`:
    those of the leading, tensor arguments; `out_head_axes`: those of the outputs. A bias table has its heads at 0."""

    def vmap(info, in_dims, *args):
        size, over_heads = info.batch_size, bias is not None and args[bias] is not None
        folded = list(args)
        for i, axis in enumerate(head_axes):
            if args[i] is not None:
                folded[i] = _fold(args[i], in_dims[i], size, axis if over_heads else 0)
        outs = op(*folded)
        if isinstance(outs, torch.Tensor):
            return _unfold(outs, size, out_head_axes[0] if over_heads else 0)
        results = [_unfold(x, size, axis if over_heads else 0) for x, axis in zip(outs, out_head_axes, strict=True)]
        return tuple(x for x, _ in results), tuple(dim for _, dim in results)

    return vmap


def _fold(x: torch.Tensor, dim, size, axis: int) -> torch.Tensor:
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    if axis >= 0:
        return x.movedim(0, axis).flatten(axis, axis + 1)
    return x.movedim(0, axis - 1).flatten(axis - 1, axis)


def _unfold(x: torch.Tensor, size, axis: int) -> tuple[torch.Tensor, int | None]:
    if x.dim() == 1:  # what stands for the gradient of an absent input
        return x, None
    axis %= x.dim()
    return x.unflatten(axis, (size, x.shape[axis] // size)), axis

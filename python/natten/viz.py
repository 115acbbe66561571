# SPDX-License-Identifier: MIT
"""What one query sees: the keys of its window and the weight that attention gives to each.

For pictures and for debugging; one query at a time, composed of torch ops and without gradients. The windows come from
the op `key_spans`, that is from neighborhood.h, like those of every engine.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import _arguments as args
from . import context
from ._gather import widened, windows
from ._geometry import geometry_of

__all__ = ["Window", "layer_window", "query_window"]


class Window(NamedTuple):
    """The keys of one query, in row-major order; only the keys it has, so W may be smaller than kernel_size ** rank."""

    keys: torch.Tensor  # [W, rank] int64: where on the grid
    weights: torch.Tensor  # [batch, heads, W]: sum to 1 along W


@torch.no_grad()
def query_window(
    query, key, index: Sequence[int], kernel_size, *, stride=1, dilation=1, is_causal=False, scale=None, rpb=None
) -> Window:
    """The window and weights of the query at `index`, one coordinate per axis of the grid, slowest first.

    Args:
        query: [batch, *grid, heads, head_dim]; key: [batch, *grid, heads_kv, head_dim].
        Others: as in `natten.functional.neighborhood_attention_generic`, oversize windows being clamped.

    Raises:
        ValueError: a rank of no grid, or an index outside of it.
    """
    grid = tuple(query.shape[1:-2])
    rank = len(grid)
    if rank not in args.AXES:
        raise ValueError(
            f"query must be [batch, *grid, heads, head_dim] with 1 to 3 axes, got {query.dim()} dimensions"
        )
    index = args.integers("index", index, rank)
    for axis, n, i in zip(args.AXES[rank], grid, index, strict=True):
        if not 0 <= i < n:
            raise ValueError(f"index {i} on axis {axis} must be at least 0 and less than {n}, the tokens there")
    seen = windows(grid, *geometry_of(query.shape, kernel_size, stride, dilation, is_causal).axes, query.device)
    row = 0
    for n, i in zip(grid, index, strict=True):
        row = row * n + i
    used = seen.used[row]
    flat, slots = seen.key[row, used], seen.bias[row, used]

    q = widened(query.flatten(1, -3)[:, row])
    k = widened(key.flatten(1, -3)[:, flat]).repeat_interleave(query.shape[-2] // key.shape[-2], -2)
    logits = args.scale_or_default(scale, q.shape[-1]) * torch.einsum("bhd,bwhd->bhw", q, k)
    if rpb is not None:
        logits = logits + widened(rpb).flatten(1)[:, slots]
    return Window(torch.stack(torch.unravel_index(flat, grid), -1), logits.softmax(-1))


@torch.no_grad()
def layer_window(layer, x, index: Sequence[int]) -> Window:
    """The window and weights of the query at `index` in a `NeighborhoodAttention{1,2,3}D` layer that is given `x`.

    `x` is [batch, *grid, channels], the layer's input. Where the layer pads its input (oversize="pad"), keys may lie
    outside the grid, on its far side.
    """
    if context.resolve_oversize(layer.oversize, layer._default_oversize) == "pad":
        x = layer._padded(x)
    q, k, _ = layer.qkv(x).unflatten(-1, (3, layer.num_heads, layer.head_dim)).unbind(-3)
    geometry = {"stride": layer.stride, "dilation": layer.dilation, "is_causal": layer.is_causal}
    return query_window(q, k, index, layer.kernel_size, **geometry, scale=layer.scale, rpb=layer.rpb)

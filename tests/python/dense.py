# SPDX-License-Identifier: MIT
"""Neighborhood attention as dense masked attention, in plain PyTorch: what the tests hold the package against.

Written from the window formula alone, with a mask of all queries by all keys; it imports nothing of ours. Gradients
come from torch's own differentiation of it. Slow and memory-hungry on purpose: small grids only.
"""

import math
from functools import lru_cache

import torch


def axis_keys(query: int, extent: int, window: int, stride: int, dilation: int, causal: bool):
    """The keys that a query sees along one axis, as tokens.

    A window larger than its dilation group is cut to it, and the stride to the window.
    """
    residue, p = query % dilation, query // dilation
    length = math.ceil((extent - residue) / dilation)
    k = min(window, length)
    s = max(min(stride, k), 1)
    if causal:
        leader = min(p // s * s + s - 1, length - 1)
        first, last = max(leader - k + 1, 0), p
    else:
        left, right = k // 2, k // 2 + k % 2 - 1
        leader = min(p // s * s + s // 2, length - 1)
        centre = min(max(leader, left), length - 1 - right)
        first, last = centre - left, centre + right
    return [residue + dilation * position for position in range(first, last + 1)] if window > 0 else []


def axis_table(extent: int, window: int, stride: int, dilation: int, causal: bool):
    """One axis: which keys a query sees, bool [extent, extent], and p_key - p_query + window - 1, int64, alike.

    The offset counts positions in the group and keeps the window as given, so a bias table does not change its meaning
    when a window is cut.
    """
    return tuple(torch.tensor(table) for table in _axis_table(extent, window, stride, dilation, causal))


# NOTE: keeps lists: a tensor that is made inside a function transform belongs to that transform.
@lru_cache(maxsize=4096)
def _axis_table(extent, window, stride, dilation, causal):
    sees = [[False] * extent for _ in range(extent)]
    offset = [[0] * extent for _ in range(extent)]
    for query in range(extent):
        for key in axis_keys(query, extent, window, stride, dilation, causal):
            sees[query][key] = True
            offset[query][key] = (key - query) // dilation + window - 1
    return sees, offset


def window_mask(grid, window, stride, dilation, causal):
    """bool [tokens, tokens] for a grid of any rank, tokens in row-major order; arguments hold one entry per axis."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    for axis in zip(grid, window, stride, dilation, causal):
        sees, _ = axis_table(*axis)
        joint = mask[:, None, :, None] & sees[None, :, None, :]
        mask = joint.reshape(joint.shape[0] * joint.shape[1], joint.shape[2] * joint.shape[3])
    return mask


def bias_matrix(bias, grid, window, stride, dilation, causal):
    """[heads, tokens, tokens] from a table [heads, 2 * window - 1 per axis]; entries outside windows mean nothing."""
    flat = torch.zeros(1, 1, dtype=torch.int64)
    for axis in zip(grid, window, stride, dilation, causal):
        _, offset = axis_table(*axis)
        joint = flat[:, None, :, None] * (2 * axis[1] - 1) + offset[None, :, None, :]
        flat = joint.reshape(joint.shape[0] * joint.shape[1], joint.shape[2] * joint.shape[3])
    return bias.flatten(1)[:, flat.clamp(min=0)]


def softmax_and_lse(logits):
    """Softmax over the last axis and the log of its denominator; a row of nothing but -inf gives zeros and -inf."""
    none = logits.new_full((*logits.shape[:-1], 1), -math.inf)
    row_max = torch.cat([logits.detach(), none], dim=-1).amax(-1, keepdim=True)
    row_max = torch.where(row_max == -math.inf, torch.zeros_like(row_max), row_max)
    weights = torch.exp(logits - row_max)
    row_sum = weights.sum(-1, keepdim=True)
    empty = row_sum == 0
    safe = torch.where(empty, torch.ones_like(row_sum), row_sum)
    lse = torch.where(empty, torch.full_like(safe, -math.inf), safe.log() + row_max)
    return weights / safe, lse.squeeze(-1)


def _to_heads(x, heads):
    """[batch, *grid, heads_kv, dim] as [batch, heads, tokens, dim], each key head repeated for its query heads."""
    x = x.flatten(1, -3).transpose(1, 2) if x.dim() > 4 else x.transpose(1, 2)
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def attention(q, k, v, window, stride, dilation, causal, scale, bias=None, extra_k=None, extra_v=None, mask=None):
    """Neighborhood attention in the type of its arguments: out [batch, *grid, heads, dim_v], lse [batch, *grid, heads].

    All of `window`, `stride`, `dilation`, `causal` hold one entry per axis of the grid. `mask`, bool [tokens, tokens],
    takes the place of the window's mask where it is given.
    """
    grid, heads = q.shape[1:-2], q.shape[-2]
    axes = (tuple(grid), tuple(window), tuple(stride), tuple(dilation), tuple(causal))
    logits = _to_heads(q, heads) @ _to_heads(k, heads).transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + bias_matrix(bias, *axes)
    mask = window_mask(*axes) if mask is None else mask
    logits = torch.where(mask, logits, torch.full_like(logits, -math.inf))
    values = _to_heads(v, heads)
    if extra_k is not None:
        extra = _to_heads(q, heads) @ _to_heads(extra_k, heads).transpose(-1, -2) * scale
        logits = torch.cat([logits, extra], dim=-1)
        values = torch.cat([values, _to_heads(extra_v, heads)], dim=-2)
    weights, lse = softmax_and_lse(logits)
    out = (weights @ values).transpose(1, 2).unflatten(1, grid)
    return out, lse.transpose(1, 2).unflatten(1, grid)


def full_attention(q, k, v, scale, causal=False):
    """Every query sees every key, or every key up to itself; q, k, v are [batch, tokens, heads, dim]."""
    heads = q.shape[-2]
    logits = _to_heads(q, heads) @ _to_heads(k, heads).transpose(-1, -2) * scale
    if causal:
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        logits = logits.masked_fill(future, -math.inf)
    weights, lse = softmax_and_lse(logits)
    return (weights @ _to_heads(v, heads)).transpose(1, 2), lse.transpose(1, 2)

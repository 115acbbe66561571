# SPDX-License-Identifier: MIT
"""Windows by plain torch ops: gathers the keys of every query, so that anything may be composed of them.

Serves what the engines do not do: second derivatives and tangents (_second_order.py), pictures (viz.py) and the export
to ONNX. Memory is O(queries * keys of a window * head_dim). The windows come from the op `key_spans`, that is from
neighborhood.h.

NOTE: products, sums, reshape and narrow: gradcheck's batched checks use the old vmap, which lacks einsum, flatten and
slices that keep everything.
Shapes: L queries, W keys of a window, N additional keys, M = W + N; q [B, L, H, D], k [B, L, M, H, D], s [B, L, M, H].
"""

import math
from typing import NamedTuple

import torch

from ._geometry import in_full, refuse_oversize
from ._library import KEY_SPANS, key_spans, plans


class Windows(NamedTuple):
    """All that depends on the geometry alone."""

    key: torch.Tensor  # [L, W] flat index of a key; an unused slot holds some valid index
    used: torch.Tensor  # [L, W] bool: causal windows and short dilation groups leave slots unused
    bias: torch.Tensor  # [L, W] flat index into the bias table of a head


def windows(extent, window, stride, dilation, causal, device) -> Windows:
    """The windows of a grid, its axes combined row-major."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    key, used, bias = zero, zero == 0, zero
    if window[0] == 0:  # cross attention: no keys on the grid
        none = zero.new_zeros(math.prod(extent), 0)
        return Windows(none, none == 0, none)
    for n, *parameters in zip(extent, *in_full(window, stride, dilation, causal), strict=True):
        axis = _axis_windows(n, *parameters, device)
        shape = key.shape[0] * n, key.shape[1] * axis.key.shape[1]
        key = (key[:, None, :, None] * n + axis.key[None, :, None]).reshape(shape)
        used = (used[:, None, :, None] & axis.used[None, :, None]).reshape(shape)
        bias = (bias[:, None, :, None] * (2 * parameters[0] - 1) + axis.bias[None, :, None]).reshape(shape)
    return Windows(key, used, bias)


def _axis_windows(extent, window, stride, dilation, causal, device) -> Windows:
    spans = _key_spans(extent, window, stride, dilation, causal).to(device)
    slot = torch.arange(min(window, -(-extent // dilation)), device=device)
    query = torch.arange(extent, device=device)[:, None]
    used = slot < spans[:, 1:]
    key = torch.where(used, spans[:, :1] + dilation * slot, query)
    return Windows(key, used, torch.div(key - query, dilation, rounding_mode="floor") + window - 1)


def _key_spans(*axis) -> torch.Tensor:
    if not in_onnx_export():
        return KEY_SPANS(*axis)
    return torch.tensor(key_spans(*axis))  # a constant of the graph, which knows no op of ours


def in_onnx_export() -> bool:
    return torch.compiler.is_compiling() and torch.onnx.is_in_onnx_export()


class Gathered(NamedTuple):
    """A problem with the keys and values of every query beside it; half types widened to float32."""

    where: Windows
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    logits: torch.Tensor  # [B, L, M, H]; -inf in unused slots
    p: torch.Tensor  # [B, L, M, H]: the probabilities


def attend(q, k, v, bias, extra_k, extra_v, *options) -> tuple[torch.Tensor, torch.Tensor]:
    """What the op na_fwd does, for exporters to formats that know only torch's ops. Raises ValueError as it does."""
    _check(q, k, v, bias, extra_k, extra_v, *options)
    x = gather(q, k, v, bias, extra_k, extra_v, *options)
    out, lse = mix(x.p, x.v), x.logits.logsumexp(2)
    return out.reshape(*q.shape[:-1], v.shape[-1]).to(q.dtype), lse.reshape(q.shape[:-1])


def _check(q, k, v, bias, extra_k, extra_v, window, stride, dilation, causal, scale, may_be_oversize, plan) -> None:
    grid, axes = q.shape[1:-2], in_full(window, stride, dilation, causal)
    if not all(isinstance(x, int) for xs in (grid, *axes) for x in xs):
        raise ValueError("the ONNX export needs a grid and windows of fixed size: only the batch may be dynamic")
    heads_kv, num_extra = k.shape[-2], 0 if extra_k is None else extra_k.shape[1]
    on_grid = k.shape[1:-2] if window[0] == 0 else grid
    for name, x, shape in (
        ("key", k, (*on_grid, heads_kv, q.shape[-1])),
        ("value", v, (*on_grid, heads_kv, v.shape[-1])),
        ("additional_keys", extra_k, (num_extra, heads_kv, q.shape[-1])),
        ("additional_values", extra_v, (num_extra, heads_kv, v.shape[-1])),
    ):
        if x is not None and tuple(x.shape[1:]) != shape:
            raise ValueError(f"{name} has shape {list(x.shape)}, but behind the batch it must have {list(shape)}")
    if bias is not None and tuple(bias.shape) != (q.shape[-2], *(2 * w - 1 for w in window)):
        raise ValueError(f"the relative position bias has shape {list(bias.shape)}, which does not fit the window")
    numbers = q.shape[-2], heads_kv, q.shape[-1], v.shape[-1], num_extra, bias is not None
    error = plans(False, q.device, q.dtype, (grid, *axes), numbers).get("error")
    if error:
        raise ValueError(error)
    if not may_be_oversize:
        refuse_oversize(grid, axes[0], axes[2], [False] * len(grid))


def gather(q, k, v, bias, extra_k, extra_v, window, stride, dilation, causal, scale, *_) -> Gathered:
    """Takes the arguments of the op na_fwd."""
    where = windows(q.shape[1:-2], window, stride, dilation, causal, q.device)
    rows, heads = queries(q), q.shape[-2]
    kw, vw = keys(k, extra_k, where, heads), keys(v, extra_v, where, heads)
    logits = scale * dot(rows, kw)
    num_extra = logits.shape[2] - where.used.shape[1]
    if bias is not None:
        logits = logits + bias_of(bias, where, num_extra)
    unused = ~torch.cat([where.used, where.used.new_ones(where.used.shape[0], num_extra)], 1)
    logits = logits.masked_fill(unused[:, :, None], -torch.inf)
    return Gathered(where, rows, kw, vw, logits, logits.softmax(2))


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def queries(x: torch.Tensor) -> torch.Tensor:
    """[B, *grid, H, D] -> [B, L, H, D]."""
    return widened(x).reshape(x.shape[0], math.prod(x.shape[1:-2]), *x.shape[-2:])


def keys(x, extra, where: Windows, heads) -> torch.Tensor:
    """[B, *grid, Hkv, D] and [B, N, Hkv, D] or None -> [B, L, M, H, D]."""
    x = queries(x)[:, where.key]
    if extra is not None:
        extra = widened(extra)[:, None]
        x = torch.cat([x, extra.expand(extra.shape[0], x.shape[1], *extra.shape[2:])], 2)
    *shape, heads_kv, dim = x.shape
    if heads_kv == heads:
        return x
    return x[..., None, :].expand(*shape, heads_kv, heads // heads_kv, dim).reshape(*shape, heads, dim)


def bias_of(table, where: Windows, num_extra) -> torch.Tensor:
    """[H, 2K-1, ...] -> [L, M, H]; additional keys have none."""
    bias = widened(table).reshape(table.shape[0], math.prod(table.shape[1:]))[:, where.bias].permute(1, 2, 0)
    return torch.cat([bias, bias.new_zeros(bias.shape[0], num_extra, bias.shape[2])], 1)


def dot(x, y) -> torch.Tensor:
    """[B, L, H, D] x [B, L, M, H, D] -> [B, L, M, H]."""
    return (x[:, :, None] * y).sum(-1)


def mix(s, y) -> torch.Tensor:
    """[B, L, M, H] x [B, L, M, H, D] -> [B, L, H, D]."""
    return (s[..., None] * y).sum(2)


def outer(s, x) -> torch.Tensor:
    """[B, L, M, H] x [B, L, H, D] -> [B, L, M, H, D]."""
    return s[..., None] * x[:, :, None]


def scatter(x, where: Windows, like, like_extra):
    """The transpose of `keys`: [B, L, M, H, D] -> [B, *grid, Hkv, D] and [B, N, Hkv, D] or None."""
    batch, length, num_all, heads, dim = x.shape
    heads_kv, num_keys = like.shape[-2], where.key.shape[1]
    num_extra = num_all - num_keys
    x = x.reshape(batch, length, num_all, heads_kv, heads // heads_kv, dim).sum(4)
    flat = x.new_zeros(batch, math.prod(like.shape[1:-2]), heads_kv, dim)
    on_grid = x.narrow(2, 0, num_keys).reshape(batch, length * num_keys, heads_kv, dim)
    grid = flat.index_add(1, where.key.reshape(-1), on_grid).reshape(like.shape).to(like.dtype)
    return grid, None if like_extra is None else x.narrow(2, num_keys, num_extra).sum(1).to(like_extra.dtype)


def scatter_bias(s, where: Windows, table):
    """The transpose of `bias_of`: [B, L, M, H] -> [H, 2K-1, ...]."""
    if table is None:
        return None
    heads, (length, num_keys) = s.shape[-1], where.bias.shape
    rows = s.narrow(2, 0, num_keys).sum(0).reshape(length * num_keys, heads)
    flat = rows.new_zeros(math.prod(table.shape[1:]), heads).index_add(0, where.bias.reshape(-1), rows)
    return flat.movedim(0, 1).reshape(table.shape).to(table.dtype)

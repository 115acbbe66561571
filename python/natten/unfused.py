# SPDX-License-Identifier: MIT
"""Neighborhood attention in two steps, with the attention tensor between them: `na*d_qk` gives the logits of every
window, `na*d_av` sums values by weights. For models that change weights between the two, or show them.

Tensors have their heads before the grid, as in every release of the original that had these operators:
[batch, heads, *grid, head_dim], and attention tensors [batch, heads, *grid, slots]. Slots are row-major over
kernel_size and ordered as the keys are; additional keys come last. A slot without a key, which causal windows have and
windows cut at a short axis, is -inf in logits, and `na*d_av` skips it. `indices` tells which key a slot is.
"""

import math

import torch

from . import _arguments as args
from . import context
from ._errors import translated
from ._geometry import geometry_of, in_full
from ._library import KEY_SPANS
from ._unfused_ops import na_av, na_qk

__all__ = ["indices", "na1d_av", "na1d_qk", "na2d_av", "na2d_qk", "na3d_av", "na3d_qk"]


def _qk(
    name, rank, query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None, oversize=None
):
    if any(getattr(x, "is_nested", False) for x in (query, key, additional_keys, rpb)):
        from .nested import _qk as nested_qk

        return nested_qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb)
    axes = ("batch", "heads", *args.AXES[rank], "head_dim")
    for label, x in (("query", query), ("key", key)):
        args.dense_tensor(label, x, name, axes)
    if additional_keys is not None:
        args.dense_tensor("additional_keys", additional_keys, name, ("batch", "heads", "n", "head_dim"))
    query, key, extra = args.autocast(query, key, additional_keys)
    args.tensors_agree(name, ("query", query), ("key", key), ("additional_keys", extra))
    if rpb is not None:
        args.dense_tensor(
            "rpb", rpb, name, ("heads", *(f"2 * kernel_size - 1 along {axis}" for axis in args.AXES[rank]))
        )
        rpb = args.with_unit_last_stride(rpb.to(query.dtype))
        args.tensors_agree(name, ("query", query), ("rpb", rpb))
    geometry = _geometry(query.shape[2:-1], kernel_size, dilation, is_causal, oversize)
    tensors = args.with_unit_last_stride(query), args.with_unit_last_stride(key), rpb, args.with_unit_last_stride(extra)
    return _run(na_qk, *tensors, *geometry.axes, 1.0, -math.inf, geometry.may_be_oversize, "")


def _av(name, rank, attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False, oversize=None):
    if any(getattr(x, "is_nested", False) for x in (attn, value, additional_values)):
        from .nested import _av as nested_av

        return nested_av(rank, attn, value, kernel_size, dilation, additional_values, is_causal)
    for label, x, last in (("attn", attn, "slots"), ("value", value, "head_dim")):
        args.dense_tensor(label, x, name, ("batch", "heads", *args.AXES[rank], last))
    if additional_values is not None:
        args.dense_tensor("additional_values", additional_values, name, ("batch", "heads", "n", "head_dim"))
    value, extra = args.autocast(value, additional_values)
    attn = attn.to(value.dtype)  # a softmax in float32 is welcome, whatever the values are
    args.tensors_agree(name, ("value", value), ("attn", attn), ("additional_values", extra))
    geometry = _geometry(value.shape[2:-1], kernel_size, dilation, is_causal, oversize)
    num_extra = 0 if extra is None else extra.shape[2]
    slots = math.prod(geometry.axes[0]) + num_extra
    if attn.shape[-1] != slots:
        raise ValueError(
            f"{name} expects attn with {slots} slots, for kernel_size {geometry.axes[0]} and {num_extra} additional "
            f"values, got {attn.shape[-1]}"
        )
    tensors = args.with_unit_last_stride(attn), args.with_unit_last_stride(value), args.with_unit_last_stride(extra)
    return _run(na_av, *tensors, *geometry.axes, geometry.may_be_oversize, "")


def _geometry(extents, kernel_size, dilation, is_causal, oversize):
    mode = context.resolve_oversize(oversize)
    if mode == "pad":
        if oversize is not None:
            raise ValueError("oversize='pad' is for layers and fused operators: pad query, key and value yourself")
        mode = "clamp"  # NOTE: what the process asked of layers
    return geometry_of((1, *extents, 1, 1), kernel_size, 1, dilation, is_causal, oversize=mode)


def _run(op, *arguments):
    try:
        return op(*arguments)
    except (RuntimeError, ValueError) as error:
        raise translated(error, arguments[0].device.type) from None


def na1d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None, *, oversize=None):
    """Logits of every window: attn[q, slot] = <query[q], key[slot]> + rpb, unscaled.

    Args:
        query: [batch, heads, x, head_dim]; float32, float64, float16 or bfloat16, any strides.
        key: [batch, heads_kv, x, head_dim]; heads_kv divides heads.
        kernel_size, dilation, is_causal, oversize: as in `natten.na1d`.
        additional_keys: [batch, heads_kv, n, head_dim]; every query has n more slots for them.
        rpb: relative position bias [heads, 2 * kernel_size - 1]; cast to the dtype of `query`; causal axes too.

    Returns:
        [batch, heads, x, kernel_size + n] in the dtype of `query`; sums are in float32 (float64 for float64).

    Raises: as `natten.na1d`.
    """
    return _qk("na1d_qk", 1, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, oversize)


def na2d_qk(query, key, kernel_size, dilation=1, additional_keys=None, is_causal=False, rpb=None, *, oversize=None):
    """Logits of every window on [batch, heads, y, x, head_dim]; otherwise as `na1d_qk`."""
    return _qk("na2d_qk", 2, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, oversize)


def na3d_qk(
    query,
    key,
    kernel_size=None,
    dilation=1,
    additional_keys=None,
    is_causal=False,
    rpb=None,
    *,
    kernel_size_d=None,
    dilation_d=None,
    oversize=None,
):
    """Logits of every window on [batch, heads, z, y, x, head_dim]; otherwise as `na1d_qk`.

    An integer in the place of `additional_keys`, or one of the keywords that end in _d, means the order of natten 0.15:
    (query, key, kernel_size_d, kernel_size, dilation_d, dilation).
    """
    if kernel_size_d is not None or dilation_d is not None or type(additional_keys) is int:
        given = kernel_size, dilation, additional_keys, is_causal, kernel_size_d, dilation_d
        kernel_size, dilation = _order_of_015("na3d_qk", *given)
        additional_keys, is_causal = None, False
    return _qk("na3d_qk", 3, query, key, kernel_size, dilation, additional_keys, is_causal, rpb, oversize)


def na1d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False, *, oversize=None):
    """Weighted sums of values: out[q] = sum over slots of attn[q, slot] * value[slot].

    Args:
        attn: [batch, heads, x, kernel_size + n]; any strides, such as a slice of something larger; cast to the dtype of
            `value`.
        value: [batch, heads_kv, x, head_dim].
        additional_values: [batch, heads_kv, n, head_dim].
        Others: as in `na1d_qk`.

    Returns:
        [batch, heads, x, head_dim] in the dtype of `value`.
    """
    return _av("na1d_av", 1, attn, value, kernel_size, dilation, additional_values, is_causal, oversize)


def na2d_av(attn, value, kernel_size, dilation=1, additional_values=None, is_causal=False, *, oversize=None):
    """Weighted sums of values on [batch, heads, y, x, ...]; otherwise as `na1d_av`."""
    return _av("na2d_av", 2, attn, value, kernel_size, dilation, additional_values, is_causal, oversize)


def na3d_av(
    attn,
    value,
    kernel_size=None,
    dilation=1,
    additional_values=None,
    is_causal=False,
    *,
    kernel_size_d=None,
    dilation_d=None,
    oversize=None,
):
    """Weighted sums of values on [batch, heads, z, y, x, ...]; otherwise as `na1d_av`, and as for `na3d_qk`."""
    if kernel_size_d is not None or dilation_d is not None or type(additional_values) is int:
        given = kernel_size, dilation, additional_values, is_causal, kernel_size_d, dilation_d
        kernel_size, dilation = _order_of_015("na3d_av", *given)
        additional_values, is_causal = None, False
    return _av("na3d_av", 3, attn, value, kernel_size, dilation, additional_values, is_causal, oversize)


def _order_of_015(name, third, fourth, fifth, sixth, kernel_size_d, dilation_d):
    """(kernel_size, dilation) per axis of a call in natten 0.15's order, positional or by its keywords."""
    kernel_size, dilation, complete = third, fourth, True
    if type(fifth) is int:
        complete = kernel_size_d is None and dilation_d is None
        kernel_size_d, kernel_size, dilation_d, dilation = third, fourth, fifth, sixth
    dilation_d = 1 if dilation_d is None else dilation_d
    if not complete or any(type(size) is not int for size in (kernel_size_d, kernel_size, dilation_d, dilation)):
        raise TypeError(
            f"{name}() in the order of natten 0.15 takes kernel_size_d, kernel_size, dilation_d, dilation: integers"
        )
    return [kernel_size_d, kernel_size, kernel_size], [dilation_d, dilation, dilation]


def attend(query, key, value, rpb, extra_k, extra_v, geometry, scale, oversize, plan, dropout_p=0.0):
    """The fused operator through its unfused parts: (out, lse, weights), the first two heads-last like all arguments,
    the weights as an attention tensor. Dropout acts on the weights, before they are returned."""
    q, k, v = (x.movedim(-2, 1) for x in (query, key, value))
    extra_k, extra_v = (None if x is None else x.transpose(1, 2) for x in (extra_k, extra_v))
    plan = plan.split("/")[0]  # its engine; kernels and tiles have other names here
    logits = na_qk(q, k, rpb, extra_k, *geometry, scale, -math.inf, oversize, plan)
    kept = torch.float64 if query.dtype == torch.float64 else torch.float32
    lse = logits.to(kept).logsumexp(-1)
    weights = torch.nn.functional.dropout(logits.softmax(-1), dropout_p)
    out = na_av(weights, v, extra_v, *geometry, oversize, plan)
    return out.movedim(1, -2), lse.movedim(1, -1), weights


def indices(grid, kernel_size, *, stride=1, dilation=1, is_causal=False):
    """Which key stands in each slot of an attention tensor: int64 [*grid, slots, rank], coordinates slowest axis first,
    and -1 in slots without a key. Additional keys, which would come last, are not listed.

    Args:
        grid: sizes of the axes, one to three.
        Others: as in `natten.functional.neighborhood_attention_generic`.
    """
    grid = [args.integer("grid", n) for n in grid]
    rank = len(grid)
    if rank not in args.AXES:
        raise ValueError(f"the grid must have 1 to 3 axes, got {rank}")
    window, *parameters = in_full(*geometry_of((1, *grid, 1, 1), kernel_size, stride, dilation, is_causal).axes)
    cpu = torch.device("cpu")  # whatever the default is
    used, keys = torch.ones((), dtype=torch.bool, device=cpu), []
    for axis, (n, *axis_parameters) in enumerate(zip(grid, window, *parameters)):
        shape = [1] * 2 * rank
        shape[axis], shape[rank + axis] = n, window[axis]
        spans, slot = KEY_SPANS(n, *axis_parameters), torch.arange(window[axis], device=cpu)
        keys.append((spans[:, :1] + axis_parameters[2] * slot).reshape(shape))
        used = used & (slot < spans[:, 1:]).reshape(shape)
    coordinates = torch.stack(torch.broadcast_tensors(*keys), -1).where(used[..., None], torch.tensor(-1, device=cpu))
    return coordinates.reshape(*grid, math.prod(window), rank)

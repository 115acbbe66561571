# SPDX-License-Identifier: MIT
"""Neighborhood attention and dense attention as functions of tensors, heads last.

Every query attends to the `kernel_size` keys nearest to it along each axis of the grid; near a border the window is
shifted inwards, so it keeps its size. Sources: Hassani et al., "Neighborhood Attention Transformer", arXiv 2204.07143,
section 3.1 (the operator); "Dilated Neighborhood Attention Transformer", arXiv 2209.15001, section 3 (dilation);
"Generalized Neighborhood Attention", arXiv 2504.16922, section 3 (stride, even windows).
"""

import warnings

import torch
from torch.nn.functional import pad as zero_pad

from . import _arguments as args
from . import _legacy, _tuning, context
from ._errors import WrongType, translated
from ._geometry import geometry_of
from ._ops import na_fwd, run_op
from ._varlen import sample_bounds
from ._varlen_ops import dense_problem, na_varlen_fwd
from .merge import merge_attentions
from .unfused import attend, na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk
from .varlen import na1d_varlen, na2d_varlen, na3d_varlen

__all__ = [
    "attention",
    "merge_attentions",
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na1d_varlen",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na2d_varlen",
    "na3d",
    "na3d_av",
    "na3d_qk",
    "na3d_varlen",
    "neighborhood_attention_generic",
]
_LAYOUT_CHECKED = ("na1d", "na2d", "na3d")  # not what the modules call: their layout is certain


def _neighborhood(
    name,
    rank,
    query,
    key,
    value,
    kernel_size,
    *too_many,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    additional_keys=None,
    additional_values=None,
    rpb=None,
    return_lse=False,
    return_weights=False,
    attn_drop=0,  # NOTE: an integer, for Dynamo specialises it: a float default would compile every call twice
    backend=None,
    plan=None,
    oversize=None,
    **tuning,
):
    """All public functions on a grid; `name` is the one that was called."""
    if too_many:
        raise TypeError(
            f"{name}() takes 4 positional arguments (query, key, value, kernel_size), got {4 + len(too_many)}: "
            "the fifth meant dilation up to natten 0.17 and stride from 0.20 on, so write dilation=... or stride=..."
        )
    if tuning:
        _tuning.check(tuning, rank, _tuning.TUNING, name)
    args.flag("return_lse", return_lse), args.flag("return_weights", return_weights)
    query, *others = _checked_tensors(name, rank, query, key, value, additional_keys, additional_values, rpb)
    shape, mode = query.shape, context.resolve_oversize(oversize)
    geometry = geometry_of(shape, kernel_size, stride, dilation, is_causal, scale, mode)
    if geometry.looks_heads_first and name in _LAYOUT_CHECKED:
        _tell_of_layout(name, query)
    plan = "" if backend is None and plan is None and not query.is_cuda else _tuning.plan_of(backend, plan, query)
    tensors, options = (query, *others), (*geometry.axes, geometry.scale, geometry.may_be_oversize, plan)
    if geometry.padding:
        tensors = *(zero_pad(x, geometry.padding) for x in tensors[:3]), *tensors[3:]
    if return_weights or attn_drop:
        dropout_p = args.probability("attn_drop", attn_drop)
        return _unfused(tensors, options, shape[1:-2], dropout_p, return_lse, return_weights)
    out, lse = run_op(na_fwd, tensors, options, backend)
    if geometry.padding:
        out, lse = _cropped(shape[1:-2], 1, out, lse)
    return (out, lse) if return_lse else out


def _unfused(tensors, options, extents, dropout_p, return_lse, return_weights):
    """The same through an attention tensor: with dropout on the weights, or to return them."""
    *geometry, scale, oversize, plan = options
    try:
        out, lse, weights = attend(*tensors, geometry, scale, oversize, plan, dropout_p)
    except (RuntimeError, ValueError) as error:
        raise translated(error, tensors[0].device.type) from None
    out, lse = _cropped(extents, 1, out, lse)
    (weights,) = _cropped(extents, 2, weights)
    results = out, *((lse,) if return_lse else ()), *((weights,) if return_weights else ())
    return results if len(results) > 1 else out


@_tuning.with_signature_of(_neighborhood)
def neighborhood_attention_generic(query, key, value, kernel_size, *too_many, **options):
    """Neighborhood attention on a grid of 1, 2 or 3 axes, taken from the rank of `query`.

    All arguments after `kernel_size` are keyword-only. Where one number per axis is expected, an integer serves all
    axes, and any sequence (list, tuple, torch.Size) gives one per axis, slowest first.

    Args:
        query: [batch, *grid, heads, head_dim]; float32, float64, float16 or bfloat16, any strides.
        key: [batch, *grid, heads_kv, head_dim]; heads_kv divides heads (grouped queries).
        value: [batch, *grid, heads_kv, head_dim_v].
        kernel_size: keys per query along each axis; -1 is the whole axis; even sizes reach one key further to the left.
        stride: so many neighbouring queries share one window; at most kernel_size. None is 1.
        dilation: distance of neighbouring keys, in tokens. None is 1.
        is_causal: per axis, whether a query sees no key behind itself. None is False.
        scale: factor of the logits; None is head_dim ** -0.5, 0.0 is zero.
        additional_keys, additional_values: [batch, n, heads_kv, head_dim] and [batch, n, heads_kv, head_dim_v]; every
            query sees them too, in the same softmax.
        rpb: relative position bias [heads, 2 * kernel_size - 1 per axis], added to the scaled logits at index
            (key - query) / dilation + kernel_size - 1; cast to the dtype of `query`.
        return_lse: also return the logarithm of the softmax's denominator; it is differentiable.
        return_weights: also return the weights [batch, heads, *grid, slots], see `natten.unfused` for the slots; they
            are computed in two steps, which takes memory for every window.
        attn_drop: probability of dropout on the weights, at every call (a layer asks for it in training only); takes
            the same path.
        backend: a name of the original or one of ours (cpu, reference, portable, cuda-reference); None is the best one.
        plan: a plan or a prefix of one, see `natten.list_plans`. Without it, products of float32 are exact, on CUDA
            unless torch.backends.cuda.matmul.allow_tf32 (or .fp32_precision = "tf32") lets them be in TF32.
        oversize: where kernel_size * dilation exceeds an axis: "clamp", "error" or "pad"; see
            `natten.context.set_oversize`.
        Others: tile shapes, schedules and the like of the original: checked for their form, then ignored.

    Returns:
        [batch, *grid, heads, head_dim_v] in the dtype of `query` (under torch.autocast: in its dtype; float64 stays),
        and with `return_lse` also [batch, *grid, heads], float32 (float64 for float64); `return_weights` adds those.

    Raises:
        TypeError: wrong types (these are ValueErrors too), more than four positional arguments.
        ValueError: wrong lengths, sizes or values, mixed dtypes or devices, a `backend` that cannot run.
        NotImplementedError: sparse or nested tensors; a dtype or device without an engine.
    """
    name = "neighborhood_attention_generic"
    if not isinstance(query, torch.Tensor):
        raise WrongType(f"{name} expects query to be a torch.Tensor, got {type(query).__name__}")
    rank = query.dim() - 3
    if rank not in args.AXES:
        raise ValueError(
            f"{name} expects query as [batch, *grid, heads, head_dim] with a grid of 1 to 3 axes, "
            f"got {query.dim()} dimensions"
        )
    return _neighborhood(name, rank, query, key, value, kernel_size, *too_many, **options)


@_tuning.with_signature_of(_neighborhood)
def na1d(query, key, value, kernel_size, *too_many, **options):
    """Neighborhood attention on [batch, x, heads, head_dim]; otherwise as `neighborhood_attention_generic`."""
    return _neighborhood("na1d", 1, query, key, value, kernel_size, *too_many, **options)


@_tuning.with_signature_of(_neighborhood)
def na2d(query, key, value, kernel_size, *too_many, **options):
    """Neighborhood attention on [batch, y, x, heads, head_dim]; otherwise as `neighborhood_attention_generic`."""
    return _neighborhood("na2d", 2, query, key, value, kernel_size, *too_many, **options)


@_tuning.with_signature_of(_neighborhood)
def na3d(query, key, value, kernel_size, *too_many, **options):
    """Neighborhood attention on [batch, z, y, x, heads, head_dim]; otherwise as `neighborhood_attention_generic`."""
    return _neighborhood("na3d", 3, query, key, value, kernel_size, *too_many, **options)


def _checked_tensors(name, rank, query, key, value, extra_k, extra_v, rpb):
    """The six tensors as the ops take them: checked for form and agreement, autocast, with unit last strides."""
    plain = extra_k is None and extra_v is None and rpb is None and args.are_plain(rank + 3, query, key, value)
    if plain and not args.is_autocast(query):
        return query, key, value, None, None, None
    axes = ("batch", *args.AXES[rank], "heads", "head_dim")
    for label, x in (("query", query), ("key", key), ("value", value)):
        args.dense_tensor(label, x, name, axes)
    if (extra_k is None) != (extra_v is None):
        raise ValueError(f"{name} needs additional_keys and additional_values together: give both or neither")
    if extra_k is not None:
        for label, x in (("additional_keys", extra_k), ("additional_values", extra_v)):
            args.dense_tensor(label, x, name, ("batch", "n", "heads", "head_dim"))
    if rpb is not None:
        args.dense_tensor(
            "rpb", rpb, name, ("heads", *(f"2 * kernel_size - 1 along {axis}" for axis in args.AXES[rank]))
        )
    query, key, value, extra_k, extra_v = args.autocast(query, key, value, extra_k, extra_v)
    others = ("key", key), ("value", value), ("additional_keys", extra_k), ("additional_values", extra_v)
    args.tensors_agree(name, ("query", query), *others)
    if rpb is not None:
        rpb = rpb.to(query.dtype)
        args.tensors_agree(name, ("query", query), ("rpb", rpb))
    query, key, value, extra_k, extra_v = map(args.with_unit_last_stride, (query, key, value, extra_k, extra_v))
    return query, key, value, rpb, extra_k, extra_v


def _tell_of_layout(name, query) -> None:
    mode = context.NattenContext.layout_check
    if mode == "off":
        return
    axes = ", ".join(("batch", *args.AXES[query.dim() - 3], "heads", "head_dim"))
    message = (
        f"{name} reads query {list(query.shape)} as [{axes}], that is with {query.shape[-2]} heads, which looks like a "
        "tensor with heads first: permute it, or call natten.context.set_layout_check('off') if it is meant so"
    )
    if mode == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=4)


def _cropped(extents, first_axis, *tensors):
    for i, n in enumerate(extents, first_axis):
        tensors = tuple(x if x.shape[i] == n else x.narrow(i, 0, n) for x in tensors)
    return tensors


def attention(
    query,
    key,
    value,
    is_causal=False,
    scale=None,
    seqlens_Q=None,
    seqlens_KV=None,
    cumulative_seqlen_Q=None,
    cumulative_seqlen_KV=None,
    max_seqlen_Q=None,
    max_seqlen_KV=None,
    backend=None,
    q_tile_size=None,
    kv_tile_size=None,
    backward_q_tile_size=None,
    backward_kv_tile_size=None,
    backward_kv_splits=None,
    backward_use_pt_reduction=False,
    run_persistent_kernel=True,
    kernel_schedule=None,
    torch_compile=False,
    return_lse=False,
    *,
    plan=None,
):
    """Dense attention: every query sees every key, or under `is_causal` those up to its own position.

    Samples of different lengths may be packed one behind the other into a batch of 1: give `seqlens_Q` and
    `seqlens_KV`, the lengths, or `cumulative_seqlen_Q` and `cumulative_seqlen_KV`, their running sums from 0, with
    `max_seqlen_Q` and `max_seqlen_KV`. Lengths may be zero. They are read in every call, so the device is waited for
    if they are there. torch.compile takes running sums as tensors, and no others.

    Args:
        query: [batch, seqlen_q, heads, head_dim]; float32, float64, float16 or bfloat16.
        key: [batch, seqlen_kv, heads_kv, head_dim]; heads_kv divides heads.
        value: [batch, seqlen_kv, heads_kv, head_dim_v].
        is_causal: needs seqlen_q == seqlen_kv, of every sample.
        scale: factor of the logits; None is head_dim ** -0.5, 0.0 is zero.
        backend, plan: as in `neighborhood_attention_generic`.
        return_lse: also return the logarithm of the softmax's denominator; it is differentiable.
        Others: tuning arguments of the original: checked for their form, then ignored.

    Returns:
        [batch, seqlen_q, heads, head_dim_v] and with `return_lse` also [batch, seqlen_q, heads], float32 (float64 for
        float64). A query without keys gets 0 and -inf.

    Raises: as `neighborhood_attention_generic`; RuntimeError for lengths under torch.compile.
    """
    tuning = q_tile_size, kv_tile_size, backward_q_tile_size, backward_kv_tile_size, backward_kv_splits
    tuning += backward_use_pt_reduction, run_persistent_kernel, kernel_schedule, torch_compile
    _tuning.check(dict(zip(_tuning.DENSE_TUNING, tuning, strict=True)), 1, _tuning.DENSE_TUNING)
    causal, _ = args.flag("is_causal", is_causal), args.flag("return_lse", return_lse)
    for label, x in (("query", query), ("key", key), ("value", value)):
        args.dense_tensor(label, x, "attention", ("batch", "seqlen", "heads", "head_dim"))
    query, key, value = args.autocast(query, key, value)
    args.tensors_agree("attention", ("query", query), ("key", key), ("value", value))
    args.same_sizes("attention", ("query", "key"), query, key, (("batch", 0), ("head_dim", -1)))
    args.same_sizes("attention", ("key", "value"), key, value, (("batch", 0), ("seqlen", 1), ("heads", -2)))
    query, key, value = map(args.with_unit_last_stride, (query, key, value))
    scale = args.scale_or_default(scale, query.shape[-1])
    plan = _tuning.plan_of(backend, plan, query)

    bounds = sample_bounds(query, seqlens_Q, seqlens_KV, cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q,
                           max_seqlen_KV)  # fmt: skip
    if bounds is None and key.shape[1] > 0:
        tensors, window = dense_problem(query, key, value, causal)
        out, lse = run_op(na_fwd, tensors, (window, [1], [1], [causal], scale, True, plan), backend)
    else:  # without keys it is a packed call, in which that is legal
        bounds = bounds or [torch.tensor([0, x.shape[1]], device="cpu") for x in (query, key)]
        samples = [], *bounds, [1], [1], [1], [causal], scale, True, plan
        out, lse = run_op(na_varlen_fwd, (query, key, value, None), samples, backend)
    return (out, lse) if return_lse else out


__getattr__ = _legacy.finder(__name__, "legacy_functional")

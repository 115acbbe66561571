# SPDX-License-Identifier: MIT
"""Neighborhood attention over grids of different sizes, packed one behind the other into a batch of 1."""

import math

import torch
from torch.nn.functional import pad as zero_pad

from . import _arguments as args
from . import _tuning, context
from ._errors import WrongType
from ._geometry import geometry_of
from ._ops import run_op
from ._varlen_ops import na_varlen_fwd

__all__ = ["na1d_varlen", "na2d_varlen", "na3d_varlen"]


def na1d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on lines of different lengths; otherwise as `na2d_varlen`."""
    return _varlen("na1d_varlen", 1, query, key, value, grids, kernel_size, **options)


def na2d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on planes of different sizes.

    Args:
        query: [1, tokens, heads, head_dim]: the grids one behind the other, each row-major.
        key, value: alike, as in `natten.na2d`.
        grids: the size of every grid, such as [(5, 7), (8, 8)]; an axis may be 0, and a grid then has no tokens.
        kernel_size: as in `natten.na2d`; windows are cut at grids that are smaller.
        options: stride, dilation, is_causal, scale, rpb, return_lse, backend, plan and oversize, as in `natten.na2d`.

    Returns:
        [1, tokens, heads, head_dim_v], and with `return_lse` also [1, tokens, heads].

    Raises: as `natten.na2d`; ValueError if the grids do not have as many tokens as there are.
    """
    return _varlen("na2d_varlen", 2, query, key, value, grids, kernel_size, **options)


def na3d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on volumes of different sizes; otherwise as `na2d_varlen`."""
    return _varlen("na3d_varlen", 3, query, key, value, grids, kernel_size, **options)


def _varlen(
    name,
    rank,
    query,
    key,
    value,
    grids,
    kernel_size,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    rpb=None,
    return_lse=False,
    backend=None,
    plan=None,
    oversize=None,
):
    """All three functions; `name` is the one that was called."""
    args.flag("return_lse", return_lse)
    query, key, value, rpb = _checked_tensors(name, rank, query, key, value, rpb)
    grids = _checked_grids(name, rank, grids, query.shape[1])
    mode = context.resolve_oversize(oversize) if grids else "clamp"
    geometries = [
        geometry_of((1, *grid, *query.shape[2:]), kernel_size, stride, dilation, is_causal, scale, mode)
        for grid in grids or [(1,) * rank]
    ]
    # They differ in windows of -1 alone: the longest is cut at every grid, as those would be.
    window = [max(sizes) for sizes in zip(*(g.axes[0] for g in geometries), strict=True)]
    first = geometries[0]
    tensors, padded = (query, key, value), grids
    if any(g.padding for g in geometries):
        padded = [_padded_grid(*pair) for pair in zip(grids, geometries, strict=True)]
        tensors = [_mapped(x, grids, _pad_to(padded)) for x in tensors]
    plan = "" if backend is None and plan is None and not query.is_cuda else _tuning.plan_of(backend, plan, query)
    sizes = [n for grid in padded for n in grid]
    options = (sizes, None, None, window, *first.axes[1:], first.scale, first.may_be_oversize, plan)
    out, lse = run_op(na_varlen_fwd, (*tensors, rpb), options, backend)
    if padded != grids:
        out, lse = (_mapped(x, padded, _crop_to(grids)) for x in (out, lse))
    return (out, lse) if return_lse else out


def _checked_tensors(name, rank, query, key, value, rpb):
    for label, x in (("query", query), ("key", key), ("value", value)):
        args.dense_tensor(label, x, name, ("1", "tokens", "heads", "head_dim"))
        if x.shape[0] != 1 or x.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name} needs a batch of 1 and as many tokens in {label} as in query, got {list(x.shape)}"
            )
    query, key, value = args.autocast(query, key, value)
    if rpb is not None:
        args.dense_tensor("rpb", rpb, name, ("heads", *(f"table of {axis}" for axis in args.AXES[rank])))
        rpb = rpb.to(query.dtype)
    args.tensors_agree(name, ("query", query), ("key", key), ("value", value), ("rpb", rpb))
    return tuple(map(args.with_unit_last_stride, (query, key, value, rpb)))


def _checked_grids(name, rank, grids, tokens) -> list[tuple]:
    """Those that have tokens."""
    if not isinstance(grids, list | tuple):
        raise WrongType(f"{name} expects grids as a list of sizes, got {type(grids).__name__}")
    grids = [tuple(args.integers("grids", grid, rank)) for grid in grids]
    total = sum(math.prod(grid) for grid in grids)
    if any(n < 0 for grid in grids for n in grid) or total != tokens:
        raise ValueError(f"{name} got grids of {total} tokens in all, but query has {tokens}")
    return [grid for grid in grids if 0 not in grid]


# --- oversize="pad" ---------------------------------------------------------------------------------------------------
def _padded_grid(grid, geometry) -> tuple:
    amounts = geometry.padding[5::2][::-1] or (0,) * len(grid)  # see `geometry_of`: from the last axis of the grid on
    return tuple(n + more for n, more in zip(grid, amounts, strict=True))


def _mapped(x, grids, function):
    """`function(number, sample)` of every sample, which it is given on its grid."""
    parts = x.split([math.prod(grid) for grid in grids], 1)
    mapped = [function(i, part.unflatten(1, grid)) for i, (part, grid) in enumerate(zip(parts, grids, strict=True))]
    return torch.cat([part.flatten(1, len(grids[0])) for part in mapped], 1)


def _pad_to(grids):
    def pad(i, x):
        amounts = [n for size, have in zip(reversed(grids[i]), reversed(x.shape[1:-2])) for n in (0, size - have)]
        return zero_pad(x, [0, 0, 0, 0, *amounts])

    return pad


def _crop_to(grids):
    def crop(i, x):
        for axis, n in enumerate(grids[i], 1):
            x = x.narrow(axis, 0, n)
        return x

    return crop

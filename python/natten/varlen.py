# SPDX-License-Identifier: MIT
"""Neighborhood attention over grids of different sizes, packed one behind the other into a batch of 1."""

import math

import torch

from . import _arguments as args
from ._errors import WrongType
from ._varlen import attend_nothing

__all__ = ["na1d_varlen", "na2d_varlen", "na3d_varlen"]


def na1d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on lines of different lengths; otherwise as `na2d_varlen`."""
    return _varlen("na1d_varlen", 1, query, key, value, grids, kernel_size, options)


def na2d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on planes of different sizes.

    Args:
        query: [1, tokens, heads, head_dim]: the grids one behind the other, each row-major.
        key, value: alike, as in `natten.na2d`.
        grids: the size of every grid, such as [(5, 7), (8, 8)]; an axis may be 0, and a grid then has no tokens.
        kernel_size: as in `natten.na2d`; windows are cut at grids that are smaller.
        options: stride, dilation, is_causal, scale, rpb, return_lse, backend and oversize, as in `natten.na2d`.

    Returns:
        [1, tokens, heads, head_dim_v], and with `return_lse` also [1, tokens, heads].

    Raises: as `natten.na2d`; ValueError if the grids do not have as many tokens as there are.
    """
    return _varlen("na2d_varlen", 2, query, key, value, grids, kernel_size, options)


def na3d_varlen(query, key, value, grids, kernel_size, **options):
    """Neighborhood attention on volumes of different sizes; otherwise as `na2d_varlen`."""
    return _varlen("na3d_varlen", 3, query, key, value, grids, kernel_size, options)


_OPTIONS = ("stride", "dilation", "is_causal", "scale", "rpb", "backend", "plan", "oversize")


def _varlen(name, rank, query, key, value, grids, kernel_size, options):
    from .functional import neighborhood_attention_generic

    return_lse = args.flag("return_lse", options.pop("return_lse", False))
    unknown = [option for option in options if option not in _OPTIONS]
    if unknown:
        raise TypeError(f"{name}() got an unexpected keyword argument {unknown[0]!r}")
    for label, x in (("query", query), ("key", key), ("value", value)):
        args.dense_tensor(label, x, name, ("1", "tokens", "heads", "head_dim"))
        if x.shape[0] != 1 or x.shape[1] != query.shape[1]:
            raise ValueError(
                f"{name} needs a batch of 1 and as many tokens in {label} as in query, got {list(x.shape)}"
            )
    if not isinstance(grids, list | tuple):
        raise WrongType(f"{name} expects grids as a list of sizes, got {type(grids).__name__}")
    grids = [tuple(args.integers("grids", grid, rank)) for grid in grids]
    counts = [math.prod(grid) for grid in grids]
    if any(n < 0 for grid in grids for n in grid) or sum(counts) != query.shape[1]:
        raise ValueError(f"{name} got grids of {sum(counts)} tokens in all, but query has {query.shape[1]}")
    samples = []
    for grid, *tensors in zip(grids, *(x.split(counts, 1) for x in (query, key, value))):
        if 0 in grid:
            continue
        tensors = [x.unflatten(1, grid) for x in tensors]
        result = neighborhood_attention_generic(*tensors, kernel_size, **options, return_lse=True)
        samples.append([x.flatten(1, rank) for x in result])
    if not samples:
        samples = [attend_nothing(query, key, value)]
    out, lse = samples[0] if len(samples) == 1 else [torch.cat(parts, 1) for parts in zip(*samples)]
    return (out, lse) if return_lse else out

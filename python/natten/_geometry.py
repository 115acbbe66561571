# SPDX-License-Identifier: MIT
"""What the arguments of a call mean for a grid: windows, strides, dilations and causal flags of its axes, and what is
done about windows that do not fit. Calls repeat, so answers are kept: this is most of what Python does in a call.
"""

import functools
from typing import NamedTuple

import torch

from . import _arguments as args


class Geometry(NamedTuple):
    """Entries per axis stand in the order of the grid, slowest first."""

    axes: tuple  # window, stride, dilation, causal; the last three () for defaults, unless sizes are symbols
    scale: float
    may_be_oversize: bool  # whether the core cuts a window that does not fit, or refuses it
    padding: tuple  # amounts for torch.nn.functional.pad of [batch, *grid, heads, head_dim]; () for none
    looks_heads_first: bool  # see `_looks_heads_first`; always False under torch.compile, which cannot look


def _shortened(window, stride, dilation, causal) -> tuple:
    """With () for a stride, dilation or causal flag that is the default on every axis, as the ops allow."""
    rank = len(window)
    return (
        window,
        () if stride == (1,) * rank else stride,
        () if dilation == (1,) * rank else dilation,
        () if causal == (False,) * rank else causal,
    )


def in_full(window, stride, dilation, causal) -> tuple:
    """Undoes `_shortened`: an entry per axis in all of what the ops were given."""
    rank = len(window)
    return window, stride or (1,) * rank, dilation or (1,) * rank, causal or (False,) * rank


def geometry_of(shape, kernel_size, stride=1, dilation=1, is_causal=False, scale=None, oversize="clamp") -> Geometry:
    """For a query of `shape` [batch, *grid, heads, head_dim]; the others are arguments of the public functions.

    Raises as `natten.functional.neighborhood_attention_generic` does for wrong types, lengths and windows.
    """
    arguments = shape, kernel_size, stride, dilation, is_causal, scale, oversize
    if torch.compiler.is_compiling():
        return _geometry_of(*arguments)
    plain = _is_plain(kernel_size, int) and _is_plain(stride, int) and _is_plain(dilation, int)
    if plain and _is_plain(is_causal, bool) and type(scale) in _NUMBERS and type(shape[-1]) is int:
        try:
            return _kept(*arguments)
        except TypeError:  # a size that is a symbol has no hash, and wrong types are told of below
            pass
    if all(type(size) is int for size in shape):
        return _eager(*arguments)
    return _geometry_of(*arguments)


_NUMBERS = (float, int, type(None))


def _is_plain(value, kind: type) -> bool:
    """Whether a kept answer may serve for `value`: nothing that equals another value but means something else."""
    return type(value) is kind or (type(value) is tuple and all(type(x) is kind for x in value))


def _eager(shape, *arguments) -> Geometry:
    geometry = _geometry_of(shape, *arguments)
    looks_heads_first = _looks_heads_first(shape, geometry.axes[0])
    return geometry._replace(axes=_shortened(*geometry.axes), looks_heads_first=looks_heads_first)


_kept = functools.lru_cache(maxsize=1024, typed=True)(_eager)


def _geometry_of(shape, kernel_size, stride, dilation, is_causal, scale, oversize) -> Geometry:
    extents = shape[1:-2]
    rank = len(extents)
    sizes = args.integers("kernel_size", kernel_size, rank, default=None)
    stride, dilation = args.integers("stride", stride, rank), args.integers("dilation", dilation, rank)
    causal = args.booleans("is_causal", is_causal, rank)
    window = [_window(*axis, oversize) for axis in zip(args.AXES[rank], sizes, extents, dilation, strict=True)]
    whole = [size == -1 for size in sizes]
    strict, padding = oversize == "error", ()
    if strict and any(whole):  # the core is not told which axes fit whatever their length
        strict = False
        refuse_oversize(extents, window, dilation, whole)
    if oversize == "pad":
        padding = _padding(extents, window, dilation, whole)
    scale = args.scale_or_default(scale, shape[-1])
    axes = tuple(window), tuple(stride), tuple(dilation), tuple(causal)
    return Geometry(axes, scale, not strict, padding, looks_heads_first=False)


def _window(axis: str, size, extent, dilation, oversize: str):
    """-1 is the whole axis, that is all of the longest group if it is dilated."""
    if size == -1:
        return max(1, -(-extent // max(1, dilation)))
    if size < 1:
        raise ValueError(f"kernel_size is {size} on axis {axis}: give at least 1, or -1 for the whole axis")
    if size == 1 and oversize == "error":  # the strict mode is that of the original
        raise ValueError(f"kernel_size is 1 on axis {axis}: oversize='error' wants at least 2, drop it to use 1")
    return size


def refuse_oversize(extents, window, dilation, whole) -> None:
    """What the core does for oversize="error", where some axes (-1: `whole`) fit whatever their length."""
    for axis, n, w, d, fits in zip(args.AXES[len(extents)], extents, window, dilation, whole, strict=True):
        if not fits and w * d > n:
            raise ValueError(
                f"kernel_size {w} with dilation {d} needs {w * d} tokens on axis {axis}, but the grid has {n} there: "
                "choose a smaller kernel_size or dilation, or drop oversize='error'"
            )


def _padding(extents, window, dilation, whole) -> tuple:
    """On the far side of every axis that is shorter than window * dilation."""
    axes = zip(extents, window, dilation, whole, strict=True)
    missing = [0 if fits else max(0, w * d - n) for n, w, d, fits in axes]
    if not any(missing):
        return ()
    amounts = [0, 0, 0, 0]  # from the last axis on: head_dim and heads stay
    for n in reversed(missing):
        amounts += [0, n]
    return tuple(amounts)


def _looks_heads_first(shape, window) -> bool:
    """Whether the tensor may be [batch, heads, *grid, head_dim], which would be read with heads for its first axis and
    an axis of the grid for heads. Two signs: the window outgrows that first axis; as many "heads" as the last axis has
    tokens."""
    first, heads = shape[1], shape[-2]
    if heads <= first or first == 0:
        return False
    outgrown = window[0] > first and heads >= max(4 * first, window[-1])
    square = len(window) > 1 and heads == shape[-3] and heads > 2 * first
    return outgrown or square

# SPDX-License-Identifier: MIT
"""Era 0.20: checks of arguments: each returns its argument as a tuple, one entry per axis, or raises ValueError."""

from .. import _arguments as _args
from .._geometry import refuse_oversize as _refuse_oversize
from ..types import KernelSchedule

_SCHEDULES = {
    "non": KernelSchedule.NonPersistent,
    "coop": KernelSchedule.WarpSpecializedCooperative,
    "pp": KernelSchedule.WarpSpecializedPingpong,
}


def _positive(name, na_dim, value):
    if na_dim not in (1, 2, 3):
        raise ValueError(f"na_dim must be 1, 2 or 3, got {na_dim}")
    sizes = tuple(_args.integers(name, value, na_dim))
    if min(sizes) < 1:
        raise ValueError(f"{name} {sizes} must be at least 1 on every axis")
    return sizes


def check_input_size_arg(na_dim, input_size):
    return _positive("input_size", na_dim, input_size)


def check_kernel_size_arg(na_dim, kernel_size):
    if kernel_size is None:
        raise ValueError("kernel_size is None: give a number, or one for each axis")
    return _positive("kernel_size", na_dim, kernel_size)


def check_stride_arg(na_dim, stride):
    return _positive("stride", na_dim, stride)


def check_dilation_arg(na_dim, dilation):
    return _positive("dilation", na_dim, dilation)


def check_causal_arg(na_dim, is_causal):
    return tuple(_args.booleans("is_causal", is_causal, na_dim))


def check_all_args(na_dim, kernel_size, stride, dilation, is_causal):
    """(kernel_size, stride, dilation, is_causal); the strides are at most the windows."""
    window, stride = check_kernel_size_arg(na_dim, kernel_size), check_stride_arg(na_dim, stride)
    if any(s > k for s, k in zip(stride, window)):
        raise ValueError(f"stride {stride} must be at most kernel_size {window} on every axis")
    return window, stride, check_dilation_arg(na_dim, dilation), check_causal_arg(na_dim, is_causal)


def check_args_against_input(input_tensor, kernel_size, stride, dilation, is_causal) -> None:
    """Refuses windows that the grid of [batch, *grid, heads, head_dim] cannot hold, though our operators would cut
    them."""
    grid = input_tensor.shape[1:-2]
    window, _, dilation, _ = check_all_args(len(grid), kernel_size, stride, dilation, is_causal)
    _refuse_oversize(grid, window, dilation, [False] * len(grid))


def check_tile_shape(tile_shape, na_dim=None):
    rank = len(tile_shape) if na_dim is None else na_dim
    return _positive("tile shape", rank, tile_shape)


def check_kernel_schedule(kernel_schedule):
    """A `KernelSchedule` for its name ("non", "coop", "pp"), for itself or for None."""
    if kernel_schedule is None or isinstance(kernel_schedule, KernelSchedule):
        return kernel_schedule
    if kernel_schedule not in _SCHEDULES:
        raise ValueError(f"kernel_schedule is {kernel_schedule!r}: give one of {', '.join(map(repr, _SCHEDULES))}")
    return _SCHEDULES[kernel_schedule]

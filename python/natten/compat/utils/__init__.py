# SPDX-License-Identifier: MIT
"""Era 0.17: checks of arguments, here without stride. `natten.utils.checks` has those of 0.20, with stride."""

import torch

from .. import _arguments as _args
from . import checks, log
from .checks import check_causal_arg, check_dilation_arg, check_kernel_size_arg
from .device import get_device_cc

__all__ = [
    "check_additional_keys",
    "check_additional_values",
    "check_all_args",
    "check_backward_tiling_config",
    "check_causal_arg",
    "check_dilation_arg",
    "check_kernel_size_arg",
    "check_tiling_config",
    "checks",
    "get_device_cc",
    "get_num_na_weights",
    "log",
    "make_attn_tensor_from_input",
]


def check_all_args(na_dim, kernel_size, dilation, is_causal):
    """(kernel_size, dilation, is_causal) as tuples, one entry per axis."""
    return (
        check_kernel_size_arg(na_dim, kernel_size),
        check_dilation_arg(na_dim, dilation),
        check_causal_arg(na_dim, is_causal),
    )


def get_num_na_weights(kernel_size) -> int:
    """Slots of a window."""
    product = 1
    for size in _args.integers("kernel_size", kernel_size, 1 if isinstance(kernel_size, int) else len(kernel_size)):
        product *= size
    return product


def check_tiling_config(na_dim, tiling_config):
    """(q_tile, kv_tile) as tuples."""
    if not isinstance(tiling_config, list | tuple) or len(tiling_config) != 2:
        raise ValueError(f"a tiling config is (q_tile, kv_tile), got {tiling_config!r}")
    return tuple(checks.check_tile_shape(tile, na_dim) for tile in tiling_config)


def check_backward_tiling_config(na_dim, tiling_config):
    """(q_tile, kv_tile, kv_splits, use_pt_delta) with tuples for the first three."""
    if not isinstance(tiling_config, list | tuple) or len(tiling_config) != 4:
        raise ValueError(
            f"a backward tiling config is (q_tile, kv_tile, kv_splits, use_pt_delta), got {tiling_config!r}"
        )
    *shapes, use_pt_delta = tiling_config
    return *(checks.check_tile_shape(shape, na_dim) for shape in shapes), _args.flag("use_pt_delta", use_pt_delta)


def make_attn_tensor_from_input(input_tensor, attention_dim):
    """An attention tensor, not initialised, for queries of [batch, heads, *grid, head_dim]."""
    options = {"dtype": input_tensor.dtype, "device": input_tensor.device, "requires_grad": input_tensor.requires_grad}
    return torch.empty(*input_tensor.shape[:-1], attention_dim, **options)


def check_additional_keys(input_tensor, additional_keys) -> int:
    """How many there are; 0 for None."""
    if additional_keys is None:
        return 0
    batch, heads, dim = input_tensor.shape[0], input_tensor.shape[1], input_tensor.shape[-1]
    if additional_keys.dim() != 4 or (*additional_keys.shape[:2], additional_keys.shape[3]) != (batch, heads, dim):
        raise ValueError(f"additional keys must be [{batch}, {heads}, n, {dim}], got {list(additional_keys.shape)}")
    return additional_keys.shape[2]


def check_additional_values(attn_tensor, additional_values, value, expected_attn_weights) -> int:
    """How many there are; 0 for None. The attention tensor must have slots for them behind those of the window."""
    num_extra = check_additional_keys(value, additional_values)
    if attn_tensor.shape[-1] != expected_attn_weights + num_extra:
        raise ValueError(
            f"attn must have {expected_attn_weights + num_extra} slots, {num_extra} of them for additional values, got "
            f"{attn_tensor.shape[-1]}"
        )
    return num_extra

# SPDX-License-Identifier: MIT
"""Era 0.17: choosing tiles by trial. Here plans are chosen by a model, so the defaults always win."""

from .types import FnaBackwardConfigType, FnaForwardConfigType

__all__ = [
    "autotune_fna",
    "get_default_tiling_config_for_fna_backward",
    "get_default_tiling_config_for_fna_forward",
]

_TILES = {1: (64,), 2: (8, 8), 3: (4, 4, 4)}


def get_default_tiling_config_for_fna_forward(na_dim: int, *arguments) -> FnaForwardConfigType:
    """(q_tile, kv_tile)"""
    return _TILES[na_dim], _TILES[na_dim]


def get_default_tiling_config_for_fna_backward(na_dim: int, *arguments) -> FnaBackwardConfigType:
    """(q_tile, kv_tile, kv_splits, use_pt_delta)"""
    return _TILES[na_dim], _TILES[na_dim], (1,) * na_dim, False


def autotune_fna(na_dim, input_tensor, kernel_size, dilation, is_causal):
    """(forward configuration, backward configuration): the defaults, whatever the problem is."""
    return get_default_tiling_config_for_fna_forward(na_dim), get_default_tiling_config_for_fna_backward(na_dim)

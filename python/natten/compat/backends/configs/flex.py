# SPDX-License-Identifier: MIT
"""Era 0.21: configurations (q_tile, kv_tile) of the forward pass. FlexAttention itself is not used here."""

from ._forms import finder, sizes, tiles

FLEX_FORWARD_TILE_SHAPES = {rank: [tiles(tile)] for rank, tile in {1: (64,), 2: (8, 8), 3: (4, 4, 4)}.items()}
get_all_tile_shapes_forward = finder("flex-fna", tiles)
get_all_tile_sizes_forward = finder("flex-fmha", sizes)

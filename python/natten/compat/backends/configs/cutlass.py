# SPDX-License-Identifier: MIT
"""Era 0.21: configurations (q_tile, kv_tile), backward with kv_splits and use_pt_reduction."""

from ._forms import finder, sizes, tiles

get_all_forward_configs = finder("cutlass-fna", tiles)
get_all_fmha_forward_configs = finder("cutlass-fmha", sizes)
get_all_backward_configs = finder("cutlass-fna", lambda tile: (*tiles(tile), (1,) * len(tile), False), True)
get_all_fmha_backward_configs = finder("cutlass-fmha", lambda tile: (*sizes(tile), 1, False), True)

# SPDX-License-Identifier: MIT
"""Era 0.21: configurations (q_tile, kv_tile) in both passes."""

from ._forms import finder, sizes, tiles

get_all_forward_configs, get_all_fmha_forward_configs = finder("blackwell-fna", tiles), finder("blackwell-fmha", sizes)
get_all_backward_configs = finder("blackwell-fna", tiles, True)
get_all_fmha_backward_configs = finder("blackwell-fmha", sizes, True)

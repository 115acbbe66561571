# SPDX-License-Identifier: MIT
"""Era 0.21: configurations ((q_tile, kv_tile), kernel_schedule), backward (q_tile, kv_tile)."""

from ...types import KernelSchedule
from ._forms import finder, sizes, tiles

get_all_forward_configs = finder("hopper-fna", lambda tile: (tiles(tile), KernelSchedule.NonPersistent))
get_all_fmha_forward_configs = finder("hopper-fmha", lambda tile: (sizes(tile), KernelSchedule.NonPersistent))
get_all_backward_configs = finder("hopper-fna", tiles, True)
get_all_fmha_backward_configs = finder("hopper-fmha", sizes, True)

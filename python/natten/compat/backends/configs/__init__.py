# SPDX-License-Identifier: MIT
"""Era 0.21: `get_configs_for_*`: what may be given back as tile arguments, the tiles of our plans. Plans choose them
themselves, so given back they change nothing. There are none where a backend cannot run.
"""

from . import cutlass, cutlass_blackwell, cutlass_hopper, flex

_BACKENDS = {"cutlass": cutlass, "cutlass_hopper": cutlass_hopper, "cutlass_blackwell": cutlass_blackwell}


def _finder(find):
    def get_configs(query, key, value):
        return find(query)

    return get_configs


for _name, _backend in _BACKENDS.items():
    globals()[f"get_configs_for_{_name}_fna"] = _finder(_backend.get_all_forward_configs)
    globals()[f"get_configs_for_{_name}_fmha"] = _finder(_backend.get_all_fmha_forward_configs)
    globals()[f"get_bwd_configs_for_{_name}_fna"] = _finder(_backend.get_all_backward_configs)
    globals()[f"get_bwd_configs_for_{_name}_fmha"] = _finder(_backend.get_all_fmha_backward_configs)
get_configs_for_flex_fna = _finder(flex.get_all_tile_shapes_forward)
get_configs_for_flex_fmha = _finder(flex.get_all_tile_sizes_forward)

__all__ = [name for name in globals() if name.startswith("get_")]

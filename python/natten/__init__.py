# SPDX-License-Identifier: MIT
"""Neighborhood attention for torch, on CPU and GPU: every query attends to the keys nearest to it.

Start with `na1d`, `na2d`, `na3d` (tensors, heads last) or `NeighborhoodAttention1D`, `...2D`, `...3D` (layers).
"""

from . import _legacy, context, functional, modules, unfused
from ._library import HAS_LIBNATTEN
from ._version import __version__
from .context import (
    allow_flex_compile,
    allow_flex_compile_backprop,
    are_deterministic_algorithms_enabled,
    disable_flex_compile,
    disable_flex_compile_backprop,
    get_memory_usage_preference,
    is_flex_compile_allowed,
    is_flex_compile_backprop_allowed,
    is_kv_parallelism_in_fused_na_enabled,
    is_memory_usage_default,
    is_memory_usage_strict,
    is_memory_usage_unrestricted,
    set_memory_usage_preference,
    use_deterministic_algorithms,
    use_kv_parallelism_in_fused_na,
)
from .functional import attention, merge_attentions, na1d, na2d, na3d
from .modules import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .plans import list_plans, list_rejections
from .unfused import indices

__all__ = [
    "HAS_LIBNATTEN",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "__version__",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "attention",
    "context",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "functional",
    "get_memory_usage_preference",
    "indices",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "list_plans",
    "list_rejections",
    "merge_attentions",
    "modules",
    "na1d",
    "na2d",
    "na3d",
    "set_memory_usage_preference",
    "unfused",
    "use_deterministic_algorithms",
    "use_kv_parallelism_in_fused_na",
]

# NOTE: in front, for behind it the library beside this file, libnatten.so, would be taken for the module libnatten.
__path__.insert(0, _legacy.FOLDER)


def __getattr__(name: str):
    return _legacy.attribute(__name__, name)

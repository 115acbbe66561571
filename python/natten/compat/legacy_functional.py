# SPDX-License-Identifier: MIT
"""Eras 0.13 to 0.17: unfused operators under their older names, as `natten.functional.X`.

    natten{1,2}dqkrpb  0.14.1 (query, key, rpb, dilation)   0.14.5 (query, key, rpb, kernel_size, dilation)
    natten{1,2}dav     0.14.1 (attn, value, dilation)       0.14.6 (attn, value, kernel_size, dilation)
    natten{1,2}dqk                                          0.14.6 (query, key, kernel_size, dilation)
    natten3d*, na3d_qk_with_bias                            0.15 (..., kernel_size_d, kernel_size, dilation_d, dilation)

A form without kernel_size takes it from the table (2 * kernel_size - 1 entries) or from the slots of `attn`. Tensors
have their heads before the grid, nothing is scaled, and there are no additional keys.
"""

from . import functional as _functional
from . import unfused as _unfused
from .unfused import na1d_av, na1d_qk, na2d_av, na2d_qk, na3d_av, na3d_qk

__all__ = [
    "FusedNeighborhoodAttention1D",
    "FusedNeighborhoodAttention2D",
    "FusedNeighborhoodAttention3D",
    "NATTEN1DAVFunction",
    "NATTEN1DQKRPBFunction",
    "NATTENAVFunction",
    "NATTENQKRPBFunction",
    "NeighborhoodAttention1DAVAutogradFunction",
    "NeighborhoodAttention1DQKAutogradFunction",
    "NeighborhoodAttention2DAVAutogradFunction",
    "NeighborhoodAttention2DQKAutogradFunction",
    "NeighborhoodAttention3DAVAutogradFunction",
    "NeighborhoodAttention3DQKAutogradFunction",
    "na1d_qk_with_bias",
    "na2d_qk_with_bias",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]


def _sizes(name, given, kernel_size, dilation, default):
    """(kernel_size, dilation) of a call whose last arguments are [kernel_size,] dilation; `default()` if it has no
    kernel_size."""
    if len(given) > 2:
        raise TypeError(f"{name}() takes kernel_size and dilation after its tensors, got {len(given)} more arguments")
    if len(given) == 2:
        if kernel_size is not None or dilation is not None:
            raise TypeError(f"{name}() got kernel_size or dilation twice")
        return given
    if len(given) == 1 and kernel_size is None and dilation is None:
        return default(), given[0]
    if len(given) == 1:
        if kernel_size is not None and dilation is not None:
            raise TypeError(f"{name}() got kernel_size or dilation twice")
        return (given[0], dilation) if kernel_size is None else (kernel_size, given[0])
    return default() if kernel_size is None else kernel_size, 1 if dilation is None else dilation


def _window_of_table(name, rpb):
    def window():
        if rpb is None:
            raise TypeError(f"{name}() without rpb needs kernel_size and dilation")
        return [(n + 1) // 2 for n in rpb.shape[1:]]

    return window


def _window_of_slots(name, attn, rank):
    def window():
        size = round(attn.shape[-1] ** (1 / rank))
        if size**rank != attn.shape[-1]:
            raise ValueError(
                f"{name}() without kernel_size takes it from the last axis of attn, but {attn.shape[-1]} is not "
                f"a window of {rank} equal axes: give kernel_size"
            )
        return size

    return window


def natten1dqkrpb(query, key, rpb, *sizes, kernel_size=None, dilation=None):
    sizes = _sizes("natten1dqkrpb", sizes, kernel_size, dilation, _window_of_table("natten1dqkrpb", rpb))
    return na1d_qk(query, key, *sizes, rpb=rpb)


def natten2dqkrpb(query, key, rpb, *sizes, kernel_size=None, dilation=None):
    sizes = _sizes("natten2dqkrpb", sizes, kernel_size, dilation, _window_of_table("natten2dqkrpb", rpb))
    return na2d_qk(query, key, *sizes, rpb=rpb)


def natten3dqkrpb(query, key, rpb, kernel_size_d, kernel_size, dilation_d, dilation):
    return na3d_qk(query, key, *_sizes_3d(kernel_size_d, kernel_size, dilation_d, dilation), rpb=rpb)


def natten1dqk(query, key, kernel_size, dilation=1):
    return na1d_qk(query, key, kernel_size, dilation)


def natten2dqk(query, key, kernel_size, dilation=1):
    return na2d_qk(query, key, kernel_size, dilation)


def natten3dqk(query, key, kernel_size_d, kernel_size, dilation_d, dilation):
    return na3d_qk(query, key, *_sizes_3d(kernel_size_d, kernel_size, dilation_d, dilation))


def natten1dav(attn, value, *sizes, kernel_size=None, dilation=None):
    sizes = _sizes("natten1dav", sizes, kernel_size, dilation, _window_of_slots("natten1dav", attn, 1))
    return na1d_av(attn, value, *sizes)


def natten2dav(attn, value, *sizes, kernel_size=None, dilation=None):
    sizes = _sizes("natten2dav", sizes, kernel_size, dilation, _window_of_slots("natten2dav", attn, 2))
    return na2d_av(attn, value, *sizes)


def natten3dav(attn, value, kernel_size_d, kernel_size, dilation_d, dilation):
    return na3d_av(attn, value, *_sizes_3d(kernel_size_d, kernel_size, dilation_d, dilation))


def _sizes_3d(kernel_size_d, kernel_size, dilation_d, dilation):
    return (kernel_size_d, kernel_size, kernel_size), (dilation_d, dilation, dilation)


# --- 0.15: bias as an argument of its own ----------------------------------------------------------------------------


def na1d_qk_with_bias(query, key, bias, kernel_size, dilation=1):
    return na1d_qk(query, key, kernel_size, dilation, rpb=bias)


def na2d_qk_with_bias(query, key, bias, kernel_size, dilation=1):
    return na2d_qk(query, key, kernel_size, dilation, rpb=bias)


def na3d_qk_with_bias(query, key, bias, kernel_size_d, kernel_size, dilation_d=1, dilation=1):
    return na3d_qk(query, key, *_sizes_3d(kernel_size_d, kernel_size, dilation_d, dilation), rpb=bias)


# --- autograd functions: our ops differentiate themselves, so `apply` is all that is left of them ---------------------


def _function(name: str, era: str, call):
    return type(name, (), {"__doc__": f"natten {era}: `apply` alone.", "apply": staticmethod(call)})


def _qk_function(rank):
    def apply(query, key, bias, additional_keys, kernel_size, dilation, is_causal):
        return getattr(_unfused, f"na{rank}d_qk")(query, key, kernel_size, dilation, additional_keys, is_causal, bias)

    return _function(f"NeighborhoodAttention{rank}DQKAutogradFunction", "0.17", apply)


def _av_function(rank):
    def apply(attn, value, additional_values, kernel_size, dilation, is_causal):
        return getattr(_unfused, f"na{rank}d_av")(attn, value, kernel_size, dilation, additional_values, is_causal)

    return _function(f"NeighborhoodAttention{rank}DAVAutogradFunction", "0.17", apply)


def _fused_function(rank):
    def apply(query, key, value, bias, kernel_size, dilation, is_causal, scale, *tiling_configs):
        options = {"dilation": dilation, "is_causal": is_causal, "rpb": bias, "scale": scale}
        return getattr(_functional, f"na{rank}d")(query, key, value, kernel_size, **options)

    return _function(f"FusedNeighborhoodAttention{rank}D", "0.17", apply)


NeighborhoodAttention1DQKAutogradFunction = _qk_function(1)
NeighborhoodAttention2DQKAutogradFunction = _qk_function(2)
NeighborhoodAttention3DQKAutogradFunction = _qk_function(3)
NeighborhoodAttention1DAVAutogradFunction = _av_function(1)
NeighborhoodAttention2DAVAutogradFunction = _av_function(2)
NeighborhoodAttention3DAVAutogradFunction = _av_function(3)
FusedNeighborhoodAttention1D = _fused_function(1)
FusedNeighborhoodAttention2D = _fused_function(2)
FusedNeighborhoodAttention3D = _fused_function(3)
NATTENQKRPBFunction = _function("NATTENQKRPBFunction", "0.13", natten2dqkrpb)
NATTENAVFunction = _function("NATTENAVFunction", "0.13", natten2dav)
NATTEN1DQKRPBFunction = _function("NATTEN1DQKRPBFunction", "0.13", natten1dqkrpb)
NATTEN1DAVFunction = _function("NATTEN1DAVFunction", "0.13", natten1dav)

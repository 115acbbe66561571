# SPDX-License-Identifier: MIT
"""Layers of eras 0.11 to 0.17 by the modules that had them. Each is a layer of ours behind the constructor of its time:

    of 0.13    natten.nattencuda{1,2}d   (dim, kernel_size, num_heads, qkv_bias, qk_scale, attn_drop, ..., dilation)
    of 0.14.6  natten.natten{1,2,3}d     (dim, num_heads, kernel_size, dilation, bias, qkv_bias, ...), 3-D with *_d
    of 0.17    natten.na{1,2,3}d         (dim, num_heads, kernel_size, dilation, is_causal, rel_pos_bias, ...)

Up to 0.15 the input is padded up to the window. `natten.NeighborhoodAttention2D` itself is that of 0.20 and later.
"""

import warnings

from torch import nn

from . import modules
from .nattentorch2d import LegacyNeighborhoodAttention2D


class _Unpickled:
    """Restores a layer that was pickled by the original: older layers lack what ours keep beside the parameters."""

    def __setstate__(self, state):
        nn.Module.__setstate__(self, state)
        rank, old = self.rank, self.__dict__
        for name, default in (("kernel_size", None), ("stride", 1), ("dilation", 1), ("is_causal", False)):
            value = old.get(name, default)
            old[name] = tuple(value) if isinstance(value, list | tuple) else (value or default,) * rank
        if "embed_dim" not in old:
            old["embed_dim"] = old["num_heads"] * old["head_dim"]
            old["oversize"] = None
            old["_default_oversize"] = self._oversize_of_era
        if "rpb" not in old.get("_parameters", {}):
            self.register_parameter("rpb", None)


def _check_window(kernel_size, dilation, sizes=None):
    """The assertions of 0.14 and before."""
    assert kernel_size > 1 and kernel_size % 2 == 1, f"kernel_size must be odd and greater than 1, got {kernel_size}"
    assert sizes is None or kernel_size in sizes, f"kernel_size must be one of {sizes}, got {kernel_size}"
    assert dilation is None or isinstance(dilation, str) or dilation >= 1, (
        f"dilation must be at least 1, got {dilation}"
    )


class _Of013(_Unpickled):
    _oversize_of_era = "pad"
    _sizes = None

    def __init__(
        self,
        dim,
        kernel_size,
        num_heads,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
        dilation=None,
    ):
        _check_window(kernel_size, dilation, self._sizes)
        fills = isinstance(dilation, str)
        options = {"attn_drop": attn_drop, "proj_drop": proj_drop, "bias": True}
        super().__init__(dim, num_heads, kernel_size, 1, 1 if fills else dilation, None, qkv_bias, qk_scale, **options)
        self.fills_input = fills
        self.window_size = kernel_size * self.dilation[0]

    def forward(self, x):
        if getattr(self, "fills_input", False):  # a dilation in words, such as "maximum": as large as the input allows
            size = max(min(x.shape[1:-1]) // self.kernel_size[0], 1)
            self.dilation = (size,) * self.rank
        return super().forward(x)


class NeighborhoodAttention1DOf013(_Of013, modules.NeighborhoodAttention1D):
    """natten 0.11 to 0.14.4."""


class NeighborhoodAttention2DOf013(_Of013, modules.NeighborhoodAttention2D):
    """natten 0.11 to 0.14.4."""

    _sizes = (3, 5, 7, 9, 11, 13)


class _Of0146(_Unpickled):
    _oversize_of_era = "pad"

    def __init__(
        self,
        dim,
        num_heads,
        kernel_size,
        dilation=1,
        bias=True,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
    ):
        _check_window(kernel_size, dilation)
        options = {"attn_drop": attn_drop, "proj_drop": proj_drop, "bias": bias}
        super().__init__(dim, num_heads, kernel_size, 1, dilation, None, qkv_bias, qk_scale, **options)
        self.window_size = kernel_size * self.dilation[0]


class NeighborhoodAttention1DOf0146(_Of0146, modules.NeighborhoodAttention1D):
    """natten 0.14.5 to 0.15."""


class NeighborhoodAttention2DOf0146(_Of0146, modules.NeighborhoodAttention2D):
    """natten 0.14.5 to 0.15."""


class NeighborhoodAttention3DOf015(_Unpickled, modules.NeighborhoodAttention3D):
    """natten 0.15: one kernel_size and dilation for height and width, another for depth."""

    _oversize_of_era = "pad"

    def __init__(
        self,
        dim,
        num_heads,
        kernel_size,
        kernel_size_d=None,
        dilation=1,
        dilation_d=None,
        bias=True,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
    ):
        depth = kernel_size if kernel_size_d is None else kernel_size_d
        dilation = 1 if dilation is None else dilation
        dilation_d = dilation if dilation_d is None else dilation_d
        _check_window(kernel_size, dilation)
        _check_window(depth, dilation_d)
        window, dilations = (depth, kernel_size, kernel_size), (dilation_d, dilation, dilation)
        options = {"attn_drop": attn_drop, "proj_drop": proj_drop, "bias": bias}
        super().__init__(dim, num_heads, window, 1, dilations, None, qkv_bias, qk_scale, **options)


class _Of017(_Unpickled):
    _oversize_of_era = "clamp"

    def __init__(
        self,
        dim,
        num_heads,
        kernel_size,
        dilation=1,
        is_causal=False,
        rel_pos_bias=False,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
        use_experimental_ops=False,
    ):
        options = {"attn_drop": attn_drop, "proj_drop": proj_drop, "rel_pos_bias": rel_pos_bias}
        super().__init__(dim, num_heads, kernel_size, 1, dilation, is_causal, qkv_bias, qk_scale, **options)


class NeighborhoodAttention1DOf017(_Of017, modules.NeighborhoodAttention1D):
    """natten 0.17."""


class NeighborhoodAttention2DOf017(_Of017, modules.NeighborhoodAttention2D):
    """natten 0.17."""


class NeighborhoodAttention3DOf017(_Of017, modules.NeighborhoodAttention3D):
    """natten 0.17."""


def _deprecated(name: str, base: type, instead: str):
    def __init__(self, *args, **kwargs):
        warnings.warn(f"{name} is deprecated since natten 0.13: use {instead}", DeprecationWarning, stacklevel=2)
        base.__init__(self, *args, **kwargs)

    return type(name, (base,), {"__init__": __init__, "__doc__": f"The name of {instead} up to natten 0.12."})


NeighborhoodAttention = _deprecated("NeighborhoodAttention", NeighborhoodAttention2DOf013, "NeighborhoodAttention2D")
LegacyNeighborhoodAttention = _deprecated(
    "LegacyNeighborhoodAttention", LegacyNeighborhoodAttention2D, "LegacyNeighborhoodAttention2D"
)

# SPDX-License-Identifier: MIT
"""Eras 0.11 to 0.13: the size of a model, in the units that papers use (a GFLOP counts multiply-adds)."""

import torch

from .flops import get_flops

__all__ = ["get_gflops", "get_imagenet_gflops", "get_mparams"]


def get_gflops(model, input, disable_warnings=False):
    """Multiply-adds for `input`, in units of 10^9. Needs fvcore."""
    return get_flops(model, input, disable_warnings) / 1e9


def get_imagenet_gflops(model, img_size=224, disable_warnings=False, device="cpu"):
    """Multiply-adds for a square picture, in units of 10^9. Needs fvcore."""
    return get_gflops(model, torch.randn(1, 3, img_size, img_size, device=device), disable_warnings)


def get_mparams(model, **kwargs):
    """Parameters that are trained, in units of 10^6."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6

# SPDX-License-Identifier: MIT
"""Eras 0.11 and 0.12, deprecated in 0.13: the layer under its first name."""

from .legacy_modules import NeighborhoodAttention

__all__ = ["NeighborhoodAttention"]

# SPDX-License-Identifier: MIT
"""Eras 0.14.5 to 0.15: where the layer of rank 1 was."""

from .legacy_modules import NeighborhoodAttention1DOf0146 as NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]

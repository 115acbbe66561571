# SPDX-License-Identifier: MIT
"""Eras 0.14.5 to 0.15: where the layer of rank 2 was."""

from .legacy_modules import NeighborhoodAttention2DOf0146 as NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]

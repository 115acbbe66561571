# SPDX-License-Identifier: MIT
"""Era 0.15: where the layer of rank 3 was."""

from .legacy_modules import NeighborhoodAttention3DOf015 as NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]

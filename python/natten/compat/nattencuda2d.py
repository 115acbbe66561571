# SPDX-License-Identifier: MIT
"""Eras 0.11 to 0.14.1: the layer on a plane, and its autograd functions."""

from .legacy_functional import NATTENAVFunction, NATTENQKRPBFunction
from .legacy_modules import NeighborhoodAttention2DOf013 as NeighborhoodAttention2D

__all__ = ["NATTENAVFunction", "NATTENQKRPBFunction", "NeighborhoodAttention2D"]

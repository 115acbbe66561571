# SPDX-License-Identifier: MIT
"""Eras 0.12 to 0.14.1: the layer on a line, and its autograd functions."""

from .legacy_functional import NATTEN1DAVFunction, NATTEN1DQKRPBFunction
from .legacy_modules import NeighborhoodAttention1DOf013 as NeighborhoodAttention1D

__all__ = ["NATTEN1DAVFunction", "NATTEN1DQKRPBFunction", "NeighborhoodAttention1D"]

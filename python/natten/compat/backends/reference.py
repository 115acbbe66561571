# SPDX-License-Identifier: MIT
"""Era 0.21: the fused operators by the oracle: plain loops, sums in double. Tests of others compare with it."""

from . import _fused

__all__ = ["na1d_reference", "na2d_reference", "na3d_reference", "reference_fna_generic"]

reference_fna_generic = _fused("reference", "neighborhood_attention_generic")
na1d_reference, na2d_reference, na3d_reference = (_fused("reference", f"na{rank}d") for rank in (1, 2, 3))

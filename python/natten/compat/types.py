# SPDX-License-Identifier: MIT
"""Eras 0.17 to 0.21: types of arguments, for annotations."""

import enum
from collections.abc import Sequence

NoneType = type(None)

Dimension1DType = tuple[int]
Dimension2DType = tuple[int, int]
Dimension3DType = tuple[int, int, int]
DimensionType = Dimension1DType | Dimension2DType | Dimension3DType
DimensionTypeOrDed = int | Sequence[int]
Dimension1DTypeOrDed = int | Sequence[int] | Dimension1DType
Dimension2DTypeOrDed = int | Sequence[int] | Dimension2DType
Dimension3DTypeOrDed = int | Sequence[int] | Dimension3DType

CausalArg1DType = tuple[bool]
CausalArg2DType = tuple[bool, bool]
CausalArg3DType = tuple[bool, bool, bool]
CausalArgType = CausalArg1DType | CausalArg2DType | CausalArg3DType
CausalArgTypeOrDed = bool | Sequence[bool]
CausalArg1DTypeOrDed = bool | Sequence[bool] | CausalArg1DType
CausalArg2DTypeOrDed = bool | Sequence[bool] | CausalArg2DType
CausalArg3DTypeOrDed = bool | Sequence[bool] | CausalArg3DType

FnaTileShapeType = DimensionType
FnaForwardConfigType = tuple[FnaTileShapeType, FnaTileShapeType]  # q_tile, kv_tile
FnaBackwardConfigType = tuple[FnaTileShapeType, FnaTileShapeType, DimensionType, bool]  # and kv_splits, use_pt_delta


class KernelSchedule(enum.Enum):
    """How warps share work, in the original's kernels for Hopper; accepted as `kernel_schedule`."""

    NonPersistent = 0
    WarpSpecializedCooperative = 1
    WarpSpecializedPingpong = 2


def create_dim_from_int(na_dim: int, value: int) -> DimensionType:
    """`value` for each of `na_dim` axes."""
    return _for_all_axes(na_dim, value)


def create_causal_arg_from_bool(na_dim: int, value: bool) -> CausalArgType:
    """`value` for each of `na_dim` axes."""
    return _for_all_axes(na_dim, value)


def _for_all_axes(na_dim, value):
    if na_dim not in (1, 2, 3):
        raise ValueError(f"na_dim must be 1, 2 or 3, got {na_dim}")
    return (value,) * na_dim

# SPDX-License-Identifier: MIT
"""Eras 0.17.4 and 0.17.5: the fused operators as ops that torch.compile keeps whole. Ours are such ops anyway, with
gradients; here they have the positional order of that time.
"""

from . import functional

__all__ = [name for rank in (1, 2, 3) for name in (f"na{rank}d", f"na{rank}d_forward_op")]


def na1d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
    return functional.na1d(query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb, scale=scale)


def na2d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
    return functional.na2d(query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb, scale=scale)


def na3d(query, key, value, kernel_size, dilation=1, is_causal=False, rpb=None, scale=None):
    return functional.na3d(query, key, value, kernel_size, dilation=dilation, is_causal=is_causal, rpb=rpb, scale=scale)


na1d_forward_op, na2d_forward_op, na3d_forward_op = na1d, na2d, na3d

# SPDX-License-Identifier: MIT
"""Eras 0.15 to 0.17: products of queries with additional keys, and of their weights with additional values.

Plain matrix products: `query` is [batch, heads, *grid, head_dim], `key` [batch, heads, n, head_dim], the result
[batch, heads, *grid, n]. The unfused operators do this by themselves when they are given additional keys.
"""

import torch

__all__ = ["av_cross_backward", "av_cross_forward", "qk_cross_backward", "qk_cross_forward"]


def _written(result, out):
    return result if out is None else out.copy_(result)


def _product(x, y):
    """[batch, heads, *grid, m] x [batch, heads, m, n], as one matrix product per head."""
    return torch.matmul(x.flatten(2, -2), y).reshape(*x.shape[:-1], y.shape[-1])


def qk_cross_forward(query, key, out=None):
    """Logits of additional keys; written to `out` if that is given, such as the end of an attention tensor."""
    return _written(_product(query, key.transpose(-2, -1)), out)


def qk_cross_backward(query, d_attn, key, d_query=None, d_key=None):
    """(d_query, d_key), written to the tensors of that name if they are given."""
    return (
        _written(_product(d_attn, key), d_query),
        _written(torch.matmul(d_attn.flatten(2, -2).transpose(-2, -1), query.flatten(2, -2)), d_key),
    )


def av_cross_forward(attn, value, output=None):
    """Values weighted by the slots of additional values."""
    return _written(_product(attn, value), output)


def av_cross_backward(d_out, value, attn, d_attn=None, d_value=None):
    """(d_attn, d_value), written to the tensors of that name if they are given."""
    return (
        _written(_product(d_out, value.transpose(-2, -1)), d_attn),
        _written(torch.matmul(attn.flatten(2, -2).transpose(-2, -1), d_out.flatten(2, -2)), d_value),
    )

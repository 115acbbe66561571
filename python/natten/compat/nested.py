# SPDX-License-Identifier: MIT
"""Eras 0.15 to 0.17: unfused operators on nested tensors, one grid of its own per sample.

`natten.functional.na*d_qk` and `na*d_av` come here by themselves when they are given nested tensors (torch.nested, of
strided layout). Samples are [heads, *grid, head_dim]; gradients flow, which they did not in the original.
"""

import torch

from . import functional

__all__ = [f"na{rank}d_{part}_nested" for rank in (1, 2, 3) for part in ("qk", "av")]


def _samples(name, label, x, number=None):
    if not x.is_nested:
        raise ValueError(f"{name} got nested tensors and {label}, which is not nested: nest all of them or none")
    samples = x.unbind()
    if number not in (None, len(samples)):
        raise ValueError(f"{name} got {number} samples, but {label} has {len(samples)}")
    return [sample[None] for sample in samples]


def _each(operator, first, second, additional, names, call):
    name = f"{operator}_nested"
    samples = _samples(name, names[0], first)
    others = _samples(name, names[1], second, len(samples))
    extras = [None] * len(samples)
    if additional is not None:
        extras = _samples(name, names[2], additional, len(samples))
    results = [call(*sample) for sample in zip(samples, others, extras)]
    return torch.nested.as_nested_tensor([result[0] for result in results])


def _qk(rank, query, key, kernel_size, dilation, additional_keys, is_causal, rpb):
    operator = f"na{rank}d_qk"
    if rpb is not None and rpb.is_nested:
        raise ValueError(f"{operator}_nested takes one relative position bias for all samples, not a nested one")

    def call(q, k, extra):
        return getattr(functional, operator)(q, k, kernel_size, dilation, extra, is_causal, rpb)

    return _each(operator, query, key, additional_keys, ("query", "key", "additional_keys"), call)


def _av(rank, attn, value, kernel_size, dilation, additional_values, is_causal):
    operator = f"na{rank}d_av"

    def call(a, v, extra):
        return getattr(functional, operator)(a, v, kernel_size, dilation, extra, is_causal)

    return _each(operator, attn, value, additional_values, ("attn", "value", "additional_values"), call)


def na1d_qk_nested(query, key, bias, kernel_size, dilation, additional_keys=None, is_causal=False):
    return _qk(1, query, key, kernel_size, dilation, additional_keys, is_causal, bias)


def na2d_qk_nested(query, key, bias, kernel_size, dilation, additional_keys=None, is_causal=False):
    return _qk(2, query, key, kernel_size, dilation, additional_keys, is_causal, bias)


def na3d_qk_nested(query, key, bias, kernel_size, dilation, additional_keys=None, is_causal=False):
    return _qk(3, query, key, kernel_size, dilation, additional_keys, is_causal, bias)


def na1d_av_nested(attn, value, kernel_size, dilation, additional_values=None, is_causal=False):
    return _av(1, attn, value, kernel_size, dilation, additional_values, is_causal)


def na2d_av_nested(attn, value, kernel_size, dilation, additional_values=None, is_causal=False):
    return _av(2, attn, value, kernel_size, dilation, additional_values, is_causal)


def na3d_av_nested(attn, value, kernel_size, dilation, additional_values=None, is_causal=False):
    return _av(3, attn, value, kernel_size, dilation, additional_values, is_causal)

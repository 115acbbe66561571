# SPDX-License-Identifier: MIT
"""Joins attention over disjoint sets of keys, as if it had been one softmax over all of them."""

import torch

from ._errors import WrongType


def merge_attentions(outputs, lse_tensors, torch_compile=True, use_autograd_fix=True):
    """The attention over the union of the branches' keys.

    A pure function: nothing is written into its arguments, and gradients flow to every output and every lse, for any
    number of branches. Computed in float32 (float64 for float64), relative to the largest lse, so nothing overflows.

    Args:
        outputs: at least two tensors [..., heads, head_dim] of one shape, such as [batch, tokens, heads, head_dim].
        lse_tensors: one [..., heads] for each: natural logarithm of its softmax's denominator; -inf if it has no key.
        torch_compile, use_autograd_fix: accepted for the original's clients; they do not change the result.

    Returns:
        out [..., heads, head_dim] in the dtype of outputs[0], and lse [..., heads] in float32 (float64 for float64).
        Where no branch has a key, out is 0, lse is -inf and all gradients are 0.

    Raises:
        TypeError: not two lists of tensors. ValueError: fewer than two branches, or lengths, shapes or devices that
        disagree.
    """
    _check(outputs, lse_tensors)
    dtype = torch.float64 if outputs[0].dtype == torch.float64 else torch.float32
    lses = torch.stack([lse.to(dtype) for lse in lse_tensors])
    # NOTE: a shift cancels in value and derivative, so it may be detached; -inf - (-inf) must not happen.
    shift = lses.detach().amax(0)
    shift = torch.where(shift == -torch.inf, 0, shift)
    weights = torch.exp(lses - shift)
    total = weights.sum(0)
    empty = total == 0
    total = torch.where(empty, 1, total)
    lse = torch.where(empty, -torch.inf, shift + total.log())
    weights = (weights / total)[..., None]
    # NOTE: a sum, not a stack: one float32 copy at a time. A branch without keys may hold anything, NaN included.
    absent = (lses == -torch.inf)[..., None]
    out = sum(torch.where(gone, 0, x).to(dtype) * w for x, gone, w in zip(outputs, absent, weights, strict=True))
    return out.to(outputs[0].dtype), lse


def _check(outputs, lse_tensors) -> None:
    for name, xs in (("outputs", outputs), ("lse_tensors", lse_tensors)):
        if not isinstance(xs, list | tuple) or not all(isinstance(x, torch.Tensor) for x in xs):
            raise WrongType(f"merge_attentions expects {name} as a list of tensors")
    if len(outputs) < 2:
        raise ValueError(f"merge_attentions needs at least 2 outputs, got {len(outputs)}")
    if len(outputs) != len(lse_tensors):
        raise ValueError(
            f"merge_attentions got {len(outputs)} outputs but {len(lse_tensors)} lse tensors: give one for each"
        )
    first = outputs[0]
    for i, (out, lse) in enumerate(zip(outputs, lse_tensors, strict=True)):
        if out.dim() < 2 or out.shape != first.shape:
            raise ValueError(
                f"merge_attentions needs outputs of one shape: {list(first.shape)} and {list(out.shape)} (no. {i})"
            )
        if lse.shape != first.shape[:-1]:
            raise ValueError(
                f"merge_attentions expects lse [..., heads] beside output [..., heads, head_dim]: "
                f"lse {i} is {list(lse.shape)}, not {list(first.shape[:-1])}"
            )
        if out.device != first.device or lse.device != first.device:
            raise ValueError(f"merge_attentions needs one device: branch {i} is not on {first.device}")

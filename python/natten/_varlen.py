# SPDX-License-Identifier: MIT
"""Dense attention over samples of different lengths, packed one behind the other into a batch of 1."""

import itertools

import torch

from ._errors import WrongType


def sample_bounds(query, key, seqlens_q, seqlens_kv, cumulative_q, cumulative_kv, max_q, max_kv):
    """(bounds of the samples in `query`, in `key`), lists that begin with 0; None if no argument asks for samples."""
    lengths, sums, maxima = (seqlens_q, seqlens_kv), (cumulative_q, cumulative_kv), (max_q, max_kv)
    if all(x is None for x in (*lengths, *sums, *maxima)):
        return None
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "attention over packed samples reads their lengths, which torch.compile cannot: call it outside"
        )
    by_lengths = all(x is not None for x in lengths) and all(x is None for x in (*sums, *maxima))
    by_sums = all(x is not None for x in (*sums, *maxima)) and all(x is None for x in lengths)
    if not by_lengths and not by_sums:
        raise ValueError(
            "attention over packed samples needs either seqlens_Q and seqlens_KV, or all of cumulative_seqlen_Q, "
            "cumulative_seqlen_KV, max_seqlen_Q and max_seqlen_KV"
        )
    if query.shape[0] != 1:
        raise ValueError(
            f"attention over packed samples needs a batch of 1, got {query.shape[0]}: pack them along the tokens"
        )
    sides = []
    for side, tensor, given, longest in (
        ("Q", query, lengths[0] if by_lengths else sums[0], max_q),
        ("KV", key, lengths[1] if by_lengths else sums[1], max_kv),
    ):
        name = f"seqlens_{side}" if by_lengths else f"cumulative_seqlen_{side}"
        values = _integers(name, given)
        bounds = [0, *itertools.accumulate(values)] if by_lengths else values
        _check_bounds(name, bounds, tensor.shape[1])
        if by_sums:
            _check_longest(f"max_seqlen_{side}", longest, bounds)
        sides.append(bounds)
    if len(sides[0]) != len(sides[1]):
        raise ValueError(f"attention got {len(sides[0]) - 1} samples of queries but {len(sides[1]) - 1} of keys")
    return sides


def _integers(name: str, given) -> list[int]:
    values = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(values, list | tuple) or not all(type(x) is int for x in values):
        raise WrongType(f"{name} must be a 1-D integer tensor or a list of integers")
    return list(values)


def _check_bounds(name: str, bounds: list[int], tokens: int) -> None:
    if not bounds or bounds[0] != 0 or any(b < a for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name} must describe samples of length 0 or more, one behind the other from token 0 on")
    if bounds[-1] > tokens:
        raise ValueError(
            f"{name} adds up to {bounds[-1]} tokens, but the tensor has {tokens}: pack all samples into it"
        )


def _check_longest(name: str, longest, bounds: list[int]) -> None:
    if type(longest) is not int:
        raise WrongType(f"{name} must be an int, got {type(longest).__name__}")
    needed = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    if longest < needed:
        raise ValueError(f"{name} is {longest}, but the longest sample has {needed} tokens")


def attend_samples(attend, query, key, value, bounds_q, bounds_kv):
    """`attend(q, k, v) -> (out, lse)` for each sample. Tokens behind the last one count as queries without keys."""
    outs, lses = [], []
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(bounds_q), itertools.pairwise(bounds_kv), strict=True):
        if q1 > q0:
            out, lse = attend(query[:, q0:q1], key[:, k0:k1], value[:, k0:k1])
            outs.append(out)
            lses.append(lse)
    end = bounds_q[-1]
    if end < query.shape[1] or not outs:
        out, lse = attend_nothing(query[:, end:], key[:, :0], value[:, :0])
        outs.append(out)
        lses.append(lse)
    return (outs[0], lses[0]) if len(outs) == 1 else (torch.cat(outs, 1), torch.cat(lses, 1))


def attend_nothing(query, key, value):
    """What queries get if there are no keys at all: out 0 and lse -inf, and gradients of 0."""
    shape = query.shape[:-1]
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    nothing = query[..., :0].sum() + key.sum() + value.sum()  # sums of no elements: zeros that keep the graph
    out = query.new_zeros(*shape, value.shape[-1]) + nothing
    return out, torch.full(shape, -torch.inf, dtype=lse_dtype, device=query.device) + nothing.to(lse_dtype)

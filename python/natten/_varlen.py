# SPDX-License-Identifier: MIT
"""How a call of `natten.attention` says where packed samples begin and end."""

import itertools

import torch

from ._errors import WrongType


def sample_bounds(query, seqlens_q, seqlens_kv, cumulative_q, cumulative_kv, max_q, max_kv):
    """(bounds of the samples of queries, of keys) as the op na_varlen_fwd takes them, which checks their values; None
    if no argument asks for samples."""
    lengths, sums, maxima = (seqlens_q, seqlens_kv), (cumulative_q, cumulative_kv), (max_q, max_kv)
    if all(x is None for x in (*lengths, *sums, *maxima)):
        return None
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
    names = [f"seqlens_{side}" if by_lengths else f"cumulative_seqlen_{side}" for side in ("Q", "KV")]
    if torch.compiler.is_compiling():
        return _unread(by_sums, names, sums)
    bounds = []
    for name, given, longest in zip(names, lengths if by_lengths else sums, maxima, strict=True):
        values = _integers(name, given)
        values = [0, *itertools.accumulate(values)] if by_lengths else values
        if by_sums:
            _check_longest(name.replace("cumulative", "max"), longest, values)
        bounds.append(torch.tensor(values, dtype=torch.int64, device="cpu"))
    return bounds


def _unread(by_sums: bool, names, sums):
    if not by_sums or not all(isinstance(x, torch.Tensor) for x in sums):
        raise RuntimeError(
            f"{names[0]} and {names[1]} would be read, which torch.compile cannot: give running sums as tensors, see "
            "generate_varlen_parameters"
        )
    for name, x in zip(names, sums, strict=True):
        if x.dim() != 1 or x.dtype not in (torch.int32, torch.int64):
            raise WrongType(f"{name} must be a 1-D integer tensor")
    return sums


def _integers(name: str, given) -> list[int]:
    values = given.tolist() if isinstance(given, torch.Tensor) else given
    if not isinstance(values, list | tuple) or not all(type(x) is int for x in values):
        raise WrongType(f"{name} must be a 1-D integer tensor or a list of integers")
    return list(values)


def _check_longest(name: str, longest, bounds: list[int]) -> None:
    if type(longest) is not int:
        raise WrongType(f"{name} must be an int, got {type(longest).__name__}")
    needed = max((b - a for a, b in itertools.pairwise(bounds)), default=0)
    if longest < needed:
        raise ValueError(f"{name} is {longest}, but the longest sample has {needed} tokens")

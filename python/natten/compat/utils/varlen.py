# SPDX-License-Identifier: MIT
"""Era 0.21: what `natten.attention` needs to know of packed samples, computed once for many calls."""

import torch


def generate_varlen_parameters(query, key, value, seqlens_Q=None, seqlens_KV=None):
    """(cumulative_seqlen_Q, cumulative_seqlen_KV, max_seqlen_Q, max_seqlen_KV); (None, None, 0, 0) without lengths.

    Lengths are int32 tensors [samples] on the device of `query`, whose batch is 1; they may be zero. The maxima are
    integers, so the device is waited for: call this outside of what torch.compile compiles.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("generate_varlen_parameters reads lengths, which torch.compile cannot: call it outside")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            f"query, key and value need one batch size, got {query.shape[0]}, {key.shape[0]} and {value.shape[0]}"
        )
    if (seqlens_Q is None) != (seqlens_KV is None):
        raise ValueError("packed samples need both seqlens_Q and seqlens_KV: give both or neither")
    if seqlens_Q is None:
        return None, None, 0, 0
    for name, lengths in (("seqlens_Q", seqlens_Q), ("seqlens_KV", seqlens_KV)):
        if not isinstance(lengths, torch.Tensor) or lengths.dtype != torch.int32 or lengths.dim() != 1:
            raise ValueError(f"{name} must be a one-dimensional int32 tensor")
        if lengths.device != query.device:
            raise ValueError(f"{name} is on {lengths.device}, but query is on {query.device}: move it there")
    if len(seqlens_Q) != len(seqlens_KV) or len(seqlens_Q) == 0:
        raise ValueError(
            f"seqlens_Q and seqlens_KV must have one entry for each sample, got {len(seqlens_Q)} and {len(seqlens_KV)}"
        )
    if query.shape[0] != 1:
        raise ValueError(f"packed samples need a batch of 1, got {query.shape[0]}: pack them along the tokens")
    sums = [torch.nn.functional.pad(x.cumsum(0, dtype=torch.int32), (1, 0)) for x in (seqlens_Q, seqlens_KV)]
    return *sums, int(seqlens_Q.max()), int(seqlens_KV.max())

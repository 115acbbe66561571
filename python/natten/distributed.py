# SPDX-License-Identifier: MIT
"""Sharded tensors: `import natten.distributed` once, and the ops take `torch.distributed.tensor.DTensor`.

Samples and heads do not see each other, so these placements need no communication, forward or backward, except that
gradients of a relative position bias are partial sums where the batch is sharded:

    Replicate()    all tensors
    Shard(0)       the batch, of all tensors but the bias, which is replicated
    Shard(-2)      the heads, of all tensors. With grouped queries only if the ranks of the whole mesh divide the key
                   heads, because every rank must hold the queries of its keys.

Anything else, a sharded grid for example, torch redistributes to one of these first. First-order derivatives of the
fused operator only: dropout on weights, `return_weights` and the unfused operators have no placements.

NOTE: not imported by the package: torch.distributed.tensor takes a second to import.
"""

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from . import _library

_OPTIONS = [None] * 7


def _choices(q, k):
    """Placements of what lies on the grid, of the bias, of additional keys and values, and of the bias's gradient."""
    heads = Shard(len(q.shape) - 2)
    yield Replicate(), Replicate(), Replicate(), Replicate()
    yield Shard(0), Replicate(), Shard(0), Partial()
    if q.shape[-2] == k.shape[-2] or k.shape[-2] % q.mesh.size() == 0:
        yield heads, Shard(0), Shard(2), Shard(0)


def _where_present(placements, tensors, otherwise=None):
    return [otherwise if x is None else placement for placement, x in zip(placements, tensors, strict=True)]


def _shard_forward(q, k, v, bias, extra_k, extra_v, *options):
    x = q, k, v, bias, extra_k, extra_v
    return [
        ([grid, grid], _where_present([grid, grid, grid, table, extra, extra], x) + _OPTIONS)
        for grid, table, extra, _ in _choices(q, k)
    ]


def _shard_backward(dout, dlse, q, k, v, bias, extra_k, extra_v, out, lse, *options):
    x = q, k, v, bias, extra_k, extra_v
    accepted = []
    for grid, table, extra, dbias in _choices(q, k):
        inputs = [grid, grid, grid, grid, grid, table, extra, extra, grid, grid]
        gradients = _where_present([grid, grid, grid, dbias, extra, extra], x, otherwise=Replicate())
        accepted.append((gradients, _where_present(inputs, (dout, dlse, *x, out, lse)) + _OPTIONS))
    return accepted


if _library.HAS_LIBNATTEN:
    register_sharding(_library.NA_FWD)(_shard_forward)
    register_sharding(_library.NA_BWD)(_shard_backward)

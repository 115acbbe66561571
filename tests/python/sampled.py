# SPDX-License-Identifier: MIT
"""Problems too large for a dense reference: a few queries are computed alone, in fp64, from the keys they see.

The gradient that comes in is zero everywhere but at those queries, so all gradients are known too: zero but at them and
at their keys.
"""

import itertools
import math

import cases
import dense
import torch


def keys_of(case, query):
    """Tokens that a query sees, as flat indices; `query` holds one coordinate per axis."""
    window, stride, dilation, causal = case.parameters
    per_axis = [dense.axis_keys(*axis) for axis in zip(query, case.grid, window, stride, dilation, causal, strict=True)]
    return [flat_index(case.grid, key) for key in itertools.product(*per_axis)]


def flat_index(grid, token):
    index = 0
    for extent, coordinate in zip(grid, token, strict=True):
        index = index * extent + coordinate
    return index


def corners(grid):
    """Queries at the borders and in the middle of a grid."""
    return sorted({tuple(places) for places in itertools.product(*({0, n // 2, n - 1} for n in grid))})


def rows(tensor, sample, tokens):
    """[tokens, heads, dim] of one sample in fp64; never a view of all, which may be larger than memory."""
    index = torch.tensor(tokens, device=tensor.device)
    grid = tensor.shape[1:-2]
    coordinates = torch.unravel_index(index, tuple(grid))
    return tensor[(sample, *coordinates)].double()


def check(case, tensors, plan, samples, queries, tolerance, backward=True):
    """Output and gradients of `queries` in `samples`, within `tolerance` of the largest number of the reference."""
    q, k, v = (tensors[name].detach().requires_grad_(backward) for name in "qkv")
    out = cases.call(case, {"q": q, "k": k, "v": v}, plan)
    where = [(sample, query, keys_of(case, query)) for sample in samples for query in queries]
    dout = torch.zeros((), dtype=out.dtype).expand(out.shape).contiguous() if backward else None
    expected = []
    for sample, query, keys in where:
        leaves = [
            rows(tensors["q"], sample, [flat_index(case.grid, query)]),
            *(rows(tensors[name], sample, keys) for name in "kv"),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        qr, kr, vr = leaves
        kr, vr = (x.repeat_interleave(qr.shape[1] // x.shape[1], dim=1) for x in (kr, vr))
        weights = torch.softmax((qr * kr).sum(-1) * case.scale_value, 0)
        row = (weights[..., None] * vr).sum(0)
        close(out[(sample, *query)].detach(), row.detach(), tolerance, f"out of {query} in sample {sample}")
        if backward:
            g = torch.randn_like(row)
            dout[(sample, *query)] = g.to(dout.dtype)
            expected.append(torch.autograd.grad(row, leaves, dout[(sample, *query)].double()))
    if backward:
        check_gradients(case, torch.autograd.grad(out, (q, k, v), dout), where, expected, tolerance)


def check_gradients(case, gradients, where, expected, tolerance):
    sums = {name: {} for name in ("dq", "dk", "dv")}
    for (sample, query, keys), (dq, dk, dv) in zip(where, expected, strict=True):
        own = [flat_index(case.grid, query)]
        for name, tokens, values in (("dq", own, dq), ("dk", keys, dk), ("dv", keys, dv)):
            for token, value in zip(tokens, values, strict=True):
                sums[name][sample, token] = sums[name].get((sample, token), 0) + value
    for (name, rows_of), gradient in zip(sums.items(), gradients, strict=True):
        got = torch.stack([rows(gradient, sample, [token])[0] for sample, token in rows_of])
        close(got, torch.stack(list(rows_of.values())), tolerance, name)
        parts = gradient.split(-(-gradient.shape[0] // 64))  # a mask of everything may not fit into memory
        touched = sum(int((part != 0).any(-1).any(-1).sum()) for part in parts)
        assert touched <= len(rows_of), f"{name}: {touched} tokens have a gradient, but {len(rows_of)} were seen"


def close(got, expected, tolerance, what):
    scale = max(float(expected.abs().max()), 0.1)
    error = float((got.double() - expected).abs().max()) / scale
    assert math.isfinite(error) and error <= tolerance, f"{what}: error {error:.3g} > {tolerance:.3g}"

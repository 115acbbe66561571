# SPDX-License-Identifier: MIT
"""The ops of packed samples as torch sees them: fake kernels and derivative rules.

First derivatives are the op's own; tangents and second derivatives take one sample after the other through those of the
plain op (_second_order.py). The arguments are four tensors x = (q, k, v, bias), of which the last may be None, and the
options (grids, bounds_q, bounds_kv, window, stride, dilation, causal, scale, oversize, plan). The op's gradient of the
bias has a table for every sample, [samples, heads, ...]; `_summed` adds them up.
"""

import itertools
import math

import torch

from ._batching import fold_rule
from ._library import HAS_LIBNATTEN, NA_VARLEN_BWD, NA_VARLEN_FWD, NAMESPACE, refuse
from ._ops import empty_results, run_backward
from ._registration import add, present, register, save
from ._second_order import hvp, jvp

_NO_GRADIENT_OF_OPTIONS = (None,) * 10


def dense_problem(q, k, v, causal: bool):
    """Six tensors and the window of dense attention as na_fwd takes it: the 1-D problem whose window is the whole axis,
    or between axes of two lengths one without keys on the grid, whose keys are all additional."""
    if q.shape[1] == k.shape[1]:
        return (q, k, v, None, None, None), [q.shape[1]]
    if causal:
        raise ValueError(
            f"attention with is_causal needs as many queries as keys, got {q.shape[1]} and {k.shape[1]}: "
            "which key a query is aligned with is ambiguous otherwise"
        )
    none = [x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in (k, v)]
    return (q, *none, None, k, v), [0]


def pieces_of(options):
    """(first and last token of the queries, of the keys, grid or None for dense attention) of every sample."""
    grids, bounds_q, bounds_kv, window, *_ = options
    if bounds_q is None:
        rank = len(window)
        sizes = [tuple(grids[i : i + rank]) for i in range(0, len(grids), rank)]
        ends = list(itertools.accumulate(map(math.prod, sizes), initial=0))
        return [((a, b), (a, b), grid) for (a, b), grid in zip(itertools.pairwise(ends), sizes, strict=True)]
    of_queries, of_keys = (itertools.pairwise(bounds.tolist()) for bounds in (bounds_q, bounds_kv))
    return [(q, k, None) for q, k in zip(of_queries, of_keys, strict=True)]


def _as_plain(tensors, piece, options):
    """The six tensors and the options of na_fwd for one sample."""
    (q0, q1), (k0, k1), grid = piece
    q, k, v, bias = tensors
    _, _, _, window, stride, dilation, causal, *rest = options
    # NOTE: narrow and reshape, as in _gather.py
    q, k, v = (x.narrow(1, a, b - a) for x, a, b in ((q, q0, q1), (k, k0, k1), (v, k0, k1)))
    if grid is None:
        six, window = dense_problem(q, k, v, causal[0])
    else:
        six = *(x.reshape(x.shape[0], *grid, *x.shape[2:]) for x in (q, k, v)), bias, None, None
    return six, (window, stride, dilation, causal, *rest)


def _each(x, t, options):
    """(number, piece, six tensors, their directions, options of na_fwd) of every sample with queries and keys; `t` are
    directions of x, that of the bias with a table for every sample."""
    *directions, tables = t
    for i, piece in enumerate(pieces_of(options)):
        (q0, q1), (k0, k1), _ = piece
        if q1 > q0 and k1 > k0:
            six, plain = _as_plain(x, piece, options)
            along = _as_plain((*directions, None if tables is None else tables[i]), piece, options)[0]
            yield i, piece, six, along, plain


def _placed(parts, like):
    """Parts [(first token, part)] of a tensor as `like`, with zeros between them."""
    pieces, at = [], 0
    for first, part in [*parts, (like.shape[1], None)]:
        if first > at or part is None:
            pieces.append(like.new_zeros(like.shape[0], first - at, *like.shape[2:]))
        if part is not None:
            pieces.append(part.reshape(part.shape[0], -1, *like.shape[2:]))
            at = first + pieces[-1].shape[1]
    return torch.cat(pieces, 1)


def _directions(t, x, options):
    """`t` with zeros for what is absent, and a table for every sample where the bias has one for all."""
    *t, t_bias = (torch.zeros_like(y) if d is None and y is not None else d for d, y in zip(t, x, strict=True))
    if t_bias is not None and t_bias.dim() == x[3].dim():
        t_bias = t_bias[None].expand(len(pieces_of(options)), *t_bias.shape)
    return *t, t_bias


def _jvp(x, t, options):
    """Tangents of (out, lse)."""
    outs, lses = [], []
    for _, piece, six, along, plain in _each(x, _directions(t, x, options), options):
        out, lse = jvp(six, along, plain)
        outs.append((piece[0][0], out)), lses.append((piece[0][0], lse))
    return tuple(map(_placed, (outs, lses), empty_results(*x)))


def _hvp(dout, dlse, x, t, options):
    """Derivative of na_varlen_bwd with respect to x in the direction `t`; that of the bias for every sample."""
    parts = [], [], []
    tables = None if x[3] is None else [torch.zeros_like(x[3]) for _ in pieces_of(options)]
    for i, ((q0, q1), (k0, _), _), six, along, plain in _each(x, _directions(t, x, options), options):
        g = dout.narrow(1, q0, q1 - q0), None if dlse is None else dlse.narrow(1, q0, q1 - q0)
        gq, gk, gv, g_bias, g_extra_k, g_extra_v = hvp(*g, six, along, plain)
        crossed = g_extra_k is not None
        for side, first, part in zip(parts, (q0, k0, k0), (gq, *((g_extra_k, g_extra_v) if crossed else (gk, gv)))):
            side.append((first, part))
        if tables is not None:
            tables[i] = g_bias
    return *map(_placed, parts, x[:3]), None if tables is None else torch.stack(tables)


def _summed(*gradients):
    *others, tables = gradients
    return *others, None if tables is None else tables.sum(0)


class Forward:
    """Rules of na_varlen_fwd(*x, *options) -> (out, lse)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, (*inputs[:4], *output), inputs[4:])

    @staticmethod
    def backward(ctx, dout, dlse):
        *x, out, lse = ctx.saved_tensors
        return *_summed(*run_backward(na_varlen_bwd, dout, dlse, x, out, lse, ctx.options)), *_NO_GRADIENT_OF_OPTIONS

    @staticmethod
    def jvp(ctx, *tangents):
        return _jvp(ctx.saved_tensors[:4], tangents[:4], ctx.options)


class Backward:
    """Rules of na_varlen_bwd(dout, dlse, *x, out, lse, *options) -> gradients of x."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:8], inputs[8:])

    @staticmethod
    def backward(ctx, *cotangents):
        dout, dlse, *x, _, _ = ctx.saved_tensors
        t = present(cotangents, x)
        g_dout, g_dlse = _jvp(x, t, ctx.options)
        g_x = _summed(*_hvp(dout, dlse, x, t, ctx.options))
        return g_dout, None if dlse is None else g_dlse, *g_x, None, None, *_NO_GRADIENT_OF_OPTIONS

    @staticmethod
    def jvp(ctx, t_dout, t_dlse, *tangents):
        dout, dlse, *x, out, lse = ctx.saved_tensors
        bwd = run_backward(na_varlen_bwd, t_dout, t_dlse, x, out, lse, ctx.options)
        sums = map(add, bwd, _hvp(dout, dlse, x, tangents[:4], ctx.options))
        return tuple(out.new_zeros(0) if g is None else g for g in sums)


def _fake_bwd(dout, dlse, q, k, v, bias, out, lse, grids, bounds_q, bounds_kv, window, *_):
    tables = q.new_empty(0) if bias is None else q.new_empty(len(grids) // len(window), *bias.shape)
    return *(x.new_empty(x.shape) for x in (q, k, v)), tables


if HAS_LIBNATTEN:
    torch.library.register_fake(NA_VARLEN_FWD)(empty_results)
    torch.library.register_fake(NA_VARLEN_BWD)(_fake_bwd)

    # As in _ops.py; the tables of the bias have their heads behind the samples.
    Forward.vmap = staticmethod(fold_rule(NA_VARLEN_FWD, 3, (-2, -2, -2, 0), (-2, -1)))
    Backward.vmap = staticmethod(fold_rule(NA_VARLEN_BWD, 5, (-2, -1, -2, -2, -2, 0, -2, -1), (-2, -2, -2, 1)))
    _registrations = torch.library.Library(NAMESPACE, "IMPL")  # NOTE: they die with this object
    na_varlen_fwd = register(_registrations, NA_VARLEN_FWD, Forward)
    na_varlen_bwd = register(_registrations, NA_VARLEN_BWD, Backward)
else:
    na_varlen_fwd = na_varlen_bwd = refuse

# SPDX-License-Identifier: MIT
"""The unfused ops as torch sees them: fake kernels and derivative rules.

Both operators are linear in each of their tensors, so four ops are closed under differentiation to any order:
    qk(q, k, bias)       backward = qk_bwd            tangent = qk(tq, k) + qk(q, tk, tbias), with 0 in unused slots
    qk_bwd(dattn, q, k)  = (W k, W^T q, sums of W), where W is dattn: linear in it, in q and in k
    av(attn, v)          backward = av_bwd            tangent = av(tattn, v) + av(attn, tv)
    av_bwd(dout, attn, v) = (qk(dout, v), attn^T dout)
Extra keys and values belong to k and v. Tensors have their heads before the grid.
"""

import math

import torch

from ._arguments import with_unit_last_stride
from ._batching import fold_rule
from ._library import HAS_LIBNATTEN, NA_AV, NA_AV_BWD, NA_QK, NA_QK_BWD, NAMESPACE, refuse
from ._registration import add, present, register, save


def _direction(t, like):
    """A tangent or cotangent as an op takes it; zeros for an absent one."""
    return with_unit_last_stride(torch.zeros_like(like) if t is None and like is not None else t)


def _scores_along(keys, directions, options):
    """The derivative of qk(q, k, bias, extra_k) along `directions`, whose first is not zero in `q`."""
    q, k, extra = keys
    tq, tk, t_bias, t_extra = directions
    *geometry, scale, oversize, plan = options
    rest = (*geometry, scale, 0.0, oversize, plan)
    along_q = None if tq is None else na_qk(with_unit_last_stride(tq), k, None, extra, *rest)
    if tk is None and t_bias is None and t_extra is None:
        return along_q
    along_k = na_qk(q, _direction(tk, k), t_bias, _direction(t_extra, extra), *rest)
    return add(along_q, along_k)


class Qk:
    """Rules of na_qk(q, k, bias, extra_k, window, stride, dilation, causal, scale, unused, oversize, plan)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        *geometry_and_scale, _, oversize, plan = inputs[4:]
        save(ctx, inputs[:4], (*geometry_and_scale, oversize, plan))

    @staticmethod
    def backward(ctx, dattn):
        if dattn is None:
            return (None,) * 12
        x = ctx.saved_tensors
        gradients = na_qk_bwd(with_unit_last_stride(dattn), *x, *ctx.options)
        return *present(gradients, x), *(None,) * 8

    @staticmethod
    def jvp(ctx, *tangents):
        q, k, _, extra = ctx.saved_tensors
        return _scores_along((q, k, extra), tangents[:4], ctx.options)


class QkBackward:
    """Rules of na_qk_bwd(dattn, q, k, bias, extra_k, *options) -> (dq, dk, dbias, dextra_k)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:5], inputs[5:])

    @staticmethod
    def backward(ctx, *cotangents):
        dattn, q, k, bias, extra = ctx.saved_tensors
        t = present(cotangents, (q, k, bias, extra))
        g_dattn = _scores_along((q, k, extra), t, ctx.options)
        return g_dattn, *QkBackward._along(ctx, t), *(None,) * 7

    @staticmethod
    def jvp(ctx, t_dattn, *tangents):
        dattn, *x = ctx.saved_tensors
        sums = QkBackward._along(ctx, tangents[:4])
        if t_dattn is not None:
            sums = tuple(map(add, present(na_qk_bwd(with_unit_last_stride(t_dattn), *x, *ctx.options), x), sums))
        return tuple(dattn.new_zeros(0 if y is None else y.shape) if g is None else g for y, g in zip(x, sums))

    @staticmethod
    def _along(ctx, t):
        """qk_bwd with the directions in the places of q and k, which it exchanges: gradient and tangent alike."""
        dattn, q, k, _, extra = ctx.saved_tensors
        if t[0] is None and t[1] is None and t[3] is None:
            return None, None, None, None
        directions = [_direction(y, like) for y, like in ((t[0], q), (t[1], k), (t[3], extra))]
        gq, gk, _, g_extra = na_qk_bwd(dattn, *directions[:2], None, directions[2], *ctx.options)
        return gq, gk, None, None if extra is None else g_extra


class Av:
    """Rules of na_av(attn, v, extra_v, window, stride, dilation, causal, oversize, plan) -> out."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:3], inputs[3:])

    @staticmethod
    def backward(ctx, dout):
        if dout is None:
            return (None,) * 9
        x = ctx.saved_tensors
        return *present(na_av_bwd(with_unit_last_stride(dout), *x, *ctx.options), x), *(None,) * 6

    @staticmethod
    def jvp(ctx, *tangents):
        return _values_along(ctx.saved_tensors, tangents[:3], ctx.options)


def _values_along(x, directions, options):
    """The derivative of av(attn, v, extra_v) along `directions`."""
    attn, v, extra = x
    t_attn, tv, t_extra = directions
    along_attn = None if t_attn is None else na_av(with_unit_last_stride(t_attn), v, extra, *options)
    if tv is None and t_extra is None:
        return along_attn
    return add(
        along_attn,
        na_av(attn, _direction(tv, v), _direction(t_extra, extra), *options),
    )


class AvBackward:
    """Rules of na_av_bwd(dout, attn, v, extra_v, *options) -> (dattn, dv, dextra_v)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:4], inputs[4:])

    @staticmethod
    def backward(ctx, *cotangents):
        dout, *x = ctx.saved_tensors
        t = present(cotangents, x)
        return _values_along(x, t, ctx.options), *AvBackward._along(ctx, t), *(None,) * 6

    @staticmethod
    def jvp(ctx, t_dout, *tangents):
        _, *x = ctx.saved_tensors
        sums = AvBackward._along(ctx, tangents[:3])
        if t_dout is not None:
            sums = tuple(map(add, present(na_av_bwd(with_unit_last_stride(t_dout), *x, *ctx.options), x), sums))
        return tuple(x[0].new_zeros(0 if y is None else y.shape) if g is None else g for y, g in zip(x, sums))

    @staticmethod
    def _along(ctx, t):
        """av_bwd with the directions in the places of attn and v, which it exchanges: gradient and tangent alike."""
        dout, *x = ctx.saved_tensors
        if all(y is None for y in t):
            return None, None, None
        directions = [_direction(y, like) for y, like in zip(t, x)]
        return present(na_av_bwd(dout, *directions, *ctx.options), x)


def _fake_qk(q, k, bias, extra_k, window, *options):
    num_extra = 0 if extra_k is None else extra_k.shape[2]
    return q.new_empty(*q.shape[:-1], math.prod(window) + num_extra)


def _fake_qk_bwd(dattn, *x_and_options):
    return tuple(dattn.new_empty(0 if x is None else x.shape) for x in x_and_options[:4])


def _fake_av(attn, v, *options):
    return v.new_empty(*attn.shape[:-1], v.shape[-1])


def _fake_av_bwd(dout, *x_and_options):
    return tuple(dout.new_empty(0 if x is None else x.shape) for x in x_and_options[:3])


def _registered(op, fake, rules, bias, head_axes, out_head_axes):
    torch.library.register_fake(op)(fake)
    rules.vmap = staticmethod(fold_rule(op, bias, head_axes, out_head_axes))
    return register(_registrations, op, rules)


if HAS_LIBNATTEN:
    _registrations = torch.library.Library(NAMESPACE, "IMPL")  # NOTE: they die with this object
    na_qk = _registered(NA_QK, _fake_qk, Qk, 2, (1, 1, 0, 1), (1,))
    na_qk_bwd = _registered(NA_QK_BWD, _fake_qk_bwd, QkBackward, 3, (1, 1, 1, 0, 1), (1, 1, 0, 1))
    na_av = _registered(NA_AV, _fake_av, Av, None, (1, 1, 1), (1,))
    na_av_bwd = _registered(NA_AV_BWD, _fake_av_bwd, AvBackward, None, (1, 1, 1, 1), (1, 1, 1))
else:
    na_qk = na_qk_bwd = na_av = na_av_bwd = refuse

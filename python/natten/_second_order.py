# SPDX-License-Identifier: MIT
"""Tangents and second derivatives, composed of torch ops over gathered windows and so differentiable to any order.

With f: x = (q, k, v, bias, extra_k, extra_v) -> (out, lse), a direction t and a cotangent g = (dout, dlse),
    jvp(x, t) = f'(x) t        hvp(x, g, t) = d(f'(x)^T g)/dx . t, which is symmetric
P are the probabilities, mean(y) = sum over keys of P * y; hvp is the gradient of F(x) = <g, jvp(x, t)>. Memory is
O(window) per query: meant for small problems and for checks, not for speed.
"""

import torch

from ._gather import bias_of, dot, gather, keys, mix, outer, queries, scatter, scatter_bias


def jvp(tensors, tangents, options):
    """Tangents of (out, lse); `tensors` and `options` are the arguments of na_fwd, a tangent may be None."""
    x = gather(*tensors, *options)
    _, _, tv, logits = _direction(x, tensors, tangents, options)
    mean = (x.p * logits).sum(2, keepdim=True)
    out = mix(x.p * (logits - mean), x.v) + mix(x.p, tv)
    shape = tensors[0].shape[:-1]
    lse_dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return out.reshape(*shape, out.shape[-1]).to(tensors[0].dtype), mean.reshape(shape).to(lse_dtype)


def hvp(dout, dlse, tensors, tangents, options):
    """Derivative of na_bwd(dout, dlse; tensors) with respect to the tensors in the direction `tangents`."""
    q, k, v, bias, extra_k, extra_v = tensors
    x = gather(*tensors, *options)
    scale = options[4]
    tq, tk, tv, t = _direction(x, tensors, tangents, options)

    def mean(y):
        return (x.p * y).sum(2, keepdim=True)

    dout = queries(dout)
    dl = 0 if dlse is None else dlse.reshape(dout.shape[:-1])[:, :, None]
    dp, u = dot(dout, x.v), dot(dout, tv)
    ds, dt = x.p * (dp - mean(dp) + dl), x.p * (t - mean(t))
    curvature = dp * t + u - dp * mean(t) - mean(dp) * t + dl * t
    gs = x.p * (curvature - mean(curvature))
    gq = (scale * (mix(gs, x.k) + mix(ds, tk))).reshape(q.shape).to(q.dtype)
    gk, g_extra_k = scatter(scale * (outer(gs, x.q) + outer(ds, tq)), x.where, k, extra_k)
    gv, g_extra_v = scatter(outer(dt, dout), x.where, v, extra_v)
    return gq, gk, gv, scatter_bias(gs, x.where, bias), g_extra_k, g_extra_v


def _direction(x, tensors, tangents, options):
    """The direction, gathered: that of q, k and v, and what it does to the logits."""
    tq, tk, tv, t_bias, t_extra_k, t_extra_v = (
        torch.zeros_like(y) if t is None and y is not None else t for y, t in zip(tensors, tangents, strict=True)
    )
    heads, scale = tq.shape[-2], options[4]
    rows, kw, vw = queries(tq), keys(tk, t_extra_k, x.where, heads), keys(tv, t_extra_v, x.where, heads)
    logits = scale * (dot(rows, x.k) + dot(x.q, kw))
    if t_bias is not None:
        logits = logits + bias_of(t_bias, x.where, logits.shape[2] - x.where.bias.shape[1])
    return rows, kw, vw, logits

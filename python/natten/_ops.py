# SPDX-License-Identifier: MIT
"""The ops of the library as torch sees them: fake kernels and derivative rules.

The derivatives close after four functions: na_fwd, na_bwd and, in _second_order.py, jvp and hvp.
    d na_fwd:  backward = na_bwd(g)                                  tangent = jvp(t)
    d na_bwd:  backward = (jvp for g, hvp for the other inputs)      tangent = na_bwd(tangent of g) + hvp
out and lse are inputs of na_bwd only to save a recomputation: no gradient flows into them, the formulas are total.
The arguments are always six tensors x = (q, k, v, bias, extra_k, extra_v), of which the last three may be None, and the
options (window, stride, dilation, causal, scale, oversize, plan).
"""

import torch

from ._arguments import with_unit_last_stride
from ._batching import fold_rule
from ._errors import translated
from ._gather import attend, in_onnx_export
from ._library import HAS_LIBNATTEN, KEY_SPANS, NA_BWD, NA_FWD, NAMESPACE, refuse
from ._registration import add, present, register, save
from ._second_order import hvp, jvp

_NO_GRADIENT_OF_OPTIONS = (None,) * 7


def backward_plan(plan: str) -> str:
    """The part of a forced plan that means something in the other pass: engine and kernel, not its tiles."""
    return "/".join(plan.split("/")[:2])


def run_op(op, tensors, options, backend=None):
    """The op, its errors as Python's; `backend` is what the caller has named, or None."""
    try:
        return op(*tensors, *options)
    except (RuntimeError, ValueError) as error:
        raise translated(error, tensors[0].device.type, backend) from None


def run_backward(op, dout, dlse, x, out, lse, options):
    """Gradients of x by na_bwd or na_varlen_bwd, None for the absent ones."""
    *geometry, plan = options
    dout = torch.zeros_like(out) if dout is None else with_unit_last_stride(dout)
    gradients = run_op(op, (dout, dlse, *x, out, lse), (*geometry, backward_plan(plan)))
    return present(gradients, x)


class Forward:
    """Rules of na_fwd(*x, *options) -> (out, lse)."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, (*inputs[:6], *output), inputs[6:])

    @staticmethod
    def backward(ctx, dout, dlse):
        *x, out, lse = ctx.saved_tensors
        return *run_backward(na_bwd, dout, dlse, x, out, lse, ctx.options), *_NO_GRADIENT_OF_OPTIONS

    @staticmethod
    def jvp(ctx, *tangents):
        return jvp(ctx.saved_tensors[:6], tangents[:6], ctx.options)


class Backward:
    """Rules of na_bwd(dout, dlse, *x, out, lse, *options) -> gradients of x."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        save(ctx, inputs[:10], inputs[10:])

    @staticmethod
    def backward(ctx, *cotangents):
        dout, dlse, *x, _, _ = ctx.saved_tensors
        t = present(cotangents, x)
        g_dout, g_dlse = jvp(x, t, ctx.options)
        g_x = hvp(dout, dlse, x, t, ctx.options)
        return g_dout, None if dlse is None else g_dlse, *g_x, None, None, *_NO_GRADIENT_OF_OPTIONS

    @staticmethod
    def jvp(ctx, t_dout, t_dlse, *tangents):
        dout, dlse, *x, out, lse = ctx.saved_tensors
        bwd = run_backward(na_bwd, t_dout, t_dlse, x, out, lse, ctx.options)
        sums = map(add, bwd, hvp(dout, dlse, x, tangents[:6], ctx.options))
        return tuple(out.new_zeros(0) if g is None else g for g in sums)


def empty_results(q, k, v, *_):
    """(out, lse), uninitialised: the fake kernel of every forward op whose tensors have their heads last."""
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=lse_dtype)


def _fake_bwd(dout, dlse, q, k, v, bias, extra_k, extra_v, out, lse, *options):
    return tuple(q.new_empty(0 if x is None else x.shape) for x in (q, k, v, bias, extra_k, extra_v))


def _fake_key_spans(extent, window, stride, dilation, causal):
    return torch.empty(extent, 2, dtype=torch.int64, device="cpu")  # whatever the default device is


def _traced_fwd(*args):
    return attend(*args) if in_onnx_export() else NA_FWD(*args)


if HAS_LIBNATTEN:
    torch.library.register_fake(NA_FWD)(empty_results)
    torch.library.register_fake(NA_BWD)(_fake_bwd)
    torch.library.register_fake(KEY_SPANS)(_fake_key_spans)

    # Head axes, for vmap: tensors have them last but one, lse and dlse last, a bias first.
    Forward.vmap = staticmethod(fold_rule(NA_FWD, 3, (-2, -2, -2, 0, -2, -2), (-2, -1)))
    Backward.vmap = staticmethod(fold_rule(NA_BWD, 5, (-2, -1, -2, -2, -2, 0, -2, -2, -2, -1), (-2, -2, -2, 0, -2, -2)))
    _registrations = torch.library.Library(NAMESPACE, "IMPL")  # NOTE: they die with this object
    na_fwd = register(_registrations, NA_FWD, Forward, traced=_traced_fwd)
    na_bwd = register(_registrations, NA_BWD, Backward)
else:
    na_fwd = na_bwd = refuse

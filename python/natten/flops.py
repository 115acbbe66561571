# SPDX-License-Identifier: MIT
"""FLOP formulas for torch.utils.flop_counter.FlopCounterMode. Import this module before the mode is entered.

They count query-key pairs exactly, whatever the window, stride, dilation and causal flags: two flops per multiply-add,
the softmax not counted. Forward 2 (D + Dv) per pair, backward 2 (3 D + 2 Dv), the logits being computed again.

NOTE: not imported by the package: torch.utils.flop_counter imports triton, 0.3 s that `import natten` shall not cost.
"""

import math

from torch.utils.flop_counter import register_flop_formula

from . import _legacy, _library
from ._varlen_ops import pieces_of


def _pairs(q, extra_k, window, stride, dilation, causal) -> int:
    """Pairs of all samples and heads; shapes stand for tensors."""
    batch, *extent, heads, _ = q
    pairs = _library.num_pairs(extent, window, stride, dilation, causal) if window[0] > 0 else 0
    if extra_k is not None:
        pairs += math.prod(extent) * extra_k[1]
    return batch * heads * pairs


def na_fwd_flops(*args, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_fwd."""
    q, _, v, _, extra_k, _, *geometry = args[:10]
    return 2 * (q[-1] + v[-1]) * _pairs(q, extra_k, *geometry)


def na_bwd_flops(*args, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_bwd."""
    _, _, q, _, v, _, extra_k, _, _, _, *geometry = args[:14]
    return 2 * (3 * q[-1] + 2 * v[-1]) * _pairs(q, extra_k, *geometry)


def _packed_pairs(q, options) -> int:
    """Pairs of all samples and heads; takes the tensor q and what na_varlen_fwd takes behind the bias."""
    window, stride, dilation, causal = options[3:7]
    pairs = 0
    for (q0, q1), (k0, k1), grid in pieces_of(options):
        if grid is not None:
            pairs += _library.num_pairs(grid, window, stride, dilation, causal)
        else:
            pairs += (q1 - q0) * (q1 - q0 + 1) // 2 if causal[0] else (q1 - q0) * (k1 - k0)
    return q.shape[0] * q.shape[2] * pairs


def na_varlen_fwd_flops(q, k, v, bias, *options, out_val=None, **kwargs) -> int:
    """Takes the arguments of the op na_varlen_fwd."""
    return 2 * (q.shape[-1] + v.shape[-1]) * _packed_pairs(q, options)


def na_varlen_bwd_flops(dout, dlse, q, k, v, bias, out, lse, *options, out_val=None, **kwargs) -> int:
    """Takes the arguments of the op na_varlen_bwd."""
    return 2 * (3 * q.shape[-1] + 2 * v.shape[-1]) * _packed_pairs(q, options)


def _unfused_pairs(x, extra, geometry) -> int:
    """Pairs of all samples and heads; `x` is the shape of a tensor with its heads before the grid."""
    batch, heads, *extent, _ = x
    pairs = _library.num_pairs(extent, *geometry) if geometry[0][0] > 0 else 0
    return batch * heads * (pairs + math.prod(extent) * (0 if extra is None else extra[2]))


def na_qk_flops(q, k, bias, extra_k, *geometry, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_qk."""
    return 2 * q[-1] * _unfused_pairs(q, extra_k, geometry[:4])


def na_qk_bwd_flops(dattn, q, k, bias, extra_k, *geometry, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_qk_bwd."""
    return 2 * na_qk_flops(q, k, bias, extra_k, *geometry)


def na_av_flops(attn, v, extra_v, *geometry, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_av."""
    return 2 * v[-1] * _unfused_pairs(attn, extra_v, geometry[:4])


def na_av_bwd_flops(dout, attn, v, extra_v, *geometry, out_shape=None, **kwargs) -> int:
    """Takes the arguments of the op na_av_bwd."""
    return 2 * na_av_flops(attn, v, extra_v, *geometry)


if _library.HAS_LIBNATTEN:
    register_flop_formula(_library.NA_FWD.overloadpacket)(na_fwd_flops)
    register_flop_formula(_library.NA_BWD.overloadpacket)(na_bwd_flops)
    # Raw: the values of bounds matter, not their shapes.
    register_flop_formula(_library.NA_VARLEN_FWD.overloadpacket, get_raw=True)(na_varlen_fwd_flops)
    register_flop_formula(_library.NA_VARLEN_BWD.overloadpacket, get_raw=True)(na_varlen_bwd_flops)
    register_flop_formula(_library.NA_QK.overloadpacket)(na_qk_flops)
    register_flop_formula(_library.NA_QK_BWD.overloadpacket)(na_qk_bwd_flops)
    register_flop_formula(_library.NA_AV.overloadpacket)(na_av_flops)
    register_flop_formula(_library.NA_AV_BWD.overloadpacket)(na_av_bwd_flops)

__getattr__ = _legacy.finder(__name__, "legacy_flops")

# SPDX-License-Identifier: MIT
"""Eras 0.11 to 0.17: counters for fvcore and formulas over shapes, as `natten.flops.X`.

They count as papers do: a multiply-add is one, a bias adds one per pair, the softmax nothing. The handles of our ops
count pairs exactly, whatever the window, dilation, stride and causal flags; those of the old functions see shapes alone
and count every slot. The `*_flop_count` functions of 0.17.4 count two per multiply-add unless told otherwise.
"""

import math

from . import _library

__all__ = [
    "add_natten_handle",
    "av_1d_flop",
    "av_2d_flop",
    "av_3d_flop",
    "av_flop",
    "fna_flop_count",
    "fna_generic_flops",
    "get_flops",
    "na_av_flop_count",
    "na_qk_flop_count",
    "qk_1d_rpb_flop",
    "qk_2d_rpb_flop",
    "qk_3d_rpb_flop",
    "qk_rpb_flop",
]


# --- values of a traced graph ----------------------------------------------------------------------------------------


def _shape(value):
    """The shape of a traced tensor; None for an absent one. Lists of sizes serve as well."""
    if isinstance(value, list | tuple):
        return list(value)
    return list(value.type().sizes()) if value.isCompleteTensor() else None


def _pairs(batch, heads, grid, geometry, num_extra):
    pairs = _library.num_pairs(grid, *geometry) if geometry[0][0] > 0 else 0
    return batch * heads * (pairs + math.prod(grid) * num_extra)


def _na_fwd(*inputs):
    (q, _, v, bias, extra_k, _), geometry = inputs[:6], inputs[6:10]
    batch, *grid, heads, dim = q
    pairs = _pairs(batch, heads, grid, geometry, extra_k[1] if extra_k else 0)
    with_bias = _pairs(batch, heads, grid, geometry, 0) if bias else 0
    return pairs * (dim + v[-1]) + with_bias


def _na_qk(*inputs):
    (q, _, bias, extra_k), geometry = inputs[:4], inputs[4:8]
    batch, heads, *grid, dim = q
    on_grid, num_extra = _pairs(batch, heads, grid, geometry, 0), extra_k[2] if extra_k else 0
    return (on_grid + batch * heads * math.prod(grid) * num_extra) * dim + (on_grid if bias else 0)


def _na_av(*inputs):
    (attn, v, extra_v), geometry = inputs[:3], inputs[3:7]
    batch, heads, *grid, _ = attn
    return _pairs(batch, heads, grid, geometry, extra_v[2] if extra_v else 0) * v[-1]


def _natten_op(inputs, outputs):
    """A call of an op of ours in the graph, see _tracing.py."""
    node = outputs[0].node()
    tensors, others = iter(inputs), iter(node.scalar_args())
    op, *arguments = (_shape(next(tensors)) if kind == "d" else next(others) for kind in node.cconv())
    return {_library.NA_FWD: _na_fwd, _library.NA_QK: _na_qk, _library.NA_AV: _na_av}[op](*arguments)


# --- functions of the original, by the shapes of their tensors -------------------------------------------------------


def _qk_rpb_flop(rank):
    def count(inputs, outputs):
        query, attn = _shape(inputs[0]), _shape(outputs[0])
        if len(query) != rank + 3 or len(attn) != rank + 3:
            raise ValueError(f"expected query and attn of rank {rank + 3}, got {query} and {attn}")
        has_bias = len(inputs) > 2 and bool(_shape(inputs[2]))
        return math.prod(attn) * (query[-1] + has_bias)

    return count


def _av_flop(rank):
    def count(inputs, outputs):
        attn, value = _shape(inputs[0]), _shape(inputs[1])
        if len(attn) != rank + 3 or len(value) != rank + 3:
            raise ValueError(f"expected attn and value of rank {rank + 3}, got {attn} and {value}")
        return math.prod(attn) * value[-1]

    return count


qk_1d_rpb_flop, qk_2d_rpb_flop, qk_3d_rpb_flop = map(_qk_rpb_flop, (1, 2, 3))
av_1d_flop, av_2d_flop, av_3d_flop = map(_av_flop, (1, 2, 3))
qk_rpb_flop, av_flop = qk_2d_rpb_flop, av_2d_flop  # 0.13
fna_generic_flops = _natten_op

_HANDLES = {
    "prim::PythonOp.NattenOp": _natten_op,
    "prim::PythonOp.NATTENQKRPBFunction": qk_2d_rpb_flop,
    "prim::PythonOp.NATTENAVFunction": av_2d_flop,
}
for _rank, _qk in enumerate((qk_1d_rpb_flop, qk_2d_rpb_flop, qk_3d_rpb_flop), 1):
    _HANDLES[f"prim::PythonOp.NATTEN{_rank}DQKRPBFunction"] = _qk
for _rank, _av in enumerate((av_1d_flop, av_2d_flop, av_3d_flop), 1):
    _HANDLES[f"prim::PythonOp.NATTEN{_rank}DAVFunction"] = _av


def add_natten_handle(flop_ctr):
    """Teaches an fvcore.nn.FlopCountAnalysis our ops; returns it."""
    return flop_ctr.set_op_handle(**_HANDLES)


def get_flops(model, input, disable_warnings=False):
    """Multiply-adds of `model(input)`. Needs fvcore."""
    from fvcore.nn import FlopCountAnalysis

    counter = add_natten_handle(FlopCountAnalysis(model, input))
    if disable_warnings:
        counter = counter.unsupported_ops_warnings(False)
    return counter.total()


# --- 0.17.4: formulas ------------------------------------------------------------------------------------------------


def _count(shape, dims, geometry, is_heads_last, return_macs):
    """`dims` multiply-adds for each pair of a grid."""
    kernel_size, dilation, is_causal = geometry
    grid, heads = (shape[1:-2], shape[-2]) if is_heads_last else (shape[2:-1], shape[1])
    rank = len(grid)
    if not 1 <= rank <= 3 or {len(kernel_size), len(dilation), len(is_causal)} != {rank}:
        raise ValueError(f"give kernel_size, dilation and is_causal for each of the {rank} axes of {list(shape)}")
    pairs = _pairs(shape[0], heads, grid, (kernel_size, [1] * rank, dilation, is_causal), 0)
    return pairs * dims * (1 if return_macs else 2)


def fna_flop_count(q_shape, k_shape, v_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs=False):
    """Of the fused operator, without bias and softmax; exact for causal axes too."""
    dims = q_shape[-1] + v_shape[-1]
    return _count(q_shape, dims, (kernel_size, dilation, is_causal), is_heads_last, return_macs)


def na_qk_flop_count(q_shape, k_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs=False):
    """Of the logits alone."""
    return _count(q_shape, q_shape[-1], (kernel_size, dilation, is_causal), is_heads_last, return_macs)


def na_av_flop_count(a_shape, v_shape, kernel_size, dilation, is_causal, is_heads_last, return_macs=False):
    """Of the weighted sums alone."""
    return _count(v_shape, v_shape[-1], (kernel_size, dilation, is_causal), is_heads_last, return_macs)

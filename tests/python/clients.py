# SPDX-License-Identifier: MIT
"""What the tests of real projects' calls share: inputs, and the dense fp64 reference in their layouts."""

import dense
import torch
from torch.nn.functional import pad


def rows(*shape, dtype=torch.float32, count=3):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(count)]


def per_axis(value, rank):
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * rank


def dense_na(q, k, v, window, dilation=1, causal=False, scale=None, stride=1, bias=None):
    """Heads-last attention in fp64."""
    rank = q.dim() - 3
    geometry = [per_axis(x, rank) for x in (window, stride, dilation, causal)]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bias = None if bias is None else bias.double()
    return dense.attention(q.double(), k.double(), v.double(), *geometry, scale, bias)[0]


def dense_layer(module, x, pad_input=False, table=None):
    """A layer in fp64, from its parameters."""
    x = x.detach().double()
    grid, rank = x.shape[1:-1], x.dim() - 2
    if pad_input:
        amounts = [0, 0]
        for n, k, d in zip(reversed(grid), reversed(module.kernel_size), reversed(module.dilation)):
            amounts += [0, max(0, k * d - n)]
        x = pad(x, amounts)
    p = {name: y.detach().double() for name, y in module.state_dict().items()}
    qkv = torch.nn.functional.linear(x, p["qkv.weight"], p.get("qkv.bias"))
    q, k, v = qkv.unflatten(-1, (3, module.num_heads, -1)).unbind(-3)
    out = dense_na(q, k, v, module.kernel_size, module.dilation, module.is_causal, module.scale, bias=p.get("rpb"))
    out = out.flatten(-2)[(slice(None), *(slice(0, n) for n in grid))]
    assert rank == module.rank
    return torch.nn.functional.linear(out, p["proj.weight"], p["proj.bias"])


def close(got, exact, tolerance=2e-5):
    assert got.shape == exact.shape
    error = float((got.double() - exact).detach().abs().max() / exact.detach().abs().max())
    assert error <= tolerance, error

# SPDX-License-Identifier: MIT
"""What real projects call of the unfused operators, as they call it. Compared with the dense fp64 reference."""

import dense_unfused
import pytest
import torch
from clients import close, dense_na, rows
from torch.nn.functional import dropout, pad, softmax

import natten

pytestmark = pytest.mark.usefixtures("initial_switches")


def exact_attention(q, k, v, window, dilation=1, rpb=None):
    rpb = None if rpb is None else rpb.double()
    return dense_unfused.attention(q.double(), k.double(), v.double(), window, dilation, False, rpb)


def test_all_in_one():
    """mir-aidj/all-in-one: 0.14.6 names in one and two dimensions, five and four arguments."""
    from natten.functional import natten1dav, natten1dqkrpb, natten2dav, natten2dqkrpb

    for grid, qkrpb, av in (((17,), natten1dqkrpb, natten1dav), ((10, 14), natten2dqkrpb, natten2dav)):
        q, k, v = rows(2, 3, *grid, 12)
        rpb = torch.randn(3, *(9 for _ in grid), requires_grad=True)
        attn = qkrpb(q, k, rpb, 5, 2)
        logits, exact = exact_attention(q, k, v, 5, 2, rpb.detach())
        close(attn, logits)
        out = av(softmax(attn, dim=-1), v, 5, 2)
        close(out, exact)
        assert torch.autograd.grad(out.sum(), rpb)[0].isfinite().all()


def test_transformers_before_0_14_5():
    """Four and three arguments; the padded input of the layer around them is the caller's."""
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = rows(1, 2, 14, 15, 8)
    rpb = torch.randn(2, 13, 13)
    attn = natten2dqkrpb(q, k, rpb, 2)
    logits, exact = exact_attention(q, k, v, 7, 2, rpb)
    close(attn, logits)
    close(natten2dav(softmax(attn, dim=-1), v, 2), exact)


def test_jafar():
    """Wants the weights as well."""
    from natten.functional import na2d_av, na2d_qk

    q, k, v = rows(1, 2, 9, 9, 16)
    attn = na2d_qk(q, k, kernel_size=(3, 3), dilation=(2, 2)).softmax(-1)
    _, exact = exact_attention(q, k, v, 3, 2)
    close(na2d_av(attn, v, kernel_size=(3, 3), dilation=(2, 2)), exact)
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    out, weights = natten.na2d(q, k, v, kernel_size=(3, 3), dilation=(2, 2), scale=1.0, return_weights=True)
    close(out.movedim(-2, 1), exact)
    close(weights, attn.double())


def test_stylenat():
    """HydraNA: heads in groups, the last ones larger, each group with its window, dilation and bias."""
    from natten import use_autotuner, use_fused_na
    from natten.functional import na2d_av, na2d_qk

    use_fused_na(True)
    use_autotuner(True)
    heads, head_dim, kernel_sizes, dilations = 5, 8, [3, 7], [1, 2]
    groups = [2, 3]
    qkv = torch.nn.Linear(heads * head_dim, 3 * heads * head_dim)
    x = torch.randn(2, 14, 16, heads * head_dim)
    tables = [torch.randn(h, 2 * k - 1, 2 * k - 1) for h, k in zip(groups, kernel_sizes)]
    q, k, v = qkv(x).reshape(2, 14, 16, 3, heads, head_dim).permute(3, 0, 4, 1, 2, 5)
    q = q * head_dim**-0.5
    outs, exacts = [], []
    for _q, _k, _v, kernel_size, dilation, rpb in zip(
        q.split(groups, 1), k.split(groups, 1), v.split(groups, 1), kernel_sizes, dilations, tables
    ):
        attn = na2d_qk(_q, _k, kernel_size=kernel_size, dilation=dilation, rpb=rpb)
        attn = dropout(softmax(attn, dim=-1), 0.0)
        outs.append(na2d_av(attn, _v, kernel_size=kernel_size, dilation=dilation))
        exacts.append(exact_attention(_q.detach(), _k.detach(), _v.detach(), kernel_size, dilation, rpb)[1])
    out = torch.cat(outs, 1).permute(0, 2, 3, 1, 4).reshape(x.shape)
    close(out, torch.cat(exacts, 1).permute(0, 2, 3, 1, 4).reshape(x.shape))


def test_overlock():
    """ContMix: weights of its own, shared by the channels of a group."""
    from natten.functional import na2d_av

    weights, (value,) = torch.rand(2, 4, 9, 11, 25), rows(2, 4, 9, 11, 6, count=1)
    where, _ = dense_unfused.slots_of((9, 11), 5, 1, False)
    exact = dense_unfused.dense_av(weights.double(), value.double(), None, where)
    close(na2d_av(weights, value, kernel_size=5), exact)


def test_agileformer():
    """0.15 names, all positional."""
    from natten.functional import na2d_av, na2d_qk_with_bias

    q, k, v = rows(1, 2, 9, 10, 8)
    rpb = torch.randn(2, 9, 9)
    attn = na2d_qk_with_bias(q, k, rpb, 5, 1)
    logits, exact = exact_attention(q, k, v, 5, 1, rpb)
    close(attn, logits)
    close(na2d_av(attn.softmax(-1), v, 5, 1), exact)


def test_superpixels():
    """Weights changed between the two steps."""
    from natten.functional import natten2dav, natten2dqkrpb

    q, k, v = rows(1, 2, 8, 9, 8)
    attn = natten2dqkrpb(q, k, torch.zeros(2, 9, 9), 5, 1)
    weights = attn.softmax(-1) * torch.rand_like(attn)
    weights = weights / weights.sum(-1, keepdim=True)
    where, _ = dense_unfused.slots_of((8, 9), 5, 1, False)
    close(natten2dav(weights, v, 5, 1), dense_unfused.dense_av(weights.double(), v.double(), None, where))


def test_native_segmentation():
    """Logits with a bias alone, keys in the place of queries."""
    from natten.functional import na2d_qk

    q, k, v = rows(1, 2, 8, 9, 8)
    bias = torch.randn(2, 5, 5)
    close(na2d_qk(k, q, kernel_size=3, rpb=bias), exact_attention(k, q, v, 3, 1, bias)[0])


def test_cosmology():
    """Three axes, a radial bias between the steps, periodic padding around them."""
    from natten.functional import na3d, na3d_av, na3d_qk

    q, k, v = (pad(x.flatten(0, 1).movedim(-1, 1), (1,) * 6, mode="circular") for x in rows(1, 2, 4, 5, 6, 8))
    q, k, v = (x.movedim(1, -1)[None] for x in (q, k, v))
    radial = torch.randn(27)
    attn = na3d_qk(q, k, kernel_size=3, dilation=1) + radial
    logits, _ = exact_attention(q, k, v, 3)
    close(attn, logits + radial.double())
    where, _ = dense_unfused.slots_of(q.shape[2:-1], 3, 1, False)
    exact = dense_unfused.dense_av(attn.double().softmax(-1), v.double(), None, where)
    close(na3d_av(attn.softmax(-1), v, kernel_size=3, dilation=1), exact)
    q, k, v = (x.movedim(1, -2) for x in (q, k, v))
    close(na3d(q, k, v, kernel_size=3), dense_na(q, k, v, 3))

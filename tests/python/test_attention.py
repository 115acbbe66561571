# SPDX-License-Identifier: MIT
"""`natten.attention`: dense attention with the rights of the windowed one. T-43 grouped heads, T-44 values of another
width, T-40 the gradient of lse, T-10 as far as queries without keys can occur here."""

import math

import cases
import dense
import pytest
import torch
from cases import DTYPES, HALVES, compare

import natten


def inputs_of(dtype, tokens=9, tokens_kv=9, heads=4, heads_kv=4, head_dim=8, head_dim_v=8, batch=2):
    shapes = {
        "q": (batch, tokens, heads, head_dim),
        "k": (batch, tokens_kv, heads_kv, head_dim),
        "v": (batch, tokens_kv, heads_kv, head_dim_v),
        "dout": (batch, tokens, heads, head_dim_v),
        "dlse": (batch, tokens, heads),
    }
    return {name: torch.randn(shape, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}


def results(function, inputs, dtype=None):
    q, k, v = (inputs[name].to(dtype or inputs[name].dtype).requires_grad_() for name in "qkv")
    out, lse = function(q, k, v)
    grads = torch.autograd.grad([out, lse], [q, k, v], [inputs["dout"].to(out.dtype), inputs["dlse"].to(lse.dtype)])
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


def check(inputs, causal=False, scale=None):
    dtype, factor = inputs["q"].dtype, inputs["q"].shape[-1] ** -0.5 if scale is None else scale

    def exactly(q, k, v):
        return dense.full_attention(q, k, v, factor, causal)

    exact = results(exactly, inputs, torch.float64)
    same = results(exactly, inputs) if dtype in HALVES else None
    for plan in map(cases.engine, (None, "reference", "cpu")):
        got = results(lambda q, k, v, p=plan: natten.attention(q, k, v, causal, scale, plan=p, return_lse=True), inputs)
        compare(got, exact, same, dtype, f"plan={plan}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [1, 9, 17, 70])
def test_self_attention(tokens, causal, dtype):
    check(inputs_of(dtype, tokens, tokens), causal)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, tokens_kv", [(1, 5), (5, 1), (9, 17), (40, 7)])
def test_cross_attention(tokens, tokens_kv, dtype):
    check(inputs_of(dtype, tokens, tokens_kv))
    check(inputs_of(dtype, tokens, tokens_kv, heads_kv=2, head_dim_v=5), scale=0.3)


@pytest.mark.parametrize("heads_kv", [1, 2, 4])
@pytest.mark.parametrize("head_dim_v", [3, 8, 16])
@pytest.mark.parametrize("scale", [0.0, -0.5, 1])
def test_grouped_heads_widths_and_scales(heads_kv, head_dim_v, scale):
    for dtype in (torch.float32, torch.bfloat16):
        check(inputs_of(dtype, heads_kv=heads_kv, head_dim_v=head_dim_v), scale=scale)


@pytest.mark.parametrize("causal", [False, True])
def test_against_torch(causal):
    q, k, v = (inputs_of(torch.float64)[name] for name in "qkv")
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
    )
    out = natten.attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_no_keys_at_all():
    q, k, v = torch.randn(2, 5, 3, 8), torch.randn(2, 0, 3, 8), torch.randn(2, 0, 3, 4)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = natten.attention(*leaves, return_lse=True)
    assert out.shape == (2, 5, 3, 4) and not out.any() and (lse == -math.inf).all()
    other, other_lse = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3)
    merged, merged_lse = natten.merge_attentions([out, other], [lse, other_lse])
    torch.testing.assert_close(merged, other)
    torch.testing.assert_close(merged_lse, other_lse)
    if merged.requires_grad:
        merged.sum().backward()
        assert q.grad is None or not q.grad.any()


@pytest.mark.parametrize("fix", [True, False])
def test_it_is_the_second_branch_of_neighborhood_attention(fix):
    """Additional keys are the same as a merge with dense attention over them, values and gradients."""
    q, k, v = torch.randn(3, 2, 5, 6, 2, 4, dtype=torch.float64)
    extra_k, extra_v = torch.randn(2, 2, 3, 2, 4, dtype=torch.float64)
    leaves = [x.requires_grad_() for x in (q, k, v, extra_k, extra_v)]
    joint, joint_lse = natten.na2d(q, k, v, 3, additional_keys=extra_k, additional_values=extra_v, return_lse=True)
    out, lse = natten.na2d(q, k, v, 3, return_lse=True)
    far, far_lse = natten.attention(q.flatten(1, 2), extra_k, extra_v, return_lse=True)
    merged, merged_lse = natten.merge_attentions(
        [out.flatten(1, 2), far], [lse.flatten(1, 2), far_lse], use_autograd_fix=fix
    )
    torch.testing.assert_close(merged.view_as(joint), joint, rtol=0, atol=1e-12)
    torch.testing.assert_close(merged_lse.view_as(joint_lse), joint_lse, rtol=0, atol=1e-12)
    gradients = [
        torch.autograd.grad(o.sin().sum() + x.square().sum(), leaves)
        for o, x in ((joint, joint_lse), (merged, merged_lse))
    ]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

# SPDX-License-Identifier: MIT
"""Which keys a query sees, exactly: T-2 even windows, T-3 dilation that does not divide the axis, T-4 stride and
blocked attention, T-5 mixes of causal axes, T-6 membership by one-hot values, T-9 windows as long as the axis."""

import itertools

import cases
import dense
import pytest
import torch
from cases import Case

import natten


def seen_keys(case, plan):
    """bool [tokens, tokens] as the package has it: equal logits and one-hot values spell the window out."""
    tokens = torch.Size(case.grid).numel()
    q = torch.zeros(1, *case.grid, 1, case.head_dim)
    v = torch.eye(tokens).view(1, *case.grid, 1, tokens)
    out = cases.call(case, {"q": q, "k": q, "v": v}, plan).view(tokens, tokens)
    counts = (out > 0).sum(-1, keepdim=True)
    torch.testing.assert_close(out * counts, (out > 0).float(), rtol=0, atol=1e-5)  # each of them once
    return out > 0


def check_membership(case):
    tokens = torch.Size(case.grid).numel()
    expected = dense.window_mask(case.grid, *case.parameters)
    for plan in cases.plans_of(Case(**{**vars(case), "head_dim_v": tokens}), torch.float32):
        assert torch.equal(seen_keys(case, plan), expected), f"{case} plan={plan}"


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_membership_on_one_axis(dilation, causal):
    for extent in (1, 2, 3, 5, 8, 13, 17):
        for window in range(1, extent // dilation + 1):
            for stride in {1, 2, 3, window // 2, window} - {0}:
                if stride <= window:
                    check_membership(Case((extent,), window, stride, dilation, causal))


@pytest.mark.parametrize("causal", list(itertools.product([False, True], repeat=2)), ids=str)
@pytest.mark.parametrize("dilation", [(1, 1), (2, 1), (1, 3)], ids=str)
@pytest.mark.parametrize(
    "window, stride", [((2, 3), (1, 1)), ((4, 2), (1, 1)), ((3, 2), (3, 1)), ((2, 2), (2, 2))], ids=str
)
def test_membership_on_two_axes(window, stride, dilation, causal):
    check_membership(Case((8, 7), window, stride, dilation, causal))


@pytest.mark.parametrize("causal", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("stride", [1, (1, 2, 2), (2, 1, 3)], ids=str)
def test_membership_on_three_axes(stride, causal):
    check_membership(Case((3, 4, 7), (2, 3, 3), stride, (1, 1, 2), causal))


@pytest.mark.parametrize("window", [2, 4, 6, 8, 10, 12])
def test_even_windows(window):
    cases.check(Case((23,), window, heads=2))
    cases.check(Case((13, 14), (window, 3), head_dim=3))
    cases.check(Case((3, 4, 13), (2, 4, window), batch=2), dtypes=(torch.float32, torch.bfloat16))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("extent", [12, 13, 14, 15])  # window * dilation = 12, and what a fourth token per group adds
def test_dilation_that_does_not_divide_the_axis(extent, causal):
    cases.check(Case((extent,), 3, dilation=4, causal=causal, heads=2))
    cases.check(Case((extent, 5), (3, 2), dilation=(4, 2), causal=(causal, False)))
    cases.check(Case((2, extent, 4), (2, 3, 3), dilation=(1, 4, 1), causal=(False, causal, False)), dtypes=cases.FLOATS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window, stride", [(5, 2), (5, 4), (5, 5), (6, 3), (6, 6), (4, 3)])
def test_stride(window, stride, causal):
    for extent, dilation in ((12, 1), (13, 1), (17, 1), (13, 2), (19, 3)):
        cases.check(Case((extent,), window, stride, dilation, causal), dtypes=(torch.float32, torch.float16))
    cases.check(Case((9, 11), (4, window), (2, stride), causal=(False, causal), heads=2), dtypes=cases.FLOATS)
    cases.check(Case((3, 5, 12), (2, 3, window), (1, 3, stride), (1, 1, 2), (False, True, causal)), dtypes=cases.FLOATS)


@pytest.mark.parametrize("window", [2, 3, 4, 7])
def test_stride_equal_to_the_window_is_swin(window):
    """Windows partition the grid, and attention runs inside of each: written with torch's own attention."""
    batch, heads, dim, blocks = 2, 2, 8, 2
    side = blocks * window
    q, k, v = torch.randn(3, batch, side, side, heads, dim, dtype=torch.float64)

    def partition(x):
        x = x.view(batch, blocks, window, blocks, window, heads, dim).transpose(2, 3)
        return x.reshape(batch * blocks * blocks, window * window, heads, dim).transpose(1, 2)

    swin = torch.nn.functional.scaled_dot_product_attention(partition(q), partition(k), partition(v)).transpose(1, 2)
    swin = swin.reshape(batch, blocks, blocks, window, window, heads, dim).transpose(2, 3).reshape(q.shape)
    for plan in cases.plans_of(Case((side, side), window, window, head_dim=dim, heads=heads), torch.float64):
        out = natten.na2d(q, k, v, window, stride=window, plan=plan)
        torch.testing.assert_close(out, swin, rtol=0, atol=1e-12)


@pytest.mark.parametrize("causal", list(itertools.product([False, True], repeat=2)), ids=str)
def test_causal_mixes_on_two_axes(causal):
    for dilation, stride in ((1, 1), (2, 1), ((1, 2), (3, 1))):
        cases.check(Case((7, 9), 3, stride, dilation, causal, heads=2))


@pytest.mark.parametrize("causal", list(itertools.product([False, True], repeat=3)), ids=str)
def test_causal_mixes_on_three_axes(causal):
    cases.check(Case((4, 5, 6), (2, 3, 4), 1, 1, causal), dtypes=(torch.float32, torch.float16))
    cases.check(Case((4, 5, 6), (2, 2, 3), (1, 2, 1), (2, 1, 2), causal), dtypes=cases.FLOATS)


def sdpa(q, k, v, is_causal=False):
    heads_first = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=is_causal)
    return out.transpose(1, 2).reshape(*q.shape[:-1], v.shape[-1])


@pytest.mark.parametrize("grid", [(17,), (5, 7), (3, 4, 5)], ids=str)
@pytest.mark.parametrize("extra", [0, 3])
def test_window_equal_to_the_axis_is_dense_attention(grid, extra):
    case = Case(grid, grid, batch=2, heads=2, head_dim=8, head_dim_v=6, extra=extra)
    cases.check(case)
    inputs = cases.make_inputs(case, torch.float64)
    k, v = (
        torch.cat([inputs[a].flatten(1, -3), inputs.get("extra_" + a, inputs[a][:, :0].flatten(1, -3))], 1)
        for a in "kv"
    )
    expected = sdpa(inputs["q"].flatten(1, -3), k, v).view(inputs["dout"].shape)
    for plan in cases.plans_of(case, torch.float64):
        torch.testing.assert_close(cases.call(case, inputs, plan), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("extra", [0, 3])
def test_window_equal_to_the_axis_with_causal_axes(extra):
    """On one axis this is causal attention; on several it is not, and must not be taken for it."""
    case = Case((17,), 17, causal=True, heads=2, head_dim=8, extra=extra)
    cases.check(case)
    inputs = cases.make_inputs(case, torch.float64)
    if not extra:
        for plan in cases.plans_of(case, torch.float64):
            expected = sdpa(*(inputs[name] for name in "qkv"), is_causal=True)
            torch.testing.assert_close(cases.call(case, inputs, plan), expected, rtol=0, atol=1e-12)
    for grid in ((4, 5), (2, 3, 4)):
        for causal in itertools.product([False, True], repeat=len(grid)):
            cases.check(Case(grid, grid, causal=causal, extra=extra), dtypes=(torch.float32,))


@pytest.mark.parametrize("causal", [False, True])
def test_window_one_short_of_the_axis(causal):
    case = Case((12,), 11, causal=causal)
    cases.check(case)
    inputs = cases.make_inputs(case, torch.float64)
    difference = cases.call(case, inputs) - sdpa(*(inputs[name] for name in "qkv"), is_causal=causal)
    assert difference.abs().max() > 1e-3
    cases.check(Case((6, 7), (5, 7), causal=causal))
    cases.check(Case((6, 7), (6, 6), causal=causal))

# SPDX-License-Identifier: MIT
"""T-12: windows that are larger than an axis or a dilation group: cut, padded as NATTEN 0.14 did, or refused."""

import cases
import pytest
import torch
import torch.nn.functional as F
from cases import Case

import natten

CUT = [
    Case((5,), 7),
    Case((5,), 7, stride=6, causal=True),
    Case((13,), 5, dilation=3),  # groups of 5, 4, 4
    Case((13,), 5, stride=5, dilation=3),
    Case((11,), 4, dilation=3, causal=True, bias=True, heads=2),  # groups of 4, 4, 3
    Case((4, 9), (7, 3), bias=True, heads=2),
    Case((9, 4), (3, 6), dilation=(2, 2)),
    Case((3, 17), 7, dilation=(1, 3), causal=(False, True), extra=2),  # the second axis: 6, 6, 5
    Case((2, 5, 6), (4, 3, 8), bias=True),
    Case((4, 2, 5), (2, 9, 5), dilation=(2, 3, 1), causal=(True, False, False)),
]


@pytest.mark.parametrize("case", CUT, ids=str)
def test_clamp_is_the_default(case):
    cases.check(case)
    inputs = cases.make_inputs(case, torch.float32)
    assert torch.equal(cases.call(case, inputs), cases.call(case, inputs, oversize="clamp"))


@pytest.mark.parametrize("grid", [(7,), (4, 6), (3, 4, 2)], ids=str)
def test_minus_one_means_the_whole_axis(grid):
    q, k, v = torch.randn(3, 2, *grid, 2, 8)
    function = cases.FUNCTIONS[len(grid)]
    assert torch.equal(function(q, k, v, -1), function(q, k, v, grid))
    window = (*grid[:-1], -1)
    assert torch.equal(function(q, k, v, window), function(q, k, v, grid))
    assert torch.equal(function(q, k, v, -1, is_causal=True), function(q, k, v, grid, is_causal=True))


@pytest.mark.parametrize("plan", [None, "reference"])
@pytest.mark.parametrize("case", CUT, ids=str)
def test_error_refuses(case, plan):
    inputs = cases.make_inputs(case, torch.float32)
    with pytest.raises(ValueError):
        cases.call(case, inputs, plan, oversize="error")


def test_error_lets_fitting_windows_pass():
    case = Case((12, 7), (3, 7), dilation=(4, 1), heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    assert torch.equal(cases.call(case, inputs, oversize="error"), cases.call(case, inputs))
    q = torch.randn(1, 13, 1, 4)
    natten.na1d(q, q, q, 3, dilation=4, oversize="error")
    with pytest.raises(ValueError, match="20"):
        natten.na1d(q, q, q, 5, dilation=4, oversize="error")
    with pytest.raises(ValueError):
        natten.na1d(q, q, q, 1, oversize="error")  # the newest era wants two keys or more


def pad_grid(x, pads):
    """Zeros behind the end of every axis of the grid; x is [batch, *grid, heads, dim] or [batch, *grid, channels]."""
    trailing = x.dim() - 1 - len(pads)
    return F.pad(x, [0, 0] * trailing + [value for pad in reversed(pads) for value in (0, pad)])


def crop_grid(x, grid):
    return x[(slice(None), *(slice(0, extent) for extent in grid))]


PADDED = [
    Case((5,), 7, heads=2),
    Case((13,), 5, dilation=3, bias=True),
    Case((4, 9), (7, 3), heads=2, bias=True),
    Case((9, 5), 3, dilation=(2, 3)),
    Case((2, 5, 6), (3, 3, 7)),
]


@pytest.mark.parametrize("case", PADDED, ids=str)
def test_pad_attends_zeros_behind_the_grid(case):
    """The functions have no projection, so the padded keys and values are zeros; they are attended all the same."""
    window, _, dilation, _ = case.parameters
    pads = [max(w * d - extent, 0) for extent, w, d in zip(case.grid, window, dilation)]
    padded = Case(**{**vars(case), "grid": tuple(extent + pad for extent, pad in zip(case.grid, pads))})

    def by_hand(tensors):
        with_zeros = {name: pad_grid(tensors[name], pads) for name in "qkv"}
        out, lse = cases.call_dense(padded, {**tensors, **with_zeros})
        return crop_grid(out, case.grid), crop_grid(lse, case.grid)

    for dtype in cases.DTYPES:
        inputs = cases.make_inputs(case, dtype)
        exact, same = cases.expected_of(by_hand, inputs)
        for plan in [None, "reference"]:
            cases.compare(cases.results(case, inputs, plan, oversize="pad"), exact, same, dtype, f"{case} pad {plan}")


def module_by_hand(module, x, heads, window, dilation):
    """The module of NATTEN 0.14.6 in plain PyTorch: zeros behind x before the projection, so that padded tokens have
    the bias of `qkv` as query, key and value; cropped behind `proj`."""
    grid, channels = x.shape[1:-1], x.shape[-1]
    pads = [max(w * d - extent, 0) for extent, w, d in zip(grid, window, dilation)]
    x = pad_grid(x, pads)
    qkv = F.linear(x, module.qkv.weight, module.qkv.bias)
    q, k, v = qkv.unflatten(-1, (3, heads, channels // heads)).movedim(-3, 0)
    case = Case(tuple(x.shape[1:-1]), window, dilation=dilation)
    tensors = {"q": q, "k": k, "v": v, "bias": module.rpb}
    case = Case(**{**vars(case), "head_dim": channels // heads})
    out, _ = cases.call_dense(case, tensors)
    return F.linear(crop_grid(out.flatten(-2), grid), module.proj.weight, module.proj.bias)


MODULES = {
    1: natten.NeighborhoodAttention1D,
    2: natten.NeighborhoodAttention2D,
    3: natten.NeighborhoodAttention3D,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "grid, window, dilation", [((4,), 7, 1), ((9,), 3, 4), ((4, 9), 7, 1), ((9, 5), 3, (2, 3)), ((2, 3, 4), 3, 1)]
)
def test_the_0_14_module_pads(grid, window, dilation, bias):
    rank, heads = len(grid), 2
    module = MODULES[rank](dim=8, num_heads=heads, kernel_size=window, dilation=dilation, bias=bias).double()
    if bias:
        torch.nn.init.normal_(module.rpb)
    torch.nn.init.normal_(module.qkv.bias)
    window, dilation = cases.per_axis(window, rank), cases.per_axis(dilation, rank)
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *module.parameters()]
    out, expected = module(x), module_by_hand(module, x, heads, window, dilation)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    gradient = torch.randn_like(out)
    for got, exact in zip(torch.autograd.grad(out, leaves, gradient), torch.autograd.grad(expected, leaves, gradient)):
        torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


def clamped_by_hand(module, x, heads):
    window, dilation = (7, 7), (1, 1)
    q, k, v = (
        F.linear(x, module.qkv.weight, module.qkv.bias).unflatten(-1, (3, heads, x.shape[-1] // heads)).movedim(-3, 0)
    )
    case = Case(tuple(x.shape[1:-1]), window, dilation=dilation, head_dim=x.shape[-1] // heads)
    out, _ = cases.call_dense(case, {"q": q, "k": k, "v": v, "bias": module.rpb})
    return F.linear(out.flatten(-2), module.proj.weight, module.proj.bias)


@pytest.fixture
def no_override():
    yield
    natten.context.set_oversize(None)


def test_modules_clamp_and_the_context_overrides(no_override):
    x = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    newer = natten.NeighborhoodAttention2D(8, 2, 7, rel_pos_bias=True).double()
    older = natten.NeighborhoodAttention2D(8, 2, 7, bias=True).double()
    for module in (newer, older):
        torch.nn.init.normal_(module.rpb)
        torch.nn.init.normal_(module.qkv.bias)
    clamped = {module: clamped_by_hand(module, x, 2) for module in (newer, older)}
    padded = {module: module_by_hand(module, x, 2, (7, 7), (1, 1)) for module in (newer, older)}

    def same(module, expected):
        torch.testing.assert_close(module(x), expected[module], rtol=0, atol=1e-12)

    same(newer, clamped)
    same(older, padded)
    natten.context.set_oversize("pad")
    same(newer, padded)
    same(older, padded)
    natten.context.set_oversize("clamp")
    same(newer, clamped)
    same(older, clamped)
    natten.context.set_oversize("error")
    for module in (newer, older):
        with pytest.raises(ValueError):
            module(x)
    natten.context.set_oversize(None)
    same(newer, clamped)
    same(older, padded)


def test_unknown_words_are_refused():
    q = torch.randn(1, 5, 1, 4)
    with pytest.raises(ValueError):
        natten.na1d(q, q, q, 3, oversize="shrink")
    with pytest.raises(ValueError):
        natten.context.set_oversize("shrink")

# SPDX-License-Identifier: MIT
"""Derivatives of first order. T-40 the gradient of lse, T-41 of additional keys and values, T-42 of the relative
position bias, T-43 grouped heads, T-44 values of another width, T-49 partially frozen inputs; gradcheck in fp64."""

import itertools

import cases
import pytest
import torch
from cases import Case

CHECKED = [
    Case((5,), 3, heads=2, head_dim=2),
    Case((6,), 2, dilation=2, causal=True, head_dim=2, bias=True),
    Case((6,), 4, stride=3, head_dim=2, head_dim_v=1, extra=2),
    Case((3, 4), (2, 3), causal=(True, False), heads=2, heads_kv=1, head_dim=2, bias=True, extra=1),
    Case((3, 4), (3, 2), dilation=(1, 2), head_dim=2, head_dim_v=3, bias=True),
    Case((4, 4), (2, 4), stride=(2, 3), head_dim=1, bias=True, extra=1),
    Case((2, 3, 3), (2, 2, 3), causal=(False, True, False), head_dim=1, bias=True, extra=1),
    Case((2, 3), 5, heads=1, head_dim=2, bias=True),  # cut windows
]


@pytest.mark.parametrize("case", CHECKED, ids=str)
def test_gradcheck(case):
    inputs = cases.make_inputs(case, torch.float64)
    names = [name for name in cases.INPUTS if name in inputs]
    leaves = [inputs[name].requires_grad_() for name in names]
    for plan in cases.plans_of(case, torch.float64):

        def function(*tensors, plan=plan):
            return cases.call(case, dict(zip(names, tensors)), plan, return_lse=True)

        assert torch.autograd.gradcheck(function, leaves, nondet_tol=0.0), plan


EVERYTHING = [
    Case((19,), 5, dilation=2, heads=2, bias=True, extra=3),
    Case((7, 18), (3, 4), causal=(True, False), heads=2, head_dim=8, bias=True, extra=2, batch=2),
    Case((7, 9), (3, 4), stride=(2, 4), heads=2, head_dim=8, bias=True, extra=2),
    Case((3, 4, 9), (2, 3, 3), dilation=(1, 1, 2), heads=2, bias=True, extra=1),
]


@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_lse_gradient(case):
    """A loss of lse alone, of out alone, and of both, which are linear: their gradients add up."""
    for dtype in cases.DTYPES:
        inputs = cases.make_inputs(case, dtype)
        zero = {name: torch.zeros_like(inputs[name]) for name in ("dout", "dlse")}
        for changed in (inputs, {**inputs, "dout": zero["dout"]}, {**inputs, "dlse": zero["dlse"]}):
            exact, same = cases.expected(case, changed)
            for plan in cases.plans_of(case, dtype):
                cases.compare(cases.results(case, changed, plan), exact, same, dtype, f"{case} {plan}")


@pytest.mark.parametrize("case", EVERYTHING, ids=str)
def test_loss_of_lse_alone(case):
    """out is not part of the graph, so its gradient does not exist; gradients of values are zero."""
    inputs = cases.make_inputs(case, torch.float64)
    for plan in cases.plans_of(case, torch.float64):
        q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
        _, lse = cases.call(case, {**inputs, "q": q, "k": k, "v": v}, plan, return_lse=True)
        _, exact = cases.call_dense(case, {**inputs, "q": q, "k": k, "v": v})
        got = torch.autograd.grad(lse.square().sum(), (q, k, v), allow_unused=True)
        expected = torch.autograd.grad(exact.square().sum(), (q, k))
        for a, b in zip(got, expected):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert got[2] is None or not got[2].any()


@pytest.mark.parametrize("extra", [1, 2, 17, 40])
def test_additional_keys(extra):
    cases.check(Case((18,), 4, heads=2, extra=extra, batch=2))
    cases.check(Case((5, 9), (3, 4), dilation=(1, 2), heads=4, heads_kv=2, head_dim_v=3, extra=extra))
    cases.check(Case((5, 6), (5, 6), heads=2, extra=extra))  # window as large as the grid
    cases.check(Case((2, 3, 4), 2, stride=2, extra=extra, causal=True), dtypes=cases.FLOATS)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("window", [(3, 3), (4, 5), (2, 6)])
def test_relative_position_bias(window, stride, causal):
    cases.check(Case((7, 17), window, stride, (1, 2), (causal, False), heads=3, bias=True, batch=2))
    cases.check(Case((13,), window[0], stride, 3, causal, heads=2, bias=True))


@pytest.mark.parametrize("dtype", (torch.float32, *cases.HALVES), ids=str)
def test_bias_gradient_sums_many_samples(dtype):
    """12,800 terms for each of 25 entries: a sum in a half type would lose all digits. Odd counts of entries."""
    case = Case((20, 20), 3, batch=32, heads=1, head_dim=4, bias=True)
    inputs = cases.make_inputs(case, dtype)
    exact, _ = cases.expected(case, inputs)
    for plan in cases.plans_of(case, dtype):
        error = cases.errors_of(cases.results(case, inputs, plan), exact)["dbias"]
        assert error <= max(4 * torch.finfo(dtype).eps, 1e-5), plan


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("heads_kv", [1, 3])
def test_grouped_heads(heads_kv, groups):
    heads = heads_kv * groups
    cases.check(Case((18,), 5, heads=heads, heads_kv=heads_kv, batch=2))
    cases.check(
        Case((5, 9), (3, 4), stride=(2, 1), heads=heads, heads_kv=heads_kv, bias=True, extra=2), dtypes=cases.FLOATS
    )


@pytest.mark.parametrize("head_dim, head_dim_v", [(8, 4), (4, 8), (1, 7), (16, 1), (32, 64), (64, 16), (20, 48)])
def test_values_of_another_width(head_dim, head_dim_v):
    cases.check(Case((18,), 5, heads=2, head_dim=head_dim, head_dim_v=head_dim_v))
    cases.check(Case((4, 9), (3, 4), dilation=(1, 2), head_dim=head_dim, head_dim_v=head_dim_v, extra=2, bias=True))
    cases.check(Case((4, 9), (3, 4), stride=(3, 2), head_dim=head_dim, head_dim_v=head_dim_v), dtypes=cases.FLOATS)


@pytest.mark.parametrize("case", [EVERYTHING[1], EVERYTHING[2]], ids=str)
def test_partially_frozen(case):
    """Every subset of inputs that requires a gradient gets the same bits as when all of them do."""
    inputs = cases.make_inputs(case, torch.float32)
    subsets = [wanted for size in (1, 2, 5) for wanted in itertools.combinations(cases.INPUTS, size)]
    for plan, wanted in itertools.product(cases.plans_of(case, torch.float32), subsets):
        full = cases.results(case, inputs, plan)
        leaves = {name: inputs[name].clone().requires_grad_(name in wanted) for name in cases.INPUTS}
        out, lse = cases.call(case, leaves, plan, return_lse=True)
        torch.autograd.backward([out, lse], [inputs["dout"], inputs["dlse"]])
        for name, leaf in leaves.items():
            if name in wanted:
                assert torch.equal(leaf.grad, full["d" + name]), f"{name} of {wanted} {plan}"
            else:
                assert leaf.grad is None


def test_nothing_requires_a_gradient():
    case = EVERYTHING[1]
    inputs = cases.make_inputs(case, torch.float32)
    out, lse = cases.call(case, inputs, return_lse=True)
    assert not out.requires_grad and not lse.requires_grad and out.grad_fn is None


def test_gradients_accumulate_in_leaves():
    case = Case((9,), 3, heads=2)
    inputs = cases.make_inputs(case, torch.float64)
    q = inputs["q"].clone().requires_grad_()
    for _ in range(2):
        cases.call(case, {**inputs, "q": q}).backward(inputs["dout"])
    once = cases.results(case, inputs, lse_gradient=False)["dq"]
    torch.testing.assert_close(q.grad, 2 * once)


def test_one_tensor_in_three_roles():
    """Self attention without projections: the gradient of x is the sum of its three."""
    case = Case((6, 7), 3, heads=2, head_dim=4)
    x = torch.randn(1, 6, 7, 2, 4, dtype=torch.float64, requires_grad=True)
    for plan in cases.plans_of(case, torch.float64):
        tensors = {"q": x, "k": x, "v": x}
        out, exact = cases.call(case, tensors, plan), cases.call_dense(case, tensors)[0]
        got, expected = (torch.autograd.grad(y.sin().sum(), x)[0] for y in (out, exact))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)

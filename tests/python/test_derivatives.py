# SPDX-License-Identifier: MIT
"""T-45: forward mode, second order, vmap and the torch.func transforms, on tiny grids in fp64."""

import cases
import pytest
import torch
from cases import Case
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import natten

CASES = [
    Case((4,), 3, heads=2, head_dim=2),
    Case((5,), 2, dilation=2, causal=True, head_dim=1, bias=True, extra=1),
    Case((2, 3), (2, 3), heads=2, heads_kv=1, head_dim=1, head_dim_v=2, bias=True),
    Case((3, 3), (2, 3), stride=(2, 1), head_dim=1, extra=2),
    Case((2, 2, 2), (2, 1, 2), causal=(True, False, False), head_dim=1, bias=True),
]


def function_and_leaves(case):
    inputs = cases.make_inputs(case, torch.float64)
    names = [name for name in cases.INPUTS if name in inputs]

    def function(*tensors):
        return cases.call(case, dict(zip(names, tensors)), return_lse=True)

    def exactly(*tensors):
        return cases.call_dense(case, dict(zip(names, tensors)))

    return function, exactly, [inputs[name].requires_grad_() for name in names]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_mode(case):
    function, _, leaves = function_and_leaves(case)
    assert torch.autograd.gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True, nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_second_order(case):
    function, _, leaves = function_and_leaves(case)
    assert torch.autograd.gradgradcheck(function, leaves, nondet_tol=0.0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tangents(case):
    """Dual numbers and torch.func.jvp against the dense reference."""
    function, exactly, leaves = function_and_leaves(case)
    primals = tuple(x.detach() for x in leaves)
    tangents = tuple(torch.randn_like(x) for x in primals)
    _, expected = jvp(exactly, primals, tangents)
    _, got = jvp(function, primals, tangents)
    with forward_ad.dual_level():
        duals = function(*(forward_ad.make_dual(x, t) for x, t in zip(primals, tangents)))
        unpacked = [forward_ad.unpack_dual(y).tangent for y in duals]
    for a, b, c in zip(got, unpacked, expected):
        torch.testing.assert_close(a, c, rtol=0, atol=1e-11)
        torch.testing.assert_close(b, c, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_hessians(case):
    function, exactly, leaves = function_and_leaves(case)
    primals = tuple(x.detach() for x in leaves)
    wanted = tuple(range(len(primals)))

    def loss(run):
        def scalar(*tensors):
            out, lse = run(*tensors)
            return out.sin().sum() + lse.square().sum()

        return scalar

    got, expected = (hessian(loss(run), argnums=wanted)(*primals) for run in (function, exactly))
    for row, exact_row in zip(got, expected):
        for a, b in zip(row, exact_row):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap(case):
    """A mapped axis in the first place, in the middle, or absent from an input; and over gradients."""
    function, exactly, leaves = function_and_leaves(case)
    primals = [x.detach() for x in leaves]
    for dims in ([0] * len(primals), [2] * len(primals), [0, None, 1, *[0] * (len(primals) - 3)]):
        batch = [x if dim is None else torch.stack([x + i for i in range(3)], dim) for x, dim in zip(primals, dims)]
        for a, b in zip(*(vmap(run, tuple(dims))(*batch) for run in (function, exactly))):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)

    def loss(run):
        return lambda *tensors: run(*tensors)[0].square().sum()

    batch = [torch.stack([x, 2 * x]) for x in primals]
    wanted = tuple(range(len(primals)))
    got, expected = (vmap(grad(loss(run), wanted))(*batch) for run in (function, exactly))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_jacobian_of_a_module():
    module = natten.NeighborhoodAttention2D(4, 2, 2, rel_pos_bias=True).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(module, p, (x,)))(parameters)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(module, p, (x,)), (parameters,), (direction,))
    product = sum((jacobian[name].flatten(4) * direction[name].flatten()).sum(-1) for name in parameters)
    torch.testing.assert_close(product, tangent, rtol=0, atol=1e-11)

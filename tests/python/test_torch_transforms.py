# SPDX-License-Identifier: MIT
"""T-45: forward mode, second order, vmap, the torch.func transforms and their compilation, on tiny grids in fp64.
What torch itself refuses stands at the end, so that the day it no longer does is noticed."""

import functools

import cases
import pytest
import torch
from cases import Case
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

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


def leaves_of(case):
    function, exactly, leaves = function_and_leaves(case)
    return function, exactly, tuple(x.detach() for x in leaves)


def loss_of(run):
    def loss(*tensors):
        out, lse = run(*tensors)
        return out.sin().sum() + lse.square().sum()

    return loss


def assert_close(got, expected):
    for a, b in zip(*(torch.utils._pytree.tree_leaves(x) for x in (got, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@pytest.mark.parametrize("case", CASES[:3], ids=str)
def test_jacobians(case, jacobian):
    function, exactly, primals = leaves_of(case)
    wanted = tuple(range(len(primals)))
    assert_close(*(jacobian(run, wanted)(*primals) for run in (function, exactly)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vjp(case):
    function, exactly, primals = leaves_of(case)
    outs, pull = vjp(function, *primals)
    expected_outs, expected_pull = vjp(exactly, *primals)
    cotangents = tuple(torch.randn_like(x) for x in outs)
    assert_close((outs, pull(cotangents)), (expected_outs, expected_pull(cotangents)))


TRANSFORMS = {
    "grad": lambda run, n: grad(loss_of(run), tuple(range(n))),
    "jvp": lambda run, n: lambda *x: jvp(run, x, tuple(y.cos() for y in x)),
    "vmap": lambda run, n: lambda *x: vmap(run)(*(torch.stack([y, 2 * y]) for y in x)),
    "vmap of grad": lambda run, n: (
        lambda *x: vmap(grad(loss_of(run), tuple(range(n))))(*(torch.stack([y, 2 * y]) for y in x))
    ),
    "hessian": lambda run, n: hessian(loss_of(run)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compiled_transforms(name):
    torch.compiler.reset()
    function, exactly, primals = leaves_of(CASES[1])
    expected = TRANSFORMS[name](exactly, len(primals))(*primals)
    torch.set_default_device(None)  # Dynamo of torch 2.11 cannot trace torch.func.hessian with one
    compiled = torch.compile(TRANSFORMS[name](function, len(primals)), fullgraph=True, backend="aot_eager")
    assert_close(compiled(*primals), expected)


def test_transform_of_a_compiled_function():
    torch.compiler.reset()
    function, exactly, primals = leaves_of(CASES[0])
    compiled = torch.compile(loss_of(function), backend="aot_eager")
    assert_close(grad(compiled, (0, 1, 2))(*primals), grad(loss_of(exactly), (0, 1, 2))(*primals))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode):
    function, exactly, primals = leaves_of(CASES[0])
    graph = make_fx(grad(loss_of(function), (0, 1, 2)), tracing_mode=mode)(*primals)
    assert "na_bwd" in graph.code
    assert_close(graph(*primals), grad(loss_of(exactly), (0, 1, 2))(*primals))


def test_third_order():
    """Nothing stops at two: derivatives of composed functions go on as torch's own do."""
    function, exactly, primals = leaves_of(CASES[0])

    def third(run):
        return grad(lambda q: hessian(lambda q: loss_of(run)(q, *primals[1:]))(q).square().sum())(primals[0])

    assert_close(third(function), third(exactly))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_derivatives_of_a_module(rank):
    """By its parameters and its input, checked by differences: first order in both modes, second order."""
    kind = getattr(natten, f"NeighborhoodAttention{rank}D")
    module = kind(2, 1, 2, rel_pos_bias=True).double()
    names = [name for name, _ in module.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in module.parameters()]
    x = torch.randn(1, *(3, 2, 2)[-rank:], 2, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        return functional_call(module, dict(zip(names, parameters)), (x,))

    # NOTE: cuBLAS, which runs the linear layers, does not repeat its bits.
    assert torch.autograd.gradcheck(run, (x, *leaves), check_forward_ad=True, check_batched_grad=True, nondet_tol=1e-12)
    assert torch.autograd.gradgradcheck(run, (x, *leaves), nondet_tol=1e-12)


def test_jacobian_of_a_module():
    module = natten.NeighborhoodAttention2D(4, 2, 2, rel_pos_bias=True).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    jacobian = jacrev(lambda p: functional_call(module, p, (x,)))(parameters)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, tangent = jvp(lambda p: functional_call(module, p, (x,)), (parameters,), (direction,))
    product = sum((jacobian[name].flatten(4) * direction[name].flatten()).sum(-1) for name in parameters)
    torch.testing.assert_close(product, tangent, rtol=0, atol=1e-11)


def test_saved_tensors_may_live_elsewhere():
    function, exactly, primals = leaves_of(CASES[1])
    leaves = [x.clone().requires_grad_() for x in primals]
    with torch.autograd.graph.save_on_cpu():
        loss = loss_of(function)(*leaves)
    assert_close(torch.autograd.grad(loss, leaves), grad(loss_of(exactly), tuple(range(len(primals))))(*primals))


def test_refused_by_torch_double_backward_of_a_compiled_function():
    torch.compiler.reset()
    function, _, primals = leaves_of(CASES[0])
    leaves = [x.clone().requires_grad_() for x in primals]
    compiled = torch.compile(loss_of(function), backend="aot_eager")
    gradients = torch.autograd.grad(compiled(*leaves), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(sum(g.sum() for g in gradients), leaves)


def test_refused_by_torch_functionalize():
    function, _, primals = leaves_of(CASES[0])
    with pytest.raises(RuntimeError, match="Functionalize"):
        torch.func.functionalize(functools.partial(function))(*primals)

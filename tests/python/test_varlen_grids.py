# SPDX-License-Identifier: MIT
"""`na{1,2,3}d_varlen`, and what both packed forms share: grids of different sizes in one call of one op, each as if it
had come alone. T-10: empty grids; T-30: strides; T-42 to T-44: bias, grouped heads, widths; T-45, T-47, T-66."""

import dataclasses
import math

import cases
import dense
import pytest
import torch
from cases import Case
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import vmap
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import natten
import natten.flops

FUNCTIONS = {1: natten.functional.na1d_varlen, 2: natten.functional.na2d_varlen, 3: natten.functional.na3d_varlen}
# A case, whose own grid is never used, and the grids of its samples.
PACKS = {
    "lines": (Case((1,), 5, dilation=2, heads=2, bias=True), [(7,), (0,), (3,), (40,), (1,)]),
    "planes": (Case((1, 1), (3, 4), heads=4, heads_kv=2, head_dim_v=6), [(4, 5), (0, 9), (6, 23), (1, 1)]),
    "strides": (Case((1, 1), (3, 4), stride=(2, 4), heads=2, scale=0.7), [(9, 8), (5, 17)]),
    "causal": (Case((1, 1), 3, dilation=(1, 2), causal=(True, False), heads=2, bias=True), [(6, 7), (4, 0), (3, 9)]),
    "volumes": (Case((1, 1, 1), (2, 3, 3), heads=2, heads_kv=1, bias=True), [(2, 3, 4), (3, 0, 2), (3, 3, 5)]),
    "one": (Case((1, 1), 3, heads=2, bias=True), [(6, 7)]),
    "none": (Case((1, 1), 3, heads=2, bias=True), [(0, 3), (0, 0)]),
    "many": (Case((1,), 3, heads=2), [(n % 5,) for n in range(200)]),
}


def on_tokens(case, grids):
    """The case of the packed tensors: their tokens are a line, and its windows make the shape of the bias."""
    return dataclasses.replace(case, grid=(sum(map(math.prod, grids)),), window=case.parameters[0][0])


def inputs_of(case, grids, dtype, seed=0):
    inputs = cases.make_inputs(dataclasses.replace(on_tokens(case, grids), bias=False), dtype, seed)
    if case.bias:
        shape = case.heads, *(2 * w - 1 for w in case.parameters[0])
        numbers = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
        inputs["bias"] = numbers.to(torch.get_default_device(), dtype)
    return inputs


def call(case, grids, t, plan=None, **options):
    window, stride, dilation, causal = case.parameters
    return FUNCTIONS[case.rank](
        t["q"], t["k"], t["v"], grids, options.pop("kernel_size", window), stride=stride, dilation=dilation,
        is_causal=causal, scale=case.scale, rpb=t.get("bias"), return_lse=True, plan=cases.engine(plan), **options,
    )  # fmt: skip


def one_by_one(case, grids, t, function):
    """`function(q, k, v)` of every sample on its grid."""
    counts = [math.prod(grid) for grid in grids]
    samples = zip(grids, *(t[name].split(counts, 1) for name in "qkv"))
    zero = 0 * sum(x.sum() for x in t.values() if x.requires_grad)
    results = [function(*(x.unflatten(1, grid) for x in xs)) for grid, *xs in samples if 0 not in grid]
    if not results:
        return t["q"].new_zeros(1, 0, case.heads, t["v"].shape[-1]) + zero, t["q"].new_zeros(1, 0, case.heads) + zero
    return [torch.cat([x.flatten(1, case.rank) for x in xs], 1) + zero for xs in zip(*results)]


def call_dense(case, grids, t):
    def function(*qkv):
        return dense.attention(*qkv, *case.parameters, case.scale_value, bias=t.get("bias"))

    return one_by_one(case, grids, t, function)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case, grids", PACKS.values(), ids=PACKS)
def test_every_grid_is_a_problem_of_its_own(case, grids, dtype):
    inputs = inputs_of(case, grids, dtype)
    exact, same = cases.expected_of(lambda t: call_dense(case, grids, t), inputs)
    for plan in (None, "reference", "cpu/loops") if torch.get_default_device().type == "cpu" else (None, "reference"):
        got = cases.results_of(lambda t, plan=plan: call(case, grids, t, plan), inputs)
        cases.compare(got, exact, same, dtype, f"{case} {grids} plan={plan}")


@pytest.mark.parametrize("case, grids", PACKS.values(), ids=PACKS)
def test_the_same_bits_as_one_by_one_and_with_any_number_of_threads(case, grids, restore_threads):
    """T-47. Gradients of one call may be summed in another order."""
    inputs = inputs_of(case, grids, torch.float32)
    plain = {1: natten.na1d, 2: natten.na2d, 3: natten.na3d}[case.rank]
    window, stride, dilation, causal = case.parameters

    def alone(*qkv):
        return plain(*qkv, window, stride=stride, dilation=dilation, is_causal=causal, scale=case.scale,
                     rpb=inputs.get("bias"), return_lse=True)  # fmt: skip

    expected = one_by_one(case, grids, inputs, alone)
    once = cases.results_of(lambda t: call(case, grids, t), inputs)
    if torch.get_default_device().type == "cpu":
        assert torch.equal(once["out"], expected[0]) and torch.equal(once["lse"], expected[1])
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        again = cases.results_of(lambda t: call(case, grids, t), inputs)
        assert all(torch.equal(once[name], again[name]) for name in once), threads


def test_large_samples_are_shared_by_threads(restore_threads):
    """One sample with more work than the others, beside some that a thread runs alone."""
    case, grids = Case((1, 1), 7, heads=2, head_dim=16, bias=True), [(40, 50), (3, 4), (9, 20), (8, 8)]
    inputs = inputs_of(case, grids, torch.float32)
    exact, _ = cases.expected_of(lambda t: call_dense(case, grids, t), inputs)
    for threads in (1, 5):
        torch.set_num_threads(threads)
        cases.compare(cases.results_of(lambda t: call(case, grids, t), inputs), exact, None, torch.float32)


def layouts(x):
    yield x.transpose(1, 2).contiguous().transpose(1, 2)  # heads before the tokens
    yield torch.stack([x, x, x], 2)[:, :, 1]  # a slice of a packed qkv
    yield x.movedim(-1, 1).contiguous().movedim(1, -1)  # no unit last stride


@pytest.mark.parametrize("layout", range(3))
def test_strides(layout):
    case, grids = PACKS["causal"]
    inputs = inputs_of(case, grids, torch.float32)
    expected = cases.results_of(lambda t: call(case, grids, t), inputs)
    strided = {**inputs, **{name: list(layouts(inputs[name]))[layout] for name in ("q", "k", "v", "dout")}}
    got = cases.results_of(lambda t: call(case, grids, t), strided)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "natten":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_one_op_forward_and_one_backward():
    case, grids = PACKS["planes"]
    q, k, v, *_ = (x.requires_grad_() for x in inputs_of(case, grids, torch.float32).values())
    with Ops() as ops:
        out, lse = call(case, grids, {"q": q, "k": k, "v": v})
        (out.sum() + lse.sum()).backward()
        natten.attention(q, k, v, seqlens_Q=[7, 3, 0], seqlens_KV=[4, 9, 2]).sum().backward()
    assert ops.names == ["natten::na_varlen_fwd", "natten::na_varlen_bwd"] * 2


# --- windows that do not fit ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("oversize", ["clamp", "pad"])
@pytest.mark.parametrize("kernel_size", [(4, 5), (-1, 3), -1], ids=str)
def test_oversize(kernel_size, oversize):
    case, grids = Case((1, 1), 1, heads=2, dilation=(1, 2)), [(3, 7), (5, 12), (0, 3), (2, 2)]
    inputs = inputs_of(case, grids, torch.float64)
    got = cases.results_of(lambda t: call(case, grids, t, kernel_size=kernel_size, oversize=oversize), inputs)

    def alone(*qkv):
        return natten.na2d(*qkv, kernel_size, dilation=(1, 2), oversize=oversize, return_lse=True)

    for name, x in cases.results_of(lambda t: one_by_one(case, grids, t, alone), inputs).items():
        torch.testing.assert_close(got[name], x, rtol=1e-12, atol=1e-12)


def test_oversize_refused():
    q = torch.randn(1, 24, 2, 8)
    with pytest.raises(ValueError, match="needs 4 tokens on axis x.*has 3"):
        FUNCTIONS[1](q, q, q, [(21,), (3,)], 4, oversize="error")
    FUNCTIONS[2](q, q, q, [(2, 3), (2, 9)], (-1, 3), oversize="error")


# --- derivatives and transforms ---------------------------------------------------------------------------------------
CHECKED = {
    "lines": (Case((1,), 3, heads=2, head_dim=2, bias=True), [(4,), (0,), (2,)]),
    "planes": (Case((1, 1), 2, causal=(True, False), heads=2, heads_kv=1, head_dim=1, bias=True), [(2, 3), (1, 2)]),
}


@pytest.mark.parametrize("case, grids", CHECKED.values(), ids=CHECKED)
def test_gradcheck(case, grids):
    inputs = inputs_of(case, grids, torch.float64)
    leaves = [inputs[name].requires_grad_() for name in ("q", "k", "v", "bias")]

    def function(*tensors):
        return call(case, grids, dict(zip(("q", "k", "v", "bias"), tensors)))

    assert torch.autograd.gradcheck(
        function,
        leaves,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        nondet_tol=0.0,
    )
    tolerance = cases.composed_nondeterminism()
    assert torch.autograd.gradgradcheck(function, leaves, check_fwd_over_rev=True, nondet_tol=tolerance)


def test_gradcheck_of_dense_samples():
    q, k, v = (torch.randn(1, n, 2, 2, dtype=torch.float64, requires_grad=True) for n in (8, 7, 7))

    def function(*qkv):
        out, lse = natten.attention(*qkv, seqlens_Q=[3, 0, 2, 2], seqlens_KV=[3, 1, 2, 0], return_lse=True)
        return out, lse[:, :5]  # the others are -inf

    assert torch.autograd.gradcheck(function, (q, k, v), check_forward_ad=True, nondet_tol=0.0)
    assert torch.autograd.gradgradcheck(function, (q, k, v), nondet_tol=cases.composed_nondeterminism())


@pytest.mark.parametrize("case, grids", CHECKED.values(), ids=CHECKED)
@pytest.mark.parametrize("mapped", [("q", "k", "v"), ("q", "bias"), ("bias",)], ids=str)
def test_vmap(case, grids, mapped):
    inputs = inputs_of(case, grids, torch.float64)
    stacks = {name: torch.randn(3, *inputs[name].shape, dtype=torch.float64) for name in mapped}
    fixed = {name: inputs[name] for name in ("q", "k", "v", "bias") if name not in mapped}

    def function(stack):
        return call(case, grids, {**fixed, **stack})[0]

    got = vmap(function)(stacks)
    for i in range(3):
        torch.testing.assert_close(got[i], function({name: x[i] for name, x in stacks.items()}))


# --- torch.compile ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case, grids", PACKS.values(), ids=PACKS)
def test_full_graph(case, grids, dtype):
    torch.compiler.reset()
    inputs = inputs_of(case, grids, dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda t: call(case, grids, t), fullgraph=True, backend=counter)
    got = cases.results_of(compiled, inputs)
    assert counter.frame_count == 1
    for name, x in cases.results_of(lambda t: call(case, grids, t), inputs).items():
        assert torch.equal(got[name], x), name


def test_full_graph_of_dense_samples():
    """The running sums are data: other lengths need no other graph."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, v, bounds_q, bounds_kv):
        return natten.attention(
            q, k, v, cumulative_seqlen_Q=bounds_q, cumulative_seqlen_KV=bounds_kv, max_seqlen_Q=20, max_seqlen_KV=20
        )

    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for sides in (([0, 4, 9, 20], [0, 6, 6, 17]), ([0, 0, 19, 20], [0, 1, 12, 13])):
        q, k, v = (torch.randn(1, n, 2, 8, requires_grad=True) for n in (20, 17, 17))
        bounds = [torch.tensor(side, dtype=torch.int32) for side in sides]
        got, expected = compiled(q, k, v, *bounds), function(q, k, v, *bounds)
        assert torch.equal(got, expected)
        grads = (torch.autograd.grad(x.sin().sum(), (q, k, v)) for x in (got, expected))
        assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert counter.frame_count == 1
    with pytest.raises(Exception, match="torch.compile cannot"):
        torch.compile(lambda *x: natten.attention(*x, seqlens_Q=[20], seqlens_KV=[17]), fullgraph=True)(q, k, v)


@pytest.mark.parametrize("name", ["planes", "causal"])
def test_opcheck(name):
    case, grids = PACKS[name]
    inputs = inputs_of(case, grids, torch.float32)
    leaves = [inputs[x].requires_grad_() if x in inputs else None for x in ("q", "k", "v", "bias")]
    window, stride, dilation, causal = map(list, case.parameters)
    options = [n for g in grids for n in g], None, None, window, stride, dilation, causal, 0.5, True, ""
    out, lse = torch.ops.natten.na_varlen_fwd(*leaves, *options)
    torch.library.opcheck(torch.ops.natten.na_varlen_fwd.default, (*leaves, *options))
    x = [None if x is None else x.detach() for x in leaves]
    arguments = inputs["dout"], inputs["dlse"], *x, out.detach(), lse.detach(), *options
    torch.library.opcheck(torch.ops.natten.na_varlen_bwd.default, arguments)


# --- arguments --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_bad_arguments(rank):
    q = torch.randn(1, 12, 2, 8)
    for bad in ([(3,) * rank], [(-1,) * rank], [(12,) * (rank + 1)]):
        with pytest.raises(ValueError):
            FUNCTIONS[rank](q, q, q, bad, 3)
    grids = [(12,) + (1,) * (rank - 1)]
    with pytest.raises(TypeError, match="unexpected"):
        FUNCTIONS[rank](q, q, q, grids, 3, window=3)
    with pytest.raises(TypeError, match="grids"):
        FUNCTIONS[rank](q, q, q, 12, 3)
    with pytest.raises(ValueError, match="relative position bias|rpb"):
        FUNCTIONS[rank](q, q, q, grids, 3, rpb=torch.zeros(2, *[3] * rank))
    with pytest.raises(ValueError, match="batch of 1"):
        FUNCTIONS[rank](*q.expand(3, 2, 12, 2, 8), grids, 3)


@pytest.mark.parametrize("bounds", [([0, 5, 4], [0, 5, 6]), ([0, 13], [0, 12]), ([1, 2], [0, 2]), ([], [0])], ids=str)
def test_the_bare_op_checks_bounds(bounds):
    q = torch.randn(1, 12, 2, 8)
    tensors = [torch.tensor(x, dtype=torch.int64) for x in bounds]
    with pytest.raises((RuntimeError, ValueError), match="samples"):
        torch.ops.natten.na_varlen_fwd(q, q, q, None, [], *tensors, [1], [], [], [], 1.0, True, "")


def test_flops():
    case, grids = PACKS["planes"]
    inputs = inputs_of(case, grids, torch.float32)
    counts = []
    for function in (
        lambda t: call(case, grids, t),
        lambda t: one_by_one(case, grids, t, lambda *x: natten.na2d(*x, case.window, return_lse=True)),
    ):
        with FlopCounterMode(display=False) as counter:
            cases.results_of(function, inputs)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    q = torch.randn(1, 9, 2, 8)
    with FlopCounterMode(display=False) as counter:
        natten.attention(q, q, q, True, seqlens_Q=[4, 5], seqlens_KV=[4, 5])
    assert counter.get_total_flops() == 2 * 16 * 2 * (10 + 15)

# SPDX-License-Identifier: MIT
"""T-66: torch.compile of forward and backward, dynamic shapes, export, AOTInductor, compiled autograd, opcheck."""

import cases
import pytest
import torch
from cases import Case
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import natten

CASES = [
    Case((19,), 5, dilation=2, heads=2, bias=True, extra=3),
    Case((6, 9), (3, 4), causal=(True, False), heads=2, bias=True),
    Case((6, 9), (3, 4), stride=(2, 4), heads=4, heads_kv=2, head_dim_v=6, extra=2),
    Case((3, 4, 6), (2, 3, 3), heads=2),
    Case((4, 5), 9, bias=True),
]


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_full_graph(case, dtype):
    """The same bits as eager, forward and backward, in one graph."""
    inputs = cases.make_inputs(case, dtype)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda t: cases.call(case, t, return_lse=True), fullgraph=True, backend=counter)
    got = cases.results_of(compiled, inputs)
    expected = cases.results(case, inputs)
    assert counter.frame_count == 1
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def test_with_inductor():
    case = CASES[1]
    inputs = cases.make_inputs(case, torch.float32)

    def function(t):
        out, lse = cases.call(case, {**t, "q": t["q"].sin()}, return_lse=True)
        return out * 2, lse + 1

    got = cases.results_of(torch.compile(function, fullgraph=True), inputs)
    for name, tensor in cases.results_of(function, inputs).items():
        torch.testing.assert_close(got[name], tensor)


@pytest.mark.parametrize("oversize", [None, "pad", "error"])
def test_dynamic_shapes(oversize):
    """One graph for every grid and batch. The sizes of the first differ, for Dynamo takes equal ones for the same."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(t):
        return natten.na2d(
            t["q"], t["k"], t["v"], (3, 4), dilation=(1, 2), rpb=t["bias"], return_lse=True, oversize=oversize
        )

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for batch, grid in ((3, (6, 9)), (5, (7, 12)), (3, (12, 8)), (4, (9, 30)), (6, (17, 11))):
        case = Case(grid, (3, 4), dilation=(1, 2), batch=batch, heads=2, bias=True)
        inputs = cases.make_inputs(case, torch.float32)
        got = cases.results_of(compiled, inputs)
        expected = cases.results(case, inputs, oversize=oversize)
        assert all(torch.equal(got[name], expected[name]) for name in expected), grid
    assert counter.frame_count == 1


def test_windows_made_of_shapes():
    """SymInt windows, dilations and strides: the window is a third of the grid, whatever that is."""
    counter = CompileCounterWithBackend("aot_eager")

    def function(q, k, v):
        height, width = q.shape[1:3]
        return natten.na2d(q, k, v, (height // 3, -1), dilation=(2, 1), stride=(1, width // 4))

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for grid in ((9, 8), (13, 12), (24, 9), (10, 21)):
        q, k, v = torch.randn(3, 2, *grid, 2, 4, requires_grad=True)
        out = compiled(q, k, v)
        assert torch.equal(out, function(q, k, v))
        out.sum().backward()
    assert counter.frame_count == 1


def test_attention_and_merge():
    def function(q, k, v, far_k, far_v):
        out, lse = natten.na1d(q, k, v, 3, return_lse=True)
        far, far_lse = natten.attention(q, far_k, far_v, return_lse=True)
        merged, merged_lse = natten.merge_attentions([out, far], [lse, far_lse])
        return merged.sin().sum() + merged_lse.sum()

    tensors = [torch.randn(2, n, 2, 8, requires_grad=True) for n in (9, 9, 9, 4, 4)]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    loss, expected = compiled(*tensors), function(*tensors)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, tensors), torch.autograd.grad(expected, tensors)):
        torch.testing.assert_close(a, b)


def test_inside_a_checkpoint():
    case = CASES[1]
    inputs = cases.make_inputs(case, torch.float32)

    def function(t):
        names = [name for name in cases.INPUTS if name in t]

        def inner(*tensors):
            return cases.call(case, dict(zip(names, tensors)), return_lse=True)

        return checkpoint(inner, *(t[name] for name in names), use_reentrant=False)

    got = cases.results_of(torch.compile(function, fullgraph=True, backend="aot_eager"), inputs)
    expected = cases.results(case, inputs)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("bias",), ("q", "bias"), ()], ids=str)
def test_partially_frozen(wanted):
    case = CASES[1]
    inputs = cases.make_inputs(case, torch.float32)
    expected = cases.results(case, inputs, lse_gradient=False)
    leaves = {name: inputs[name].clone().requires_grad_(name in wanted) for name in ("q", "k", "v", "bias")}
    compiled = torch.compile(lambda t: cases.call(case, t), fullgraph=True, backend="aot_eager")
    out = compiled(leaves)
    assert torch.equal(out, expected["out"]) and out.requires_grad == bool(wanted)
    if wanted:
        out.backward(inputs["dout"])
    for name, leaf in leaves.items():
        assert leaf.grad is None if name not in wanted else torch.equal(leaf.grad, expected["d" + name])


@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = natten.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True)

        def forward(self, x):
            return x + self.attention(x)

    block = Block()
    height = torch.export.Dim("height", min=3, max=100)
    program = torch.export.export(block, (torch.randn(2, 6, 7, 8),), dynamic_shapes=({1: height},), strict=strict)
    for rows in (6, 11):
        x = torch.randn(2, rows, 7, 8)
        torch.testing.assert_close(program.module()(x), block(x))


class Function(torch.nn.Module):
    def forward(self, q, k, v):
        return natten.na2d(q, k, v, (3, 4), dilation=(1, 2), return_lse=True)


@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_function_with_its_backward(strict):
    """A grid whose sizes are both dynamic; the op stays one node, also behind torch's own decompositions."""
    height, width = torch.export.Dim("height", min=3, max=64), torch.export.Dim("width", min=4, max=64)
    shapes = ({1: height, 2: width},) * 3
    program = torch.export.export(
        Function(), tuple(torch.randn(3, 2, 6, 9, 2, 4)), dynamic_shapes=shapes, strict=strict
    )
    assert "natten.na_fwd.default" in str(program.graph)
    for module in (program.module(), program.run_decompositions().module()):
        for grid in ((6, 9), (11, 8)):
            q, k, v = torch.randn(3, 2, *grid, 2, 4, requires_grad=True)
            out, lse = module(q, k, v)
            expected, expected_lse = Function()(q, k, v)
            assert torch.equal(out, expected) and torch.equal(lse, expected_lse)
    got, expected = (torch.autograd.grad(f(q, k, v)[0].sin().sum(), (q, k, v)) for f in (program.module(), Function()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected))


def test_aot_inductor(tmp_path):
    """Compiled ahead of time, loaded again, run on another size."""
    width = torch.export.Dim("width", min=4, max=64)
    program = torch.export.export(Function(), tuple(torch.randn(3, 2, 6, 9, 2, 4)), dynamic_shapes=({2: width},) * 3)
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for columns in (9, 17):
        q, k, v = torch.randn(3, 2, 6, columns, 2, 4)
        for got, expected in zip(loaded(q, k, v), Function()(q, k, v)):
            assert torch.equal(got, expected)


def test_compiled_autograd():
    case = CASES[1]
    inputs = cases.make_inputs(case, torch.float32)
    with torch._dynamo.config.patch(compiled_autograd=True):
        compiled = torch.compile(
            lambda t: cases.results_of(lambda t: cases.call(case, t, return_lse=True), t), backend="aot_eager"
        )
        got = compiled(inputs)
    for name, tensor in cases.results(case, inputs).items():
        torch.testing.assert_close(got[name], tensor)


def test_without_gradients():
    compiled = torch.compile(Function(), fullgraph=True, backend="aot_eager")
    q, k, v = torch.randn(3, 2, 6, 9, 2, 4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(compiled(q, k, v)[0], Function()(q, k, v)[0])


def test_a_new_grid_does_not_recompile_but_a_new_head_dim_does():
    """Its default scale is a number made of a size, which torch specialises."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(Function(), fullgraph=True, dynamic=True, backend=counter)
    for grid, dim in (((6, 9), 4), ((7, 12), 4), ((8, 10), 5), ((9, 13), 5)):
        compiled(*torch.randn(3, 2, *grid, 3, dim))
    assert counter.frame_count == 2


def test_errors_under_compile():
    """The exception of eager mode, or Dynamo's own with the same sentence in it."""
    q = torch.randn(1, 6, 7, 2, 8)
    with pytest.raises(Exception, match="stride"):
        torch.compile(lambda q: natten.na2d(q, q, q, 3, stride=4), fullgraph=True, backend="aot_eager")(q)
    with pytest.raises(Exception, match="kernel_size"):
        torch.compile(lambda q: natten.na2d(q, q, q, 0), fullgraph=True, backend="aot_eager")(q)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_opcheck(case, dtype):
    inputs = cases.make_inputs(case, dtype)
    parameters = [[*map(list, case.parameters)], case.scale_value, True, ""]
    parameters = [*parameters[0], *parameters[1:]]
    tensors = [inputs.get(name) for name in cases.INPUTS]
    leaves = [None if x is None else x.clone().requires_grad_() for x in tensors]
    torch.library.opcheck(torch.ops.natten.na_fwd.default, (*leaves, *parameters))
    out, lse = torch.ops.natten.na_fwd(*tensors, *parameters)
    arguments = (inputs["dout"], inputs["dlse"], *tensors, out, lse, *parameters)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.natten.na_bwd.default, arguments, test_utils=tests)
    arguments = (inputs["dout"], None, *tensors, out, lse, *parameters)
    torch.library.opcheck(torch.ops.natten.na_bwd.default, arguments, test_utils=tests)


def test_opcheck_of_key_spans():
    torch.library.opcheck(torch.ops.natten.key_spans.default, (13, 3, 2, 2, False))

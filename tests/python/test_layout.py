# SPDX-License-Identifier: MIT
"""Memory: T-30 any strides, T-31 any alignment, T-32 inputs and the user's dicts stay as they are, T-35 outputs are
written everywhere."""

import contextlib
import copy

import cases
import pytest
import torch
from cases import Case

CASE = Case((5, 18), (3, 4), dilation=(1, 2), causal=(True, False), batch=2, heads=4, head_dim=8)
DTYPES = (torch.float32, torch.bfloat16)


def random_like(shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def packed(case, dtype):
    """q, k and v as slices of one projection, [batch, *grid, 3, heads, dim]."""
    base = random_like((case.batch, *case.grid, 3, case.heads, case.head_dim), dtype)
    return base, lambda x: x.unbind(-3)


def packed_by_head(case, dtype):
    """[batch, *grid, heads, 3 * dim]: the channels of q, k and v side by side."""
    base = random_like((case.batch, *case.grid, case.heads, 3 * case.head_dim), dtype)
    return base, lambda x: x.chunk(3, -1)


def heads_first(case, dtype):
    """[3, batch, heads, *grid, dim], seen heads-last."""
    base = random_like((3, case.batch, case.heads, *case.grid, case.head_dim), dtype)
    return base, lambda x: x.movedim(2, -2).unbind(0)


def grid_reversed(case, dtype):
    """The grid's axes in the opposite order in memory."""
    base = random_like((3, case.batch, *case.grid[::-1], case.heads, case.head_dim), dtype)
    return base, lambda x: x.transpose(2, 1 + len(case.grid)).unbind(0)


def expanded_heads(case, dtype):
    base = random_like((3, case.batch, *case.grid, 1, case.head_dim), dtype)
    return base, lambda x: x.expand(*x.shape[:-2], case.heads, -1).unbind(0)


def expanded_batch(case, dtype):
    base = random_like((3, 1, *case.grid, case.heads, case.head_dim), dtype)
    return base, lambda x: x.expand(-1, case.batch, *x.shape[2:]).unbind(0)


def expanded_grid(case, dtype):
    base = random_like((3, case.batch, 1, case.grid[1], case.heads, case.head_dim), dtype)
    return base, lambda x: x.expand(-1, -1, *case.grid, -1, -1).unbind(0)


def odd_offset(case, dtype):
    """One flat buffer, everything beginning at an odd element."""
    numel = case.batch * torch.Size(case.grid).numel() * case.heads * case.head_dim
    base = random_like((3 * (numel + 2) + 1,), dtype)
    shape = (case.batch, *case.grid, case.heads, case.head_dim)
    return base, lambda x: [x[1 + i * (numel + 2) :][:numel].view(shape) for i in range(3)]


def sliced_channels(case, dtype):
    base = random_like((3, case.batch, *case.grid, case.heads, case.head_dim + 5), dtype)
    return base, lambda x: x[..., 3 : 3 + case.head_dim].unbind(0)


def sliced_grid(case, dtype):
    base = random_like((3, case.batch, 2 * case.grid[0], case.grid[1] + 3, case.heads, case.head_dim), dtype)
    return base, lambda x: x[:, :, ::2, 2:-1].unbind(0)


def channels_not_unit_stride(case, dtype):
    base = random_like((3, case.batch, case.head_dim, *case.grid, case.heads), dtype)
    return base, lambda x: x.movedim(2, -1).unbind(0)


def every_other_channel(case, dtype):
    base = random_like((3, case.batch, *case.grid, case.heads, 2 * case.head_dim), dtype)
    return base, lambda x: x[..., ::2].unbind(0)


def all_one_tensor(case, dtype):
    base = random_like((case.batch, *case.grid, case.heads, case.head_dim), dtype)
    return base, lambda x: (x, x, x)


LAYOUTS = [
    packed,
    packed_by_head,
    heads_first,
    grid_reversed,
    expanded_heads,
    expanded_batch,
    expanded_grid,
    odd_offset,
    sliced_channels,
    sliced_grid,
    channels_not_unit_stride,
    every_other_channel,
    all_one_tensor,
]


def gradient_forms(case, dtype):
    """Gradients as callers make them: of a sum (all strides 0), transposed, at an odd offset, channels apart."""
    shape = (case.batch, *case.grid, case.heads, case.head_dim)
    flat = random_like((torch.Size(shape).numel() + 1,), dtype)
    yield torch.ones((), dtype=dtype).expand(shape)
    yield random_like((shape[-1],), dtype).expand(shape)
    yield random_like((shape[0], shape[-2], *shape[1:-2], shape[-1]), dtype).movedim(1, -2)
    yield flat[1:].view(shape)
    yield random_like((*shape[:-1], 2 * shape[-1]), dtype)[..., ::2]


def through(function, split, base, gradients):
    """out and, for each incoming gradient, that of the base tensor."""
    leaf = base.detach().requires_grad_()
    out, lse = function(*split(leaf))
    grads = [torch.autograd.grad(out, leaf, g.to(out.dtype), retain_graph=True)[0] for g in gradients]
    return {"out": out.detach(), "lse": lse.detach(), **{f"dbase{i}": g for i, g in enumerate(grads)}}


def check_layout(layout, case, dtype, functions):
    base, split = layout(case, dtype)
    before = base.clone()
    gradients = list(gradient_forms(case, dtype))

    def exactly(q, k, v):
        return cases.call_dense(case, {"q": q, "k": k, "v": v})

    exact = through(exactly, split, base.double(), gradients)
    same = through(exactly, split, base, gradients) if dtype in cases.HALVES else None
    for name, function in functions.items():
        got = through(function, split, base, gradients)
        cases.compare(got, exact, same, dtype, f"{layout.__name__} {name}")
        assert torch.equal(base, before)


def by_plan(case, dtype):
    return {
        plan: lambda q, k, v, plan=plan: cases.call(case, {"q": q, "k": k, "v": v}, plan, return_lse=True)
        for plan in [None, *cases.plans_of(case, dtype)]
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides(layout, dtype):
    check_layout(layout, CASE, dtype, by_plan(CASE, dtype))
    strided = Case(CASE.grid, (3, 4), stride=(2, 4), batch=2, heads=4, head_dim=8)
    check_layout(layout, strided, dtype, by_plan(strided, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_strides_under_compile(layout, dtype):
    torch.compiler.reset()

    def function(q, k, v):
        return cases.call(CASE, {"q": q, "k": k, "v": v}, return_lse=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    check_layout(layout, CASE, dtype, {"compiled": compiled})


def test_strides_of_bias_and_additional_keys():
    case = Case((6, 9), (3, 4), batch=2, heads=2, head_dim=4, extra=3, bias=True)
    inputs = cases.make_inputs(case, torch.float32)
    exact, same = cases.expected(case, inputs)
    moved = {
        "bias": inputs["bias"].permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "extra_k": inputs["extra_k"].transpose(1, 2).contiguous().transpose(1, 2),
        "extra_v": inputs["extra_v"].transpose(-1, -2).contiguous().transpose(-1, -2),
        "dlse": inputs["dlse"].transpose(1, -1).contiguous().transpose(1, -1),
    }
    for plan in cases.plans_of(case, torch.float32):
        cases.compare(cases.results(case, {**inputs, **moved}, plan), exact, same, torch.float32, plan)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [1, 3, 4, 5, 7, 12, 17, 20, 31, 33, 47, 65])
def test_misaligned_pointers(head_dim, dtype):
    case = Case((3, 19), (2, 5), batch=1, heads=2, head_dim=head_dim)
    check_layout(odd_offset, case, dtype, by_plan(case, dtype))


@pytest.mark.parametrize("head_dim", [80, 127, 180, 256, 300])
def test_long_misaligned_heads(head_dim):
    case = Case((2, 17), (2, 3), heads=1, head_dim=head_dim)
    for dtype in DTYPES:
        check_layout(odd_offset, case, dtype, by_plan(case, dtype))


def test_inputs_and_dicts_stay_as_they_are():
    case = Case((6, 9), (3, 4), batch=2, heads=2, head_dim=8, extra=3, bias=True)
    inputs = cases.make_inputs(case, torch.float32)
    before = copy.deepcopy(inputs)
    window, keywords = [3, 4], {"backend": None}
    for plan in [None, *cases.plans_of(case, torch.float32)]:
        cases.results(case, inputs, plan, attention_kwargs=keywords)
    cases.FUNCTIONS[2](*(inputs[n] for n in "qkv"), window, attention_kwargs=keywords)
    assert keywords == {"backend": None} and window == [3, 4]
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@contextlib.contextmanager
def nan_filled_memory():
    """torch fills what `empty` returns with NaN, so a result that is not written shows."""
    was = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        torch.utils.deterministic.fill_uninitialized_memory = fill


WRITTEN = [
    Case((19,), 5, dilation=3, causal=True, heads=2),
    Case((7, 18), (3, 4), heads=4, heads_kv=2, extra=2, bias=True),
    Case((7, 9), (3, 6), stride=(2, 4), dilation=(2, 1), bias=True),
    Case((4, 5), 9, bias=True),  # most of the table is never read
    Case((2, 3, 7), (2, 2, 3), causal=(False, True, False), head_dim=5, head_dim_v=3),
]


@pytest.mark.parametrize("case", WRITTEN, ids=str)
def test_outputs_are_written_everywhere(case):
    with nan_filled_memory():
        cases.check(case)
        cases.check(case, lse_gradient=False)

# SPDX-License-Identifier: MIT
"""T-1: axes around the lengths of vectors and tiles, inputs between guard bands of NaN. T-24: the smallest problems."""

import itertools
import math

import cases
import dense
import pytest
import torch
from cases import Case

import natten


def guarded(tensor):
    """The same numbers inside a larger buffer of NaN, which surrounds them along every axis: (view, buffer)."""
    buffer = tensor.new_full([size + 3 for size in tensor.shape], math.nan)
    view = buffer[tuple(slice(1, 1 + size) for size in tensor.shape)]
    view.copy_(tensor)
    return view, buffer


def check_guarded(case, dtype, plans):
    inputs = cases.make_inputs(case, dtype)
    exact, same = cases.expected(case, inputs)
    views = {name: guarded(tensor) for name, tensor in inputs.items()}
    before = {name: buffer.clone() for name, (_, buffer) in views.items()}
    for plan in plans:
        got = cases.results(case, {name: view for name, (view, _) in views.items()}, plan)
        cases.compare(got, exact, same, dtype, f"{case} plan={plan}")
    for name, (_, buffer) in views.items():
        assert torch.equal(buffer.view(torch.uint8), before[name].view(torch.uint8)), (
            f"{name} or its guards were written"
        )


def windows_of(extent):
    return sorted({w for w in (1, 2, 3, 5, 6, extent - 1, extent) if 1 <= w <= extent})


def check_lengths(lengths, dtype, dilations=(1, 2, 3), build=lambda extent: (extent,)):
    """All windows, strides and causal flags on an axis of each length, the last one, along which engines vectorise."""
    problems = ((e, w, d) for e in lengths for w in windows_of(e) for d in dilations if w * d <= e)
    for extent, window, dilation in problems:
        grid = build(extent)
        outer = len(grid) - 1
        for stride, causal in itertools.product({1, min(2, window), window}, (False, True)):
            case = Case(
                grid,
                (min(2, min(grid)),) * outer + (window,),
                (1,) * outer + (stride,),
                (1,) * outer + (dilation,),
                (False,) * outer + (causal,),
                head_dim=3,
            )
            check_guarded(case, dtype, cases.plans_of(case, dtype))


LENGTHS = (2, 3, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("extent", LENGTHS)
def test_lengths_around_a_vector(extent, dtype):
    check_lengths([extent], dtype, dilations=(1, 3) if extent > 16 else (1, 2, 3))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("extent", [47, 49, 55, 57, 63, 64, 65, 79, 81, 113, 127, 129])
def test_lengths_around_a_tile(extent, dtype):
    for window, dilation, causal in ((2, 1, False), (7, 1, True), (12, 1, False), (5, 3, False), (extent, 1, False)):
        case = Case((extent,), window, 1, dilation, causal, head_dim=5)
        check_guarded(case, dtype, cases.plans_of(case, dtype))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7])
def test_rows_of_a_tile(rows, dtype):
    for columns in (6, 17):
        for window, dilation, causal in (
            ((rows, 3), (1, 1), (False, False)),
            ((min(rows, 3), 4), (1, 1), (True, False)),
        ):
            case = Case((rows, columns), window, 1, dilation, causal, heads=2, head_dim=4)
            check_guarded(case, dtype, cases.plans_of(case, dtype))
            case = Case((2, rows, columns), (2, *window), 1, (1, *dilation), (False, *causal), heads=1, head_dim=4)
            check_guarded(case, dtype, cases.plans_of(case, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_length(dtype):
    check_lengths(range(1, 36), dtype)
    check_lengths(range(1, 20), dtype, dilations=(1, 2), build=lambda extent: (3, extent))
    check_lengths(range(1, 20), dtype, dilations=(1, 2), build=lambda extent: (2, 2, extent))
    check_lengths([*range(60, 68), *range(124, 132)], dtype)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_backward_reads_out_and_lse_between_guards(dtype):
    """The saved tensors of the backward operator need not be contiguous either; bias and additional keys take part."""
    case = Case((5, 9), (3, 4), dilation=(1, 2), causal=(True, False), batch=2, heads=4, heads_kv=2, extra=2, bias=True)
    inputs = cases.make_inputs(case, dtype)
    exact, same = cases.expected(case, inputs)
    optional = [inputs["bias"], inputs["extra_k"], inputs["extra_v"]]
    parameters = [*case.parameters, case.scale_value, True]
    for plan in cases.plans_of(case, dtype):
        out, lse = torch.ops.natten.na_fwd(*(inputs[n] for n in "qkv"), *optional, *parameters, plan)
        tensors = [inputs["dout"], inputs["dlse"], *(inputs[n] for n in "qkv"), *optional, out, lse]
        grads = torch.ops.natten.na_bwd(*(guarded(t)[0] for t in tensors), *parameters, plan)
        names = ("dq", "dk", "dv", "dbias", "dextra_k", "dextra_v")
        got = {"out": out, "lse": lse, **dict(zip(names, grads))}
        cases.compare(got, exact, same, dtype, f"{case} plan={plan}")


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_smallest_problems(rank):
    for head_dim in (1, 2, 8):
        cases.check(Case((1,) * rank, 1, head_dim=head_dim))
        cases.check(Case((1,) * rank, 1, head_dim=head_dim, extra=1, bias=True))
        cases.check(Case((1,) * rank, 5, head_dim=head_dim, bias=True))  # a window cut to the only token
        cases.check(Case((1,) * (rank - 1) + (3,), (1,) * (rank - 1) + (2,), head_dim=head_dim))
        cases.check(Case((3,) + (1,) * (rank - 1), (2,) + (1,) * (rank - 1), head_dim=head_dim, causal=True))


def returns(out, v):
    """On tensor cores a float is the sum of two of eleven bits: it loses its last two."""
    if v.is_cuda and v.dtype == torch.float32:
        return torch.allclose(out, v, rtol=2**-21, atol=0)
    return torch.equal(out, v)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_window_one_returns_the_values(dtype):
    q, k, v = torch.randn(3, 2, 4, 5, 2, 8).to(dtype)
    for plan in cases.plans_of(Case((4, 5), 1, batch=2, heads=2, head_dim=8), dtype):
        assert returns(natten.na2d(q, k, v, 1, plan=plan), v)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_dilation_of_the_whole_axis_isolates_every_token(dtype):
    q, k, v = torch.randn(3, 1, 6, 1, 4).to(dtype)
    assert returns(natten.na1d(q, k, v, 3, dilation=6), v)
    assert returns(natten.na1d(q, k, v, 1, dilation=600), v)


@pytest.mark.parametrize("plan", [None, "reference", "cpu"])
@pytest.mark.parametrize("grid", [(5,), (3, 4), (2, 3, 4)], ids=str)
def test_empty_batch(grid, plan):
    case = Case(grid, 2, batch=0, heads=2, head_dim=8, head_dim_v=4, extra=3, bias=True)
    inputs = cases.make_inputs(case, torch.float32)
    got = cases.results(case, inputs, plan)
    for name, tensor in got.items():
        source = {"out": "dout", "lse": "dlse"}.get(name, name[1:])
        assert tensor.shape == inputs[source].shape
    assert not got["dbias"].any()


def test_many_samples_of_a_tiny_grid():
    case = Case((2, 2), 2, batch=3000, heads=1, head_dim=2)
    cases.check(case, dtypes=(torch.float32,))


def test_reference_window_mask_is_what_key_spans_says():
    """`natten::key_spans` gives the first key and the number of keys of each query."""
    for extent in (1, 5, 12, 13):
        for window, stride, dilation, causal in (
            (1, 1, 1, False),
            (4, 2, 1, True),
            (5, 4, 1, False),
            (3, 2, 2, False),
            (9, 9, 3, True),
        ):
            spans = torch.ops.natten.key_spans(extent, window, stride, dilation, causal)
            assert spans.dtype == torch.int64 and spans.shape == (extent, 2)
            mask, _ = dense.axis_table(extent, window, stride, dilation, causal)
            for query, (first, count) in enumerate(spans.tolist()):
                assert mask[query].nonzero().flatten().tolist() == [first + dilation * j for j in range(count)]

# SPDX-License-Identifier: MIT
"""T-7: axes of different length and parameters, and what swapping axes must do. T-8: every parameter acts, and a key
reaches exactly the queries whose window holds it, to the last bit."""

import itertools

import cases
import dense
import pytest
import torch
from cases import Case

import natten

UNEQUAL = [
    Case((6, 11), (2, 5), 1, (3, 2), (False, True), heads=2, bias=True),
    Case((9, 5), (4, 3), (2, 3), (2, 1), (True, False), heads=2, extra=2),
    Case((5, 13), (5, 4), 1, (1, 3), (True, True), heads=2, bias=True, extra=1),
    Case((3, 5, 8), (2, 3, 4), 1, (1, 1, 2), (False, True, False), heads=2, bias=True),
    Case((7, 4, 6), (3, 4, 2), (3, 1, 2), (2, 1, 3), (False, False, True)),
    Case((2, 7, 5), (2, 3, 5), 1, (1, 2, 1), (True, False, True), bias=True),
]


@pytest.mark.parametrize("case", UNEQUAL, ids=str)
def test_axes_that_differ_in_everything(case):
    cases.check(case)


def swapped(case, order):
    grid, *parameters = ([values[axis] for axis in order] for values in (case.grid, *case.parameters))
    names = ("window", "stride", "dilation", "causal")
    return Case(**{**vars(case), "grid": tuple(grid), **{n: tuple(p) for n, p in zip(names, parameters)}})


def swap_axes(tensors, order):
    """Permutes the grid of every tensor that has one; the bias table's axes likewise."""
    rank = len(order)
    moved = {}
    for name, x in tensors.items():
        if name.endswith(("extra_k", "extra_v")):
            moved[name] = x
        else:
            moved[name] = x.permute(0, *(1 + axis for axis in order), *range(1 + rank, x.dim()))
    return moved


@pytest.mark.parametrize("case", UNEQUAL, ids=str)
def test_swapping_axes_swaps_the_answer(case):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = cases.make_inputs(case, dtype)
        for plan in cases.plans_of(case, dtype):
            straight = cases.results(case, inputs, plan)
            for order in itertools.permutations(range(case.rank)):
                if plan not in cases.plans_of(swapped(case, order), dtype):
                    continue
                other = cases.results(swapped(case, order), swap_axes(inputs, order), plan)
                for name, tensor in swap_axes(straight, order).items():
                    error = (tensor - other[name]).abs().max()
                    assert error <= tolerance * max(1, tensor.abs().max()), f"{name} {order} {plan}"


@pytest.mark.parametrize(
    "change",
    [
        {"window": 4},
        {"window": (3, 5)},
        {"dilation": 2},
        {"dilation": (1, 2)},
        {"stride": 2},
        {"stride": (2, 1)},
        {"causal": True},
        {"causal": (False, True)},
        {"scale": 0.7},
    ],
    ids=str,
)
def test_every_parameter_acts(change):
    base = Case((10, 11), 3, head_dim=8)
    changed = Case(**{**vars(base), **change})
    inputs = cases.make_inputs(base, torch.float32)
    for plan in sorted({*cases.plans_of(base, torch.float32), *cases.plans_of(changed, torch.float32)}) + [None]:
        both = [
            plan if plan is None or plan in cases.plans_of(case, torch.float32) else None for case in (base, changed)
        ]
        out, other = (cases.call(case, inputs, forced) for case, forced in zip((base, changed), both))
        assert (out - other).abs().max() > 1e-2


PERTURBED = [
    Case((21,), 5),
    Case((21,), 4, dilation=3),
    Case((20,), 6, stride=4),
    Case((19,), 5, dilation=2, causal=True),
    Case((19,), 4, stride=2, causal=True),
    Case((5, 18), (3, 4), causal=(True, False)),
    Case((7, 9), 3, dilation=(1, 2)),
    Case((6, 8), (2, 4), stride=(1, 4)),
    Case((3, 4, 9), (2, 3, 5), causal=(False, True, False)),
    Case((9,), 12, dilation=2),  # cut to 5 and 4
]


def check_reach(case, run):
    """Changes one key and its value after the other: rows that see it change, all others stay the same bits."""
    inputs = cases.make_inputs(case, torch.float32)
    mask = dense.window_mask(case.grid, *case.parameters)
    before = run(inputs).flatten(1, -3)
    for key in range(mask.shape[1]):
        changed = dict(inputs, k=inputs["k"].clone(), v=inputs["v"].clone())
        changed["k"].flatten(1, -3)[:, key] += 1
        changed["v"].flatten(1, -3)[:, key] += 100
        after = run(changed).flatten(1, -3)
        moved = (after != before).flatten(2).any(-1)[0]
        assert torch.equal(moved, mask[:, key]), f"{case}: key {key}"


@pytest.mark.parametrize("case", PERTURBED, ids=str)
def test_a_key_reaches_exactly_its_queries(case):
    for plan in [*cases.plans_of(case, torch.float32), None]:
        check_reach(case, lambda inputs, plan=plan: cases.call(case, inputs, plan))


@pytest.mark.parametrize("case", [PERTURBED[4], PERTURBED[6]], ids=str)
def test_a_key_reaches_exactly_its_queries_when_compiled(case):
    torch.compiler.reset()
    compiled = torch.compile(
        lambda q, k, v: cases.call(case, {"q": q, "k": k, "v": v}), fullgraph=True, backend="aot_eager"
    )
    check_reach(case, lambda inputs: compiled(*(inputs[name] for name in "qkv")))


@pytest.mark.parametrize("case", PERTURBED, ids=str)
def test_a_gradient_reaches_exactly_its_queries(case):
    """The gradient of one output row is non-zero on exactly the keys of its window."""
    inputs = cases.make_inputs(case, torch.float32)
    mask = dense.window_mask(case.grid, *case.parameters)
    for plan in cases.plans_of(case, torch.float32):
        for query in range(0, mask.shape[0], 3):
            q, k, v = (inputs[name].clone().requires_grad_() for name in "qkv")
            cases.call(case, {"q": q, "k": k, "v": v}, plan).flatten(1, -3)[0, query].sum().backward()
            assert torch.equal(v.grad.flatten(1, -3)[0].flatten(1).any(-1), mask[query]), f"{case} {plan}"
            assert not k.grad.flatten(1, -3)[0].flatten(1).any(-1)[~mask[query]].any()
            assert not q.grad.flatten(1, -3)[0].flatten(1).any(-1)[torch.arange(mask.shape[0]) != query].any()


def test_heads_and_samples_do_not_meet():
    case = Case((6, 7), 3, batch=2, heads=2, head_dim=4)
    inputs = cases.make_inputs(case, torch.float32)
    for plan in cases.plans_of(case, torch.float32):
        before = cases.call(case, inputs, plan)
        for name in "qkv":
            changed = dict(inputs, **{name: inputs[name].clone()})
            changed[name][1, ..., 0, :] += 1
            after = cases.call(case, changed, plan)
            assert torch.equal(after[0], before[0]) and torch.equal(after[1, ..., 1, :], before[1, ..., 1, :])
            assert not torch.equal(after[1, ..., 0, :], before[1, ..., 0, :])


def test_the_best_plan_is_the_first_of_the_list():
    case = Case((8, 17), (3, 5), head_dim=8, heads=2)
    inputs = cases.make_inputs(case, torch.float32)
    best = cases.plans_of(case, torch.float32)[0]
    assert torch.equal(natten.na2d(*(inputs[n] for n in "qkv"), (3, 5)), cases.call(case, inputs, best))

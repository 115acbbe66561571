# SPDX-License-Identifier: MIT
"""T-46: forward gives the same bits with and without gradients. T-47: so do repeats and every number of threads."""

import cases
import pytest
import torch
from cases import Case
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import natten

CASES = [
    Case((70,), 9, dilation=2, batch=3, heads=4, heads_kv=2, head_dim=16, bias=True, extra=3),
    Case((17, 35), (5, 7), batch=2, heads=3, head_dim=32, bias=True),
    Case((17, 20), (5, 6), stride=(2, 3), batch=2, heads=2, head_dim=16, bias=True, extra=2),
    Case((12, 20), (4, 5), dilation=(3, 2), causal=(True, False), heads=4, heads_kv=1, head_dim=8),
    Case((5, 6, 18), (3, 2, 5), causal=(False, True, False), heads=2, head_dim=16, bias=True),
]
DTYPES = (torch.float32, torch.bfloat16)


def assert_same_bits(a, b, what):
    for name in a:
        assert torch.equal(a[name], b[name]), f"{name}: {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_twenty_repeats(case, dtype, restore_threads):
    torch.set_num_threads(2)
    inputs = cases.make_inputs(case, dtype)
    for plan in cases.plans_of(case, dtype):
        first = cases.results(case, inputs, plan)
        for _ in range(1 if plan == "reference" else 19):
            assert_same_bits(first, cases.results(case, inputs, plan), plan)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_number_of_threads(case, dtype, restore_threads):
    inputs = cases.make_inputs(case, dtype)
    for plan in cases.plans_of(case, dtype):
        torch.set_num_threads(1)
        alone = cases.results(case, inputs, plan)
        for threads in (2, 3, 5):
            torch.set_num_threads(threads)
            assert_same_bits(alone, cases.results(case, inputs, plan), f"{plan}, {threads} threads")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_sample_is_the_same_in_any_batch(case):
    """The bits of one sample do not depend on the others, so batching is no source of differences."""
    inputs = cases.make_inputs(Case(**{**vars(case), "batch": 4}), torch.float32)
    per_sample = {name: x if name == "bias" else x[2:3] for name, x in inputs.items()}
    for plan in cases.plans_of(case, torch.float32):
        many, one = cases.call(case, inputs, plan), cases.call(case, per_sample, plan)
        assert torch.equal(many[2:3], one)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_with_and_without_gradients(case, dtype):
    inputs = cases.make_inputs(case, dtype)
    for plan in [None, *cases.plans_of(case, dtype)]:
        leaves = {name: x.clone().requires_grad_(name in cases.INPUTS) for name, x in inputs.items()}
        recorded = cases.call(case, leaves, plan, return_lse=True)
        without_lse = cases.call(case, leaves, plan)
        plain = cases.call(case, inputs, plan, return_lse=True)
        with torch.no_grad():
            no_grad = cases.call(case, leaves, plan, return_lse=True)
        with torch.inference_mode():
            inference = cases.call(case, inputs, plan, return_lse=True)
        assert torch.equal(recorded[0], without_lse)
        for other in (plain, no_grad, inference):
            assert torch.equal(recorded[0], other[0]) and torch.equal(recorded[1], other[1]), plan


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_checkpoints_recompute_the_same_bits(case, reentrant):
    inputs = cases.make_inputs(case, torch.float32)
    for plan in [None, *cases.plans_of(case, torch.float32)]:
        straight = cases.results(case, inputs, plan)
        leaves = {name: inputs[name].clone().requires_grad_() for name in cases.INPUTS if name in inputs}
        seen = []

        def function(*tensors, plan=plan, seen=seen, leaves=leaves):
            out, lse = cases.call(case, dict(zip(leaves, tensors)), plan, return_lse=True)
            seen.append(out.detach().clone())
            return out, lse

        with set_checkpoint_early_stop(False):
            out, lse = checkpoint(function, *leaves.values(), use_reentrant=reentrant)
            torch.autograd.backward([out, lse], [inputs["dout"], inputs["dlse"]])
        assert len(seen) == 2 and torch.equal(*seen)
        recomputed = {"out": out, "lse": lse, **{"d" + name: leaf.grad for name, leaf in leaves.items()}}
        assert_same_bits(straight, recomputed, plan)


@pytest.mark.parametrize("mode", [(False, False), (True, True), (True, False), (False, True)], ids=str)
def test_deterministic_mode(mode):
    """torch's switch changes nothing, whether it is thrown before the forward pass or between the two."""
    case = CASES[1]
    inputs = cases.make_inputs(case, torch.float32)
    expected = cases.results(case, inputs)
    leaves = {name: inputs[name].clone().requires_grad_() for name in cases.INPUTS if name in inputs}
    try:
        torch.use_deterministic_algorithms(mode[0])
        out, lse = cases.call(case, leaves, return_lse=True)
        torch.use_deterministic_algorithms(mode[1])
        torch.autograd.backward([out, lse], [inputs["dout"], inputs["dlse"]])
    finally:
        torch.use_deterministic_algorithms(False)
    got = {"out": out, "lse": lse, **{"d" + name: leaf.grad for name, leaf in leaves.items()}}
    assert_same_bits(expected, got, mode)


def test_modules_under_checkpoint():
    module = natten.NeighborhoodAttention2D(16, 2, 3, rel_pos_bias=True)
    x = torch.randn(2, 6, 7, 16)
    grads = []
    for run in (module, lambda y: checkpoint(module, y, use_reentrant=False)):
        module.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads))

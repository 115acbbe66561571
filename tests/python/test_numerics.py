# SPDX-License-Identifier: MIT
"""T-51: extreme scales and logits. T-53: NaN and infinity stay with the queries whose windows hold them."""

import math

import cases
import dense
import pytest
import torch
from cases import Case

import natten

SHAPES = [
    Case((21,), 5, dilation=2, heads=2, head_dim=8),
    Case((6, 18), (3, 4), causal=(True, False), heads=2, head_dim=8),
    Case((6, 9), (3, 4), stride=(2, 4), heads=2, head_dim=8, extra=2, bias=True),
]
PER_SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=str)


@PER_SHAPE
@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, 3, 1e-6])
def test_scales(shape, scale):
    cases.check(Case(**{**vars(shape), "scale": scale}))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_scale_zero_is_the_mean_of_the_window(dtype):
    case = Case((6, 18), (3, 4), heads=2, head_dim=8, scale=0.0)
    inputs = cases.make_inputs(case, dtype)
    uniform = dense.window_mask(case.grid, *case.parameters).double() / 12
    exact = torch.einsum("qk,bkhd->bqhd", uniform, inputs["v"].double().flatten(1, 2)).view(inputs["v"].shape)
    for plan in cases.plans_of(case, dtype):
        out, lse = cases.call(case, inputs, plan, return_lse=True)
        # On tensor cores a product of floats is a sum of three.
        ulps = 2 if out.is_cuda and dtype == torch.float32 else 1
        assert (out.double() - exact).abs().max() <= max(ulps * torch.finfo(dtype).eps, 1e-14)
        torch.testing.assert_close(lse.double(), torch.full_like(lse, math.log(12)).double(), rtol=0, atol=1e-6)


@PER_SHAPE
def test_cosine_similarity_with_a_learnable_scale(shape):
    """Normalised q and k and scale=1, the learnable factor in q, as in k-diffusion."""
    case = Case(**{**vars(shape), "scale": 1.0})

    def with_cosine(run):
        def function(tensors):
            q, k = (torch.nn.functional.normalize(tensors[name], dim=-1) for name in "qk")
            factor = torch.tensor([10.0, 0.3], dtype=q.dtype)
            return run(case, {**tensors, "q": q * factor[:, None], "k": k})

        return function

    for dtype in (torch.float32, torch.float64):
        inputs = cases.make_inputs(case, dtype)
        exact, same = cases.expected_of(with_cosine(cases.call_dense), inputs)
        for plan in cases.plans_of(case, dtype):
            ours = with_cosine(lambda c, t, plan=plan: cases.call(c, t, plan, return_lse=True))
            cases.compare(cases.results_of(ours, inputs), exact, same, dtype, f"{case} {plan}")


def check_extreme(case, inputs, dtype):
    exact, same = cases.expected(case, inputs)
    largest_logit = float(exact["lse"].abs().max())
    for plan in cases.plans_of(case, dtype):
        cases.compare(cases.results(case, inputs, plan), exact, same, dtype, f"{case} {plan}", largest_logit)


@PER_SHAPE
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_huge_logits(shape, dtype):
    """Logits up to 1e4."""
    case = Case(**{**vars(shape), "scale": 1.0})
    inputs = cases.make_inputs(case, dtype)
    for name in ("q", "k", "bias", "extra_k"):
        if name in inputs:
            inputs[name] = inputs[name] * 10
    inputs["q"] *= 3
    largest = (inputs["q"].flatten(0, -2) @ inputs["k"].flatten(0, -2).T).abs().max()
    assert 2e3 < largest < 1e5
    check_extreme(case, inputs, dtype)


@PER_SHAPE
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_equal_logits_far_from_zero(shape, dtype):
    """All logits of a row are the same large number: the weights are equal, with nothing left of the number."""
    case = Case(**{**vars(shape), "scale": 1.0, "bias": False})
    inputs = cases.make_inputs(case, dtype)
    for name in ("q", "k", "extra_k"):
        if name in inputs:
            inputs[name] = torch.full_like(inputs[name], 32.0 if name == "q" else 16.0)
    check_extreme(case, inputs, dtype)


@PER_SHAPE
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_bias_of_minus_infinity_masks(shape, dtype):
    """Some offsets are masked by their bias; the query's own never is, so no row is empty. Gradients stay finite."""
    case = Case(**{**vars(shape), "bias": True})
    inputs = cases.make_inputs(case, dtype)
    masked = torch.rand(inputs["bias"].shape) < 0.5
    masked[(slice(None), *(w - 1 for w in case.parameters[0]))] = False
    inputs["bias"].masked_fill_(masked, -math.inf)
    exact, same = cases.expected(case, inputs)
    assert all(x.isfinite().all() for x in exact.values())
    for plan in cases.plans_of(case, dtype):
        cases.compare(cases.results(case, inputs, plan), exact, same, dtype, f"{case} {plan}")


@pytest.mark.parametrize("magnitude", [1e-30, 1e-18, 1e15, 1e30])
def test_tiny_and_large_values(magnitude):
    """out and dv scale with the values and with the incoming gradient; nothing in between under- or overflows."""
    for shape in SHAPES:
        case = Case(**{**vars(shape), "bias": False, "extra": 0})
        inputs = cases.make_inputs(case, torch.float32)
        for name in ("v", "dout"):
            scaled = {**inputs, name: inputs[name] * magnitude}
            for plan in cases.plans_of(case, torch.float32):
                base = cases.results(case, inputs, plan, lse_gradient=False)
                got = cases.results(case, scaled, plan, lse_gradient=False)
                linear = {"v": ("out", "dq", "dk"), "dout": ("dq", "dk", "dv")}[name]
                for result in linear:
                    error = (got[result].double() / magnitude - base[result].double()).abs().max()
                    assert error <= 1e-5 * base[result].abs().max(), f"{result} {plan} {case}"


POISONED = [
    Case((40,), 5, dilation=2, heads=2, heads_kv=1, head_dim=8),
    Case((23,), 4, causal=True, heads=2, head_dim=8),
    Case((7, 20), (3, 4), heads=2, head_dim=8),
    Case((7, 20), (3, 4), dilation=(2, 1), causal=(False, True), heads=2, head_dim=8),
    Case((8, 12), (3, 4), stride=(2, 4), heads=2, head_dim=8),
    Case((3, 5, 9), (2, 3, 3), causal=(True, False, False), heads=2, head_dim=8),
    Case((5, 6), 9, dilation=(2, 1), heads=2, head_dim=8),
]
POISON = pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])


def poisoned_batch(case, dtype, poison, places):
    """Copies of one sample, each with one number replaced; `places` holds (name of the tensor, token) per sample."""
    inputs = cases.make_inputs(case, dtype)
    inputs = {name: x.expand(len(places), *x.shape[1:]).clone() for name, x in inputs.items()}
    changed = {name: x.clone() for name, x in inputs.items()}
    for sample, (name, token) in enumerate(places):
        changed[name].flatten(1, -3)[sample, token, :, 1] = poison
    return inputs, changed


def per_token(tensor):
    return tensor.flatten(1, -3).flatten(2)  # [samples, tokens, heads * dim]


def assert_untouched(before, after, sample, names, tokens, what):
    for name in names:
        a, b = per_token(before[name])[sample][tokens], per_token(after[name])[sample][tokens]
        assert torch.equal(a, b), f"{name}: {what}"


@POISON
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("case", POISONED, ids=str)
def test_poisoned_keys_and_values(case, dtype, poison):
    """Queries that do not see the key keep every bit, and so do the gradients of keys that no such query sees."""
    mask = dense.window_mask(case.grid, *case.parameters)
    tokens = mask.shape[0]
    places = [(name, key) for name in "kv" for key in (0, 1, tokens // 2, tokens - 4, tokens - 1)]
    inputs, changed = poisoned_batch(case, dtype, poison, places)
    for plan in cases.plans_of(case, dtype):
        before, after = cases.results(case, inputs, plan), cases.results(case, changed, plan)
        for sample, (name, key) in enumerate(places):
            reached, what = mask[:, key], f"{name} of token {key}, {plan}"
            assert_untouched(before, after, sample, ("out", "dq"), ~reached, what)
            assert_untouched(before, after, sample, ("dk", "dv"), ~mask[reached].any(0), what)
            lse, lse_before = (x["lse"][sample].flatten(0, -2) for x in (after, before))
            assert torch.equal(lse[~reached], lse_before[~reached]), f"lse: {what}"
            if name == "k" and math.isnan(poison):
                assert lse[reached].isnan().all(), f"hidden from lse: {what}"
            if name == "v" or math.isnan(poison):
                assert not per_token(after["out"])[sample][reached].isfinite().all(-1).any(), f"hidden: {what}"


@POISON
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("case", POISONED, ids=str)
def test_poisoned_queries_and_gradients(case, dtype, poison):
    mask = dense.window_mask(case.grid, *case.parameters)
    others = torch.arange(mask.shape[0])
    places = [(name, query) for name in ("q", "dout") for query in (0, mask.shape[0] // 2, mask.shape[0] - 1)]
    inputs, changed = poisoned_batch(case, dtype, poison, places)
    for plan in cases.plans_of(case, dtype):
        before, after = cases.results(case, inputs, plan), cases.results(case, changed, plan)
        for sample, (name, query) in enumerate(places):
            what = f"{name} of token {query}, {plan}"
            assert_untouched(before, after, sample, ("out", "dq"), others != query, what)
            assert_untouched(before, after, sample, ("dk", "dv"), ~mask[query], what)


def test_poison_stays_in_its_sample_and_head():
    case = Case((6, 18), (3, 4), batch=2, heads=4, heads_kv=2, head_dim=8, extra=2)
    inputs = cases.make_inputs(case, torch.float32)
    for plan in cases.plans_of(case, torch.float32):
        before = cases.call(case, inputs, plan)
        for name in ("k", "v", "extra_k", "extra_v"):
            changed = {**inputs, name: inputs[name].clone()}
            changed[name][1, ..., 1, :] = math.nan  # the second key head serves query heads 2 and 3
            out = cases.call(case, changed, plan)
            assert torch.equal(out[0], before[0]) and torch.equal(out[1, ..., :2, :], before[1, ..., :2, :])
            assert out[1, ..., 2:, :].isnan().any(-1).all()


@pytest.mark.parametrize("dtype", cases.HALVES, ids=str)
def test_half_types_are_summed_in_fp32(dtype):
    """A window of 441 keys with equal weights: a sum in the half type would lose two digits."""
    case = Case((21, 21), 21, head_dim=64, scale=0.0)
    inputs = cases.make_inputs(case, dtype)
    exact = inputs["v"].double().flatten(1, 2).mean(1)
    for plan in cases.plans_of(case, dtype):
        out = natten.na2d(*(inputs[n] for n in "qkv"), 21, scale=0.0, plan=plan)
        assert (out.double() - exact[:, None, None]).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()

# SPDX-License-Identifier: MIT
"""The unfused operators against the dense reference: values, gradients, second order, tangents, transforms."""

import math

import cases
import pytest
import torch
from dense_unfused import dense_av, dense_qk, per_axis, slots_of
from torch.func import jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import natten
from natten import functional, indices

QK = {1: functional.na1d_qk, 2: functional.na2d_qk, 3: functional.na3d_qk}
AV = {1: functional.na1d_av, 2: functional.na2d_av, 3: functional.na3d_av}

# grid, kernel_size, dilation, is_causal, additional keys, relative position bias
PROBLEMS = [
    ((7,), 3, 1, False, 0, True),
    ((13,), 4, 3, True, 2, True),
    ((9,), 5, 1, True, 0, False),
    ((6, 7), (3, 5), (2, 1), (True, False), 3, True),
    ((5, 8), (2, 4), 1, False, 0, False),
    ((9, 20), 7, (1, 2), (False, True), 0, True),
    ((4, 3), 9, 1, True, 1, True),  # windows cut on both axes
    ((3, 4, 5), (1, 3, 2), (1, 1, 2), (False, True, False), 2, True),
    ((2, 2, 9), (3, 3, 3), 1, False, 0, True),
    ((41,), 7, 1, False, 0, True),  # several blocks of lanes
    ((18, 24), 7, 1, False, 0, True),  # several tiles of the CUDA engine, slots in shared memory
    ((20, 35), (5, 6), (1, 2), (True, False), 0, False),
    ((70,), 6, 2, True, 0, False),
    ((4, 37), (3, 20), 1, (False, True), 0, True),
    ((5, 90), (4, 33), (1, 2), (True, False), 0, False),
    ((3, 3, 35), (2, 3, 40), 1, False, 0, True),
]
IDS = [str(problem).replace(" ", "") for problem in PROBLEMS]


def tensors_of(problem, dtype=torch.float64, heads=2, dim=3, dim_v=5, batch=2):
    grid, window, _, _, extra, with_rpb = problem
    slots = math.prod(per_axis(window, len(grid))) + extra

    def make(*shape):
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    return {
        "q": make(batch, heads, *grid, dim),
        "k": make(batch, heads, *grid, dim),
        "extra_k": make(batch, heads, extra, dim) if extra else None,
        "rpb": make(heads, *(2 * k - 1 for k in per_axis(window, len(grid)))) if with_rpb else None,
        "attn": make(batch, heads, *grid, slots),
        "v": make(batch, heads, *grid, dim_v),
        "extra_v": make(batch, heads, extra, dim_v) if extra else None,
    }


def functions_of(problem):
    """(qk, av) of ours and of the dense reference, as functions of tensors alone."""
    grid, window, dilation, causal, *_ = problem
    rank, (where, entries) = len(grid), slots_of(*problem[:4])

    def qk(q, k, extra_k, rpb):
        return QK[rank](q, k, window, dilation, extra_k, causal, rpb)

    def av(attn, v, extra_v):
        return AV[rank](attn, v, window, dilation, extra_v, causal)

    def exact_qk(q, k, extra_k, rpb):
        return dense_qk(q, k, extra_k, rpb, where, entries)

    def exact_av(attn, v, extra_v):
        return dense_av(attn, v, extra_v, where)

    return qk, av, exact_qk, exact_av


def with_gradients(function, inputs, gradient):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    found = torch.autograd.grad(out, [x for x in leaves if x is not None], gradient)
    return [out.detach(), *found]


def unused_of(attn):
    return attn == -math.inf


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_values_and_gradients(problem, dtype):
    qk, av, exact_qk, exact_av = functions_of(problem)
    t = tensors_of(problem, dtype, dim=19, dim_v=34)
    for function, exact, names in (
        (qk, exact_qk, ("q", "k", "extra_k", "rpb")),
        (av, exact_av, ("attn", "v", "extra_v")),
    ):
        inputs = [t[name] for name in names]
        wide = [None if x is None else x.double() for x in inputs]
        gradient = torch.randn(exact(*wide).shape, dtype=torch.float64).to(dtype)
        got = with_gradients(function, inputs, gradient)
        expected = with_gradients(exact, wide, gradient.double())
        for name, a, b in zip(("result", *(n for n in names if t[n] is not None)), got, expected):
            assert a.dtype == dtype and a.shape == b.shape
            assert torch.equal(unused_of(a), unused_of(b)), name
            a, b = (x.double().masked_fill(unused_of(b), 0) for x in (a, b))
            limit = cases.TOLERANCE.get(dtype) or 2 * torch.finfo(dtype).eps
            scale = b.abs().max().clamp(min=1.0)
            assert (a - b).abs().max() <= limit * scale, (name, float((a - b).abs().max() / scale))


@pytest.mark.parametrize("problem", PROBLEMS, ids=IDS)
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALVES], ids=str)
def test_every_plan_agrees(problem, dtype):
    grid, window, dilation, causal, *_ = problem
    rank = len(grid)
    t = tensors_of(problem, dtype)
    geometry = [list(per_axis(x, rank)) for x in (window, 1, dilation, causal)]
    rest = (-math.inf, True)
    qk, qk_bwd = torch.ops.natten.na_qk, torch.ops.natten.na_qk_bwd
    av, av_bwd = torch.ops.natten.na_av, torch.ops.natten.na_av_bwd
    x = t["q"], t["k"], t["rpb"], t["extra_k"]
    dattn, dout = torch.randn_like(t["attn"]), torch.randn(*t["q"].shape[:-1], 5).to(dtype)
    a = t["attn"], t["v"], t["extra_v"]
    results = {}
    for plan in plans_of(problem, dtype):
        results[plan] = [
            qk(*x, *geometry, 0.5, *rest, plan),
            *qk_bwd(dattn, *x, *geometry, 0.5, True, plan),
            av(*a, *geometry, True, plan),
            *av_bwd(dout, *a, *geometry, True, plan),
        ]
    *others, oracle = results
    limit = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    for plan in others:
        for got, expected in zip(results[plan], results[oracle]):
            largest = expected.masked_fill(unused_of(expected), 0).abs().max() if expected.numel() else 0
            torch.testing.assert_close(got, expected, rtol=limit, atol=limit * max(float(largest), 1.0), msg=plan)


def plans_of(problem, dtype):
    """Engine and kernel, the oracle last. On the CPU the unfused operators have those of the fused one."""
    grid, window, dilation, causal, extra, _ = problem
    q = torch.empty(1, *grid, 1, 8, dtype=dtype)
    extra = torch.empty(1, extra, 1, 8, dtype=dtype) if extra else None
    plans = natten.list_plans(q, q, q, window, dilation=dilation, is_causal=causal, additional_keys=extra)
    if q.is_cuda:
        return ["portable", "cuda-reference"] if dtype in cases.HALVES else ["cuda-reference"]
    return list(dict.fromkeys("/".join(plan.split("/")[:2]) for plan in plans))


@pytest.mark.parametrize("problem", [p for p in PROBLEMS if math.prod(p[0]) <= 24], ids=str)
def test_every_derivative(problem):
    """Reverse, forward and second order, and the batched versions of each."""
    qk, av, *_ = functions_of(problem)
    t = tensors_of(problem, dim=2, dim_v=2, batch=1, heads=1)
    used = ~unused_of(qk(*(t[n] for n in ("q", "k", "extra_k", "rpb"))))
    for function, names in (
        (lambda *x: qk(*x).where(used, torch.zeros((), dtype=torch.float64)), ("q", "k", "extra_k", "rpb")),
        (av, ("attn", "v", "extra_v")),
    ):
        inputs = [None if t[name] is None else t[name].requires_grad_() for name in names]
        assert torch.autograd.gradcheck(
            function, inputs, check_forward_ad=True, check_batched_grad=True, nondet_tol=0.0
        )
        assert torch.autograd.gradgradcheck(function, inputs, check_fwd_over_rev=True, nondet_tol=0.0)


@pytest.mark.parametrize("problem", PROBLEMS[:4], ids=IDS[:4])
def test_transforms(problem):
    """vmap with and without a bias, and jvp."""
    qk, av, exact_qk, exact_av = functions_of(problem)
    t = tensors_of(problem)
    for function, exact, names in (
        (qk, exact_qk, ("q", "k", "extra_k", "rpb")),
        (av, exact_av, ("attn", "v", "extra_v")),
    ):
        present = [name for name in names if t[name] is not None]

        def of_present(run, names=names, present=present):
            return lambda *xs: run(*(dict(zip(present, xs)).get(name) for name in names))

        inputs = [t[name] for name in present]
        stacked = [torch.stack([x, x + 1, 2 * x], 1) for x in inputs]
        got, expected = (vmap(of_present(run), 1)(*stacked) for run in (function, exact))
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
        tangents = tuple(torch.randn_like(x) for x in inputs)
        results = [jvp(of_present(run), tuple(inputs), tangents)[1] for run in (function, exact)]
        unused = unused_of(exact(*(t[n] for n in names)))
        got, expected = (x.masked_fill(unused, 0) for x in results)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


def test_compile():
    torch._dynamo.reset()
    t = tensors_of(PROBLEMS[3], torch.float32)

    def block(q, k, v, rpb):
        attn = functional.na2d_qk(q, k, (3, 5), (2, 1), is_causal=(True, False), rpb=rpb)
        return functional.na2d_av(attn.softmax(-1), v, (3, 5), (2, 1), is_causal=(True, False))

    inputs = [t[name].requires_grad_() for name in ("q", "k", "v", "rpb")]
    expected = block(*inputs)
    got = torch.compile(block, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(x.square().sum(), inputs) for x in (got, expected)]
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_strided_attention_tensors():
    """The original splits and joins attention tensors along their last axis: views must do, in both directions."""
    grid, q, k, v = (6, 7), *(torch.randn(2, 3, 6, 7, 8, dtype=torch.float64) for _ in range(3))
    attn = functional.na2d_qk(q, k, 3)
    wide = torch.full((2, 3, *grid, 20), math.nan, dtype=torch.float64)
    wide[..., 4:13] = attn
    out = functional.na2d_av(wide[..., 4:13], v, 3)
    torch.testing.assert_close(out, functional.na2d_av(attn, v, 3), rtol=0, atol=0)
    turned = attn.transpose(2, 3).contiguous().transpose(2, 3)
    torch.testing.assert_close(functional.na2d_av(turned, v, 3), out, rtol=0, atol=0)
    leaf = wide.requires_grad_()
    (gradient,) = torch.autograd.grad(functional.na2d_av(leaf[..., 4:13], v, 3).sum(), leaf)
    assert gradient[..., :4].eq(0).all() and gradient[..., 13:].eq(0).all() and gradient[..., 4:13].isfinite().all()


def test_packed_and_grouped_inputs():
    x = torch.randn(2, 5, 9, 3, 4, 8, dtype=torch.float64)  # [batch, y, x, (q, k, v), heads, head_dim]
    q, k, v = x.permute(3, 0, 4, 1, 2, 5)
    attn = functional.na2d_qk(q, k, 3)
    torch.testing.assert_close(attn, functional.na2d_qk(q.contiguous(), k.contiguous(), 3), rtol=0, atol=0)
    grouped = functional.na2d_qk(q, k[:, :2], 3)
    torch.testing.assert_close(grouped, functional.na2d_qk(q, k[:, :2].repeat_interleave(2, 1), 3), rtol=0, atol=1e-12)
    out = functional.na2d_av(attn, v[:, :2], 3)
    torch.testing.assert_close(out, functional.na2d_av(attn, v[:, :2].repeat_interleave(2, 1), 3), rtol=0, atol=1e-12)


def test_unused_slots_may_hold_anything():
    v = torch.randn(1, 2, 9, 4, requires_grad=True)
    attn = functional.na1d_qk(torch.randn(1, 2, 9, 4), torch.randn(1, 2, 9, 4), 5, is_causal=True)
    for value in (math.nan, math.inf):
        weights = attn.detach().masked_fill(unused_of(attn), value).requires_grad_()
        out = functional.na1d_av(weights, v, 5, is_causal=True)
        gradients = torch.autograd.grad(out.sum(), (weights, v))
        assert out.isfinite().all() and all(g.isfinite().all() for g in gradients)


def test_bias_gradient_is_the_same_bits():
    q, k = (torch.randn(2, 3, 17, 19, 8) for _ in range(2))
    rpb = torch.zeros(3, 9, 9, requires_grad=True)

    def gradient():
        return torch.autograd.grad(functional.na2d_qk(q, k, 5, rpb=rpb).sin().sum(), rpb)[0]

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(5))


def test_autocast_and_mixed_types():
    q, k, v = (torch.randn(1, 2, 6, 7, 8) for _ in range(3))
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        attn = functional.na2d_qk(q, k.bfloat16(), 3)
        assert attn.dtype == torch.bfloat16
        assert functional.na2d_av(attn.float().softmax(-1), v, 3).dtype == torch.bfloat16
    assert functional.na2d_av(torch.rand(1, 2, 6, 7, 9), v.half(), 3).dtype == torch.half
    with pytest.raises(ValueError, match="one dtype"):
        functional.na2d_qk(q, k.half(), 3)


@pytest.mark.parametrize(
    "call",
    [
        lambda q, a: functional.na2d_av(a[..., :8], q, 3),
        lambda q, a: functional.na2d_av(a, q, 5),
        lambda q, a: functional.na2d_qk(q, q[:, :, :5], 3),
        lambda q, a: functional.na2d_qk(q, q[:, :1].expand(1, 3, 6, 7, 8), 3),
        lambda q, a: functional.na2d_qk(q, q, 3, dilation=0),
        lambda q, a: functional.na2d_qk(q, q, (3, 3, 3)),
        lambda q, a: functional.na1d_qk(q, q, 3),
        lambda q, a: functional.na2d_qk(q, q, 3, rpb=torch.zeros(2, 3, 3)),
        lambda q, a: functional.na2d_qk(q, q, 5, 2, oversize="error"),
        lambda q, a: functional.na2d_qk(q, q, 5, oversize="pad"),
        lambda q, a: functional.na2d_qk(q, q, 3, additional_keys=torch.zeros(1, 2, 4)),
        lambda q, a: functional.na2d_av(a, q, 3, additional_values=torch.zeros(1, 2, 4, 7)),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError) as error:
        call(torch.zeros(1, 2, 6, 7, 8), torch.zeros(1, 2, 6, 7, 9))
    assert "\n" not in str(error.value) and "natten[" not in str(error.value)


def test_empty_tensors():
    q = torch.zeros(0, 2, 6, 7, 8, requires_grad=True)
    rpb = torch.zeros(2, 5, 5, requires_grad=True)
    attn = functional.na2d_qk(q, q, 3, rpb=rpb)
    assert attn.shape == (0, 2, 6, 7, 9)
    dq, drpb = torch.autograd.grad(functional.na2d_av(attn, q, 3).sum(), (q, rpb))
    assert dq.shape == q.shape and drpb.eq(0).all()


# --- the fused API on this path --------------------------------------------------------------------------------------

FUSED = [
    cases.Case((7,), 3, stride=2, heads=4, heads_kv=2, head_dim=8, bias=True, extra=2),
    cases.Case((6, 7), (3, 4), dilation=(1, 2), causal=(False, True), heads=2, head_dim=8, head_dim_v=4, extra=1),
    cases.Case((4, 3), 9, heads=2, head_dim=8, bias=True),
    cases.Case((3, 4, 5), 3, head_dim=8, causal=True),
]


@pytest.mark.parametrize("case", FUSED, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_return_weights(case, dtype):
    inputs = cases.make_inputs(case, dtype)
    exact, same = cases.expected(case, inputs)

    def run(tensors):
        out, lse, weights = cases.call(case, tensors, return_lse=True, return_weights=True)
        total = weights.double().sum(-1)
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=2e-2 if dtype in cases.HALVES else 1e-5)
        return out, lse

    got = cases.results_of(run, inputs)
    allowed = cases.allowed_errors(exact, same, dtype)
    for name, error in cases.errors_of(got, exact).items():
        # weights that are stored in a half type are rounded once more than the dense computation of that type does
        assert error <= allowed[name] * (2 if dtype in cases.HALVES else 1), (name, error, allowed[name])


def test_weights_belong_to_the_indices():
    q, k, v = (torch.randn(1, 5, 6, 2, 8, dtype=torch.float64) for _ in range(3))
    out, weights = natten.na2d(q, k, v, (3, 5), dilation=(1, 2), is_causal=(True, False), return_weights=True)
    where = indices((5, 6), (3, 5), dilation=(1, 2), is_causal=(True, False)).to(v.device)
    assert where.shape == (5, 6, 15, 2)
    assert torch.equal(where[..., 0] < 0, weights[0, 0] == 0)
    flat = (where[..., 0] * 6 + where[..., 1]).clamp(min=0)
    picked = v[0].flatten(0, 1)[flat]  # [5, 6, slots, heads, dim]
    torch.testing.assert_close((weights[0].movedim(0, -1)[..., None] * picked).sum(2), out[0], rtol=0, atol=1e-12)


def test_dropout_acts_and_keeps_the_mean():
    q, k = (torch.randn(1, 40, 40, 4, 8) for _ in range(2))
    v = torch.ones(1, 40, 40, 4, 8)
    out, weights = natten.na2d(q, k, v, 7, attn_drop=0.25, return_weights=True)
    dropped = (weights == 0).float().mean()
    assert 0.24 < dropped < 0.26 and 0.99 < out.mean() < 1.01 and not torch.equal(out, v)
    with pytest.raises(ValueError, match="attn_drop"):
        natten.na2d(q, k, v, 7, attn_drop=1.5)


def test_flop_counter():
    import natten.flops  # noqa: F401

    q = torch.randn(2, 3, 6, 7, 8, requires_grad=True)
    pairs = 2 * 3 * 6 * 7 * 9
    with FlopCounterMode(display=False) as counter:
        attn = functional.na2d_qk(q, q, 3)
    assert counter.get_total_flops() == 2 * 8 * pairs
    with FlopCounterMode(display=False) as counter:
        functional.na2d_av(attn, q, 3).sum().backward()
    assert counter.get_total_flops() == (1 + 2 + 2) * 2 * 8 * pairs

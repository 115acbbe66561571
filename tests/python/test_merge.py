# SPDX-License-Identifier: MIT
"""`merge_attentions`. T-33: branches used elsewhere too, several backward passes, checkpoints, compile. T-41: gradients
over two to four branches, log-sum-exps far apart, branches without keys."""

import math

import cases
import dense
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import natten

BATCH, TOKENS, HEADS, DIM = 2, 6, 2, 4
FIX = pytest.mark.parametrize("fix", [True, False])


def make_branches(lengths, dtype=torch.float64, shifts=None):
    """A query and, for each branch, its keys and values. `shifts` are added to a branch's logits through its keys."""
    q = torch.randn(BATCH, TOKENS, HEADS, DIM, dtype=torch.float64)
    q[..., 0] = 1
    pairs = []
    for length, shift in zip(lengths, shifts or [0] * len(lengths)):
        k, v = torch.randn(2, BATCH, length, HEADS, DIM, dtype=torch.float64)
        k[..., 0] += shift
        pairs += [k, v]
    return [x.to(dtype) for x in (q, *pairs)]


def branch_results(q, pairs):
    results = [dense.full_attention(q, k, v, 1.0) for k, v in zip(pairs[::2], pairs[1::2])]
    return [out for out, _ in results], [lse for _, lse in results]


def joint(q, *pairs):
    return dense.full_attention(q, torch.cat(pairs[::2], 1), torch.cat(pairs[1::2], 1), 1.0)


def gradients(function, tensors, dtype=None, lse_gradient=True):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out, lse = function(*leaves)
    generator = torch.Generator(torch.get_default_device()).manual_seed(1)
    loss = (out * torch.randn(out.shape, dtype=torch.float64, generator=generator)).sum()
    if lse_gradient:
        loss = loss + (lse * torch.randn(lse.shape, dtype=torch.float64, generator=generator)).sum()
    loss.backward()  # reentrant checkpoints refuse torch.autograd.grad
    return [out.detach(), lse.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(got, expected, tolerance=1e-11):
    for a, b in zip(got, expected, strict=True):
        scale = max(1.0, float(b[b.isfinite()].abs().max())) if b.isfinite().any() else 1.0
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance * scale)


@FIX
@pytest.mark.parametrize("lengths", [(3, 5), (1, 4, 2), (3, 1, 5, 2)], ids=str)
def test_merging_is_attention_over_all_keys(lengths, fix):
    tensors = make_branches(lengths)

    def merged(q, *pairs):
        return natten.merge_attentions(*branch_results(q, pairs), use_autograd_fix=fix)

    assert_same(gradients(merged, tensors), gradients(joint, tensors))
    assert_same(gradients(merged, tensors, lse_gradient=False), gradients(joint, tensors, lse_gradient=False))


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_types(dtype):
    """The output has the type of the first branch, lse is fp32 (fp64 for fp64); both computed in that precision."""
    outs = [torch.randn(2, 5, 3, 4).to(dtype) for _ in range(3)]
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    lses = [torch.randn(2, 5, 3, dtype=kept) for _ in range(3)]
    out, lse = natten.merge_attentions(outs, lses)
    exact_lse = torch.stack(lses).double().logsumexp(0)
    exact = sum(o.double() * (x.double() - exact_lse).exp().unsqueeze(-1) for o, x in zip(outs, lses))
    assert out.dtype == dtype and lse.dtype == kept
    rounding = torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= rounding * 4
    assert (lse.double() - exact_lse).abs().max() <= torch.finfo(kept).eps * 8


@FIX
@pytest.mark.parametrize(
    "shifts", [(80, 0), (0, 80), (-80, 80), (80, 0, -80), (0, 80, 80), (-80, 80, 0, -80), (500, -500)], ids=str
)
def test_log_sum_exps_far_apart(shifts, fix):
    tensors = make_branches([3, 2, 4, 1][: len(shifts)], shifts=shifts)

    def merged(q, *pairs):
        return natten.merge_attentions(*branch_results(q, pairs), use_autograd_fix=fix)

    assert_same(gradients(merged, tensors), gradients(joint, tensors))
    single = gradients(merged, tensors, torch.float32)
    assert all(x.isfinite().all() for x in single)
    assert_same(single[:1], gradients(joint, tensors)[:1], 1e-4)  # the branches' own fp32 logits reach 500


@FIX
@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_branches_without_keys(position, dtype, fix):
    """A branch of lse -inf and out 0 takes no part, whatever its place; with no keys at all the row stays empty."""
    outs = [torch.randn(BATCH, TOKENS, HEADS, DIM, dtype=dtype) for _ in range(3)]
    lses = [torch.randn(BATCH, TOKENS, HEADS, dtype=dtype) for _ in range(3)]
    outs[position][:, :3] = 0
    lses[position][:, :3] = -math.inf
    for x, y in zip(outs, lses):
        x[:, 0], y[:, 0] = 0, -math.inf
    leaves = [x.requires_grad_() for x in (*outs, *lses)]
    out, lse = natten.merge_attentions(outs, lses, use_autograd_fix=fix)
    rest = [i for i in range(3) if i != position]
    with torch.no_grad():
        two, two_lse = natten.merge_attentions([outs[i][:, 1:3] for i in rest], [lses[i][:, 1:3] for i in rest])
    torch.testing.assert_close(out[:, 1:3], two)
    torch.testing.assert_close(lse[:, 1:3], two_lse)
    assert not out[:, 0].any() and (lse[:, 0] == -math.inf).all()
    (out.sum() + lse[:, 1:].sum()).backward()
    assert all(x.grad.isfinite().all() for x in leaves)
    assert not any(x.grad[:, 0].any() for x in leaves)
    assert not outs[position].grad[:, :3].any() and not lses[position].grad[:, :3].any()


@FIX
def test_inputs_are_never_written(fix):
    tensors = [x.requires_grad_() for x in make_branches([3, 2, 4])]
    outs, lses = branch_results(tensors[0], tensors[1:])
    before = [x.detach().clone() for x in (*outs, *lses)]
    versions = [x._version for x in (*outs, *lses)]
    lists = (list(outs), list(lses))
    out, lse = natten.merge_attentions(*lists, use_autograd_fix=fix)
    (out.sum() + lse.sum()).backward()
    assert all(torch.equal(x, y) for x, y in zip((*outs, *lses), before))
    assert versions == [x._version for x in (*outs, *lses)]
    assert all(x is y for x, y in zip((*lists[0], *lists[1]), (*outs, *lses)))


def local_and_global(q, k, v, far_k, far_v):
    out, lse = natten.na1d(q, k, v, 3, scale=1.0, return_lse=True)
    far, far_lse = natten.attention(q, far_k, far_v, scale=1.0, return_lse=True)
    return (out, far), (lse, far_lse)


def local_and_global_exactly(q, k, v, far_k, far_v):
    out, lse = dense.attention(q, k, v, (3,), (1,), (1,), (False,), 1.0)
    far, far_lse = dense.full_attention(q, far_k, far_v, 1.0)
    return (out, far), (lse, far_lse)


def merge_exactly(outs, lses):
    lse = torch.stack(lses).logsumexp(0)
    return sum(o * (x - lse).exp().unsqueeze(-1) for o, x in zip(outs, lses)), lse


def loss_of(branches, merge):
    """`out` of the first branch stands in the loss itself too, and both branches take part in two merges."""

    def function(*tensors):
        outs, lses = branches(*tensors)
        out, lse = merge(outs, lses)
        again, again_lse = merge([outs[0], out], [lses[0], lse])
        return out + again.sin() + outs[0].square(), lse + again_lse * lses[1]

    return function


def tensors_of_local_and_global():
    q, k, v = torch.randn(3, BATCH, 9, HEADS, DIM, dtype=torch.float64)
    far_k, far_v = torch.randn(2, BATCH, 4, HEADS, DIM, dtype=torch.float64)
    return [q, k, v, far_k, far_v]


@FIX
def test_a_branch_used_twice(fix):
    tensors = tensors_of_local_and_global()
    ours = loss_of(local_and_global, lambda o, x: natten.merge_attentions(list(o), list(x), use_autograd_fix=fix))
    expected = gradients(loss_of(local_and_global_exactly, merge_exactly), tensors)
    assert_same(gradients(ours, tensors), expected)


@FIX
def test_backward_twice(fix):
    tensors = [x.requires_grad_() for x in tensors_of_local_and_global()]
    outs, lses = local_and_global(*tensors)
    out, lse = natten.merge_attentions(list(outs), list(lses), use_autograd_fix=fix)
    loss = out.square().sum() + lse.sum() + outs[0].sin().sum()
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    second = torch.autograd.grad(loss, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    outs, lses = local_and_global_exactly(*tensors)
    out, lse = merge_exactly(outs, lses)
    loss = out.square().sum() + lse.sum() + outs[0].sin().sum()
    assert_same(second, torch.autograd.grad(loss, tensors))


@FIX
@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpoint(reentrant, fix):
    ours = loss_of(local_and_global, lambda o, x: natten.merge_attentions(list(o), list(x), use_autograd_fix=fix))
    tensors = tensors_of_local_and_global()
    expected = gradients(loss_of(local_and_global_exactly, merge_exactly), tensors)
    assert_same(gradients(lambda *t: checkpoint(ours, *t, use_reentrant=reentrant), tensors), expected)


@FIX
def test_under_compile(fix):
    torch.compiler.reset()
    ours = loss_of(local_and_global, lambda o, x: natten.merge_attentions(list(o), list(x), use_autograd_fix=fix))
    tensors = tensors_of_local_and_global()
    expected = gradients(loss_of(local_and_global_exactly, merge_exactly), tensors)
    assert_same(gradients(torch.compile(ours, fullgraph=True, backend="aot_eager"), tensors), expected)


def test_torch_compile_argument_changes_no_number():
    outs, lses = branch_results(*(lambda t: (t[0], t[1:]))(make_branches([3, 2])))
    for a, b in zip(natten.merge_attentions(outs, lses, torch_compile=False), natten.merge_attentions(outs, lses)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)
    for a, b in zip(natten.merge_attentions(outs, lses, True, True), natten.merge_attentions(outs, lses, False, False)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


@FIX
def test_gradcheck(fix):
    outs = [torch.randn(1, 2, 1, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 1, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(
        lambda *t: natten.merge_attentions(list(t[:3]), list(t[3:]), use_autograd_fix=fix), (*outs, *lses)
    )


def test_bad_input():
    out, lse = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3)
    for outs, lses in (
        ([], []),
        ([out, out], [lse]),
        ([out], [lse, lse]),
        ([out, out[:, :4]], [lse, lse]),
        ([out, out], [lse, lse[:, :4]]),
        ([out, out], [lse[..., :2], lse[..., :2]]),
    ):
        with pytest.raises(ValueError):
            natten.merge_attentions(outs, lses)

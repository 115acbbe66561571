# SPDX-License-Identifier: MIT
"""`natten.attention` over samples of different lengths, packed one behind the other into a batch of 1: every sample is
attention of its own. T-10: samples without queries, without keys, and tokens behind the last sample."""

import itertools
import math

import cases
import dense
import pytest
import torch
from cases import compare

import natten

HEADS, DIM = 4, 8
# (queries, keys) of each sample.
PACKS = {
    "equal": ((5, 5), (1, 1), (9, 9)),
    "cross": ((5, 3), (1, 7), (4, 20)),
    "empty": ((0, 0), (4, 0), (3, 3), (0, 6), (6, 2), (0, 0)),
    "no keys": ((4, 0), (3, 0)),
    "no queries": ((0, 4), (0, 3)),
    "no samples": (),
}


def lengths_of(pack):
    return [q for q, _ in pack], [k for _, k in pack]


def arguments(pack, style, tensors=False):
    """The lengths of the samples, said in one of the two ways."""
    sides = lengths_of(pack)
    if style == "cumulative":
        maxima = [max(side, default=0) for side in sides]
        sides = [[0, *itertools.accumulate(side)] for side in sides]
    if tensors:
        sides = [torch.tensor(side, dtype=torch.int32) for side in sides]
    if style == "lengths":
        return dict(zip(("seqlens_Q", "seqlens_KV"), sides))
    names = "cumulative_seqlen_Q", "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV"
    return dict(zip(names, (*sides, *maxima)))


def inputs_of(pack, dtype, heads_kv=HEADS, dim_v=DIM, behind=0):
    """q, k, v and the gradients of out and lse; `behind` tokens more than the samples have."""
    tokens, tokens_kv = (sum(side) + behind for side in lengths_of(pack))
    sizes = (tokens, HEADS, DIM), (tokens_kv, heads_kv, DIM), (tokens_kv, heads_kv, dim_v), (tokens, HEADS, dim_v)
    tensors = [torch.randn(1, *size, dtype=torch.float64).to(dtype) for size in sizes]
    return [*tensors, torch.randn(1, tokens, HEADS, dtype=torch.float64)]


def expected(q, k, v, pack, causal=False):
    """A loop over the samples; queries without keys keep 0 and -inf."""
    nothing = 0 * (q.sum() + k.sum() + v.sum())  # so that there is a graph even if no sample has any key
    out = q.new_zeros(1, q.shape[1], HEADS, v.shape[-1]) + nothing
    lse = q.new_full((1, q.shape[1], HEADS), -math.inf)
    begin = begin_kv = 0
    for n, n_kv in pack:
        end, end_kv = begin + n, begin_kv + n_kv
        if n > 0 and n_kv > 0:
            sample = q[:, begin:end], k[:, begin_kv:end_kv], v[:, begin_kv:end_kv]
            rows = torch.arange(begin, end)
            sample_out, sample_lse = dense.full_attention(*sample, DIM**-0.5, causal)
            out, lse = out.index_copy(1, rows, sample_out), lse.index_copy(1, rows, sample_lse)
        begin, begin_kv = end, end_kv
    return out, lse


def results(function, inputs, dtype):
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in inputs[:3])
    out, lse = function(q, k, v)
    # An lse of nothing but rows without keys is a constant and may say so.
    pairs = [(x, g.to(x.dtype)) for x, g in zip((out, lse), inputs[3:]) if x.requires_grad]
    outputs, gradients = zip(*pairs)
    grads = torch.autograd.grad(outputs, (q, k, v), gradients, materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


def check(pack, inputs, causal=False, style="lengths", tensors=False, plan=None):
    dtype = inputs[0].dtype

    def packed(q, k, v):
        options = arguments(pack, style, tensors)
        return natten.attention(q, k, v, causal, **options, plan=plan, return_lse=True)

    exact = results(lambda *x: expected(*x, pack, causal), inputs, torch.float64)
    got = results(packed, inputs, dtype)
    assert got["out"].dtype == dtype and got["lse"].dtype == (dtype if dtype == torch.float64 else torch.float32)
    same = results(lambda *x: expected(*x, pack, causal), inputs, dtype) if dtype == torch.bfloat16 else None
    assert torch.equal(got["lse"] == -math.inf, exact["lse"] == -math.inf)
    for each in filter(None, (got, exact, same)):
        each["lse"] = each["lse"].masked_fill(each["lse"] == -math.inf, 0)
    compare(got, exact, same, dtype, f"{pack} {style} plan={plan}")


@pytest.mark.parametrize("tensors", [False, True])
@pytest.mark.parametrize("style", ["lengths", "cumulative"])
@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_every_sample_is_attention_of_its_own(pack, style, tensors):
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(pack, inputs_of(pack, dtype), style=style, tensors=tensors)


@pytest.mark.parametrize("style", ["lengths", "cumulative"])
@pytest.mark.parametrize("plan", ["reference", "cpu"])
def test_causal_grouped_heads_and_widths(plan, style):
    pack, plan = ((5, 5), (0, 0), (1, 1), (17, 17)), cases.engine(plan)
    check(pack, inputs_of(pack, torch.float64, heads_kv=2, dim_v=3), True, style, plan=plan)
    check(PACKS["empty"], inputs_of(PACKS["empty"], torch.float64, heads_kv=1, dim_v=5), False, style, plan=plan)


@pytest.mark.parametrize("pack", PACKS.values(), ids=PACKS)
def test_tokens_behind_the_last_sample_see_nothing_and_are_not_seen(pack):
    inputs = inputs_of(pack, torch.float64, behind=3)
    check(pack, inputs)
    tokens, tokens_kv = map(sum, lengths_of(pack))
    for x, end in zip(inputs[:3], (tokens, tokens_kv, tokens_kv)):
        x[:, end:] = math.nan
    out = natten.attention(*inputs[:3], **arguments(pack, "lengths"))
    assert not out[:, tokens:].any() and out.isfinite().all()


def test_one_sample_is_the_plain_call_bit_for_bit():
    q, k, v, *_ = inputs_of(((9, 6),), torch.float32)
    plain = natten.attention(q, k, v, return_lse=True)
    for style in ("lengths", "cumulative"):
        packed = natten.attention(q, k, v, return_lse=True, **arguments(((9, 6),), style))
        assert all(map(torch.equal, packed, plain))


BAD = {
    "one side": ({"seqlens_Q": [3, 2]}, ValueError),
    "both ways": ({**arguments(((3, 3),), "lengths"), **arguments(((3, 3),), "cumulative")}, ValueError),
    "no maxima": ({"cumulative_seqlen_Q": [0, 5], "cumulative_seqlen_KV": [0, 5]}, ValueError),
    "too many tokens": (arguments(((3, 3), (3, 2)), "lengths"), ValueError),
    "negative length": ({"seqlens_Q": [6, -1], "seqlens_KV": [3, 2]}, ValueError),
    "numbers of samples": ({"seqlens_Q": [3, 2], "seqlens_KV": [5]}, ValueError),
    "sums from 1": ({**arguments(((5, 5),), "cumulative"), "cumulative_seqlen_Q": [1, 5]}, ValueError),
    "falling sums": ({**arguments(((5, 5),), "cumulative"), "cumulative_seqlen_KV": [0, 4, 3]}, ValueError),
    "low maximum": ({**arguments(((5, 5),), "cumulative"), "max_seqlen_KV": 4}, ValueError),
    "floats": ({"seqlens_Q": [2.5, 2.5], "seqlens_KV": [3, 2]}, TypeError),
    "matrix": ({"seqlens_Q": torch.tensor([[3, 2]]), "seqlens_KV": [3, 2]}, TypeError),
}


@pytest.mark.parametrize("options, error", BAD.values(), ids=BAD)
def test_bad_lengths(options, error):
    q, k, v, *_ = inputs_of(((5, 5),), torch.float32)
    with pytest.raises(error, match="seqlen|samples"):
        natten.attention(q, k, v, **options)


def test_bad_batch_and_causal_lengths():
    q, k, v = (x.expand(2, -1, -1, -1) for x in inputs_of(((5, 5),), torch.float32)[:3])
    with pytest.raises(ValueError, match="batch of 1"):
        natten.attention(q, k, v, seqlens_Q=[5], seqlens_KV=[5])
    with pytest.raises(ValueError, match="is_causal"):
        natten.attention(q[:1], k[:1], v[:1], True, seqlens_Q=[2, 3], seqlens_KV=[3, 2])

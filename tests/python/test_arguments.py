# SPDX-License-Identifier: MIT
"""T-61: the forms in which arguments come. T-62: the fifth positional argument. T-63: tensors with heads first."""

import inspect
import warnings

import numpy as np
import pytest
import torch

import natten
from natten.functional import neighborhood_attention_generic

Q, K, V = torch.randn(3, 2, 6, 7, 2, 8)


def na2d(*args, **kwargs):
    return natten.na2d(Q, K, V, *args, **kwargs)


class Indexable:
    """A sequence that is neither list nor tuple."""

    def __init__(self, *values):
        self.values = values

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


ONE_FOR_ALL = [3, np.int64(3), np.int32(3)]
PER_AXIS = [
    (3, 5),
    [3, 5],
    torch.Size([3, 5]),
    np.array([3, 5]),
    (np.int64(3), np.int16(5)),
    [np.uint8(3), 5],
    range(3, 6, 2),
    Indexable(3, 5),
]


@pytest.mark.parametrize("form", ONE_FOR_ALL, ids=lambda x: type(x).__name__)
def test_one_number_for_all_axes(form):
    assert torch.equal(na2d(form), na2d((3, 3)))
    assert torch.equal(na2d(3, dilation=form), na2d((3, 3), dilation=(3, 3)))
    assert torch.equal(na2d(5, stride=form), na2d((5, 5), stride=(3, 3)))


@pytest.mark.parametrize("form", PER_AXIS, ids=lambda x: type(x).__name__)
def test_one_number_per_axis(form):
    expected = na2d((3, 5))
    assert torch.equal(na2d(form), expected) and not torch.equal(na2d(3), expected)
    assert torch.equal(na2d(2, dilation=form), na2d(2, dilation=(3, 5)))
    assert torch.equal(na2d((5, 6), stride=form), na2d((5, 6), stride=(3, 5)))


@pytest.mark.parametrize(
    "form",
    [(True, False), [True, False], (np.bool_(True), np.bool_(False)), np.array([True, False]), Indexable(True, False)],
    ids=lambda x: type(x).__name__,
)
def test_causal_flags(form):
    expected = na2d(3, is_causal=(True, False))
    assert torch.equal(na2d(3, is_causal=form), expected)
    assert torch.equal(na2d(3, is_causal=True), na2d(3, is_causal=(True, True)))
    assert torch.equal(na2d(3, is_causal=np.bool_(True)), na2d(3, is_causal=(True, True)))


def test_none_is_the_default():
    expected = na2d(3)
    for name in ("dilation", "stride", "is_causal", "scale", "rpb", "additional_keys", "backend", "plan", "oversize"):
        assert torch.equal(na2d(3, **{name: None}), expected)
    assert torch.equal(na2d(3, scale=8**-0.5), expected)


@pytest.mark.parametrize("scale", [2, 2.0, np.float32(2), np.float64(2), np.int64(2)], ids=lambda x: type(x).__name__)
def test_scales(scale):
    assert torch.equal(na2d(3, scale=scale), na2d(3, scale=2.0))
    assert not torch.equal(na2d(3, scale=0.0), na2d(3))


def test_lists_of_the_caller_stay_as_they_are():
    window, dilation, causal = [3, -1], [1, 2], [True, False]
    na2d(window, dilation=dilation, is_causal=causal)
    assert (window, dilation, causal) == ([3, -1], [1, 2], [True, False])


def test_generic_is_the_same_function():
    for rank, function in ((1, natten.na1d), (2, natten.na2d), (3, natten.na3d)):
        q, k, v = torch.randn(3, 2, *(5,) * rank, 2, 4)
        expected = function(q, k, v, 3, dilation=1, is_causal=True)
        assert torch.equal(neighborhood_attention_generic(q, k, v, 3, is_causal=True), expected)
        assert torch.equal(neighborhood_attention_generic(q, k, v, (3,) * rank, is_causal=True), expected)


@pytest.mark.parametrize("function", [natten.na2d, neighborhood_attention_generic], ids=lambda f: f.__name__)
@pytest.mark.parametrize("more", [(2,), (1, 2), (2, 1, False)], ids=str)
def test_fifth_positional_argument(function, more):
    with pytest.raises(TypeError, match="(?s)dilation.*stride|stride.*dilation"):
        function(Q, K, V, 3, *more)


NEWEST_ERA = [
    "query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale", "additional_keys",
    "additional_values", "attention_kwargs", "backend", "q_tile_shape", "kv_tile_shape",
    "backward_q_tile_shape", "backward_kv_tile_shape", "backward_kv_splits", "backward_use_pt_reduction",
    "run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse",
]  # fmt: skip
OURS = ["rpb", "plan", "oversize"]


@pytest.mark.parametrize(
    "function", [natten.na1d, natten.na2d, natten.na3d, neighborhood_attention_generic], ids=lambda f: f.__name__
)
def test_complete_argument_list(function):
    parameters = inspect.signature(function).parameters
    assert set(NEWEST_ERA + OURS) <= set(parameters)
    assert list(parameters)[:4] == NEWEST_ERA[:4]
    kinds = {name: parameters[name].kind for name in NEWEST_ERA[4:] + OURS}
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}


def test_positional_order_of_attention_and_merge():
    names = list(inspect.signature(natten.attention).parameters)
    assert names[:22] == [
        "query", "key", "value", "is_causal", "scale", "seqlens_Q", "seqlens_KV", "cumulative_seqlen_Q",
        "cumulative_seqlen_KV", "max_seqlen_Q", "max_seqlen_KV", "backend", "q_tile_size", "kv_tile_size",
        "backward_q_tile_size", "backward_kv_tile_size", "backward_kv_splits", "backward_use_pt_reduction",
        "run_persistent_kernel", "kernel_schedule", "torch_compile", "return_lse",
    ]  # fmt: skip
    names = list(inspect.signature(natten.merge_attentions).parameters)
    assert names == ["outputs", "lse_tensors", "torch_compile", "use_autograd_fix"]


TUNING = {
    "q_tile_shape": (8, 8),
    "kv_tile_shape": (8, 16),
    "backward_q_tile_shape": (4, 4),
    "backward_kv_tile_shape": (4, 4),
    "backward_kv_splits": 2,
    "backward_use_pt_reduction": True,
    "run_persistent_kernel": False,
    "kernel_schedule": "coop",
    "torch_compile": True,
    "attention_kwargs": {},
}


def test_tuning_arguments_change_no_bit():
    def gradients(**kwargs):
        leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
        out = natten.na2d(*leaves, 3, **kwargs)
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = gradients()
    for tuning in [*({name: value} for name, value in TUNING.items()), TUNING, {"backend": "flex-fna"}]:
        assert all(torch.equal(a, b) for a, b in zip(gradients(**tuning), expected)), tuning


@pytest.mark.parametrize(
    "tuning",
    [{"q_tile_shape": (8,)}, {"kv_tile_shape": (0, 8)}, {"backward_kv_splits": 0}, {"kernel_schedule": "fast"}],
    ids=str,
)
def test_tuning_arguments_are_validated(tuning):
    with pytest.raises(ValueError):
        na2d(3, **tuning)


def test_unknown_keywords():
    with pytest.raises(TypeError, match="windows"):
        na2d(3, windows=5)


def test_return_lse_is_a_pair():
    out, lse = na2d(3, return_lse=True)
    assert torch.equal(out, na2d(3)) and lse.shape == Q.shape[:-1]


@pytest.fixture
def layout_check():
    yield natten.context.set_layout_check
    natten.context.set_layout_check("warn")


def heads_first(function, *shape, window=7):
    return function(*torch.randn(3, *shape), window)


def test_heads_first_is_noticed(layout_check):
    """[batch, heads, height, width, dim] given where heads stand last would run, with the height as heads."""
    with pytest.warns(UserWarning, match="heads"):
        heads_first(natten.na2d, 2, 4, 32, 32, 16)
    with pytest.warns(UserWarning, match="heads"):
        heads_first(natten.na1d, 2, 4, 64, 16)
    layout_check("error")
    with pytest.raises(ValueError, match="heads"):
        heads_first(natten.na2d, 2, 4, 32, 32, 16)
    layout_check("off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        heads_first(natten.na2d, 2, 4, 32, 32, 16)
    with pytest.raises(ValueError):
        layout_check("maybe")


def test_heads_last_is_no_cause_for_warnings(layout_check):
    layout_check("error")
    for shape in ((1, 56, 56, 2, 32), (1, 7, 7, 24, 8), (1, 4, 9, 8, 8), (2, 14, 14, 12, 8), (1, 5, 30, 3, 8)):
        heads_first(natten.na2d, *shape)
    for shape in ((2, 100, 8, 16), (2, 5, 4, 16), (1, 12, 12, 8)):
        heads_first(natten.na1d, *shape)


def test_heads_first_that_does_not_fit_is_refused():
    """Grouped key heads make the layouts incompatible: the sizes of the grid disagree."""
    q = torch.randn(2, 8, 10, 10, 16)
    k = torch.randn(2, 2, 10, 10, 16)
    with pytest.raises(ValueError):
        natten.na2d(q, k, k, 3)

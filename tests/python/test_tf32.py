# SPDX-License-Identifier: MIT
"""T-54: products of float32 are in TF32 only where the switch of torch or the plan says so. What the front asks for, on
fake CUDA tensors; what a GPU makes of it is in test_cuda.py."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

import natten
from natten import _tuning


@pytest.fixture(autouse=True)
def torch_as_it_was():
    torch.compiler.reset()
    yield
    torch.backends.cuda.matmul.allow_tf32 = False  # NOTE: this sets the newer switch too


def allow_tf32():
    torch.backends.cuda.matmul.allow_tf32 = True


def allow_tf32_by_the_newer_switch():
    torch.backends.cuda.matmul.fp32_precision = "tf32"


PER_SWITCH = pytest.mark.parametrize("switch", [allow_tf32, allow_tf32_by_the_newer_switch])


def plan_asked_for(function=natten.na2d, grid=(8, 9), dtype=torch.float32, device="cuda", **kwargs):
    """The plan that the op was given, which its backward pass is given too."""
    with FakeTensorMode():
        q = torch.empty(1, *grid, 2, 32, dtype=dtype, device=device, requires_grad=True)
        arguments = (q, q, q) if function is natten.attention else (q, q, q, 3)
        return function(*arguments, **kwargs).grad_fn.options[-1]


@PER_SWITCH
def test_where_torch_allows_it(switch):
    assert plan_asked_for() == ""
    assert plan_asked_for(backend="cutlass-fna") == "portable"
    switch()
    assert plan_asked_for() == "+tf32"
    assert plan_asked_for(natten.attention, (9,)) == "+tf32"
    assert plan_asked_for(backend="cutlass-fna") == "portable+tf32"
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        assert plan_asked_for(dtype=dtype) == ""
    assert plan_asked_for(device="cpu") == ""
    for plan in ("portable/boxes", "portable/boxes-tf32", "portable"):
        assert plan_asked_for(plan=plan) == plan, "a plan says all there is to say"


@PER_SWITCH
def test_a_graph_is_compiled_anew_when_the_switch_is_thrown(switch):
    compiled = torch.compile(lambda x: x + _tuning.tf32_is_allowed(), fullgraph=True, backend="eager")
    zero = torch.zeros(())
    assert compiled(zero) == 0
    switch()
    assert compiled(zero) == 1
    torch.backends.cuda.matmul.allow_tf32 = False
    assert compiled(zero) == 0


def test_the_preference_means_nothing_where_there_is_no_tf32():
    """The same bits on the CPU, by every way that takes a plan."""
    q, k, v = torch.randn(3, 1, 8, 9, 2, 16)
    options = [3, 3], [1, 1], [1, 1], [False, False], 1.0, True
    for plan, preferring in (("", "+tf32"), ("cpu", "cpu+tf32"), ("reference", "reference+tf32")):
        pair = [torch.ops.natten.na_fwd(q, k, v, None, None, None, *options, p)[0] for p in (plan, preferring)]
        assert torch.equal(*pair)
    with pytest.raises((RuntimeError, ValueError), match="cannot run|no plan"):
        torch.ops.natten.na_fwd(q, k, v, None, None, None, *options, "nothing+tf32")

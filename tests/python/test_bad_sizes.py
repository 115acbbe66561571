# SPDX-License-Identifier: MIT
"""Bad input, second part: the ops themselves, empty and huge sizes, names of engines and plans, modules, attention."""

import cases
import pytest
import torch
from test_bad_input import HUGE, refused, tensors

import natten


@pytest.mark.parametrize("plan", ["", "reference", "cpu"])
def test_ops_check_for_themselves(plan):
    """Whoever calls the op below the Python function gets an error too: dtypes, sizes, parameters."""
    q, k, v = tensors(k=(1, 6, 7, 4, 8), v=(1, 6, 7, 4, 8))

    def fwd(
        q=q,
        k=k,
        v=v,
        bias=None,
        extra_k=None,
        extra_v=None,
        window=(3, 3),
        stride=(1, 1),
        dilation=(1, 1),
        causal=(False, False),
    ):
        return torch.ops.natten.na_fwd(
            q, k, v, bias, extra_k, extra_v, window, stride, dilation, causal, 1.0, True, plan
        )

    out, lse = fwd()
    for arguments in (
        {"k": k.double()},
        {"v": v.half()},
        {"k": k[:, :5]},
        {"v": v[..., :3, :]},
        {"k": k[..., :4]},
        {"q": q[0]},
        {"q": q.long(), "k": k.long(), "v": v.long()},
        {"window": (3,)},
        {"stride": (1, 1, 1)},
        {"dilation": (1,)},
        {"causal": (True,)},
        {"window": (-1, 3)},
        {"window": (3, 0)},
        {"stride": (4, 1)},
        {"dilation": (0, 1)},
        {"bias": torch.randn(4, 3, 5)},
        {"bias": torch.randn(4, 5, 5).double()},
        {"bias": torch.randn(3, 5, 5)},
        {"extra_k": torch.randn(1, 3, 4, 8)},
        {"extra_v": torch.randn(1, 3, 4, 8)},
        {"extra_k": torch.randn(1, 3, 4, 8), "extra_v": torch.randn(1, 2, 4, 8)},
        {"extra_k": torch.randn(2, 3, 4, 8), "extra_v": torch.randn(2, 3, 4, 8)},
        {"window": (2**33, 3), "stride": (2**33 + 1, 1)},
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"natten\[(invalid_argument|unsupported)\]"):
            fwd(**arguments)

    def bwd(dout=out, dlse=lse, out=out, lse=lse):
        return torch.ops.natten.na_bwd(
            dout, dlse, q, k, v, None, None, None, out, lse, (3, 3), (1, 1), (1, 1), (False, False), 1.0, True, plan
        )

    bwd(dlse=None)
    for arguments in (
        {"dout": out[:, :5]},
        {"dout": out.double()},
        {"dlse": lse.double()},
        {"dlse": lse[..., :3]},
        {"out": out[..., :4]},
        {"out": out.half()},
        {"lse": lse.half()},
        {"lse": lse[:, :3]},
        {"dout": out[0]},
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"natten\[(invalid_argument|unsupported)\]"):
            bwd(**arguments)


LAST_STRIDES = {
    "moved": lambda: torch.randn(1, 6, 7, 8, 2).transpose(-1, -2),
    "sliced": lambda: torch.randn(1, 6, 7, 2, 16)[..., ::2],
    "expanded": lambda: torch.randn(1, 6, 7, 2, 1).expand(-1, -1, -1, -1, 8),
}


@pytest.mark.parametrize("layout", LAST_STRIDES)
def test_ops_and_last_strides(layout):
    """A last stride other than 1 is answered as its copy is, or refused."""
    x = LAST_STRIDES[layout]()
    parameters = ((3, 3), (1, 1), (1, 1), (False, False), 1.0, True, "")
    dense = x.contiguous()
    out, lse = torch.ops.natten.na_fwd(dense, dense, dense, None, None, None, *parameters)
    grads = torch.ops.natten.na_bwd(dense, lse, dense, dense, dense, None, None, None, out, lse, *parameters)
    for q, k, v, dout in (
        (x, dense, dense, dense),
        (dense, x, dense, dense),
        (dense, dense, x, dense),
        (dense, dense, dense, x),
    ):
        try:
            got = torch.ops.natten.na_fwd(q, k, v, None, None, None, *parameters)
            got += torch.ops.natten.na_bwd(dout, lse, q, k, v, None, None, None, out, lse, *parameters)
        except (RuntimeError, ValueError) as error:
            assert "natten[invalid_argument]" in str(error)
        else:
            assert all(torch.equal(a, b) for a, b in zip(got, (out, lse, *grads)))


@pytest.mark.parametrize("plan", [None, "reference"])
@pytest.mark.parametrize("axis", range(5))
def test_axes_of_length_zero(axis, plan):
    """Any size may be zero: the answer is empty, or an error says what is missing."""
    shape = [2, 6, 7, 4, 8]
    shape[axis] = 0
    q, k, v = (torch.randn(shape).requires_grad_() for _ in range(3))
    try:
        out, lse = natten.na2d(q, k, v, 3, plan=plan, return_lse=True)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert out.shape == tuple(shape) and lse.shape == tuple(shape[:-1])
        (out.sum() + lse.sum()).backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))


def test_no_additional_keys_at_all():
    """n = 0 additional keys is the call without them."""
    q, k, v = tensors()
    none = torch.randn(1, 0, 2, 8)
    assert torch.equal(natten.na2d(q, k, v, 3, additional_keys=none, additional_values=none), natten.na2d(q, k, v, 3))


def test_huge_windows_and_dilations():
    """Numbers beyond 32 bits mean what they say or are refused; they never wrap around."""
    q, k, v = tensors()
    for arguments, same in (
        ({"kernel_size": HUGE}, {"kernel_size": (6, 7)}),
        ({"kernel_size": 3, "dilation": HUGE}, {"kernel_size": 1}),
        ({"kernel_size": 2**62}, {"kernel_size": (6, 7)}),
        ({"kernel_size": 2**31}, {"kernel_size": (6, 7)}),
    ):
        try:
            out = natten.na2d(q, k, v, **arguments)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            torch.testing.assert_close(out, natten.na2d(q, k, v, **same), rtol=0, atol=1e-6)
    for number in (2**63, 2**64 + 3, 10**30, -(2**63) - 1):
        for name in ("kernel_size", "dilation", "stride"):
            with pytest.raises((ValueError, OverflowError)):
                natten.na2d(q, k, v, **{"kernel_size": 3, name: number})


@pytest.mark.parametrize(
    "arguments", [{"kernel_size": HUGE}, {"dilation": HUGE}, {"kernel_size": HUGE, "stride": HUGE}], ids=str
)
def test_list_plans_does_not_wrap(arguments):
    """What the operator refuses or cuts is not listed as another, smaller problem."""
    arguments = {"kernel_size": 3, **arguments}
    q, k, v = tensors()
    try:
        natten.na2d(q, k, v, **arguments)
    except ValueError:
        refused(ValueError, lambda: natten.list_plans(q, k, v, **arguments))
    else:
        assert natten.list_plans(q, k, v, **arguments)


@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_huge_strides(name):
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, stride=HUGE))
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, **{name: -HUGE}))


@pytest.mark.parametrize("size", [2**31 + 1, 2**32 + 5, 2**40])
def test_huge_axes(size):
    """Tensors of one element, expanded: no such grid can be run, and 32 bits must not make a small one of it."""
    x = torch.zeros(1, 1, 1, 1).expand(1, size, 1, 1)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        natten.na1d(x, x, x, 3)
    x = torch.zeros(1, 1, 1, 1, 1).expand(1, size, size, 1, 1) if size < 2**31 + 2 else x.unsqueeze(1)
    with pytest.raises((ValueError, NotImplementedError, RuntimeError)):
        natten.na2d(x, x, x, 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_scales_that_are_no_number(number):
    """An answer, if a useless one, or an error."""
    try:
        out = natten.na2d(*tensors(), 3, scale=number)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert not out.isfinite().any()


@pytest.mark.parametrize("backend", ["cutlass", "triton", "", "CPU"])
def test_unknown_backends(backend):
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, backend=backend), match="reference")


@pytest.mark.parametrize("backend", ["cutlass-fna", "hopper-fna", "blackwell-fna", "portable", "sm90"])
def test_backends_that_cannot_run_on_cpu_tensors(backend):
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, backend=backend))
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, backend=backend, return_lse=True))


@pytest.mark.parametrize("plan", ["gpu", "cpu/walking", "referenc", "cpu/sliding-avx512/q9x9x9", "reference/x", "/"])
def test_unknown_plans(plan):
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, plan=plan))


@pytest.mark.parametrize("build", [
    lambda: natten.NeighborhoodAttention2D(10, 3, 3),
    lambda: natten.NeighborhoodAttention2D(8, 2, 0),
    lambda: natten.NeighborhoodAttention2D(8, 2, (3, 3, 3)),
    lambda: natten.NeighborhoodAttention2D(8, 0, 3),
])  # fmt: skip
def test_modules_refuse_to_be_built(build):
    refused(ValueError, build)


@pytest.mark.parametrize("shape", [(1, 6, 8), (1, 6, 7, 1, 8), (1, 6, 7, 9), (8,)], ids=str)
def test_modules_refuse_inputs(shape):
    module = natten.NeighborhoodAttention2D(8, 2, 3)
    refused(ValueError, lambda: module(torch.randn(shape)))


@pytest.mark.parametrize("arguments", [{"stride": 4}, {"dilation": 0}, {"stride": 0}], ids=str)
def test_modules_refuse_parameters(arguments):
    """At construction or at the first call."""
    refused(ValueError, lambda: natten.NeighborhoodAttention2D(8, 2, 3, **arguments)(torch.randn(1, 6, 7, 8)))


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 5, 2, 8), (1, 5, 2, 4), (1, 5, 2, 8)),
        ((1, 5, 3, 8), (1, 5, 2, 8), (1, 5, 2, 8)),
        ((1, 5, 2, 8), (1, 5, 2, 8), (1, 4, 2, 8)),
        ((1, 5, 8), (1, 5, 8), (1, 5, 8)),
        ((2, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8)),
    ],
    ids=str,
)
def test_attention_refuses(shapes):
    refused(ValueError, lambda: natten.attention(*map(torch.randn, shapes)))


def test_attention_refuses_mixed_types():
    q = torch.randn(1, 5, 2, 8)
    refused(ValueError, lambda: natten.attention(q, q.double(), q))
    refused(NotImplementedError, lambda: natten.attention(q.int(), q.int(), q.int()))


def test_threads_survive_errors():
    """After many errors the engine answers as before."""
    q, k, v = tensors()
    before = natten.na2d(q, k, v, 3)
    for _ in range(200):
        with pytest.raises(ValueError):
            natten.na2d(q, k, v, 3, stride=4)
    assert torch.equal(natten.na2d(q, k, v, 3), before)
    assert cases.plans_of(cases.Case((6, 7), 3), torch.float32)

# SPDX-License-Identifier: MIT
"""Bad input: the right exception with one sentence, or an answer; never a crash, never silence."""

import re

import cases
import pytest
import torch

import natten
from natten.functional import neighborhood_attention_generic

HUGE = 2**32 + 3  # as a 32-bit integer: 3


def tensors(q=(1, 6, 7, 4, 8), k=(1, 6, 7, 2, 8), v=(1, 6, 7, 2, 8), dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in (q, k, v)]


def assert_sentence(error):
    text = str(error.value)
    assert text and "\n" not in text and "natten[" not in text and len(text) < 500, text


def refused(kind, call, match=None):
    with pytest.raises(kind, match=match) as error:
        call()
    assert_sentence(error)


VALUES = {
    "kernel_size 0": dict(kernel_size=0),
    "kernel_size -2": dict(kernel_size=(3, -2)),
    "kernel_size of 1 axis": dict(kernel_size=(3,)),
    "kernel_size of 3 axes": dict(kernel_size=(3, 3, 3)),
    "kernel_size of none": dict(kernel_size=()),
    "dilation 0": dict(dilation=0),
    "dilation -1": dict(dilation=(1, -1)),
    "dilation of 3 axes": dict(dilation=(1, 1, 1)),
    "stride 0": dict(stride=0),
    "stride -1": dict(stride=(-1, 1)),
    "stride beyond kernel_size": dict(stride=4),
    "stride beyond kernel_size on one axis": dict(kernel_size=(5, 3), stride=(5, 4)),
    "stride of 1 axis": dict(stride=(1,)),
    "is_causal of 3 axes": dict(is_causal=(True, False, True)),
    "only additional keys": dict(additional_keys=torch.randn(1, 3, 2, 8)),
    "only additional values": dict(additional_values=torch.randn(1, 3, 2, 8)),
    "unknown oversize": dict(oversize="wrap"),
    "oversize": dict(kernel_size=5, dilation=2, oversize="error"),
    "kernel_size 1 where oversize is an error": dict(kernel_size=1, oversize="error"),
}
TYPES = {
    "kernel_size as text": dict(kernel_size="3"),
    "kernel_size as float": dict(kernel_size=3.0),
    "kernel_size with a float": dict(kernel_size=(3, 3.5)),
    "kernel_size None": dict(kernel_size=None),
    "kernel_size as bool": dict(kernel_size=True),
    "dilation as float": dict(dilation=1.0),
    "stride as text": dict(stride="1"),
    "is_causal as int": dict(is_causal=(1, 0)),
    "is_causal as text": dict(is_causal="yes"),
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    arguments = {"kernel_size": 3, **VALUES[name]}
    refused(ValueError, lambda: natten.na2d(*tensors(), **arguments))
    refused(ValueError, lambda: neighborhood_attention_generic(*tensors(), **arguments))


@pytest.mark.parametrize("name", TYPES)
def test_types(name):
    """The newest era has ValueError for a wrong type too."""
    arguments = {"kernel_size": 3, **TYPES[name]}
    refused(ValueError, lambda: natten.na2d(*tensors(), **arguments))


@pytest.mark.parametrize("scale", ["1", torch.ones(()), [1.0]], ids=str)
def test_scale_of_a_wrong_type(scale):
    with pytest.raises((TypeError, ValueError)):
        natten.na2d(*tensors(), 3, scale=scale)


SHAPES = {
    "batch of k": dict(k=(2, 6, 7, 2, 8)),
    "batch of v": dict(v=(2, 6, 7, 2, 8)),
    "grid of k": dict(k=(1, 6, 6, 2, 8)),
    "grid of v": dict(v=(1, 5, 7, 2, 8)),
    "grid of k and v": dict(k=(1, 6, 8, 2, 8), v=(1, 6, 8, 2, 8)),
    "head_dim of k": dict(k=(1, 6, 7, 2, 4), v=(1, 6, 7, 2, 4)),
    "heads of k": dict(k=(1, 6, 7, 4, 8)),
    "3 key heads for 4 heads": dict(k=(1, 6, 7, 3, 8), v=(1, 6, 7, 3, 8)),
    "more key heads than heads": dict(k=(1, 6, 7, 8, 8), v=(1, 6, 7, 8, 8)),
    "rank of q": dict(q=(6, 7, 4, 8)),
    "rank of k": dict(k=(6, 7, 2, 8)),
    "rank of v": dict(v=(1, 6, 7, 1, 2, 8)),
    "all of rank 4": dict(q=(1, 6, 4, 8), k=(1, 6, 2, 8), v=(1, 6, 2, 8)),
    "all of rank 6": dict(q=(1, 1, 6, 7, 4, 8), k=(1, 1, 6, 7, 2, 8), v=(1, 1, 6, 7, 2, 8)),
    "rank 0": dict(q=(), k=(), v=()),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    refused(ValueError, lambda: natten.na2d(*tensors(**SHAPES[name]), 3))


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 7, 8])
def test_ranks_of_the_generic_function(rank):
    q = torch.randn((2,) * rank)
    refused(ValueError, lambda: neighborhood_attention_generic(q, q, q, 1))


@pytest.mark.parametrize("shapes", [((2, 3, 2, 8), (2, 3, 2, 8)), ((1, 3, 2, 4), (1, 3, 2, 8)), ((1, 3, 2, 8), (1, 4, 2, 8)),
                                    ((1, 3, 4, 8), (1, 3, 4, 8)), ((1, 3, 2, 8), (1, 3, 2, 5)), ((3, 2, 8), (3, 2, 8))], ids=str)
def test_shapes_of_additional_keys(shapes):
    extra_k, extra_v = map(torch.randn, shapes)
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, additional_keys=extra_k, additional_values=extra_v))


@pytest.mark.parametrize("shape", [(2, 5, 5), (4, 5), (4, 3, 3), (4, 5, 9), (1, 5, 5), (4, 5, 5, 1), ()], ids=str)
def test_shapes_of_the_bias(shape):
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, rpb=torch.randn(shape)))


def test_an_oversize_message_names_axis_numbers_and_remedy():
    with pytest.raises(ValueError) as error:
        natten.na2d(*tensors(), (3, 5), dilation=(1, 2), oversize="error")
    text = str(error.value)
    for word in ("5", "2", "10", "7", "x"):
        assert re.search(rf"\b{word}\b", text), text
    assert "smaller" in text


@pytest.mark.parametrize("position", range(3))
@pytest.mark.parametrize("other", [torch.float64, torch.float16, torch.bfloat16, torch.int64], ids=str)
def test_mixed_types(position, other):
    mixed = tensors()
    mixed[position] = mixed[position].to(other)
    kind = NotImplementedError if other == torch.int64 and position == 0 else ValueError
    refused(kind, lambda: natten.na2d(*mixed, 3), match="float32|int64")


@pytest.mark.parametrize("which", ["additional_keys", "additional_values"])
def test_mixed_types_of_additional_keys(which):
    extra = {"additional_keys": torch.randn(1, 3, 2, 8), "additional_values": torch.randn(1, 3, 2, 8)}
    extra[which] = extra[which].double()
    refused(ValueError, lambda: natten.na2d(*tensors(), 3, **extra))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_types_without_an_engine(dtype):
    q, k, v = (torch.zeros(x.shape, dtype=dtype) for x in tensors())
    refused(NotImplementedError, lambda: natten.na2d(q, k, v, 3))


@pytest.mark.parametrize("position", range(3))
def test_mixed_devices(position):
    mixed = tensors()
    mixed[position] = mixed[position].to("meta")
    refused(ValueError, lambda: natten.na2d(*mixed, 3))


def test_meta_tensors_give_shapes():
    q, k, v = (x.to("meta") for x in tensors(v=(1, 6, 7, 2, 5)))
    out, lse = natten.na2d(q, k, v, 3, return_lse=True)
    assert out.is_meta and out.shape == (1, 6, 7, 4, 5) and lse.shape == (1, 6, 7, 4)


@pytest.mark.parametrize("position", range(3))
def test_sparse_and_nested_tensors(position):
    for convert in (lambda x: x.to_sparse(), lambda x: torch.nested.nested_tensor([x[0]])):
        mixed = tensors()
        mixed[position] = convert(mixed[position])
        refused(NotImplementedError, lambda mixed=mixed: natten.na2d(*mixed, 3))


@pytest.mark.parametrize("thing", [None, 1.0, "q", [[1.0]]], ids=str)
def test_things_that_are_no_tensors(thing):
    for position in range(3):
        mixed = tensors()
        mixed[position] = thing
        refused(TypeError, lambda mixed=mixed: natten.na2d(*mixed, 3))


@pytest.mark.parametrize("plan", ["", "reference", "cpu"])
def test_ops_check_for_themselves(plan):
    """Whoever calls the op below the Python function gets an error too: dtypes, sizes, parameters."""
    q, k, v = tensors(k=(1, 6, 7, 4, 8), v=(1, 6, 7, 4, 8))

    def fwd(q=q, k=k, v=v, bias=None, extra_k=None, extra_v=None, window=(3, 3), stride=(1, 1), dilation=(1, 1), causal=(False, False)):
        return torch.ops.natten.na_fwd(q, k, v, bias, extra_k, extra_v, window, stride, dilation, causal, 1.0, True, plan)

    out, lse = fwd()
    for arguments in (
        dict(k=k.double()),
        dict(v=v.half()),
        dict(k=k[:, :5]),
        dict(v=v[..., :3, :]),
        dict(k=k[..., :4]),
        dict(q=q[0]),
        dict(q=q.long(), k=k.long(), v=v.long()),
        dict(window=(3,)),
        dict(stride=(1, 1, 1)),
        dict(dilation=()),
        dict(causal=(True,)),
        dict(window=(-1, 3)),
        dict(window=(3, 0)),
        dict(stride=(4, 1)),
        dict(dilation=(0, 1)),
        dict(bias=torch.randn(4, 3, 5)),
        dict(bias=torch.randn(4, 5, 5).double()),
        dict(bias=torch.randn(3, 5, 5)),
        dict(extra_k=torch.randn(1, 3, 4, 8)),
        dict(extra_v=torch.randn(1, 3, 4, 8)),
        dict(extra_k=torch.randn(1, 3, 4, 8), extra_v=torch.randn(1, 2, 4, 8)),
        dict(extra_k=torch.randn(2, 3, 4, 8), extra_v=torch.randn(2, 3, 4, 8)),
        dict(window=(2**33, 3), stride=(2**33 + 1, 1)),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"natten\[(invalid_argument|unsupported)\]"):
            fwd(**arguments)

    def bwd(dout=out, dlse=lse, out=out, lse=lse):
        return torch.ops.natten.na_bwd(dout, dlse, q, k, v, None, None, None, out, lse, (3, 3), (1, 1), (1, 1), (False, False), 1.0, True, plan)

    bwd(dlse=None)
    for arguments in (
        dict(dout=out[:, :5]),
        dict(dout=out.double()),
        dict(dlse=lse.double()),
        dict(dlse=lse[..., :3]),
        dict(out=out[..., :4]),
        dict(out=out.half()),
        dict(lse=lse.half()),
        dict(lse=lse[:, :3]),
        dict(dout=out[0]),
    ):
        with pytest.raises((RuntimeError, ValueError), match=r"natten\[(invalid_argument|unsupported)\]"):
            bwd(**arguments)


@pytest.mark.parametrize("x", [torch.randn(1, 6, 7, 8, 2).transpose(-1, -2), torch.randn(1, 6, 7, 2, 16)[..., ::2],
                               torch.randn(1, 6, 7, 2, 1).expand(-1, -1, -1, -1, 8)], ids=["moved", "sliced", "expanded"])  # fmt: skip
def test_ops_and_last_strides(x):
    """A last stride other than 1 is answered as its copy is, or refused."""
    parameters = ((3, 3), (1, 1), (1, 1), (False, False), 1.0, True, "")
    dense = x.contiguous()
    out, lse = torch.ops.natten.na_fwd(dense, dense, dense, None, None, None, *parameters)
    grads = torch.ops.natten.na_bwd(dense, lse, dense, dense, dense, None, None, None, out, lse, *parameters)
    for q, k, v, dout in ((x, dense, dense, dense), (dense, x, dense, dense), (dense, dense, x, dense), (dense, dense, dense, x)):
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
    for arguments, same in ((dict(kernel_size=HUGE), dict(kernel_size=(6, 7))), (dict(kernel_size=3, dilation=HUGE), dict(kernel_size=1)),
                            (dict(kernel_size=2**62), dict(kernel_size=(6, 7))), (dict(kernel_size=2**31), dict(kernel_size=(6, 7)))):
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


@pytest.mark.parametrize("arguments", [dict(kernel_size=HUGE), dict(dilation=HUGE), dict(kernel_size=HUGE, stride=HUGE)], ids=str)
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
    """Tensors of one element, expanded: the grid cannot be run, and 32-bit arithmetic must not make a small one of it."""
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


@pytest.mark.parametrize("arguments", [dict(stride=4), dict(dilation=0), dict(stride=0)], ids=str)
def test_modules_refuse_parameters(arguments):
    """At construction or at the first call."""
    refused(ValueError, lambda: natten.NeighborhoodAttention2D(8, 2, 3, **arguments)(torch.randn(1, 6, 7, 8)))


@pytest.mark.parametrize("shapes", [((1, 5, 2, 8), (1, 5, 2, 4), (1, 5, 2, 8)), ((1, 5, 3, 8), (1, 5, 2, 8), (1, 5, 2, 8)),
                                    ((1, 5, 2, 8), (1, 5, 2, 8), (1, 4, 2, 8)), ((1, 5, 8), (1, 5, 8), (1, 5, 8)),
                                    ((2, 5, 2, 8), (1, 5, 2, 8), (1, 5, 2, 8))], ids=str)
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

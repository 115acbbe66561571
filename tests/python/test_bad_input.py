# SPDX-License-Identifier: MIT
"""Bad input: the right exception with one sentence, or an answer; never a crash, never silence."""

import re

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
    "kernel_size 0": {"kernel_size": 0},
    "kernel_size -2": {"kernel_size": (3, -2)},
    "kernel_size of 1 axis": {"kernel_size": (3,)},
    "kernel_size of 3 axes": {"kernel_size": (3, 3, 3)},
    "kernel_size of none": {"kernel_size": ()},
    "dilation 0": {"dilation": 0},
    "dilation -1": {"dilation": (1, -1)},
    "dilation of 3 axes": {"dilation": (1, 1, 1)},
    "stride 0": {"stride": 0},
    "stride -1": {"stride": (-1, 1)},
    "stride beyond kernel_size": {"stride": 4},
    "stride beyond kernel_size on one axis": {"kernel_size": (5, 3), "stride": (5, 4)},
    "stride of 1 axis": {"stride": (1,)},
    "is_causal of 3 axes": {"is_causal": (True, False, True)},
    "only additional keys": {"additional_keys": torch.randn(1, 3, 2, 8)},
    "only additional values": {"additional_values": torch.randn(1, 3, 2, 8)},
    "unknown oversize": {"oversize": "wrap"},
    "oversize": {"kernel_size": 5, "dilation": 2, "oversize": "error"},
    "kernel_size 1 where oversize is an error": {"kernel_size": 1, "oversize": "error"},
}
TYPES = {
    "kernel_size as text": {"kernel_size": "3"},
    "kernel_size as float": {"kernel_size": 3.0},
    "kernel_size with a float": {"kernel_size": (3, 3.5)},
    "kernel_size None": {"kernel_size": None},
    "kernel_size as bool": {"kernel_size": True},
    "dilation as float": {"dilation": 1.0},
    "stride as text": {"stride": "1"},
    "is_causal as int": {"is_causal": (1, 0)},
    "is_causal as text": {"is_causal": "yes"},
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
    "batch of k": {"k": (2, 6, 7, 2, 8)},
    "batch of v": {"v": (2, 6, 7, 2, 8)},
    "grid of k": {"k": (1, 6, 6, 2, 8)},
    "grid of v": {"v": (1, 5, 7, 2, 8)},
    "grid of k and v": {"k": (1, 6, 8, 2, 8), "v": (1, 6, 8, 2, 8)},
    "head_dim of k": {"k": (1, 6, 7, 2, 4), "v": (1, 6, 7, 2, 4)},
    "heads of k": {"k": (1, 6, 7, 4, 8)},
    "3 key heads for 4 heads": {"k": (1, 6, 7, 3, 8), "v": (1, 6, 7, 3, 8)},
    "more key heads than heads": {"k": (1, 6, 7, 8, 8), "v": (1, 6, 7, 8, 8)},
    "rank of q": {"q": (6, 7, 4, 8)},
    "rank of k": {"k": (6, 7, 2, 8)},
    "rank of v": {"v": (1, 6, 7, 1, 2, 8)},
    "all of rank 4": {"q": (1, 6, 4, 8), "k": (1, 6, 2, 8), "v": (1, 6, 2, 8)},
    "all of rank 6": {"q": (1, 1, 6, 7, 4, 8), "k": (1, 1, 6, 7, 2, 8), "v": (1, 1, 6, 7, 2, 8)},
    "rank 0": {"q": (), "k": (), "v": ()},
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name):
    refused(ValueError, lambda: natten.na2d(*tensors(**SHAPES[name]), 3))


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 7, 8])
def test_ranks_of_the_generic_function(rank):
    q = torch.randn((2,) * rank)
    refused(ValueError, lambda: neighborhood_attention_generic(q, q, q, 1))


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 2, 8), (2, 3, 2, 8)),
        ((1, 3, 2, 4), (1, 3, 2, 8)),
        ((1, 3, 2, 8), (1, 4, 2, 8)),
        ((1, 3, 4, 8), (1, 3, 4, 8)),
        ((1, 3, 2, 8), (1, 3, 2, 5)),
        ((3, 2, 8), (3, 2, 8)),
    ],
    ids=str,
)
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


@pytest.mark.parametrize(
    "dtype", [torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str
)
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

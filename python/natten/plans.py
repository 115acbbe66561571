# SPDX-License-Identifier: MIT
"""Which plans a problem has: the engines and kernels that could run it, as strings that `plan=` takes."""

from . import _arguments as args
from . import _library
from ._geometry import geometry_of


def list_plans(
    query,
    key,
    value,
    kernel_size,
    *,
    stride=1,
    dilation=1,
    is_causal=False,
    additional_keys=None,
    rpb=None,
    backward=False,
) -> list[str]:
    """The plans of a call, best first, on the device of `query`. Arguments are those of na1d, na2d and na3d; only the
    sizes and the dtype of tensors matter, so meta tensors will do and stand for the CPU. With `backward`, the plans of
    the backward pass.

    Raises ValueError for what is no problem at all, NotImplementedError for a dtype without an engine.
    """
    return _answer(query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, rpb, backward)["plans"]


def list_rejections(
    query,
    key,
    value,
    kernel_size,
    *,
    stride=1,
    dilation=1,
    is_causal=False,
    additional_keys=None,
    rpb=None,
    backward=False,
) -> dict[str, str]:
    """The kernels that cannot run a call, each with the first requirement that failed. Arguments as in `list_plans`."""
    answer = _answer(query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, rpb, backward)
    return {rejection["name"]: rejection["reason"] for rejection in answer["rejections"]}


def _answer(query, key, value, kernel_size, stride, dilation, is_causal, additional_keys, rpb, backward) -> dict:
    if query.dim() - 3 not in args.AXES:
        raise ValueError(
            f"query must be [batch, *grid, heads, head_dim] with a grid of 1 to 3 axes, got {query.dim()} dimensions"
        )
    axes = geometry_of(query.shape, kernel_size, stride, dilation, is_causal).axes
    num_extra = 0 if additional_keys is None else additional_keys.shape[1]
    numbers = query.shape[-2], key.shape[-2], query.shape[-1], value.shape[-1], num_extra, rpb is not None
    answer = _library.plans(backward, query.device, query.dtype, (query.shape[1:-2], *axes), numbers)
    if "error" in answer:
        raise ValueError(answer["error"])
    return answer

# SPDX-License-Identifier: MIT
"""Neighborhood attention with dropout on its probabilities, composed of torch ops.

The engines have no dropout yet, and a probability of dropout that is given must act. Correct for every parameter of the
operator and differentiable to any order; its memory is O(queries * keys of a window * head_dim).
"""

import torch

from ._errors import translated
from ._gather import gather, mix
from ._geometry import geometry_of


def attention_with_dropout(
    query,
    key,
    value,
    kernel_size,
    *,
    dropout_p,
    stride=1,
    dilation=1,
    is_causal=False,
    scale=None,
    rpb=None,
    additional_keys=None,
    additional_values=None,
    oversize="clamp",
):
    """As `natten.functional.neighborhood_attention_generic`, with dropout on the probabilities.

    Each is kept with probability 1 - dropout_p and then divided by it. `oversize` is "clamp" or "error": who wants
    "pad" pads beforehand.
    """
    options = geometry_of(query.shape, kernel_size, stride, dilation, is_causal, scale, oversize).options
    tensors = query, key, value, rpb, additional_keys, additional_values
    try:
        x = gather(*tensors, *options)
    except (RuntimeError, ValueError) as error:
        raise translated(error, query.device.type) from None
    out = mix(torch.nn.functional.dropout(x.p, dropout_p), x.v)
    return out.reshape(*query.shape[:-1], value.shape[-1]).to(query.dtype)

# SPDX-License-Identifier: MIT
"""Neighborhood attention as layers: projection to queries, keys and values, attention, projection back.

One class for every generation of checkpoints: parameters are `qkv.*`, `proj.*` and, with a relative position bias,
`rpb`.
"""

import torch
from torch import nn

from . import _arguments as args
from . import context
from .functional import neighborhood_attention_generic

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]


class _NeighborhoodAttention(nn.Module):
    """Multi-head neighborhood attention on [batch, {axes}, channels].

    Source: arXiv 2204.07143, section 3.1; dilation: arXiv 2209.15001; stride: arXiv 2504.16922.

    Args:
        embed_dim: channels of input and output; `dim`, as a keyword, means the same.
        num_heads: divides embed_dim.
        kernel_size: window, an integer for all axes or one per axis; -1 is the whole axis.
        stride, dilation, is_causal: as in `natten.functional.neighborhood_attention_generic`; None is 1, 1 and False.
        qkv_bias: whether the projection to queries, keys and values has a bias.
        qk_scale: factor of the logits; None is head_dim ** -0.5, 0.0 is zero.
        proj_drop: probability of dropout after the last projection.
        attn_drop: probability of dropout on the attention probabilities. In training it runs on a composed path that
            needs memory for every window.
        rel_pos_bias: learn a relative position bias `rpb` [num_heads, 2 * kernel_size - 1 per axis].
        bias: natten 0.14's name of rel_pos_bias; it also selects oversize="pad", which that version did.
        oversize: where kernel_size * dilation exceeds an axis: "clamp", "error" or "pad", which appends zeros to the
            *input*; None leaves it to `natten.context.set_oversize`, then to `bias`, then to "clamp".

    The order of positional arguments is that of natten 0.20 and later.

    Raises:
        TypeError: wrong types, missing embed_dim, num_heads or kernel_size.
        ValueError: embed_dim not a multiple of num_heads; in `forward` a wrong rank or number of channels.
    """

    rank: int

    def __init__(
        self,
        embed_dim=None,
        num_heads=None,
        kernel_size=None,
        stride=1,
        dilation=1,
        is_causal=False,
        qkv_bias=True,
        qk_scale=None,
        proj_drop=0.0,
        *,
        attn_drop=0.0,
        rel_pos_bias=None,
        bias=None,
        dim=None,
        oversize=None,
    ):
        super().__init__()
        embed_dim = self._one_of("embed_dim", embed_dim, "dim", dim)
        with_rpb = self._one_of("rel_pos_bias", rel_pos_bias, "bias", bias)
        for name, x in (("embed_dim", embed_dim), ("num_heads", num_heads), ("kernel_size", kernel_size)):
            if x is None:
                raise TypeError(f"{type(self).__name__} needs {name}")
        embed_dim, num_heads = args.integer("embed_dim", embed_dim), args.integer("num_heads", num_heads)
        if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim {embed_dim} must be a positive multiple of num_heads {num_heads}")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.kernel_size = tuple(args.integers("kernel_size", kernel_size, self.rank))
        self.stride = tuple(args.integers("stride", stride, self.rank))
        self.dilation = tuple(args.integers("dilation", dilation, self.rank))
        self.is_causal = tuple(args.booleans("is_causal", is_causal, self.rank))
        self._check_geometry()
        self.scale = args.scale_or_default(qk_scale, self.head_dim)
        self.oversize = context.check_oversize(oversize)
        self._default_oversize = "clamp" if bias is None else "pad"

        self.qkv = nn.Linear(embed_dim, 3 * embed_dim, bias=qkv_bias)
        if with_rpb:
            self.rpb = nn.Parameter(torch.zeros(num_heads, *self._bias_sizes()))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        else:
            self.register_parameter("rpb", None)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def _one_of(self, name, value, alias, alias_value):
        if value is not None and alias_value is not None:
            raise TypeError(f"{type(self).__name__} got both {name} and {alias}, which mean the same: give one of them")
        return alias_value if value is None else value

    def _check_geometry(self) -> None:
        """What the core would say of the first call, said by the constructor."""
        parameters = zip(args.AXES[self.rank], self.kernel_size, self.stride, self.dilation, strict=True)
        for axis, window, stride, dilation in parameters:
            if window < 1 and window != -1:
                raise ValueError(f"kernel_size is {window} on axis {axis}: give at least 1, or -1 for the whole axis")
            if stride < 1 or stride > window != -1:
                raise ValueError(f"stride {stride} on axis {axis} must be at least 1 and at most kernel_size {window}")
            if dilation < 1:
                raise ValueError(f"dilation {dilation} on axis {axis} must be at least 1")

    def _bias_sizes(self) -> list[int]:
        if -1 in self.kernel_size:
            raise ValueError(
                "a relative position bias needs kernel_size in numbers: -1 does not tell the size of its table"
            )
        return [2 * window - 1 for window in self.kernel_size]

    def _load_from_state_dict(self, state_dict, prefix, *others):
        # Checkpoints with a bias exist for code that does not ask for one: it was the default of natten 0.14.
        table = state_dict.get(prefix + "rpb")
        if self.rpb is None and table is not None and -1 not in self.kernel_size:
            self.rpb = nn.Parameter(torch.zeros(self.num_heads, *self._bias_sizes()).to(self.qkv.weight))
        super()._load_from_state_dict(state_dict, prefix, *others)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, *grid, embed_dim] -> the same shape."""
        args.dense_tensor("the input", x, type(self).__name__, ("batch", *args.AXES[self.rank], "channels"))
        if x.shape[-1] != self.embed_dim:
            raise ValueError(
                f"{type(self).__name__} expects {self.embed_dim} channels, got {x.shape[-1]}: {list(x.shape)}"
            )
        grid = x.shape[1:-1]
        oversize = context.resolve_oversize(self.oversize, self._default_oversize)
        if oversize == "pad":
            x = self._padded(x)
        # NOTE: views of one packed tensor: the engines read them in place. Not by unflatten, which Dynamo of torch 2.11
        # cannot trace under torch.set_default_device.
        q, k, v = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, self.head_dim).unbind(-3)
        out = self._attend(q, k, v, oversize).flatten(-2)
        for i, n in enumerate(grid):
            if out.shape[i + 1] != n:
                out = out.narrow(i + 1, 0, n)
        return self.proj_drop(self.proj(out))

    def _attend(self, q, k, v, oversize):
        options = {"stride": self.stride, "dilation": self.dilation, "is_causal": self.is_causal, "scale": self.scale}
        options |= {"rpb": self.rpb, "oversize": "clamp" if oversize == "pad" else oversize}
        if self.training and self.attn_drop.p > 0:
            options["attn_drop"] = self.attn_drop.p
        return neighborhood_attention_generic(q, k, v, self.kernel_size, **options)

    def _padded(self, x):
        """Zeros on the far side of every axis that is shorter than its window, before the projection: what is appended
        has the projection's bias as query, key and value, and is attended, as in natten 0.14."""
        amounts = [0, 0]
        for n, window, dilation in zip(x.shape[-2:0:-1], self.kernel_size[::-1], self.dilation[::-1], strict=True):
            amounts += [0, max(0, window * dilation - n)]
        return nn.functional.pad(x, amounts) if any(amounts) else x

    def extra_repr(self) -> str:
        parts = [f"embed_dim={self.embed_dim}", f"num_heads={self.num_heads}", f"kernel_size={self.kernel_size}"]
        parts += [f"stride={self.stride}", f"dilation={self.dilation}", f"is_causal={self.is_causal}"]
        parts += [f"rel_pos_bias={self.rpb is not None}"]
        return ", ".join(parts)


class NeighborhoodAttention1D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__.format(axes="x")
    rank = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__.format(axes="y, x")
    rank = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    __doc__ = _NeighborhoodAttention.__doc__.format(axes="z, y, x")
    rank = 3

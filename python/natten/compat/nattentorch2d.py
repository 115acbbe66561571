# SPDX-License-Identifier: MIT
"""Eras 0.11 to 0.14: neighborhood attention on a plane in torch ops alone. Needs no library, no GPU, nothing compiled.

Sliding views of all full windows, the outer ones repeated for the queries near the border: these see the nearest full
window, which is what the operator means. It is a layer of its own, not the operator of neighborhood.h.
"""

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.functional import unfold as unfold_channels


class LegacyNeighborhoodAttention2D(nn.Module):
    """Neighborhood attention on [batch, y, x, channels], with a relative position bias.

    Args:
        dim, kernel_size, num_heads, qkv_bias, qk_scale, attn_drop, proj_drop: as in `natten.nattencuda2d`.
        mode: how windows are made, 0 by Tensor.unfold and 1 by torch.nn.functional.unfold; both give the same.

    An input that is shorter than the window is padded with zeros on its far sides, which are attended, and cropped.
    """

    def __init__(
        self,
        dim,
        kernel_size,
        num_heads,
        qkv_bias=True,
        qk_scale=None,
        attn_drop=0.0,
        proj_drop=0.0,
        mode=1,
    ):
        super().__init__()
        assert kernel_size > 1 and kernel_size % 2 == 1, (
            f"kernel_size must be odd and greater than 1, got {kernel_size}"
        )
        assert mode in (0, 1), f"mode must be 0 or 1, got {mode}"
        self.num_heads, self.head_dim, self.kernel_size, self.mode = num_heads, dim // num_heads, kernel_size, mode
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.rpb = nn.Parameter(torch.zeros(num_heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
        nn.init.trunc_normal_(self.rpb, std=0.02)
        self.attn_drop, self.proj, self.proj_drop = nn.Dropout(attn_drop), nn.Linear(dim, dim), nn.Dropout(proj_drop)

    def forward(self, x):
        """[batch, y, x, dim] -> the same shape."""
        batch, height, width, dim = x.shape
        k = self.kernel_size
        if height < k or width < k:
            x = pad(x, (0, 0, 0, max(0, k - width), 0, max(0, k - height)))
        grid = x.shape[1:3]
        qkv = self.qkv(x).reshape(batch, *grid, 3, self.num_heads, self.head_dim).permute(3, 0, 4, 5, 1, 2)
        q = qkv[0].permute(0, 1, 3, 4, 2)[..., None, :] * self.scale  # [batch, heads, y, x, 1, head_dim]
        keys, values = self._windows(qkv[1]), self._windows(qkv[2])  # [batch, heads, y, x, k * k, head_dim]
        attn = (q @ keys.transpose(-1, -2)).squeeze(-2) + self._bias(*grid)
        attn = self.attn_drop(attn.softmax(-1))
        out = (attn[..., None, :] @ values).squeeze(-2)
        out = out.permute(0, 2, 3, 1, 4).reshape(batch, *grid, dim)[:, :height, :width]
        return self.proj_drop(self.proj(out))

    def _windows(self, x):
        """[batch, heads, head_dim, y, x] -> the window of every query."""
        batch, heads, head_dim, height, width = x.shape
        k, full = self.kernel_size, (height - self.kernel_size + 1, width - self.kernel_size + 1)
        if self.mode == 0:
            views = x.unfold(3, k, 1).unfold(4, k, 1).permute(0, 1, 5, 6, 2, 3, 4)
        else:
            views = unfold_channels(x.flatten(1, 2), k).reshape(batch, heads, head_dim, k, k, *full)
            views = views.permute(0, 1, 3, 4, 2, 5, 6)
        views = views.reshape(batch, heads * k * k * head_dim, *full)
        views = pad(views, ((k - 1) // 2,) * 4, mode="replicate")
        return views.reshape(batch, heads, k * k, head_dim, height, width).permute(0, 1, 4, 5, 2, 3)

    def _bias(self, height, width):
        """[heads, y, x, k * k], at key - query + kernel_size - 1 on each axis."""
        y, x = (self._bias_index(n) for n in (height, width))
        return self.rpb[:, y[:, None, :, None], x[None, :, None, :]].flatten(-2)

    def _bias_index(self, extent):
        k, device = self.kernel_size, self.rpb.device
        first = torch.arange(extent - k + 1, dtype=torch.float64, device=device)[None, None]
        first = pad(first, ((k - 1) // 2,) * 2, mode="replicate")[0, 0].long()
        return (first - torch.arange(extent, device=device) + k - 1)[:, None] + torch.arange(k, device=device)

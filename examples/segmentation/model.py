# SPDX-License-Identifier: MIT
"""A small neighborhood-attention transformer that gives every pixel a class.

    image [B, 3, 224, 224] -> two convolutions -> grid [B, 56, 56, dim] -> blocks -> logits [B, classes, 224, 224]

Only the attention looks further than the 7x7 pixels that make a token: the same network with window 1 shows what it is
worth.
"""

from collections.abc import Sequence

import torch
from torch import nn

from natten import NeighborhoodAttention2D

PATCH = 4
HEAD_DIM = 32


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual; [B, y, x, dim] in and out."""

    def __init__(self, dim: int, kernel_size: int, dilation: int, mlp_ratio: int = 1) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = NeighborhoodAttention2D(
            dim, num_heads=dim // HEAD_DIM, kernel_size=kernel_size, dilation=dilation, rel_pos_bias=True
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class Segmenter(nn.Module):
    """One block per dilation."""

    def __init__(self, classes: int, dim: int = 64, kernel_size: int = 7, dilations: Sequence[int] = (1, 2, 1, 8)):
        super().__init__()
        if dim % HEAD_DIM:
            raise ValueError(f"dim {dim} is no multiple of {HEAD_DIM}, the size of a head")
        # Two convolutions of stride 2, as in NAT: they tell textures apart better than one cut into patches does.
        self.embed = nn.Sequential(
            nn.Conv2d(3, dim // 2, 3, 2, 1), nn.GELU(), nn.Conv2d(dim // 2, dim, 3, PATCH // 2, 1)
        )
        self.blocks = nn.ModuleList(Block(dim, kernel_size, dilation) for dilation in dilations)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes * PATCH * PATCH)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).permute(0, 2, 3, 1)
        for block in self.blocks:
            tokens = block(tokens)
        logits = self.head(self.norm(tokens)).permute(0, 3, 1, 2)
        return nn.functional.pixel_shuffle(logits, PATCH)

# SPDX-License-Identifier: MIT
"""Era 0.21: tokens of a grid in the order of tiles, as kernels that cannot read a grid want them. Ours can, so this is
for code that calls it itself; composed of torch ops, on any device, differentiable.
"""

import math

from torch.nn.functional import pad

from ._arguments import integers

__all__ = ["token_permute_operation", "token_unpermute_operation"]


def _plan(grid, tile_shape, dilation):
    """(tile, dilation, padded grid, tiles along each axis of a dilation group)."""
    rank = len(grid)
    tile, dilation = integers("tile_shape", tile_shape, rank), integers("dilation", dilation, rank)
    if min(tile + dilation) < 1:
        raise ValueError(f"tile_shape {tile} and dilation {dilation} must be at least 1")
    steps = [t * d for t, d in zip(tile, dilation)]
    padded = [-(-n // step) * step for n, step in zip(grid, steps)]
    return tile, dilation, padded, [n // step for n, step in zip(padded, steps)]


def _order(rank, flip_tiled_dims):
    """Axes of [batch, (tiles, tile, dilation) per axis, heads, head_dim] as [batch, dilations, tiles, tile, ...]."""
    axes = list(range(rank))[:: -1 if flip_tiled_dims else 1]
    tiles, inside, groups = ([part + 3 * i for i in axes] for part in (1, 2, 3))
    return [0, *groups, *tiles, *inside, 1 + 3 * rank, 2 + 3 * rank]


def token_permute_operation(tensor, tile_shape, dilation=None, flip_tiled_dims=True, use_torch=None):
    """[batch, *grid, heads, head_dim] -> ([batch * prod(dilation), tokens, heads, head_dim], *two layouts).

    Each axis is padded with zeros to a multiple of tile * dilation; dilation groups go to the batch; then come the
    tiles, and in each its tokens, all row-major, or with `flip_tiled_dims` with the first axis fastest.

    Returns the tokens, the grid as it was, and the padded grid of one dilation group.
    """
    grid = tuple(tensor.shape[1:-2])
    rank = len(grid)
    tile, dilation, padded, tiles = _plan(grid, tile_shape, dilation)
    amounts = [0, 0, 0, 0]
    for n, whole in zip(reversed(grid), reversed(padded)):
        amounts += [0, whole - n]
    x = pad(tensor, amounts) if any(amounts) else tensor
    split = [size for sizes in zip(tiles, tile, dilation) for size in sizes]
    x = x.reshape(x.shape[0], *split, *x.shape[-2:]).permute(_order(rank, flip_tiled_dims))
    tokens = x.reshape(tensor.shape[0] * math.prod(dilation), math.prod(tiles) * math.prod(tile), *tensor.shape[-2:])
    return tokens, grid, tuple(n // d for n, d in zip(padded, dilation))


def token_unpermute_operation(
    tensor, token_layout_shape, tile_shape, dilation=None, flip_tiled_dims=True, use_torch=None
):
    """What `token_permute_operation` did, undone; `token_layout_shape` is the grid as it was."""
    grid = tuple(token_layout_shape)
    rank = len(grid)
    tile, dilation, padded, tiles = _plan(grid, tile_shape, dilation)
    order = _order(rank, flip_tiled_dims)
    batch = tensor.shape[0] // math.prod(dilation)
    split = [batch, *(size for sizes in zip(tiles, tile, dilation) for size in sizes), *tensor.shape[-2:]]
    x = tensor.reshape([split[i] for i in order]).permute([order.index(i) for i in range(len(order))])
    x = x.reshape(batch, *padded, *tensor.shape[-2:])
    for axis, n in enumerate(grid, 1):
        x = x.narrow(axis, 0, n)
    return x

# SPDX-License-Identifier: MIT
"""natten.viz: the weights of one query, applied to the values, are that query's output."""

import pytest
import torch

import natten
from natten import viz

PROBLEMS = [
    ((11,), {"kernel_size": 4, "stride": 2}),
    ((9, 12), {"kernel_size": (3, 5), "dilation": (2, 1), "is_causal": (False, True)}),
    ((9, 12), {"kernel_size": 7, "dilation": 2}),  # windows that the dilation groups cannot fill
    ((4, 5, 6), {"kernel_size": (3, 2, 3), "scale": 0.5}),
]


@pytest.mark.parametrize(("grid", "geometry"), PROBLEMS)
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_weights_give_the_output(grid, geometry, heads_kv):
    q = torch.randn(2, *grid, 4, 8)
    k, v = torch.randn(2, 2, *grid, heads_kv, 8)
    out = natten.functional.neighborhood_attention_generic(q, k, v, **geometry)
    values = v.repeat_interleave(4 // heads_kv, -2)
    for index in [(0,) * len(grid), tuple(n // 2 for n in grid), tuple(n - 1 for n in grid)]:
        window = viz.query_window(q, k, index, **geometry)
        seen = values[(slice(None), *window.keys.unbind(-1))]
        expected = torch.einsum("bhw,bwhd->bhd", window.weights, seen)
        torch.testing.assert_close(expected, out[(slice(None), *index)], rtol=1e-5, atol=1e-5)


def test_layer_window():
    layer = natten.NeighborhoodAttention2D(16, num_heads=2, kernel_size=5, dilation=2, rel_pos_bias=True)
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(1, 12, 13, 16)
    window = viz.layer_window(layer, x, (1, 7))
    assert window.keys.shape == (25, 2)
    assert window.weights.shape == (1, 2, 25)
    assert window.keys[:5].tolist() == [[1, x] for x in (3, 5, 7, 9, 11)]
    values = layer.qkv(x)[0, ..., 32:].unflatten(-1, (2, 8))[window.keys[:, 0], window.keys[:, 1]]
    mixed = torch.einsum("hw,whd->hd", window.weights[0], values).flatten()
    torch.testing.assert_close(layer.proj(mixed), layer(x)[0, 1, 7], rtol=1e-5, atol=1e-5)


def test_layer_window_where_the_layer_pads():
    layer = natten.NeighborhoodAttention1D(8, num_heads=1, kernel_size=5, bias=True)  # natten 0.14's spelling
    window = viz.layer_window(layer, torch.randn(1, 3, 8), (0,))
    assert window.keys.flatten().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("index", [(3, 12), (-1, 0)])
def test_index_outside_the_grid(index):
    q = torch.randn(1, 9, 12, 1, 4)
    with pytest.raises(ValueError, match="on axis"):
        viz.query_window(q, q, index, 3)

# SPDX-License-Identifier: MIT
"""The reference itself: golden windows, sums done by hand, torch's own attention. Nothing of the package is used."""

import math

import dense
import pytest
import torch

# (extent, window, dilation, stride, causal): first and last key of every query, from the published formulas.
GOLDEN = {
    (10, 4, 1, 1, False): "(0,3)(0,3)(0,3)(1,4)(2,5)(3,6)(4,7)(5,8)(6,9)(6,9)",
    (10, 5, 1, 1, False): "(0,4)(0,4)(0,4)(1,5)(2,6)(3,7)(4,8)(5,9)(5,9)(5,9)",
    (11, 3, 2, 1, False): "(0,4)(1,5)(0,4)(1,5)(2,6)(3,7)(4,8)(5,9)(6,10)(5,9)(6,10)",
    (10, 3, 1, 1, True): "(0,0)(0,1)(0,2)(1,3)(2,4)(3,5)(4,6)(5,7)(6,8)(7,9)",
    (12, 5, 1, 4, False): "(0,4)(0,4)(0,4)(0,4)(4,8)(4,8)(4,8)(4,8)(7,11)(7,11)(7,11)(7,11)",
    (12, 6, 1, 3, False): "(0,5)(0,5)(0,5)(1,6)(1,6)(1,6)(4,9)(4,9)(4,9)(6,11)(6,11)(6,11)",
    (10, 4, 1, 2, True): "(0,0)(0,1)(0,2)(0,3)(2,4)(2,5)(4,6)(4,7)(6,8)(6,9)",
    (13, 3, 2, 2, False): "(0,4)(1,5)(0,4)(1,5)(4,8)(5,9)(4,8)(5,9)(8,12)(7,11)(8,12)(7,11)(8,12)",
    (13, 3, 3, 1, True): "(0,0)(1,1)(2,2)(0,3)(1,4)(2,5)(0,6)(1,7)(2,8)(3,9)(4,10)(5,11)(6,12)",
}


def keys_of(sees, query):
    return sees[query].nonzero().flatten().tolist()


@pytest.mark.parametrize("axis", GOLDEN, ids=str)
def test_golden_windows(axis):
    extent, window, dilation, stride, causal = axis
    sees, offset = dense.axis_table(extent, window, stride, dilation, causal)
    text = ""
    for query in range(extent):
        keys = keys_of(sees, query)
        assert keys == list(range(keys[0], keys[-1] + 1, dilation))
        assert [int(offset[query, key]) for key in keys] == [(key - query) // dilation + window - 1 for key in keys]
        text += f"({keys[0]},{keys[-1]})"
    assert text == GOLDEN[axis]


def test_windows_that_are_too_large_are_cut_per_dilation_group():
    sees, offset = dense.axis_table(7, 4, 2, 2, False)  # groups 0 2 4 6 and 1 3 5
    assert [keys_of(sees, query) for query in range(7)] == [[0, 2, 4, 6], [1, 3, 5]] * 3 + [[0, 2, 4, 6]]
    assert int(offset[0, 6]) == 3 + 4 - 1  # with the window as given, 4, also where the group holds 3
    assert int(offset[1, 5]) == 2 + 4 - 1
    sees, _ = dense.axis_table(3, 9, 5, 1, True)
    assert [keys_of(sees, query) for query in range(3)] == [[0], [0, 1], [0, 1, 2]]
    sees, _ = dense.axis_table(4, 2, 1, 9, False)
    assert torch.equal(sees, torch.eye(4, dtype=torch.bool))


def test_axes_of_a_grid_are_a_product():
    mask = dense.window_mask((3, 4), (3, 2), (1, 1), (1, 2), (True, False))
    for query in range(12):
        rows = range(query // 4 + 1)
        columns = [c for c in range(4) if c % 2 == query % 2]
        assert keys_of(mask, query) == [4 * r + c for r in rows for c in columns]


def test_sums_by_hand():
    one = torch.ones(1, 3, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, math.log(2), math.log(3)], dtype=torch.float64).view(1, 3, 1, 1)
    v = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64).view(1, 3, 1, 1)
    out, lse = dense.attention(one, k, v, (2,), (1,), (1,), (False,), 1.0)  # windows 01, 01, 12
    expected = [50 / 3, 50 / 3, (2 * 20 + 3 * 30) / 5]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(lse.flatten(), torch.tensor([3.0, 3.0, 5.0], dtype=torch.float64).log())
    bias = torch.tensor([[0.0, math.log(4), math.log(5)]], dtype=torch.float64)  # key - query = -1, 0, 1
    out, _ = dense.attention(one, k, v, (2,), (1,), (1,), (False,), 1.0, bias=bias)
    expected = [(4 * 10 + 10 * 20) / 14, (1 * 10 + 8 * 20) / 9, (2 * 20 + 12 * 30) / 14]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    extra_k, extra_v = k[:, 2:], v[:, 2:] * 10
    out, lse = dense.attention(one, k, v, (2,), (1,), (1,), (False,), 1.0, extra_k=extra_k, extra_v=extra_v)
    expected = [(10 + 40 + 900) / 6, (10 + 40 + 900) / 6, (40 + 90 + 900) / 8]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(lse.flatten(), torch.tensor([6.0, 6.0, 8.0], dtype=torch.float64).log())


def test_rows_without_keys():
    q = torch.randn(1, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, False], [False] * 3, [True, True, False]])
    out, lse = dense.attention(q, q, q, (3,), (1,), (1,), (False,), 1.0, mask=mask)
    assert lse[0, 1, 0] == -math.inf and not out[0, 1].any()
    (out.sum() + lse[:, ::2].sum()).backward()
    assert q.grad.isfinite().all() and not q.grad[0, 2].isnan().any()


@pytest.mark.parametrize("causal", [False, True])
def test_against_torch(causal):
    torch.manual_seed(0)
    q = torch.randn(2, 9, 4, 5, dtype=torch.float64)
    k = torch.randn(2, 9, 2, 5, dtype=torch.float64)
    v = torch.randn(2, 9, 2, 3, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True, scale=0.3
    ).transpose(1, 2)
    out, lse = dense.attention(q, k, v, (9,), (1,), (1,), (causal,), 0.3)
    torch.testing.assert_close(out, expected)
    other, other_lse = dense.full_attention(q, k, v, 0.3, causal)
    torch.testing.assert_close(other, expected)
    torch.testing.assert_close(lse, other_lse)


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    shapes = [(1, 3, 4, 2, 2), (1, 3, 4, 1, 2), (1, 3, 4, 1, 3), (2, 3, 5), (1, 2, 1, 2), (1, 2, 1, 3)]
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def function(q, k, v, bias, extra_k, extra_v):
        axes = (2, 3), (1, 2), (1, 1), (True, False)
        return dense.attention(q, k, v, *axes, 0.7, bias=bias, extra_k=extra_k, extra_v=extra_v)

    assert torch.autograd.gradcheck(function, tensors)

# SPDX-License-Identifier: MIT
"""A few small problems under whatever torch runs this, forward and backward, against dense attention.

Run by tools/abi_matrix.sh. The masks are written out here by hand, so that nothing of natten checks natten.
"""

import sys

import torch

import natten


def visible(extent: int, window: int, dilation: int, causal: bool) -> torch.Tensor:
    """[extent, extent]: may query i see key j? By counting, not by formula: the `window` nearest keys of i's group."""
    mask = torch.zeros(extent, extent, dtype=torch.bool)
    for i in range(extent):
        group = [j for j in range(extent) if j % dilation == i % dilation and not (causal and j > i)]
        # An even window reaches further to the left: of two equally near keys the left one counts as nearer.
        nearest = sorted(group, key=lambda j: (abs(j - i), j))[:window]
        mask[i, nearest] = True
    return mask


def dense(q, k, v, mask):
    """[batch, tokens, heads, dim] attention with lse, in the inputs' dtype."""
    logits = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    logits = logits.masked_fill(~mask, float("-inf"))
    return torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v), logits.logsumexp(-1).transpose(1, 2)


def check(grid, window, dilation, causal, dtype) -> None:
    torch.manual_seed(0)
    mask = torch.ones(1, 1, dtype=torch.bool)
    for n, w, d, c in zip(grid, window, dilation, causal, strict=True):
        mask = torch.kron(mask.int(), visible(n, w, d, c).int()).bool()
    q, k, v = (torch.randn(2, *grid, 3, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    attend = (natten.na1d, natten.na2d, natten.na3d)[len(grid) - 1]
    out, lse = attend(q, k, v, window, dilation=dilation, is_causal=causal, return_lse=True)
    flat = [t.flatten(1, len(grid)) for t in (q, k, v)]
    want_out, want_lse = dense(*flat, mask)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    got = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    d_flat = (dout.flatten(1, len(grid)), dlse.flatten(1, len(grid)))
    want = torch.autograd.grad((want_out, want_lse), (q, k, v), d_flat)
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(out.flatten(1, len(grid)), want_out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.flatten(1, len(grid)), want_lse, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def main() -> None:
    for dtype in (torch.float32, torch.float64):
        check((23,), (5,), (2,), (False,), dtype)
        check((9, 14), (3, 4), (1, 2), (False, True), dtype)
        check((4, 6, 7), (3, 3, 5), (1, 2, 1), (True, False, False), dtype)
    try:
        natten.na1d(*torch.randn(3, 1, 8, 1, 4), 0)
    except ValueError:
        pass
    else:
        sys.exit("window 0 was accepted")
    version = ".".join(map(str, sys.version_info[:2]))
    print(f"OK: natten {natten.__version__}, torch {torch.__version__}, Python {version}")


if __name__ == "__main__":
    main()

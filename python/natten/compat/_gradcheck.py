# SPDX-License-Identifier: MIT
"""Era 0.13: what gradcheck1d and gradcheck2d share. On the GPU if there is an engine for it, else on the CPU."""

import argparse
import sys
import warnings

import torch
from torch.autograd import gradcheck

from .legacy_context import has_cuda
from .legacy_functional import NATTEN1DAVFunction, NATTEN1DQKRPBFunction, NATTENAVFunction, NATTENQKRPBFunction

_FUNCTIONS = {1: (NATTEN1DQKRPBFunction, NATTEN1DAVFunction), 2: (NATTENQKRPBFunction, NATTENAVFunction)}
# Steps and tolerances of the original; a half type cannot take a smaller step.
_CHECKS = {
    torch.float64: {"eps": 1e-6, "atol": 1e-5, "rtol": 1e-3, "nondet_tol": 1e-8},
    torch.float16: {"eps": 0.5, "atol": 0.5, "rtol": 1e-1, "nondet_tol": 0.5},
}


def _arguments(rank: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=f"Checks the gradients of the unfused operators, rank {rank}.")
    parser.add_argument("-b", "--batch-size", type=int, default=1)
    parser.add_argument("-n", "--heads", type=int, default=2)
    parser.add_argument("-x", type=int, default=14, help="tokens along the first axis")
    if rank == 2:
        parser.add_argument("-y", type=int, default=14, help="tokens along the second axis")
    parser.add_argument("-d", "--dim", type=int, default=8 if rank == 1 else 32, help="channels of a head")
    parser.add_argument("-k", "--kernel-size", type=int, default=7)
    parser.add_argument("--dilation", type=int, default=1)
    parser.add_argument("--slow", action="store_true", help="every entry of the Jacobian, not random directions")
    return parser.parse_args()


def main(rank: int) -> None:
    given = _arguments(rank)
    grid = (given.x, given.y) if rank == 2 else (given.x,)
    device = "cuda" if has_cuda() else "cpu"
    qk, av = _FUNCTIONS[rank]
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="Input #")  # float16 is what is asked for
    rows, k = (given.batch_size, given.heads, *grid, given.dim), given.kernel_size
    inputs = {
        "QK + RPB": (qk, [rows, rows, (given.heads, *[2 * k - 1] * rank)]),
        "AV": (av, [(*rows[:-1], k**rank), rows]),
    }
    failures = 0
    for dtype, options in _CHECKS.items():
        for name, (function, shapes) in inputs.items():
            tensors = [torch.randn(s, dtype=torch.float64, device=device).to(dtype).requires_grad_() for s in shapes]
            passed = gradcheck(
                lambda *x, function=function: function.apply(*x, given.dilation),
                tensors,
                fast_mode=not given.slow,
                raise_exception=False,
                **options,
            )
            failures += not passed
            print(f"{name:<9}{str(dtype).removeprefix('torch.'):<9}{device}: {'passed' if passed else 'FAILED'}")
    sys.exit(1 if failures else 0)

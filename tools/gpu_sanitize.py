# SPDX-License-Identifier: MIT
"""Runs every plan of a few problems, and the unfused operators, on the GPU while compute-sanitizer watches.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tools/gpu_sanitize.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests/python"))
import cases  # noqa: E402
from cases import Case  # noqa: E402

PROBLEMS = [
    Case((19,), 5, dilation=3, causal=True, heads=2, head_dim=8, extra=2, bias=True),
    Case((9, 20), (3, 4), dilation=(1, 2), batch=2, heads=4, heads_kv=2, head_dim=32, extra=3, bias=True),
    Case((14, 14), 7, heads=2, head_dim=32, batch=2),
    Case((17, 23), (7, 5), stride=(2, 3), heads=2, head_dim=64, head_dim_v=32),
    Case((20, 17), 13, dilation=(2, 1), heads=1, head_dim=48, bias=True),
    Case((3, 6, 10), (2, 3, 5), causal=(False, True, False), heads=2, head_dim=20, head_dim_v=12),
    Case((4, 5), 9, heads=1, head_dim=128),
]


def call_unfused(case, inputs):
    out, lse, _ = cases.call(case, inputs, return_lse=True, return_weights=True)
    return out, lse


def main() -> None:
    runs = 0
    torch.set_default_device("cuda")
    for case in PROBLEMS:
        for dtype in cases.DTYPES:
            inputs = cases.make_inputs(case, dtype)
            for plan in cases.plans_of(case, dtype):
                results = cases.results(case, inputs, plan)
                assert all(x.isfinite().all() for x in results.values()), f"{case} {dtype} {plan}"
                runs += 1
            results = cases.results_of(lambda x, case=case: call_unfused(case, x), inputs)
            assert all(x.isfinite().all() for x in results.values()), f"{case} {dtype} unfused"
            runs += 1
    torch.cuda.synchronize()
    print(f"{runs} runs")


if __name__ == "__main__":
    main()

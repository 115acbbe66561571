# SPDX-License-Identifier: MIT
"""What a call costs before it computes anything: microseconds on tensors so small that the kernel hardly counts.

    python bench/overhead.py [--out bench/results/overhead.json]

Processor time of the calling thread, the best of many rounds, one thread; torch's own attention on the same tensors
stands beside, as a measure of the machine. The import is timed in fresh processes, after `import torch`.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import natten

ROOT = Path(__file__).resolve().parent.parent
SHAPE = (1, 2, 2, 1, 8)  # [batch, y, x, heads, head_dim]
KERNEL_SIZE = 2
ROUNDS, CALLS = 40, 500
IMPORT = "import torch, time; t = time.perf_counter(); import natten; print(time.perf_counter() - t)"


def microseconds(mode, function) -> float:
    best = float("inf")
    with mode():
        for _ in range(ROUNDS):
            begin = time.thread_time()
            for _ in range(CALLS):
                function()
            best = min(best, (time.thread_time() - begin) / CALLS)
    return best * 1e6


def import_milliseconds() -> float:
    command = [sys.executable, "-c", IMPORT]
    runs = [subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT) for _ in range(5)]
    return min(float(run.stdout) for run in runs) * 1e3


def calls(attend, *tensors):
    """(name, mode, function) of what is timed of one attention function."""
    leaves = [x.clone().requires_grad_() for x in tensors]

    def backward():
        torch.autograd.grad(attend(*leaves).sum(), leaves)

    yield "inference_mode", torch.inference_mode, lambda: attend(*tensors)
    yield "no_grad", torch.no_grad, lambda: attend(*tensors)
    yield "forward that records", torch.enable_grad, lambda: attend(*leaves)
    yield "forward, sum, backward", torch.enable_grad, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "overhead.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    q, k, v = (torch.randn(SHAPE) for _ in range(3))
    flat = [x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)]
    ours = calls(lambda q, k, v: natten.na2d(q, k, v, KERNEL_SIZE), q, k, v)
    limits = {"inference_mode": 12.0, "forward that records": 40.0}
    rows = [
        {"name": name, "us": microseconds(*call), "sdpa_us": microseconds(*other), "must_us": limits.get(name)}
        for (name, *call), (_, *other) in zip(ours, calls(F.scaled_dot_product_attention, *flat), strict=True)
    ]
    table = Table("call", "na2d, us", "SDPA, us", "at most", title="cost of a call")
    for row in rows:
        must = "" if row["must_us"] is None else f"{row['must_us']:.0f}"
        table.add_row(row["name"], f"{row['us']:.1f}", f"{row['sdpa_us']:.1f}", must)
    importing = import_milliseconds()
    table.add_row("import natten, ms", f"{importing:.1f}", "", "30")
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    result = {"commit": commit, "torch": torch.__version__, "python": platform.python_version(), "shape": SHAPE}
    result |= {"rows": rows, "import_ms": importing, "import_must_ms": 30.0}
    out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

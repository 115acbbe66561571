# SPDX-License-Identifier: MIT
"""Speed of the CPU engine, as a fraction of what this processor can do.

    python bench/cpu.py [--quick] [--force] [--out bench/results/cpu.json]

Each row is timed right after the FMA peak of one thread has been measured in the same process, so a fraction survives a
noisy machine better than a time does. "Useful" flops are 4 (forward) or 10 (backward) * queries * window * head_dim *
heads: none for anything that is masked or computed twice. Times are the best of several calls of the torch op, fp32.
Baselines on the same inputs: a plain loop (bench/probe.cpp), torch's SDPA with a mask, compiled FlexAttention.
"""

import argparse
import ctypes
import json
import math
import os
import platform
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import natten
from natten import functional as NF

ROOT = Path(__file__).resolve().parent.parent
HEADS = 4


def case(grid, window, head_dim, dilation=1, heads=HEADS, must=(None, None), plan="", threads=1):
    """One row: a problem, and the fractions of the peak that issue 3 asks for (forward, backward)."""
    name = f"{'x'.join(map(str, grid))} k{'x'.join(map(str, window))} d{head_dim}"
    return {
        "name": name + (f" dil{dilation}" if dilation > 1 else ""),
        "grid": grid,
        "kernel_size": window,
        "dilation": [dilation] * len(grid),
        "heads": heads,
        "head_dim": head_dim,
        "must": must,
        "plan": plan,
        "threads": threads,
    }


CASES = [
    case([56, 56], [7, 7], 64, must=(0.50, 0.36)),
    case([56, 56], [13, 13], 64, must=(0.65, 0.50)),
    case([56, 56], [31, 31], 64, must=(0.75, 0.60)),
    case([4096], [63], 64, must=(0.40, None)),
    case([16, 28, 28], [5, 5, 5], 64, must=(0.40, None)),
    case([8, 32, 32], [3, 7, 7], 64, must=(0.40, None)),
    case([56, 56], [7, 7], 32),
    case([56, 56], [13, 13], 32),
    case([56, 56], [7, 7], 128),
    case([56, 56], [7, 7], 64, dilation=2),
    case([128, 128], [7, 7], 64),
    case([56, 56], [7, 7], 64, threads=2),
    case([56, 56], [13, 13], 64, threads=2),
    case([56, 56], [7, 7], 64, plan="cpu/sliding-avx2"),
    case([56, 56], [13, 13], 64, plan="cpu/sliding-avx2"),
    case([56, 56], [7, 7], 64, plan="cpu/sliding-portable"),
    case([56, 56], [7, 7], 64, plan="cpu/loops"),
]
BASELINES = [case([56, 56], [7, 7], 32, heads=2), case([56, 56], [7, 7], 64), case([56, 56], [13, 13], 64)]


ALLOCATIONS = 12


def busy_fraction(seconds=1.0):
    """Share of all cores that something else keeps busy."""

    def sample():
        numbers = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        return sum(numbers), numbers[3] + numbers[4]

    all0, idle0 = sample()
    time.sleep(seconds)
    all1, idle1 = sample()
    return 1 - (idle1 - idle0) / max(all1 - all0, 1)


def best_ms(call, seconds):
    """Shortest of at least five calls within about `seconds`, in ms."""
    call()
    best, end, calls = math.inf, time.perf_counter() + seconds, 0
    while calls < 5 or time.perf_counter() < end:
        begin = time.perf_counter()
        call()
        best, calls = min(best, time.perf_counter() - begin), calls + 1
    return best * 1e3


def inputs(c):
    torch.manual_seed(0)
    return [torch.randn(1, *c["grid"], c["heads"], c["head_dim"]) for _ in range(4)]


def measure(c, probe, seconds):
    """Rows of the table: the forward and the backward pass of one case.

    Best of ALLOCATIONS sets of tensors: where the pages of one set happen to lie changes the time by a tenth and more.
    """
    torch.set_num_threads(c["threads"])
    rank = len(c["grid"])
    arguments = (c["kernel_size"], [1] * rank, c["dilation"], [False] * rank, c["head_dim"] ** -0.5, True, c["plan"])
    best, peak, kept = {"fwd": math.inf, "bwd": math.inf}, 0.0, []
    for _ in range(ALLOCATIONS):
        q, k, v, dout = inputs(c)
        out, lse = torch.ops.natten.na_fwd(q, k, v, None, None, None, *arguments)
        calls = {
            "fwd": partial(torch.ops.natten.na_fwd, q, k, v, None, None, None, *arguments),
            "bwd": partial(torch.ops.natten.na_bwd, dout, None, q, k, v, None, None, None, out, lse, *arguments),
        }
        for name, call in calls.items():
            peak = max(peak, probe.probe_fma_peak(5) * c["threads"])
            best[name] = min(best[name], best_ms(call, seconds / ALLOCATIONS))
        kept.append((q, k, v, dout, out, lse))  # so that the next ones lie elsewhere
    pairs = math.prod(c["grid"]) * math.prod(c["kernel_size"]) * c["heads"] * c["head_dim"]
    for which, (name, ms) in enumerate(best.items()):
        gflops = (4, 10)[which] * pairs / ms * 1e-6
        plans = natten.list_plans(q, k, v, c["kernel_size"], dilation=c["dilation"], backward=which == 1)
        yield {
            "workload": c["name"],
            "pass": name,
            "threads": c["threads"],
            "ms": round(ms, 3),
            "gflops": round(gflops, 1),
            "peak_gflops": round(peak, 1),
            "fraction": round(gflops / peak, 3),
            "must": c["must"][which],
            "plan": next(p for p in plans if p.startswith(c["plan"])),
        }


def window_mask(c):
    """[tokens, tokens], True where a query sees a key."""
    size = c["grid"][0]
    spans = torch.ops.natten.key_spans(size, c["kernel_size"][0], 1, 1, False)
    key = torch.arange(size)
    axis = (key >= spans[:, :1]) & (key < spans.sum(1, keepdim=True))
    return (axis[:, None, :, None] & axis[None, :, None, :]).reshape(size * size, size * size)


def flex_attention_call(c, q, k, v):
    """Compiled FlexAttention on the same window, or None where torch has none for CPUs."""
    try:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask, size = window_mask(c), c["grid"][0] ** 2
        blocks = create_block_mask(lambda b, h, i, j: mask[i, j], None, None, size, size, device="cpu")
        compiled = torch.compile(flex_attention)
        compiled(q, k, v, block_mask=blocks)
        return lambda: compiled(q, k, v, block_mask=blocks)
    except Exception as error:  # a missing compiler or feature of torch is a row less, not a failed benchmark
        print(f"FlexAttention does not run here: {type(error).__name__}", file=sys.stderr)
        return None


def baselines(c, probe, seconds):
    """Ours and the alternatives on one 2-D problem, forward, one thread, in ms."""
    torch.set_num_threads(1)
    q, k, v, _ = inputs(c)
    window = c["kernel_size"]
    flat = [x.flatten(1, 2).transpose(1, 2).contiguous() for x in (q, k, v)]
    out, mask = torch.empty_like(q), window_mask(c)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (q, k, v, out)]
    ours = NF.na2d(q, k, v, window)
    probe.probe_plain_forward(*pointers, *c["grid"], c["heads"], c["head_dim"], window[0])
    torch.testing.assert_close(out, ours, atol=1e-4, rtol=1e-4)
    row = {"workload": f"{c['name']} heads {c['heads']}"}
    with torch.inference_mode():
        row["natten"] = best_ms(lambda: NF.na2d(q, k, v, window), seconds)
        row["plain loop"] = best_ms(
            lambda: probe.probe_plain_forward(*pointers, *c["grid"], c["heads"], c["head_dim"], window[0]), seconds
        )
        row["SDPA + mask"] = best_ms(lambda: F.scaled_dot_product_attention(*flat, attn_mask=mask), seconds)
        if flex := flex_attention_call(c, *flat):
            row["FlexAttention"] = best_ms(flex, seconds)
    return {key: value if isinstance(value, str) else round(value, 3) for key, value in row.items()}


def print_tables(rows, compared):
    table = Table(title="Useful fp32 flops against the FMA peak of this processor")
    for heading in ("workload", "pass", "threads", "ms", "GFLOP/s", "of peak", "must", "plan"):
        table.add_column(heading, justify="left" if heading in ("workload", "pass", "plan") else "right")
    for r in rows:
        style = "red" if r["must"] and r["fraction"] < r["must"] else None
        must = f"{r['must']:.2f}" if r["must"] else ""
        table.add_row(r["workload"], r["pass"], str(r["threads"]), f"{r['ms']:.2f}", f"{r['gflops']:.1f}",
                      f"{r['fraction']:.3f}", must, r["plan"], style=style)  # fmt: skip
    Console(width=120).print(table)
    table = Table(title="Forward, one thread, ms (times ours)")
    names = ["natten", "plain loop", "SDPA + mask", "FlexAttention"]
    for heading in ["workload", *names]:
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for r in compared:
        cells = [f"{r[n]:.2f} ({r[n] / r['natten']:.1f})" if n in r else "-" for n in names]
        table.add_row(r["workload"], *cells)
    Console(width=120).print(table)


def keep_memory():
    """Starts again with an allocator that keeps what is freed: else every call's outputs are pages that the kernel has
    to map anew, which here costs up to a third of the shortest call, now more, now less."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "4000000000", "MALLOC_TRIM_THRESHOLD_": "8000000000"}
    if os.environ.get("MALLOC_MMAP_THRESHOLD_") != settings["MALLOC_MMAP_THRESHOLD_"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | settings)


def main():
    keep_memory()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the rows with a target only, no baselines")
    parser.add_argument("--force", action="store_true", help="measure on a busy machine, too")
    parser.add_argument(
        "--probe", default=str(ROOT / "build/dev/libnatten_probe.so"), help="the library of bench/probe.cpp"
    )
    parser.add_argument("--out", default=str(ROOT / "bench/results/cpu.json"))
    options = parser.parse_args()
    busy = busy_fraction()
    print(f"load average {os.getloadavg()[0]:.2f}, {100 * busy:.0f} % of {os.cpu_count()} cores busy")
    if busy > 0.1 and not options.force:
        sys.exit("This machine is busy, figures would mean nothing: wait, or use --force.")
    probe = ctypes.CDLL(options.probe)
    probe.probe_fma_peak.restype = ctypes.c_double
    seconds = 0.3 if options.quick else 1.0
    cases = [c for c in CASES if any(c["must"])] if options.quick else CASES
    rows = [row for c in cases for row in measure(c, probe, seconds)]
    compared = [] if options.quick else [baselines(c, probe, seconds) for c in BASELINES]
    print_tables(rows, compared)
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    model = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    result = {
        "commit": git.stdout.strip(), "processor": model[0] if model else platform.processor(), "cores": os.cpu_count(),
        "busy": round(busy, 3), "torch": torch.__version__, "rows": rows, "baselines": compared,
    }  # fmt: skip
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()

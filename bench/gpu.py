# SPDX-License-Identifier: MIT
"""Speed of the CUDA engines on the workloads of gpu_workloads.json, beside what memory allows.

    python bench/gpu.py --out rows.json [--only NAME ...] [--quick]

Times are kernel times: calls over as many sets of buffers as outgrow the L2 cache are captured in a CUDA graph, which
is replayed between two events; the median counts. The last replay writes into poisoned outputs, one head of which is
compared with the oracle on the GPU. `floor_ms` is the time in which memory could move every input and output once.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import natten

HERE = Path(__file__).resolve().parent
COPY_BYTES_PER_MS = 4.24e9  # measured on the H200: a device-to-device copy, bytes read and written
ROTATED_BYTES = 256 << 20
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 4e-3, torch.float32: 1e-5}


class Workload:
    """One row of the table: a problem, its tensors, its two passes."""

    def __init__(self, row):
        rank = len(row["grid"])
        self.name, self.row, self.dtype = row["name"], row, DTYPES[row.get("dtype", "bf16")]
        self.causal = row.get("causal", [False] * rank)
        self.parameters = (
            row["kernel_size"],
            row.get("stride", [1] * rank),
            row.get("dilation", [1] * rank),
            self.causal,
            row["head_dim"] ** -0.5,
            True,
        )
        self.shape = (row["batch"], *row["grid"], row["heads"], row["head_dim"])

    def bytes(self, backward):
        """Inputs read once and outputs written once."""
        tensor = math.prod(self.shape) * self.dtype.itemsize
        lse = math.prod(self.shape[:-1]) * 4
        return 8 * tensor + lse if backward else 4 * tensor + lse

    def num_sets(self):
        return max(2, min(16, -(-ROTATED_BYTES // self.bytes(False))))

    def inputs(self, seed=0):
        generator = torch.Generator("cuda").manual_seed(seed)
        return [torch.randn(self.shape, device="cuda", dtype=self.dtype, generator=generator) for _ in range(4)] + [
            torch.randn(self.row["heads"], *(2 * w - 1 for w in self.row["kernel_size"]), device="cuda").to(self.dtype)
            if self.row.get("bias")
            else None
        ]

    def forward(self, q, k, v, bias, plan=""):
        return torch.ops.natten.na_fwd(q, k, v, bias, None, None, *self.parameters, plan)

    def backward(self, dout, q, k, v, bias, out, lse, plan=""):
        return torch.ops.natten.na_bwd(dout, None, q, k, v, bias, None, None, out, lse, *self.parameters, plan)

    def plan(self, backward):
        window, stride, dilation, causal, *_ = self.parameters
        q = torch.empty(self.shape, device="cuda", dtype=self.dtype)
        bias = self.inputs()[4]
        plans = natten.list_plans(
            q, q, q, window, rpb=bias, stride=stride, dilation=dilation, is_causal=causal, backward=backward
        )
        return plans[0]


def replay_ms(call, sets, seconds):
    """Median time of one call and the results of the last replay; `call(set)` returns tensors."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call(sets[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call(one) for one in sets]
    times, end = [], time.perf_counter() + seconds
    while len(times) < 11 or (time.perf_counter() < end and len(times) < 500):
        begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(begin.elapsed_time(stop) / len(sets))
    for tensors in results:
        for x in tensors:
            x.fill_(math.nan)
    graph.replay()
    torch.cuda.synchronize()
    return statistics.median(times), results, graph


def check(got, expected, dtype, what):
    for a, b in zip(got, expected, strict=True):
        a, b = a.double(), b.double()
        error = float((a - b).abs().max()) / max(float(b.abs().max()), 1e-3)
        assert error <= TOLERANCE[dtype], f"{what}: error {error:.3g}"  # NaN fails too


def one_head(x, head=0):
    """A problem of one sample and one head, whose results do not depend on the others."""
    return x[:1, ..., head : head + 1, :].contiguous()


def measure(workload, seconds):
    sets = [workload.inputs(seed) for seed in range(workload.num_sets())]
    ms, results, _ = replay_ms(lambda s: workload.forward(*s[:3], s[4]), sets, seconds)
    q, k, v, dout, bias = sets[0]
    out, lse = results[0]
    head_bias = None if bias is None else bias[:1].contiguous()
    rows = [one_head(x) for x in (q, k, v, dout)]
    exact = workload.forward(*rows[:3], head_bias, "cuda-reference")
    check((one_head(out), lse[:1, ..., :1]), exact, workload.dtype, f"{workload.name} forward")
    yield row_of(workload, False, ms)

    states = [(s[3], *s[:3], s[4], *r) for s, r in zip(sets, results, strict=True)]
    ms, results, _ = replay_ms(lambda s: workload.backward(*s), states, seconds)
    grads = workload.backward(rows[3], *rows[:3], head_bias, *exact, "cuda-reference")
    check([one_head(x) for x in results[0][:3]], grads[:3], workload.dtype, f"{workload.name} backward")
    yield row_of(workload, True, ms)


def measure_unfused(workload, seconds):
    """QK and AV, and both beside the fused forward pass: in its time, half as much again, and the attention tensor
    written and read."""
    window, stride, dilation, causal, scale, _ = workload.parameters
    geometry = (window, stride, dilation, causal)
    sets = [[x.movedim(-2, 1).contiguous() for x in workload.inputs(seed)[:3]] for seed in range(workload.num_sets())]

    def qk(q, k, plan=""):
        return (torch.ops.natten.na_qk(q, k, None, None, *geometry, scale, -math.inf, True, plan),)

    def av(attn, v, plan=""):
        return (torch.ops.natten.na_av(attn, v, None, *geometry, True, plan),)

    def first(x):
        return x[:1, :1].contiguous()

    times = {}
    times["qk"], results, _ = replay_ms(lambda s: qk(*s[:2]), sets, seconds)
    q, k, v = (first(x) for x in sets[0])
    check([first(results[0][0])], qk(q, k, "cuda-reference"), workload.dtype, f"{workload.name} qk")
    pairs = [(attn.softmax(-1), s[2]) for (attn,), s in zip(results, sets, strict=True)]
    del results
    times["av"], results, _ = replay_ms(lambda s: av(*s), pairs, seconds)
    exact = av(first(pairs[0][0]), v, "cuda-reference")
    check([first(results[0][0])], exact, workload.dtype, f"{workload.name} av")
    times["qk+av"] = times["qk"] + times["av"]
    attn_bytes, row_bytes = (x.numel() * x.element_size() for x in (pairs[0][0], sets[0][0]))
    del pairs, results
    fused, *_ = replay_ms(lambda s: workload.forward(*s), [workload.inputs(s)[:3] + [None] for s in range(2)], seconds)
    for name, ms in times.items():
        floor = (2 if name == "qk+av" else 1) * (2 * row_bytes + attn_bytes) / COPY_BYTES_PER_MS
        row = {"workload": workload.name, "pass": name, "dtype": workload.row.get("dtype", "bf16"), "ms": round(ms, 4)}
        row |= {"floor_ms": round(floor, 4), "times_floor": round(ms / floor, 2)}
        if name == "qk+av":
            transfers = 2 * attn_bytes / COPY_BYTES_PER_MS
            row |= {"fused_fwd_ms": round(fused, 4), "attn_transfers_ms": round(transfers, 4)}
            row["must_ms"] = round(1.5 * workload.row["must"][0] + transfers, 4)
        yield row


def row_of(workload, backward, ms):
    which = "bwd" if backward else "fwd"
    floor = workload.bytes(backward) / COPY_BYTES_PER_MS
    row = {
        "workload": workload.name,
        "pass": which,
        "dtype": workload.row.get("dtype", "bf16"),
        "ms": round(ms, 4),
        "plan": workload.plan(backward),
        "floor_ms": round(floor, 4),
        "times_floor": round(ms / floor, 2),
    }
    for bound in ("must", "goal"):
        if bound in workload.row:
            row[bound + "_ms"] = workload.row[bound][int(backward)]
    return row


# --- beside the kernels -----------------------------------------------------------------------------------------------
def host_overhead():
    """Microseconds of one eager na2d call on an 8x8 grid: the median of 1,000 in a row, never waiting for the GPU."""
    result = {}
    for name, recording in (("no_grad", False), ("recording", True)):
        q, k, v = (torch.randn(1, 8, 8, 2, 32, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        for x in (q, k, v):
            x.requires_grad_(recording)
        times = []
        for i in range(1100):
            begin = time.perf_counter_ns()
            natten.na2d(q, k, v, 7)
            times.append((time.perf_counter_ns() - begin) / 1e3)
            if i % 100 == 99:
                torch.cuda.synchronize()
        result[name] = round(statistics.median(times[100:]), 2)
    return result


def peak_memory(workload):
    """Peak of a forward and backward step over what must exist: inputs, outputs, gradients and saved tensors."""
    torch.cuda.empty_cache()
    q, k, v, dout, _ = workload.inputs()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function = (natten.na1d, natten.na2d, natten.na3d)[len(workload.row["grid"]) - 1]
    window, stride, dilation, causal, *_ = workload.parameters
    out = function(*leaves, window, stride=stride, dilation=dilation, is_causal=causal)
    out.backward(dout)
    torch.cuda.synchronize()
    needed = workload.bytes(True)
    return round((torch.cuda.max_memory_allocated() - before + 4 * q.numel() * q.element_size()) / needed, 3)


def dense_line(head_dim, tokens=16384, heads=24):
    """Dense attention of cuDNN through torch, TFLOP/s forward: the speed of light of this card today."""
    q, k, v = (torch.randn(1, heads, tokens, head_dim, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
        ms, *_ = replay_ms(lambda s: (F.scaled_dot_product_attention(*s),), [(q, k, v)], 0.2)
    return round(4 * heads * tokens**2 * head_dim / ms * 1e-9, 1)


def copy_speed():
    a = torch.randn(1 << 28, device="cuda")
    ms, *_ = replay_ms(lambda s: (s[0].clone(),), [(a,)], 0.1)
    return round(2 * a.numel() * 4 / ms * 1e-9, 3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("rows.json"))
    parser.add_argument("--only", nargs="*", help="names of workloads")
    parser.add_argument("--quick", action="store_true", help="shorter timing, no large windows")
    args = parser.parse_args()
    workloads = [Workload(row) for row in json.loads((HERE / "gpu_workloads.json").read_text())]
    if args.only:
        workloads = [w for w in workloads if w.name in args.only]
    if args.quick:
        workloads = [w for w in workloads if not w.row.get("large")]
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "copy_tb_per_s": copy_speed(),
        "host_overhead_us": host_overhead(),
        "dense_cudnn_tflops": {f"d{d}": dense_line(d) for d in (64, 128)},
        "rows": [],
        "errors": [],
    }
    print({name: value for name, value in report.items() if name not in ("rows", "errors")})
    for workload in workloads:
        try:
            for row in measure(workload, 0.1 if args.quick else 0.3):
                report["rows"].append(row)
                print(json.dumps(row), flush=True)
            if not workload.row.get("large"):
                report["rows"][-1]["peak_memory"] = peak_memory(workload)
            if workload.row.get("unfused"):
                for row in measure_unfused(workload, 0.1 if args.quick else 0.3):
                    report["rows"].append(row)
                    print(json.dumps(row), flush=True)
        except (AssertionError, RuntimeError) as error:
            report["errors"].append(f"{workload.name}: {error}")
            print("ERROR", report["errors"][-1], flush=True)
        torch.cuda.empty_cache()
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    raise SystemExit(1 if report["errors"] else 0)


if __name__ == "__main__":
    main()

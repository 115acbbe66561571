# SPDX-License-Identifier: MIT
"""The ledger of compiled CUDA kernels: engine, pass, element type, head_dim bucket, and why the instance exists.

    python tools/cuda_ledger.py [build/cuda/libnatten.a]

Reads the names from the built library and fails if one is not explained here, if an engine has more than 24 instances
in a pass, or if there are more than 100 in all.
"""

import collections
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
MOST_PER_PASS, MOST = 24, 100
# What may exceed the budgets, and why.
EXCEPTIONS = {
    ("portable", "fwd"): (38, "two families; a bias in the same window kernel made the others spill; 16 or 32 rows"),
    ("portable", "bwd"): (34, "two families of two kernels each, for queries and for keys"),
    "all": (120, "the two above; the oracle's 36 take four element types"),
}
DTYPE_ONLY = "one per element type: the type is all that changes instructions"
ANY_DTYPE = "the type is a branch at run time"
BUCKETS = "element type, and accumulators of 32, 64, 128 or 256 (float: 64 or 128) channels in registers"
WINDOW = "element type, channels in registers, and the shape of a warp's tile"
# (engine, kernel): (pass, why)
WHY = {
    ("cuda-reference", "forward"): ("fwd", DTYPE_ONLY),
    ("cuda-reference", "delta"): ("bwd", DTYPE_ONLY),
    ("cuda-reference", "dq"): ("bwd", DTYPE_ONLY),
    ("cuda-reference", "dkv"): ("bwd", DTYPE_ONLY),
    ("cuda-reference", "dbias"): ("bwd", DTYPE_ONLY),
    ("cuda-reference", "scores"): ("unfused", DTYPE_ONLY),
    ("cuda-reference", "weigh_keys"): ("unfused", DTYPE_ONLY),
    ("cuda-reference", "weigh_queries"): ("unfused", DTYPE_ONLY),
    ("cuda-reference", "sum_bias"): ("unfused", DTYPE_ONLY),
    ("portable", "forward"): ("fwd", BUCKETS + "; of 64 and 128 also for 32 rows of a warp, which share fragments"),
    ("portable", "dq"): ("bwd", BUCKETS),
    ("portable", "dkdv"): ("bwd", BUCKETS),
    ("portable", "window_forward"): ("fwd", WINDOW + "; flat ones also as a ring; with and without a bias"),
    ("portable", "window_forward_square"): (
        "fwd",
        "element type, and channels in registers; fewer warps with more keys",
    ),
    ("portable", "window_dq"): ("bwd", WINDOW),
    ("portable", "window_dkdv"): ("bwd", WINDOW),
    ("portable", "row_stats"): ("bwd", ANY_DTYPE),
    ("portable", "reduce_bias"): ("bwd", ANY_DTYPE),
    ("portable", "scores"): ("unfused", "element type, and channels of 16 queries in registers"),
    ("portable", "weigh"): ("unfused", "element type, and accumulators of 32 or 64 channels; queries' and keys' side"),
    ("portable", "sum_bias"): ("unfused", DTYPE_ONLY),
}
KERNEL = re.compile(r"natten::cuda_(\w+)::(?:\(anonymous namespace\)::)?(\w+)_kernel(?:<([^<>]*)>)?\(")
ENGINES = {"reference": "cuda-reference"}


def instances(library: Path) -> list[tuple[str, str, str]]:
    """(engine, kernel, template arguments) of every kernel, by the names of their host stubs."""
    names = subprocess.run(["nm", "-C", library], check=True, capture_output=True, text=True).stdout
    names = re.sub(r"\(natten::cuda_portable::Shape\)", "", names)  # its values are named in window.h
    found = {(ENGINES.get(e, e), kernel, arguments) for e, kernel, arguments in KERNEL.findall(names)}
    return sorted(found, key=lambda row: (row[0], row[1], [int(x) if x.isdigit() else -1 for x in row[2].split(", ")]))


def main() -> int:
    library = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build/cuda/libnatten.a"
    rows, counts, status = instances(library), collections.Counter(), 0
    print(f"{'engine':<16}{'pass':<9}{'kernel':<23}{'dtype':<8}{'bucket':<12}why")
    for engine, kernel, arguments in rows:
        which, why = WHY.get((engine, kernel), ("?", None))
        counts[engine, which] += 1
        dtype, *bucket = arguments.replace("natten::", "").split(", ")
        sizes = "x".join(bucket) or "-"
        print(f"{engine:<16}{which:<9}{kernel:<23}{dtype or 'any':<8}{sizes:<12}{why or 'NOT EXPLAINED'}")
        status |= why is None
    for (engine, which), count in sorted(counts.items()):
        most, why = EXCEPTIONS.get((engine, which), (MOST_PER_PASS, "the budget"))
        over = count > most
        print(f"{engine} {which}: {count} of at most {most} ({why}){' OVER' if over else ''}")
        status |= over
    most, why = EXCEPTIONS.get("all", (MOST, "the budget"))
    print(f"{len(rows)} instances of at most {most} ({why}), {library.stat().st_size / 2**20:.1f} MiB")
    return int(status or not 0 < len(rows) <= most)


if __name__ == "__main__":
    sys.exit(main())

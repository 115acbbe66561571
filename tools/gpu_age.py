# SPDX-License-Identifier: MIT
"""Warns, and never fails, if CUDA code changed after the commit that the newest GPU results name.

CI has no GPU, so this is all it can say of the CUDA engines' speed and correctness on one.
"""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench/results/h200"
WATCHED = ("src/cuda", "src/core", "include", "bindings")


def verdict() -> str:
    newest = max(RESULTS.glob("*.json"), default=None)  # their names begin with the date
    if newest is None:
        return "warning: the CUDA engines have no results from a GPU yet (tools/gpu_check.sh makes them)"
    commit = json.loads(newest.read_text())["commit"].removesuffix("-dirty")
    log = ["git", "log", "--format=%h %s", f"{commit}..HEAD", "--", *WATCHED]
    later = subprocess.run(log, cwd=ROOT, capture_output=True, text=True)
    if later.returncode != 0:
        return f"warning: {newest.name} names commit {commit}, which is not in this clone"
    if later.stdout:
        return f"warning: CUDA code changed after the GPU run of {newest.name} ({commit[:7]}):\n{later.stdout.rstrip()}"
    return f"GPU results of {newest.name} are those of this source"


if __name__ == "__main__":
    print(verdict())

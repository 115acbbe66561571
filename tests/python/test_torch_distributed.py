# SPDX-License-Identifier: MIT
"""DTensor: batch and heads sharded over two gloo ranks, against the whole tensor. What a rank does: two_ranks.py."""

import subprocess
import sys
from pathlib import Path


def test_two_gloo_ranks():
    script = Path(__file__).with_name("two_ranks.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("checks passed") == 2

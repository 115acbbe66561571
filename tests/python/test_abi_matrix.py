# SPDX-License-Identifier: MIT
"""One built library under the oldest torch and the newest, with the tests of what torch does with the ops. Downloads
both: gigabytes, a quarter of an hour."""

import subprocess
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_suite_for_torch_under_every_torch():
    script = Path(__file__).parents[2] / "tools" / "abi_matrix.sh"
    run = subprocess.run(["bash", script, "--suite", "torch"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]

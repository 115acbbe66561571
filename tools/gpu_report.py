# SPDX-License-Identifier: MIT
"""Joins what tools/gpu_check.sh left in a folder into gpu_check.json and prints its last line.

    python tools/gpu_report.py FOLDER PART...

Fails if a test failed or skipped, a sanitizer found something or did not finish, or a part left no results.
"""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def test_counts(folder: Path) -> dict:
    suites = ElementTree.parse(folder / "tests.xml").getroot().iter("testsuite")
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    failed = totals["failures"] + totals["errors"]
    return {"passed": totals["tests"] - failed - totals["skipped"], "failed": failed, "skipped": totals["skipped"]}


def sanitizer_summaries(folder: Path) -> dict:
    found = {}
    for tool in SANITIZERS:
        path = folder / f"sanitizer_{tool}.txt"
        text = path.read_text(errors="replace") if path.is_file() else ""
        summary = re.findall(r"========= ((?:ERROR|RACECHECK) SUMMARY: .*)", text)
        found[tool] = summary[-1] if summary and re.search(r"^\d+ runs$", text, re.M) else "did not finish"
    return found


def is_clean(summary: str) -> bool:
    return bool(re.match(r"(ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards)", summary))


def demo_losses(folder: Path) -> dict:
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("demo_*.json"))}
    return {name: {key: run.get(key) for key in ("loss", "accuracy", "miou")} for name, run in runs.items()}


def in_band(losses: dict) -> bool:
    """Is the loss in bfloat16 within those of three seeds in float32?"""
    band = [run["loss"] for name, run in losses.items() if name.startswith("demo_fp32")]
    return len(band) == 3 and "demo_bf16" in losses and min(band) <= losses["demo_bf16"]["loss"] <= max(band)


def main() -> int:
    folder, parts = Path(sys.argv[1]), sys.argv[2:]
    bench = folder / "bench.json"
    measured = json.loads(bench.read_text()) if "bench" in parts and bench.is_file() else {}
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    gpu, driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].split(", ")
    import torch

    report = {"commit": Path("commit").read_text().strip(), "gpu": gpu, "driver": driver, "torch": torch.__version__}
    report |= test_counts(folder) if "tests" in parts else {"passed": 0, "failed": 0, "skipped": 0}
    bad = report["failed"] + report["skipped"]
    if "sanitizers" in parts:
        report["sanitizers"] = sanitizer_summaries(folder)
        bad += sum(not is_clean(summary) for summary in report["sanitizers"].values())
    if "demo" in parts:
        report["demo"] = demo_losses(folder)
        report["demo_in_band"] = in_band(report["demo"])
        bad += not report["demo_in_band"]
    if "bench" in parts:
        bad += not measured
        report |= {name: value for name, value in measured.items() if name not in ("gpu", "torch", "rows")}
    report["rows"] = measured.get("rows", [])
    (folder / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    for tool, summary in report.get("sanitizers", {}).items():
        print(f"{tool}: {summary}")
    print(f"{report['passed']} passed, {report['failed']} failed, {report['skipped']} skipped")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: MIT
"""`python -m natten info [--json]`: what this installation can do, and why not the rest."""

import argparse
import json
import platform

import torch

from . import _library
from ._version import __version__


def collect() -> dict:
    """Everything that `info` shows."""
    report = {
        "version": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "library": str(_library.PATH) if _library.HAS_LIBNATTEN else None,
        "library_reason": _library.REASON,
        "isa": None,
        "threads": torch.get_num_threads(),
        "backends": [],
        "gpus": _gpus(),
    }
    if _library.HAS_LIBNATTEN:
        native = _library.info()
        report |= {"library_version": native["version"], "isa": native["isa"], "backends": native["backends"]}
    return report


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        {"name": p.name, "compute_capability": f"{p.major}.{p.minor}", "memory_gib": round(p.total_memory / 2**30, 1)}
        for p in properties
    ]


def _text(report: dict) -> str:
    library = report["library"] or f"not loaded: {report['library_reason']}"
    lines = [
        f"natten    {report['version']}",
        f"library   {library}",
        f"torch     {report['torch']}, Python {report['python']}",
        f"CPU       {report['isa'] or 'unknown'}, {report['threads']} threads",
    ]
    gpus = [f"{g['name']}, compute capability {g['compute_capability']}, {g['memory_gib']} GiB" for g in report["gpus"]]
    lines += [f"GPU       {gpu}" for gpu in gpus] or ["GPU       none that torch can use"]
    for backend in report["backends"]:
        lines.append(f"backend   {backend['name']:<16}{'on' if backend['available'] else 'off: ' + backend['reason']}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m natten", description="Neighborhood attention.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="version, backends, instruction set, torch, GPUs")
    info.add_argument("--json", action="store_true", help="as JSON")
    report = collect()
    print(json.dumps(report, indent=2) if parser.parse_args().json else _text(report))


if __name__ == "__main__":
    main()

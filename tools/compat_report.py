# SPDX-License-Identifier: MIT
"""Every name of older releases: its era, and whether it is there, called and compared: `python tools/compat_report.py`.

The names and what calls them stand in tests/python/legacy_names.py. Exits with 1 if anything is missing or wrong.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "python"))

import legacy_names


def main() -> int:
    counts, gaps = Counter(), 0
    for era, name, problem in legacy_names.results():
        counts[era] += 1
        gaps += bool(problem)
        print(f"{era:<6}natten.{name:<62}{'GAP: ' + problem if problem else 'called and compared'}", flush=True)
    eras = ", ".join(f"{era}: {count}" for era, count in counts.items())
    print(f"\n{sum(counts.values())} names ({eras}), {gaps} gaps")
    return 1 if gaps else 0


if __name__ == "__main__":
    sys.exit(main())

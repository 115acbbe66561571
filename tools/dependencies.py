# SPDX-License-Identifier: MIT
"""Prints what pyproject.toml asks for, one requirement a line: `python tools/dependencies.py [EXTRA...]`.

`make` installs these before the package itself, so that downloads show their progress and a rebuild of the package
does not ask the index again.
"""

import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: every pip carries a copy
    from pip._vendor import tomli as tomllib


def main() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    requirements = list(project["dependencies"])
    for extra in sys.argv[1:]:
        requirements += project["optional-dependencies"][extra]
    print("\n".join(dict.fromkeys(requirements)))


if __name__ == "__main__":
    main()

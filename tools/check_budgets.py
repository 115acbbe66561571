# SPDX-License-Identifier: MIT
"""Checks the budgets of the house on every tracked or new file: `python tools/check_budgets.py [--write-tour]`.

What is measured stands in BUDGETS and in the functions named `check_*`; what may exceed it, in EXCEPTIONS, each with
its reason. An exception that nothing needs any more is an error too. `--write-tour` corrects the line counts of the
reading tour in ARCHITECTURE.md.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import cpp_shape

ROOT = Path(__file__).parent.parent
BUDGETS = {"file": 400, "kernel file": 600, "function": 80, "nesting": 4, "template": 5, "headers": 500, "width": 120}
KERNEL_FOLDERS = ("src/cpu/", "src/cuda/")
TOUR_SLACK = 0.10

# (path, rule) -> why. Rules are the first words of the messages below.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("tools/mutate.sh", "width"): "one mutant a line: file, two expressions, what it breaks",
}

CPP = {".h", ".cuh", ".cpp", ".cu"}
SOURCE = CPP | {".py", ".sh", ".cmake", ".toml", ".yml", ".yaml"}
SOURCE_NAMES = {"CMakeLists.txt", "Makefile", "run", ".clang-format"}

# Written in two halves so that this file passes its own check.
UNFINISHED = re.compile("TO" + "DO|FIX" + r"ME|\bXX" + r"X\b|\bHAC" + r"K\b")
MACHINE_PATH = re.compile(r"(?<![\w.$}])/(?:" + "wo" + "rk|ro" + "ot|ho" + "me|tm" + r"p|Users)/\w")
NETWORK_HOST = re.compile("https" + r"?://(?!127\.|localhost)")
# The window formula belongs to neighborhood.h: these expressions are its fingerprints.
FORMULA = re.compile(
    r"(?:window|kernel_size|\bstride)\w*(?:\[\w+\])?\s*//?\s*2\b|extent\s*-\s*[\w.]*window|- 1\) / [\w.]*dilation"
)
FORMULA_FOLDERS = ("include/", "src/", "bindings/", "python/")
CPP_CODE = re.compile(
    r"^\s*//+\s*(?:\}|.*[\w)\]]\s*[({=].*[;{]\s*$|(?:return|break|continue)\b.*;\s*$|#\s*(?:if|include)\b)"
)
PROSE = re.compile(r"\b[a-zA-Z]+,? [a-z]+,? [a-z]+\b")  # three plain words in a row
PY_CODE = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.For, ast.If, ast.With, ast.Raise)


class Finding(NamedTuple):
    path: str
    line: int
    rule: str
    text: str


def tracked_files() -> list[str]:
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    return sorted({n for n in names if n and (ROOT / n).is_file()})


def is_source(path: str) -> bool:
    return Path(path).suffix in SOURCE or Path(path).name in SOURCE_NAMES


def check_file(path: str, lines: list[str]) -> Iterator[Finding]:
    kind = "kernel file" if path.startswith(KERNEL_FOLDERS) else "file"
    if len(lines) > BUDGETS[kind]:
        yield Finding(path, len(lines), "file", f"{len(lines)} lines, at most {BUDGETS[kind]}")
    if "SPDX-License-Identifier: MIT" not in "\n".join(lines[:2]):
        yield Finding(path, 1, "licence", "no SPDX-License-Identifier line on top")


def check_text(path: str, lines: list[str]) -> Iterator[Finding]:
    for number, line in enumerate(lines, 1):
        if UNFINISHED.search(line):
            yield Finding(path, number, "unfinished", "a note to self: finish it or file an issue")
        if MACHINE_PATH.search(line):
            yield Finding(path, number, "path", "a path of one machine: " + line.strip())
        if NETWORK_HOST.search(line):
            yield Finding(path, number, "host", "a network host: " + line.strip())
        if len(line) > BUDGETS["width"] and is_source(path):
            yield Finding(path, number, "width", f"{len(line)} columns, at most {BUDGETS['width']}")


def check_formula(path: str, lines: list[str]) -> Iterator[Finding]:
    if not path.startswith(FORMULA_FOLDERS) or path.endswith("natten/neighborhood.h"):
        return
    for number, line in enumerate(lines, 1):
        if FORMULA.search(line.split("//")[0] if Path(path).suffix in CPP else line):
            yield Finding(path, number, "formula", "the window formula belongs to neighborhood.h: " + line.strip())


def check_cpp(path: str, text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.split("\n"), 1):
        if CPP_CODE.search(line) and not PROSE.search(line):
            yield Finding(path, number, "dead code", "commented-out code? " + line.strip())
    for function in cpp_shape.functions(text):
        where = (path, function.line)
        if function.lines > BUDGETS["function"]:
            yield Finding(*where, "function", f"{function.name}: {function.lines} lines, at most {BUDGETS['function']}")
        if function.nesting > BUDGETS["nesting"]:
            yield Finding(
                *where, "nesting", f"{function.name}: {function.nesting} levels, at most {BUDGETS['nesting']}"
            )
    for line, count in cpp_shape.template_parameters(text):
        if count > BUDGETS["template"]:
            yield Finding(path, line, "template", f"{count} template parameters, at most {BUDGETS['template']}")


def python_nesting(node: ast.AST) -> int:
    """Levels of control flow below `node`; functions inside start anew and an `elif` is no deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        level = isinstance(child, (ast.For, ast.AsyncFor, ast.While, ast.If, ast.With, ast.AsyncWith, ast.Try))
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, level - is_elif + python_nesting(child))
    return deepest


def is_python_code(comment: str) -> bool:
    try:
        body = ast.parse(comment).body
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(s, PY_CODE) or isinstance(getattr(s, "value", None), ast.Call) for s in body)


def check_python(path: str, text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip().startswith("# ") and is_python_code(line.strip()[2:]):
            yield Finding(path, number, "dead code", "commented-out code? " + line.strip())
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        length = node.end_lineno - node.lineno + 1
        if length > BUDGETS["function"]:
            yield Finding(path, node.lineno, "function", f"{node.name}: {length} lines, at most {BUDGETS['function']}")
        if python_nesting(node) > BUDGETS["nesting"]:
            yield Finding(path, node.lineno, "nesting", f"{node.name}: {python_nesting(node)} levels")


def check_headers(files: list[str]) -> Iterator[Finding]:
    total = sum(len((ROOT / f).read_text().splitlines()) for f in files if f.startswith("include/natten/"))
    if total >= BUDGETS["headers"]:
        yield Finding("include/natten", total, "headers", f"{total} lines, under {BUDGETS['headers']}")


def check_version() -> Iterator[Finding]:
    """The version stands in python/natten/_version.py; CMake's must be the same."""
    version, cmake = ROOT / "python/natten/_version.py", ROOT / "CMakeLists.txt"
    if not version.is_file() or not cmake.is_file():
        return
    wanted = re.search(r'"(\d+\.\d+\.\d+)[^"]*"', version.read_text())
    found = re.search(r"project\(natten VERSION ([\d.]+)", cmake.read_text())
    if wanted and found and wanted[1] != found[1]:
        yield Finding("CMakeLists.txt", 1, "version", f"{found[1]}, but python/natten/_version.py says {wanted[1]}")


TOUR_ROW = re.compile(r"^(\|[^|]*?`(?P<path>[\w./-]+)`[^|]*\|\s*)(?P<lines>[\d,]+)(\s*\|.*)$")
TOUR_TOTAL = re.compile(r"^(\|\s*(?:\*\*)?[Tt]otal(?:\*\*)?\s*\|\s*(?:\*\*)?)(?P<lines>[\d,]+)(.*)$")


def check_tour(write: bool) -> Iterator[Finding]:
    """Rows `| `path` | lines | ... |` and a row `| total | lines |` of the first table with such rows."""
    page = ROOT / "ARCHITECTURE.md"
    if not page.is_file():
        yield Finding("ARCHITECTURE.md", 0, "tour", "is missing")
        return
    lines, total, rows = page.read_text().split("\n"), 0, 0
    for i, line in enumerate(lines):
        row, sum_row = TOUR_ROW.match(line), TOUR_TOTAL.match(line)
        if not row and not sum_row:
            continue
        rows += bool(row)
        if row and not (ROOT / row["path"]).is_file():
            yield Finding("ARCHITECTURE.md", i + 1, "tour", f"{row['path']} does not exist")
            continue
        actual = len((ROOT / row["path"]).read_text().splitlines()) if row else total
        total += actual if row else 0
        match = row or sum_row
        stated = int(match["lines"].replace(",", ""))
        if write:
            lines[i] = line[: match.start("lines")] + f"{actual:,}" + line[match.end("lines") :]
        elif abs(stated - actual) > TOUR_SLACK * actual:
            yield Finding("ARCHITECTURE.md", i + 1, "tour", f"says {stated} lines, but there are {actual}")
        if sum_row:
            break
    if not rows or not total:
        yield Finding("ARCHITECTURE.md", 0, "tour", "has no table of the reading tour")
    if write:
        page.write_text("\n".join(lines))


def all_findings(write_tour: bool) -> Iterator[Finding]:
    files = tracked_files()
    for path in files:
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue  # a picture
        lines = text.splitlines()
        yield from check_text(path, lines)
        if not is_source(path):
            continue
        yield from check_file(path, lines)
        yield from check_formula(path, lines)
        if Path(path).suffix in CPP:
            yield from check_cpp(path, text)
        if path.endswith(".py"):
            yield from check_python(path, text)
    yield from check_headers(files)
    yield from check_version()
    yield from check_tour(write_tour)


def main() -> int:
    findings = list(all_findings("--write-tour" in sys.argv))
    bad = [f for f in findings if (f.path, f.rule) not in EXCEPTIONS]
    stale = EXCEPTIONS.keys() - {(f.path, f.rule) for f in findings}
    for f in bad:
        print(f"{f.path}:{f.line}: {f.rule}: {f.text}")
    for path, rule in sorted(stale):
        print(f"{path}: the exception for '{rule}' is not needed any more: remove it from tools/check_budgets.py")
    print(f"budgets: {len(bad)} over, {len(EXCEPTIONS)} exceptions, {len(stale)} of them stale")
    return 1 if bad or stale else 0


if __name__ == "__main__":
    sys.exit(main())

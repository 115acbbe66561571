# SPDX-License-Identifier: MIT
"""Finds functions, their lengths and nesting, and template parameter lists in C++ and CUDA text.

No compiler: one pass over the text without comments and literals, which keeps a stack of open braces and
parentheses. It is meant for sources in our own format; macros that open a brace would confuse it.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

CONTROL = re.compile(r"(?<![\w#])(?:for|while|if|switch|do|try|catch|else)(?!\w)")
SCOPE = re.compile(r"\b(?:namespace|class|struct|union|enum|extern)\b")
NAME = re.compile(r"([~\w:]+|operator\s*\S+)\s*\($")
NOISE = re.compile(r'//[^\n]*|/\*.*?\*/|R"(\w*)\(.*?\)\1"|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])\'', re.DOTALL)
DIRECTIVE = re.compile(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", re.MULTILINE)


class Function(NamedTuple):
    name: str
    line: int
    lines: int
    nesting: int


class _Brace(NamedTuple):
    kind: str  # "scope", "function", "block" (adds to the nesting) or "plain" (lambda, initialiser)
    name: str
    line: int
    levels: int


def blank(match: re.Match) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def strip(text: str) -> str:
    """The text with comments, literals and preprocessor lines blanked out; positions stay."""
    return DIRECTIVE.sub(blank, NOISE.sub(blank, text))


def levels_of(header: str) -> int:
    """Control statements that a header such as `if (a) for (..)` opens; `else if` is one."""
    return len(CONTROL.findall(re.sub(r"\belse\s+if\b", "if", header)))


def classify(header: str, inside: str) -> tuple[str, str, int]:
    levels = levels_of(header)
    if inside in ("function", "block", "plain"):
        return ("block", "", levels) if levels else ("plain", "", 0)
    if SCOPE.search(header) and not header.rstrip().endswith(")"):
        return "scope", "", 0
    first = header.find("(")
    if first < 0 or "=" in re.sub(r"operator\s*[=<>!]+", "operator", header[:first]):
        return "plain" if first >= 0 or "=" in header else "scope", "", 0
    name = NAME.search(header[: first + 1])
    return "function", name[1] if name else header.strip()[:40], 0


def functions(text: str) -> Iterator[Function]:
    """Every function with a body. The length runs from the line of its opening brace's header to its closing brace."""
    text = strip(text)
    stack: list[_Brace] = []
    start, parens, saved_parens = 0, 0, []
    deepest = 0
    for i, c in enumerate(text):
        if c in "()":
            parens += 1 if c == "(" else -1
        elif c == "{":
            header = text[start:i]
            kind, name, levels = classify(header, stack[-1].kind if stack else "scope")
            begin = start + len(header) - len(header.lstrip())
            stack.append(_Brace(kind, name, text.count("\n", 0, begin) + 1, levels))
            if kind == "function":
                deepest = 0
            saved_parens.append(parens)
            start, parens = i + 1, 0
            deepest = max(deepest, sum(b.levels for b in stack))
        elif c == "}" and stack:
            brace = stack.pop()
            parens, start = saved_parens.pop(), i + 1
            if brace.kind == "function":
                yield Function(brace.name, brace.line, text.count("\n", 0, i) + 2 - brace.line, deepest)
        elif c == ";" and parens == 0:
            inside = bool(stack) and stack[-1].kind != "scope"
            deepest = max(deepest, sum(b.levels for b in stack) + levels_of(text[start:i])) if inside else deepest
            start = i + 1
        elif c == ":" and re.fullmatch(r"\s*(?:public|private|protected|default|case\s+[\w:]+)\s*", text[start:i]):
            start = i + 1


def template_parameters(text: str) -> Iterator[tuple[int, int]]:
    """(line, number of parameters) of each template parameter list."""
    text = strip(text)
    for match in re.finditer(r"\btemplate\s*<", text):
        depth, commas, i = 1, 0, match.end()
        while depth and i < len(text):
            depth += {"<": 1, "(": 1, "{": 1, ">": -1, ")": -1, "}": -1}.get(text[i], 0)
            commas += text[i] == "," and depth == 1
            i += 1
        empty = not text[match.end() : i - 1].strip()
        yield text.count("\n", 0, match.start()) + 1, 0 if empty else commas + 1

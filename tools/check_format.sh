#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Checks, or with --fix establishes, the house format: clang-format (.clang-format) and ruff (pyproject.toml), both at
# the versions that requirements/dev.txt pins.
set -euo pipefail
cd "$(dirname "$0")/.."

for tool in clang-format ruff; do
  wanted=$(sed -n "s/^$tool==//p" requirements/dev.txt)
  "$tool" --version | grep -qwF "$wanted" || { echo "$tool is not version $wanted: run 'make format'" >&2; exit 1; }
done

mapfile -t cpp < <(git ls-files -co --exclude-standard -- '*.h' '*.cpp' '*.cuh' '*.cu')
existing=()
for file in "${cpp[@]}"; do [ -f "$file" ] && existing+=("$file"); done

status=0
if [ "${1:-}" = --fix ]; then
  [ ${#existing[@]} -eq 0 ] || clang-format -i "${existing[@]}"
  ruff format .
  ruff check --fix . || status=1
else
  [ ${#existing[@]} -eq 0 ] || clang-format --dry-run --Werror "${existing[@]}" || status=1
  ruff format --check . || status=1
fi
exit $status

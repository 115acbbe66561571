#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds the library with its CUDA engines and copies what tools/gpu_check.sh needs into a folder that can be carried
# to a machine with a GPU.
#
#   tools/gpu_pack.sh FOLDER [LIBRARY]      default: builds the preset `cuda` and takes its library
set -euo pipefail
folder=$(realpath -m "${1:?usage: tools/gpu_pack.sh FOLDER [LIBRARY]}")
library=${2:+$(realpath "$2")}
cd "$(dirname "$0")/.."
if [ -z "$library" ]; then
  cmake --preset cuda
  cmake --build --preset cuda --target natten_torch natten_bench_cuda
  library=$PWD/build/cuda/libnatten.so
fi
rm -rf "$folder"
mkdir -p "$folder/tests" "$folder/tools"
cp "$library" "$folder/libnatten.so"
[ ! -x build/cuda/bench/natten_bench_cuda ] || cp build/cuda/bench/natten_bench_cuda "$folder/"
cp -r python bench examples pyproject.toml "$folder/"
cp -r tests/python "$folder/tests/"
cp tools/gpu_check.sh tools/gpu_report.py tools/gpu_sanitize.py "$folder/tools/"
find "$folder" -name __pycache__ -prune -exec rm -rf {} +
commit=$(git rev-parse HEAD)
git diff --quiet HEAD -- src include bindings python tests || commit=$commit-dirty
echo "$commit" > "$folder/commit"
du -sh "$folder"

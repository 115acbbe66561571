#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Builds one wheel and smoke-tests it (abi_smoke.py) under the oldest torch that we support and under the newest, each
# in an environment of its own below build/abi. Downloads both: gigabytes, minutes; a second run reuses them.
#
#   tools/abi_matrix.sh [--suite torch] [TORCH_REQUIREMENT...]   default: the lower bound of pyproject.toml, the newest
#
# With `--suite torch` also the tests of what torch does with the ops, the same files under each: a quarter of an hour.
set -euo pipefail
cd "$(dirname "$0")/.."
unset NATTEN_LIBRARY PYTHONPATH

python=.venv/bin/python
export PATH="$PWD/.venv/bin:$PATH"
oldest=$(sed -n 's/^dependencies = .*torch>=\([0-9.]*\).*/\1/p' pyproject.toml)
suite=()
if [ "${1:-}" = --suite ]; then
  [ "${2:-}" = torch ] || { echo "there is one suite: --suite torch" >&2; exit 2; }
  suite=(tests/python/test_torch_*.py tests/python/test_{arguments,autocast,determinism,gradients,modules}.py)
  shift 2
fi
requirements=("$@")
[ $# -gt 0 ] || requirements=("torch==$oldest.*" torch)

rm -rf build/abi/wheel
"$python" -m pip wheel --quiet --no-build-isolation --no-deps -C build-dir=build/dev -w build/abi/wheel .
wheel=$(echo build/abi/wheel/*.whl)
case $wheel in
  *-py3-none-*) echo "wheel: $wheel" ;;
  *) echo "not a wheel for every Python: $wheel" >&2 && exit 1 ;;
esac
"$python" -c 'import sys, zipfile
zipfile.ZipFile(sys.argv[1]).extract("natten/libnatten.so", "build/abi")' "$wheel"
bash tools/check_symbols.sh build/abi/natten/libnatten.so
sum=$(sha256sum < build/abi/natten/libnatten.so)

results=()
status=0
for requirement in "${requirements[@]}"; do
  venv=build/abi/venv-$(tr -c 'a-z0-9.\n' - <<< "$requirement")
  printf '\n==> %s\n' "$requirement"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip install --disable-pip-version-check --upgrade "$requirement" numpy
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet --force-reinstall --no-deps "$wheel"
  installed=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/natten/libnatten.so
  [ "$(sha256sum < "$installed")" = "$sum" ] || { echo "another library got installed: $installed" >&2; exit 1; }
  if result=$("$venv/bin/python" tools/abi_smoke.py); then
    results+=("$requirement: $result")
  else
    results+=("$requirement: FAILED $result")
    status=1
  fi
  [ ${#suite[@]} -gt 0 ] || continue
  # shellcheck disable=SC2046
  "$venv/bin/python" -m pip install --disable-pip-version-check --quiet $("$python" tools/dependencies.py test)
  "$venv/bin/python" -m pytest -q -p no:cacheprovider "${suite[@]}" | tee "$venv/suite.log" || status=1
  results+=("$requirement: $(tail -1 "$venv/suite.log")")
done

printf '\n==> one library, sha256 %.16s\n' "$sum"
printf '%s\n' "${results[@]}"
exit $status

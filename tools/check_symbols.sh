#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# One libnatten.so must load under every torch >= 2.10 and every Python: it may need libtorch_cpu and the C++ runtime,
# of torch only the C functions of the stable ABI, and nothing of CPython or CUDA.
#
#   tools/check_symbols.sh [LIBRARY]        default: the library of the installed package
set -euo pipefail
cd "$(dirname "$0")/.."

library=${1:-$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/natten/libnatten.so}
[ -f "$library" ] || { echo "no such library: $library" >&2; exit 1; }

# One a line. Versioned names such as memcpy@GLIBC_2.14 lose their version.
undefined=$(nm -D --undefined-only "$library" | awk '{print $NF}' | sed 's/@.*//')
needed=$(readelf -d "$library" | sed -n 's/.*(NEEDED).*\[\(.*\)\]/\1/p')
status=0

complain() {  # complain WHAT LINES
  [ -n "$2" ] || return 0
  printf '%s:\n%s\n' "$1" "$(sed 's/^/  /' <<< "$2")" >&2
  status=1
}

complain "undefined symbols of CPython" "$(grep -E '^_?Py[A-Z_]' <<< "$undefined" || true)"
complain "undefined symbols of CUDA" "$(grep \
  -E '^(cu[A-Z]|cuda[A-Z]|__cuda|nv[A-Z]|nccl|cublas|cudnn)' <<< "$undefined" || true)"
complain "undefined C++ symbols of torch" "$(grep -E '^_Z.*(2at|3c10|5torch)[0-9A-Z]' <<< "$undefined" || true)"
complain "needed libraries beside libtorch_cpu and the C++ runtime" "$(grep -vE \
  '^(libtorch_cpu\.so|lib(c|m|dl|pthread|rt|gcc_s|stdc\+\+)\.so(\.[0-9]+)?|ld-linux.*)$' <<< "$needed" || true)"
complain "a path of the build machine" "$(readelf -d "$library" | grep -E 'R(UN)?PATH' || true)"

shim=$(grep -cE '^(aoti_torch|torch)_' <<< "$undefined" || true)
[ "$shim" -gt 0 ] || { echo "no function of torch's stable ABI is used: is this the right library?" >&2; status=1; }
[ $status -ne 0 ] || echo "symbols: $shim functions of torch's stable ABI; needs" $needed
exit $status

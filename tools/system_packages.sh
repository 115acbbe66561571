#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Makes sure that the system has what PyPI cannot give: a C++20 compiler, Python's venv module and, for the tests,
# GoogleTest. As root on Debian or Ubuntu it installs what is missing; elsewhere it names the one command to type.
#
#   tools/system_packages.sh demo|test        exit status 0: everything is there
#
# Each requirement is tried, not looked up in a package list: a compiler in CXX or a Python from elsewhere is welcome.
set -euo pipefail

purpose=${1:-demo}
python=${PYTHON:-python3}
case $purpose in demo | test) ;; *) echo "usage: $0 demo|test" >&2 && exit 2 ;; esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

compiler() {
  local candidate
  for candidate in ${CXX:-c++ g++ clang++}; do
    command -v "$candidate" > /dev/null && echo "$candidate" && return 0
  done
  return 1
}

compiles() {  # compiles FLAGS... < program: does it build and link?
  local cxx
  cxx=$(compiler) || return 1
  "$cxx" -std=c++20 -x c++ - -o "$scratch/probe" "$@" > "$scratch/log" 2>&1
}

has_compiler() { compiles <<< '#include <compare>
#include <span>
struct P { int x; auto operator<=>(const P&) const = default; };
int main() { int a[2] = {0, 0}; return std::span<int>(a)[1] + (P{1} == P{2}); }'; }

has_gtest() { compiles -lgtest -lgtest_main -pthread <<< '#include <gtest/gtest.h>
TEST(Probe, Links) { EXPECT_TRUE(true); }'; }

has_venv() { "$python" -c 'import ensurepip, venv' 2> /dev/null; }

missing() {
  has_compiler || echo compiler
  has_venv || echo venv
  [ "$purpose" = demo ] || has_gtest || echo gtest
}

# Names of the packages that provide what is missing, for one packager: packages apt|dnf|pacman|zypper NEED...
packages() {
  local manager=$1 need
  shift
  for need in "$@"; do
    case $manager-$need in
      apt-compiler) echo g++ ;;
      apt-venv) echo python3-venv ;;
      apt-gtest) echo libgtest-dev ;;
      dnf-compiler | zypper-compiler) echo gcc-c++ ;;
      dnf-gtest) echo gtest-devel ;;
      zypper-gtest) echo gtest ;;
      pacman-compiler) echo gcc ;;
      pacman-gtest) echo gtest ;;
      *-venv) echo python3 ;;
    esac
  done
}

one_line() { local words; mapfile -t words < <("$@"); echo "${words[*]}"; }

command_for() {  # the one command that installs NEED...
  if command -v apt-get > /dev/null; then
    echo "sudo apt-get install -y $(one_line packages apt "$@")"
  elif command -v dnf > /dev/null; then
    echo "sudo dnf install -y $(one_line packages dnf "$@")"
  elif command -v pacman > /dev/null; then
    echo "sudo pacman -S --needed $(one_line packages pacman "$@")"
  elif command -v zypper > /dev/null; then
    echo "sudo zypper install $(one_line packages zypper "$@")"
  elif [ "$(uname)" = Darwin ]; then
    echo "xcode-select --install && brew install googletest"
  else
    echo "(your system's packager) install: a C++20 compiler, Python's venv module, GoogleTest"
  fi
}

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; then
  found=$("$python" --version 2> /dev/null) || found="not there"
  echo "natten needs Python >= 3.10, but $python is $found: name another one with 'make PYTHON=...'" >&2
  exit 1
fi

mapfile -t needs < <(missing)
[ ${#needs[@]} -gt 0 ] || exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
  mapfile -t wanted < <(packages apt "${needs[@]}")
  echo "Missing on this system: ${needs[*]}. Installing ${wanted[*]} with apt-get."
  export DEBIAN_FRONTEND=noninteractive
  apt-get update || echo "apt-get update failed; trying with the lists that are here" >&2
  apt-get install -y --no-install-recommends "${wanted[@]}"
  mapfile -t needs < <(missing)
  [ ${#needs[@]} -gt 0 ] || exit 0
  echo "Still missing after the installation: ${needs[*]}" >&2
  [ ! -s "$scratch/log" ] || tail -5 "$scratch/log" >&2
  exit 1
fi

echo "Missing on this system: ${needs[*]}. Type this, then the make command again:" >&2
echo "  $(command_for "${needs[@]}")" >&2
exit 1

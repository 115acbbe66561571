#!/usr/bin/env bash
# SPDX-License-Identifier: MIT
# Do the tests notice a broken operator? Breaks one thing at a time in a scratch copy (build/mutate/tree), rebuilds and
# runs a fast part of both test suites: each mutant must fail in C++ and in Python, and the unbroken copy must pass.
#
#   tools/mutate.sh [NAME...]      only these mutants; `make mutate` runs all of them
set -uo pipefail
cd "$(dirname "$0")/.."

root=$PWD
tree=$root/build/mutate/tree
logs=$root/build/mutate/logs
export PATH="$root/.venv/bin:$PATH"
# The slow and the torch-independent parts say nothing about the operator; a mutant ends at its first failure.
pytest_args=(-q -x -m "not slow" -p no:cacheprovider tests/python/test_windows.py tests/python/test_gradients.py)
export GTEST_FAIL_FAST=1 GTEST_FILTER='-*Determinism*:*Containment.Backward*'
ctest_args=(--stop-on-failure --no-tests=error -E "fuzz|install|declarations|example")

# name | file, below the root | sed expression | what it breaks
mutants() {
  cat << 'END'
window-even|include/natten/neighborhood.h|s|g.window - 1 : g.window / 2;|g.window - 1 : (g.window - 1) / 2;|an even window reaches to the right instead
window-border|include/natten/neighborhood.h|s|return {begin, begin + g.window};|return {begin, detail::min(begin + g.window, leader + (g.window + 1) / 2)};|a window is cut at the near border, not shifted
window-inverse|include/natten/neighborhood.h|s|p - g.window + 1 + reach_before(g)|p - g.window + 2 + reach_before(g)|query_span misses its first query: wrong dk and dv only
dilation-groups|include/natten/neighborhood.h|s|by_dilation.quotient(a.extent - r - 1) + 1|detail::max(by_dilation.quotient(a.extent - 0 * r), 1)|groups of unequal length lose their last token
dilation-window|include/natten/neighborhood.h|s|const int window = detail::min(a.window, extent);|const int window = detail::min(a.window, detail::max(extent - (a.dilation > 1 \&\& a.window > 0), 1));|with dilation, a window as long as its group loses a key
causal-future|include/natten/neighborhood.h|s|reach_before(g), 0), p + 1}|reach_before(g), 0), detail::min(p + 2, g.extent)}|a causal query sees one key of the future
causal-stride|include/natten/neighborhood.h|s|g.causal ? g.stride - 1 : g.stride / 2|g.stride / 2|a causal stride group follows its middle
bias-index|include/natten/neighborhood.h|s|return key - query + a.window - 1;|return query - key + a.window - 1;|the bias table is read backwards
lse-reference|src/reference/attention.cpp|s|p.head_dim_v) - dlse;|p.head_dim_v) + 0 * dlse;|the oracle drops the gradient of lse
lse-cpu-loops|src/cpu/loops.cpp|s|(args.dlse ? sum_at|(args.dlse \&\& p.head_dim < 0 ? sum_at|the plain loops drop the gradient of lse
lse-cpu-sliding|src/cpu/sliding_backward.cpp|s|if (dlse) delta\[lane\] -=|if (dlse) delta[lane] +=|the sliding kernel has the wrong sign on the gradient of lse
lse-torch|python/natten/_ops.py|s|run_backward(na_bwd, dout, dlse, x|run_backward(na_bwd, dout, None, x|autograd drops the gradient of lse (Python only)
END
}

fresh_tree() {
  mkdir -p "$tree" "$logs"
  # Only files whose content changed are touched, so that the next build is incremental.
  git ls-files -co --exclude-standard -z | while IFS= read -r -d '' file; do
    [ -f "$file" ] || continue
    cmp -s "$file" "$tree/$file" || { mkdir -p "$tree/$(dirname "$file")" && cp "$file" "$tree/$file"; }
  done
  # A mutant that the compiler stops says nothing about the tests that run: those must notice it by themselves.
  sed -i '/^static_assert(natten::.*;$/d' "$tree"/tests/cpp/*.cpp
}

build() {
  (cd "$tree" && cmake --preset dev && cmake --build --preset dev) > "$logs/$1.build.log" 2>&1
}

run_ctest() {
  (cd "$tree" && ctest --preset dev "${ctest_args[@]}") > "$logs/$1.ctest.log" 2>&1
}

run_pytest() {
  (cd "$tree" && NATTEN_LIBRARY=$tree/build/dev/libnatten.so PYTHONPATH=$tree/python \
    python -m pytest "${pytest_args[@]}") > "$logs/$1.pytest.log" 2>&1
}

row() { printf '%-18s %-8s %-8s %-8s %s\n' "$@"; }

fresh_tree
row mutant build ctest pytest "what is broken"
begin=$SECONDS
build unbroken || { tail -20 "$logs/unbroken.build.log"; echo "the unbroken copy does not build"; exit 1; }
for suite in ctest pytest; do
  "run_$suite" unbroken || { tail -20 "$logs/unbroken.$suite.log"; echo "the unbroken copy fails in $suite"; exit 1; }
done
row unbroken ok pass pass "nothing ($((SECONDS - begin)) s)"

status=0
count=0
while IFS='|' read -r name file command_s from to what; do
  expression="$command_s|$from|$to|"
  [ $# -eq 0 ] || [[ " $* " == *" $name "* ]] || continue
  count=$((count + 1))
  fresh_tree
  sed -i "$expression" "$tree/$file"
  if cmp -s "$file" "$tree/$file"; then
    row "$name" - - - "NOTHING: its sed expression changes nothing in $file"
    status=1
    continue
  fi
  begin=$SECONDS
  built=ok cpp=- py=-
  if build "$name"; then
    case $file in
      python/*) cpp=killed ;;  # no C++ changed: nothing for ctest to notice
      *) run_ctest "$name" && cpp=SURVIVES || cpp=killed ;;
    esac
    run_pytest "$name" && py=SURVIVES || py=killed
  else
    built=FAILS  # a mutant that does not compile proves nothing about the tests
  fi
  [ "$built $cpp $py" = "ok killed killed" ] || status=1
  row "$name" "$built" "$cpp" "$py" "$what ($((SECONDS - begin)) s)"
done < <(mutants)

fresh_tree
[ "$count" -gt 0 ] || { echo "no mutant of that name"; exit 2; }
[ $status -eq 0 ] && echo "all $count mutants were noticed" || echo "NOT all mutants were noticed: see build/mutate/logs"
exit $status

#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under nine minutes: build, GPU tests, compute-sanitizer, benches.
# Usage: bash bench/gpu_check.sh [--dry-run]. Results go to $OUT (default build/gpu_check) as logs and JSON, with a table last.
#
# Needs python3 with torch, pybind11, setuptools and pytest, and nvcc; fetches nothing. --dry-run prints the commands.
# A stage that fails is counted, the others still run. Not here: the GPU's settings, which are left alone.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD
dry=${1-}
mkdir -p "$OUT"
failed=0
summary=()

# stage NAME SECONDS COMMAND...: its output in $OUT/NAME.log
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  if [ "$dry" = --dry-run ]; then
    printf '%-10s %4ss  %s\n' "$name" "$limit" "$*"
    return
  fi
  timeout "$limit" "$@" >"$OUT/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  summary+=("$(printf '%-10s exit %3d  %4d s  %s' "$name" $status $((SECONDS - begin)) "$(tail -n 1 "$OUT/$name.log" | cut -c1-90)")")
}

# bench NAME SECONDS ARGUMENTS...: floor and copy of the same run, both GPU backends, JSON with device, driver, versions, date
bench() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$PYTHON" -m pyoffline bench --device cuda --json "$OUT/$name.json" "$@"
}

files=(tests/test_gpu_*.py tests/test_benchmarks_device.py)
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider -m gpu)
sanitizer="compute-sanitizer --error-exitcode 9 --tool"

stage build 95 env PYOFFLINE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
# Both backends must be there: a test of a backend that is not is skipped, and a skipped check is no check.
stage backends 30 "$PYTHON" -c "import pyoffline as po; from pyoffline.backends import why_not; print(po.backends()); assert not (why_not('cuda', 'cuda') or why_not('triton', 'cuda'))"
# The backends side by side: Triton's tests mostly compile, on the host.
# shellcheck disable=SC2016
stage tests 145 bash -c 'log=$0
  "$@" -k "not triton" >"$log-cuda.log" 2>&1 & first=$!
  "$@" -k triton >"$log-triton.log" 2>&1
  second=$?
  wait $first
  first=$?
  tail -n 2 "$log-cuda.log" "$log-triton.log"
  exit $((first | second))' "$OUT/tests" "${pytest[@]}" -rs "${files[@]}"
# Small rows only: the checkers are slow.
# shellcheck disable=SC2086
stage memcheck 35 $sanitizer memcheck "${pytest[@]}" -x tests/test_gpu_numbers_2.py -k "agrees"
# shellcheck disable=SC2086
stage racecheck 35 $sanitizer racecheck "${pytest[@]}" -x tests/test_gpu_numbers_2.py -k "agrees and 300"
# Shapes and bars of DESIGN.md section 7. What a cut-off stage has finished is in its JSON.
bench bars 70 --op linear_policy_loss linear_token_logps scoring --rounds 5 --no-peers --budget
bench large 40 --op linear_policy_loss --shape 8192,4096,151936 8192,896,151936 --rounds 5 --no-peers --no-memory --budget
# The same with the GEMM's epilogue in place of the row pass (kernels/epilogue_rows.py).
PYOFFLINE_TRITON_EPILOGUE=1 bench epilogue 30 --op linear_policy_loss --rounds 5 --no-peers --no-memory --budget
bench peers 35 --op linear_cross_entropy --rounds 3 --budget
stage rows 20 "$PYTHON" bench/gpu_row_pass.py --rounds 11 --json "$OUT/rows.json"

[ "$dry" = --dry-run ] && exit 0
for name in bars large epilogue peers rows; do
  printf '\n== %s\n' "$name"
  cat "$OUT/$name.log"
done
printf '%s\n' "${summary[@]}"
echo "$failed stages failed"
exit "$failed"

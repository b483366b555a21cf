#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under nine minutes: build, GPU tests, compute-sanitizer, benches.
# Usage: bash bench/gpu_check.sh [--dry-run] [STAGE...]. No STAGE means all of them; --dry-run prints the commands.
#
# $OUT (default build/gpu_check) gets the JSON of the benches, summary.txt, and logs.tar.gz with every stage's output, all of them
# written again after each stage: what is there when the time runs out is whole. Needs python3 with torch, pybind11, setuptools and
# pytest, and nvcc; uses pytest-xdist where it is installed; fetches nothing. A stage that fails is counted, the others still run.
# PYOFFLINE_COMMIT names the commit where .git is not at hand. Not here: the GPU's settings, which are left alone.
set -u
cd "$(dirname "$0")/.."
OUT=${OUT:-build/gpu_check}
LOGS=$(mktemp -d)
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD
command -v nvcc >/dev/null || export CUDA_HOME=${CUDA_HOME:-/usr/local/cuda}
dry=
[ "${1-}" = --dry-run ] && dry=yes && shift
wanted=" $* "
mkdir -p "$OUT"
failed=0

# stage NAME SECONDS COMMAND...: its output in the logs. An interrupt first: pytest then still prints what failed.
stage() {
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  case $wanted in "  " | *" $name "*) ;; *) return ;; esac
  if [ "$dry" ]; then
    printf '%-10s %4ss  %s\n' "$name" "$limit" "$*"
    return
  fi
  timeout -s INT -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  [ $status -eq 0 ] || failed=$((failed + 1))
  printf '%-10s exit %3d  %4d s  %s\n' "$name" $status $((SECONDS - begin)) "$(tail -n 1 "$LOGS/$name.log" | cut -c1-90)" >>"$LOGS/summary.txt"
  cp "$LOGS/summary.txt" "$OUT"
  tar czf "$OUT/logs.tar.gz" -C "$LOGS" .
}

# bench NAME SECONDS ARGUMENTS...: floor and copy of the same run, both GPU backends, JSON with device, driver, versions, date
bench() {
  local name=$1 limit=$2
  shift 2
  stage "$name" "$limit" "$PYTHON" -m pyoffline bench --device cuda --json "$OUT/$name.json" "$@"
}

files=(tests/test_gpu_*.py tests/test_benchmarks_device.py)
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider --tb=short -m gpu)
# Triton's tests mostly compile, on the host. What takes several GiB runs alone.
many=()
"$PYTHON" -c "import xdist" 2>/dev/null && many=(-n "${JOBS:-12}" --dist worksteal)
sanitizer=(compute-sanitizer --error-exitcode 9 --report-api-errors no --tool)

stage build 80 env PYOFFLINE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
# Both backends must be there: a test of a backend that is not is skipped, and a skipped check is no check.
stage backends 20 "$PYTHON" -c "import pyoffline as po; from pyoffline.backends import why_not; print(po.backends()); assert not (why_not('cuda', 'cuda') or why_not('triton', 'cuda'))"
stage tests 150 "${pytest[@]}" "${many[@]}" -rs -k "not n13 and not N13" "${files[@]}"
stage huge 25 "${pytest[@]}" -rs -k "n13 or N13" "${files[@]}"
# Small rows only, of one block and of a cluster: the checkers are slow.
stage memcheck 35 "${sanitizer[@]}" memcheck "${pytest[@]}" -x tests/test_gpu_numbers_2.py -k "agrees and not 4097"
stage racecheck 35 "${sanitizer[@]}" racecheck "${pytest[@]}" -x tests/test_gpu_numbers_2.py -k "agrees and (300 or 32000) and not 16"
# Shapes and bars of DESIGN.md section 7. What a cut-off stage has finished is in its JSON.
bench bars 65 --op linear_policy_loss linear_token_logps scoring --rounds 5 --no-peers --budget
bench wide 35 --op linear_policy_loss --shape 8192,4096,151936 8192,896,151936 --rounds 5 --no-peers --no-memory --budget
# The same with the GEMM's epilogue in place of the row pass (kernels/epilogue_rows.py).
PYOFFLINE_TRITON_EPILOGUE=1 bench epilogue 25 --op linear_policy_loss --rounds 5 --no-peers --no-memory --budget
bench peers 50 --op linear_cross_entropy --rounds 3 --no-memory --budget
stage rows 15 "$PYTHON" bench/gpu_row_pass.py --rounds 11 --json "$OUT/rows.json"

[ "$dry" ] && exit 0
for name in bars wide epilogue peers rows; do
  [ -f "$LOGS/$name.log" ] && printf '\n== %s\n' "$name" && cat "$LOGS/$name.log"
done
cat "$LOGS/summary.txt"
echo "$failed stages failed"
exit "$failed"

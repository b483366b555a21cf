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

stage machine 20 "$PYTHON" -c "import torch, json; p = torch.cuda.get_device_properties(0); print(json.dumps({'gpu': p.name, 'sms': p.multi_processor_count, 'l2': p.L2_cache_size, 'torch': torch.__version__, 'cuda': torch.version.cuda}))"
stage build 200 env PYOFFLINE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
stage tests 150 "$PYTHON" -m pytest -q -m gpu tests
# Small rows only: the checkers are slow.
stage memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m pytest -q -x tests -m gpu -k "agrees and (-7 or -300 or -4097)"
stage racecheck 60 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m pytest -q -x tests -m gpu -k "agrees and -300"
stage bandwidth 60 "$PYTHON" bench/gpu_row_pass.py --json "$OUT/row_pass.json"

[ "$dry" = --dry-run ] && exit 0
cat "$OUT/bandwidth.log" 2>/dev/null | tail -n 20
printf '%s\n' "${summary[@]}"
echo "$failed stages failed"
exit "$failed"

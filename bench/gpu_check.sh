#!/usr/bin/env bash
# Everything that only a GPU can tell, in one command and under nine minutes: build, GPU tests, benches, compute-sanitizer.
# Usage: bash bench/gpu_check.sh [--dry-run] [STAGE...]. No STAGE means all of them; --dry-run prints the commands.
#
# $OUT (default build/gpu_check) gets a folder named after the GPU with the JSON of the benches, summary.txt, and logs.tar.gz with
# every stage's output, all of them written again after each stage: what is there when the time runs out is whole. What a first run
# must tell comes first. Needs python3 with torch, pybind11, setuptools and pytest, and nvcc; uses pytest-xdist where it is
# installed; fetches nothing. A stage that fails is counted, the others still run. PYOFFLINE_COMMIT names the commit where .git is
# not at hand. Not here: the GPU's settings, which are left alone.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
# nvcc and compute-sanitizer where the toolkit was not put on PATH
for folder in bin compute-sanitizer; do PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/$folder; done
dry=
[ "${1-}" = --dry-run ] && dry=yes && shift
wanted=" $* "
failed=0
# An H100's results and an H200's never share a file.
gpu=$(nvidia-smi --query-gpu=name,driver_version --format=csv,noheader 2>/dev/null | head -n 1)
name=$(printf %s "${gpu%%,*}" | tr -cs 'A-Za-z0-9.\n' '-')
OUT=${OUT:-build/gpu_check}/${name:-unnamed}
LOGS=$(mktemp -d)
if [ ! "$dry" ]; then
  mkdir -p "$OUT"
  commit=${PYOFFLINE_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null)}
  echo "${gpu:-unnamed GPU}; commit ${commit:-unknown}; $(date -u +%FT%TZ)" >"$LOGS/summary.txt"
fi

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
sanitizer=(compute-sanitizer --error-exitcode 9 --report-api-errors no --target-processes all --tool)
agrees=("${pytest[@]}" -x tests/test_gpu_numbers_2.py -k)

stage build 60 env PYOFFLINE_CUDA=1 "$PYTHON" setup.py build_ext --inplace
# Both backends must be there: a test of a backend that is not is skipped, and a skipped check is no check.
stage backends 35 "$PYTHON" -c "import pyoffline as po; from pyoffline.backends import why_not; print(po.backends()); assert not (why_not('cuda', 'cuda') or why_not('triton', 'cuda'))"
stage tests 120 "${pytest[@]}" ${many[@]+"${many[@]}"} -rs -k "not n13 and not N13" "${files[@]}"
stage rows 20 "$PYTHON" bench/gpu_row_pass.py --rounds 11 --json "$OUT/rows.json"
# Shapes and bars of DESIGN.md section 7. What a cut-off stage has finished is in its JSON.
bench bars 60 --op linear_policy_loss linear_token_logps scoring --rounds 5 --no-peers --budget
# Small rows only, of one block and of a cluster: the checkers are slow.
stage memcheck 30 "${sanitizer[@]}" memcheck "${agrees[@]}" "agrees and not 4097"
stage racecheck 30 "${sanitizer[@]}" racecheck "${agrees[@]}" "agrees and (300 or 32000) and not 16"
stage synccheck 20 "${sanitizer[@]}" synccheck "${agrees[@]}" "agrees and (300 or 32000) and not 16"
bench wide 30 --op linear_policy_loss --shape 8192,4096,151936 8192,896,151936 --rounds 5 --no-peers --no-memory --budget
stage huge 25 "${pytest[@]}" -rs -k "n13 or N13" "${files[@]}"
# The same with the GEMM's epilogue in place of the row pass (kernels/epilogue_rows.py).
PYOFFLINE_TRITON_EPILOGUE=1 bench epilogue 20 --op linear_policy_loss --rounds 5 --no-peers --no-memory --budget
# Which tile SCORE_TILES should name: most of it is compilation.
stage tiles 45 "$PYTHON" bench/gpu_score_tiles.py --json "$OUT/tiles.json"
bench peers 45 --op linear_cross_entropy --rounds 3 --no-memory --budget

[ "$dry" ] && exit 0
for name in rows bars wide epilogue peers; do
  [ -f "$LOGS/$name.log" ] && printf '\n== %s\n' "$name" && cat "$LOGS/$name.log"
done
for name in build backends tests huge memcheck racecheck synccheck; do
  [ -f "$LOGS/$name.log" ] && grep -hE '^(FAILED|ERROR|E  )|^=+ (ERROR SUMMARY|RACECHECK SUMMARY)|[Ee]rror:' "$LOGS/$name.log" | cut -c1-200 | head -n 20
done
cat "$LOGS/summary.txt"
echo "$failed stages failed"
exit "$failed"

#!/usr/bin/env bash
# The CUDA row algorithm on CPU threads under the sanitizers: sanitize.sh FOLDER. Non-zero on the first report.
# Not here: the run in the tests (test_cuda_row_pass.py), which is ThreadSanitizer alone.
set -euo pipefail
out=${1:?usage: sanitize.sh FOLDER}
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$out"
build() {
  local name=$1
  shift
  ${CXX:-g++} -std=c++20 -O1 -g -fno-math-errno -pthread -Wno-unknown-pragmas "$@" "$here/race_driver.cpp" -o "$out/$name"
}
build thread -fsanitize=thread
TSAN_OPTIONS=halt_on_error=1 "$out/thread"
if TSAN_OPTIONS=halt_on_error=1 "$out/thread" fault >"$out/fault.log" 2>&1; then
  echo "the run without cluster barriers was not reported" >&2
  exit 1
fi
echo "TSan: clean, and a missing cluster barrier is found"
build address -fsanitize=address,undefined -fno-sanitize-recover=all
"$out/address"
echo "ASan and UBSan: clean"

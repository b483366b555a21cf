#!/usr/bin/env bash
# Sanitizer runs: sanitize.sh FOLDER [PYTHON]. Ends with non-zero on the first report.
#
# 1. ASan + UBSan: the kernels without Python, on buffers of the exact size. 2. TSan: the same with std::thread in the
# place of libgomp, whose barriers TSan cannot see. 3. With PYTHON (numpy and pybind11, no torch): the extension module
# itself under ASan, on numpy buffers.
set -euo pipefail
out=${1:?usage: sanitize.sh FOLDER [PYTHON]}
python=${2-}
here=$(cd "$(dirname "$0")" && pwd)
cpu=$here/../../csrc/cpu
CXX=${CXX:-g++}

declare -A isa_flags=(
  [distill_avx2]="-mavx2 -mfma -mf16c"
  [distill_avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
  [row_pass_avx2]="-mavx2 -mfma -mf16c"
  [row_pass_avx512]="-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c"
)

# build NAME FLAGS...: all kernels and the driver with these flags into $out/NAME
build() {
  local folder=$out/$1 source stem
  shift
  mkdir -p "$folder"
  for source in "$cpu"/*.cpp "$here/sanitize_driver.cpp"; do
    stem=$(basename "$source" .cpp)
    # shellcheck disable=SC2086
    [ "$folder/$stem.o" -nt "$source" ] ||
      $CXX -O1 -g -std=c++17 -DPYOFFLINE_POISON_SCRATCH -fno-math-errno -fno-omit-frame-pointer ${isa_flags[$stem]-} "$@" -c "$source" -o "$folder/$stem.o"
  done
  # exported, so that the stand-ins for the vendor GEMMs are found by dlsym
  $CXX -rdynamic "$@" "$folder"/*.o -ldl -o "$folder/driver"
}

rm -rf "$out"
undefined="-fsanitize=undefined -fno-sanitize-recover=all"
# shellcheck disable=SC2086
build address -fopenmp -fsanitize=address $undefined
ASAN_OPTIONS=detect_leaks=1 "$out/address/driver" 600
echo "ASan and UBSan: clean"

build thread -fopenmp -fsanitize=thread -DPYOFFLINE_STD_THREADS
TSAN_OPTIONS=halt_on_error=1 "$out/thread/driver" 150
echo "TSan: clean"

if [ -n "$python" ]; then
  cd "$here/../.."
  PYOFFLINE_CUDA=0 PYOFFLINE_CXXFLAGS="-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all" \
    "$python" setup.py -q build_ext --build-temp "$out/module-objects" --build-lib "$out/module"
  # Python itself is not built for ASan: the runtime is loaded first, and its own leaks are not ours.
  LD_PRELOAD="$($CXX -print-file-name=libasan.so) $($CXX -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    "$python" "$here/asan_numpy.py" "$out"/module/pyoffline/_C*.so
  echo "ASan on the module: clean"
fi

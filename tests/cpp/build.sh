#!/bin/sh
# Builds row_pass_test and row_pass_time into $1 (a scratch folder) with the flags of setup.py, without Python. Extra flags: $CXXFLAGS.
# Fails when an object compiled for a wider instruction set defines a weak symbol, which the linker could pick elsewhere.
set -e
out=${1:?usage: build.sh FOLDER}
cpu=$(dirname "$0")/../../csrc/cpu
mkdir -p "$out"
compile() {
  source=$1
  shift
  ${CXX:-g++} -O3 -std=c++17 -fopenmp -fno-math-errno -Wall -Wextra "$@" ${CXXFLAGS-} -c "$source" -o "$out/$(basename "$source" .cpp).o"
}
for kernel in row_pass distill; do
  compile "$cpu/${kernel}_portable.cpp"
  compile "$cpu/${kernel}_avx2.cpp" -mavx2 -mfma -mf16c
  compile "$cpu/${kernel}_avx512.cpp" -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
done
for name in row_pass dispatch parallel; do compile "$cpu/$name.cpp"; done
mkdir -p "$out/kernel"
mv "$out"/*.o "$out/kernel"
if [ -z "${CXXFLAGS-}" ] && nm -C "$out"/kernel/*_avx*.o "$out"/kernel/*_portable.o | grep " [VWu] "; then
  echo "weak symbols in an ISA object" >&2
  exit 1
fi
for name in row_pass_test row_pass_time; do
  compile "$(dirname "$0")/$name.cpp"
  ${CXX:-g++} -fopenmp ${CXXFLAGS-} "$out/$name.o" "$out"/kernel/*.o -o "$out/$name"
done

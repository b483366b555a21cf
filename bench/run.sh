#!/bin/sh
# The CPU measurements behind bench/results/cpu, by stage; what they take is in bench/results/README.md.
# Usage: sh bench/run.sh [bars | peers | fp32 | flat | all] [FOLDER]
# Not here: the measuring (pyoffline/benchmarks). `bars` before `peers`: a later record replaces an earlier one.
set -u
stage=${1:-all}
folder=${2:-bench/results/cpu}
status=0
fused="linear_policy_loss linear_cross_entropy"

bench() {
  python -m pyoffline bench --save "$folder" "$@" || status=1
}
wants() {
  [ "$stage" = all ] || [ "$stage" = "$1" ]
}

if wants bars; then
  bench --op row_pass scoring --shape all --rounds 7 --no-peers
  bench --op linear_policy_loss --shape all --rounds 5 --no-peers
  bench --op linear_cross_entropy frozen_head linear_token_logps --shape all --rounds 3 --no-peers
fi
if wants peers; then
  # shellcheck disable=SC2086
  bench --op $fused --shape all --rounds 5
  bench --op scoring --shape 1024,896,151936 --rounds 5
fi
if wants fp32; then
  # shellcheck disable=SC2086
  bench --op $fused row_pass --shape all --dtype fp32 --rounds 3
fi
if wants flat; then
  bench --op linear_policy_loss --shape 16384,896,151936 --no-time --no-peers
fi
exit $status

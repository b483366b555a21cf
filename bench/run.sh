#!/bin/sh
# The whole CPU measurement of bench/results/cpu, in the order that fails early. Run it on a quiet machine; expected
# durations are in bench/results/README.md. Usage: sh bench/run.sh [FOLDER]
set -u
folder=${1:-bench/results/cpu}
status=0
bench() { python -m pyoffline bench --save "$folder" "$@" || status=1; }

bench --op row_pass --shape all --dtype bf16 fp32 --rounds 7
bench --op scoring frozen_head linear_token_logps --shape all --rounds 5 --no-peers
bench --op linear_policy_loss linear_cross_entropy --shape all --dtype bf16 fp32 --rounds 5
bench --op linear_policy_loss --shape 16384,896,151936 --no-time --no-peers
exit $status

"""The table of what `--op` may name. One module per op; `row_pass` has its own runner."""

from pyoffline.benchmarks import (
    linear_cross_entropy,
    linear_distill_loss,
    linear_policy_loss,
    linear_token_logps,
)

MODULES = (linear_policy_loss, linear_cross_entropy, linear_token_logps, linear_distill_loss)
CASES = {case.name: case for module in MODULES for case in module.CASES}
ROW_PASS = "row_pass"  # noqa: S105  not a password
NAMES = (*CASES, ROW_PASS)

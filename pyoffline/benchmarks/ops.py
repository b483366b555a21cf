"""The table of what `--op` may name. One module per op; `row_pass` has its own runner."""

from pyoffline.benchmarks import linear_cross_entropy, linear_policy_loss, linear_token_logps

CASES = {
    case.name: case
    for module in (linear_policy_loss, linear_cross_entropy, linear_token_logps)
    for case in module.CASES
}
ROW_PASS = "row_pass"  # noqa: S105  not a password
NAMES = (*CASES, ROW_PASS)

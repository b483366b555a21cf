"""The Triton backend: the kernels of `pyoffline.kernels` inside `gpu_rows.py`.

NVIDIA sm_80 and later, AMD gfx942 and later; under TRITON_INTERPRET=1 also CPU tensors, for tests.
Not here: the kernels, what GPU backends share.
"""

import math
import os

import torch

from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult, RowOutputs
from pyoffline.device_flags import flag_of
from pyoffline.gpu_rows import GpuRows, run_linear_call, run_logits_call
from pyoffline.kernels import epilogue_rows
from pyoffline.kernels.configs import ROW_UNIT
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.scale_by_upstream import scale_by_upstream as scale_by_upstream
from pyoffline.kernels.score_rows import score_rows, sums_nbytes
from pyoffline.plan import PlanSettings

# PYOFFLINE_TRITON_EPILOGUE=1: training chunks of `epilogue_rows.py`, 6 bytes per logit and not 10.
# Off until a benchmark on a GPU shows it faster than the vendor's GEMM and a row pass.
EPILOGUE = os.environ.get("PYOFFLINE_TRITON_EPILOGUE", "0") == "1"
# Rows that one launch of `score_rows` takes at most: its sums stay within 64 MiB at V = 262,144.
SCORE_ROWS = 8192


def _outputs(out: RowOutputs) -> tuple:
    """In the kernels' order; None where not wanted."""
    top1 = None if out.is_top1 is None else out.is_top1.view(torch.uint8)
    return (out.loss, out.logps, out.entropy, out.lse, out.log_sum_p2, top1, out.gap, out.coefs)


class TritonKernels(GpuRows):
    """The steps of the chunk loop with the Triton row pass."""

    def launch(self, logits, dlogits, rows, out, scale, is_lifted=False):
        flag = flag_of(logits.device)
        row_pass(logits, dlogits, rows, _outputs(out), flag, scale, is_lifted=is_lifted)

    def fold(self, call, hidden, rows, out, exps):
        """The GEMM's epilogue in place of the row pass, where it is asked for and serves."""
        if not (EPILOGUE and epilogue_rows.serves(call)):
            return None
        kernels = _Folding(call)
        kernels.run_rows(hidden, exps, rows, out)
        return kernels.factor

    def score(self, call, hidden, rows, out):
        """Rows without gradient, their logits never stored; `score_rows.py` rounds a logit where
        the GEMM of a training pass does.

        False, so that logits are stored in chunks: with an adapter on the head, whose second
        product is not in the kernel; in deterministic mode, which promises the bits of the training
        pass, and so its GEMM; with given coefficients, which no call without gradients has.
        """
        if call.plan.deterministic or call.adapter_weight is not None or rows.coefs is not None:
            return False
        kernels = _Scoring(call)
        size = score_block(call.plan, hidden.shape[0], call.weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            cut = slice(start, start + size)
            part = rows.map(lambda v, cut=cut: v[cut])
            results = out.map(lambda v, cut=cut: v[..., cut])
            kernels.run_rows(hidden[cut], None, part, results)
        return True


class _Scoring(GpuRows):
    """`launch` on hidden states in place of logits."""

    def __init__(self, call: LinearCall):
        self.call = call

    def launch(self, hidden, dlogits, rows, out, scale):
        flag = flag_of(hidden.device)
        score_rows(hidden, self.call.weight, rows, _outputs(out), flag, self.call.logits_dtype)


class _Folding(GpuRows):
    """`launch` on hidden states, with exponentials in place of dlogits; leaves their `factor`."""

    def __init__(self, call: LinearCall):
        self.call = call

    def launch(self, hidden, exps, rows, out, scale):
        flag, weight = flag_of(hidden.device), self.call.weight
        self.factor = epilogue_rows.epilogue_rows(hidden, weight, rows, _outputs(out), flag, exps)


def score_block(plan: PlanSettings, count: int, vocab: int) -> int:
    """Rows of a launch: what the overrides allow, evenly cut, in ROW_UNITs: the next block's
    pointers are then aligned as this one's, and no kernel is compiled anew for them.
    """
    if plan.rows:
        return plan.rows
    limit = SCORE_ROWS
    if plan.budget:
        limit = min(limit, max(1, plan.budget // sums_nbytes(vocab) // ROW_UNIT) * ROW_UNIT)
    each = math.ceil(count / math.ceil(count / limit))
    return math.ceil(each / ROW_UNIT) * ROW_UNIT


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the Triton backend."""
    return run_linear_call(TritonKernels(), call)


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits on the Triton backend."""
    return run_logits_call(TritonKernels(), call)

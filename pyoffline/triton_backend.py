"""The Triton backend: the row pass of `pyoffline.kernels` inside `gpu_rows.py`.

NVIDIA sm_80 and later, AMD gfx942 and later; under TRITON_INTERPRET=1 also CPU tensors, for tests.
Not here: the kernels, what GPU backends share.
"""

import torch

from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult
from pyoffline.device_flags import flag_of
from pyoffline.gpu_rows import GpuRows, run_linear_call, run_logits_call
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.scale_by_upstream import scale_by_upstream as scale_by_upstream


class TritonKernels(GpuRows):
    """The steps of the chunk loop with the Triton row pass."""

    def launch(self, logits, dlogits, rows, out, scale, is_lifted=False):
        top1 = None if out.is_top1 is None else out.is_top1.view(torch.uint8)
        stats = (out.logps, out.entropy, out.lse, out.log_sum_p2, top1)
        outputs = (out.loss, *stats, out.gap, out.coefs)
        row_pass(logits, dlogits, rows, outputs, flag_of(logits.device), scale, is_lifted=is_lifted)


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the Triton backend."""
    return run_linear_call(TritonKernels(), call)


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits on the Triton backend."""
    return run_logits_call(TritonKernels(), call)

"""The CUDA backend: the row pass of csrc/cuda inside `gpu_rows.py`.

Compute capability 8.0 and later. The kernel goes to the current stream of the tensors' device,
returns at once and may be captured. Not here: the kernel, what GPU backends share.
"""

import torch
from torch import Tensor

from pyoffline import _C
from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult
from pyoffline.cpu import row_arguments
from pyoffline.device_flags import flag_of
from pyoffline.gpu_rows import GpuRows, run_linear_call, run_logits_call


def stream_of(device: torch.device) -> int:
    """The current stream of this device, as cudaStream_t."""
    return torch.cuda.current_stream(device).cuda_stream


class CudaKernels(GpuRows):
    """The steps of the chunk loop with the CUDA row pass."""

    def launch(self, logits, dlogits, rows, out, scale):
        arguments = row_arguments(rows, out)
        del arguments["threads"]
        _C.cuda_row_pass(
            logits,
            rows.labels,
            dlogits=dlogits,
            **arguments,
            codes=tuple(rows.codes),
            hyper=rows.hyper,
            coefs=rows.coefs,
            loss=out.loss,
            gap=out.gap,
            coefs_out=out.coefs,
            stream=stream_of(logits.device),
            bad_label=flag_of(logits.device),
            device_scale=None if scale is None else scale.reshape(1),
        )


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the CUDA backend."""
    return run_linear_call(CudaKernels(), call)


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits on the CUDA backend."""
    return run_logits_call(CudaKernels(), call)


def scale_by_upstream(grad: Tensor, upstream: Tensor) -> Tensor:
    """grad *= upstream in place: grad any contiguous bf16, fp16 or fp32 tensor, upstream one float
    on its device, read there.
    """
    device = grad.device
    factor = upstream.reshape(1).float()
    _C.cuda_scale_by_upstream(grad.view(-1), factor, stream=stream_of(device))
    return grad

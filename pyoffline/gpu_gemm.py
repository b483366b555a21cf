"""The GEMMs of the chunk loop on a GPU: torch's, with fp32 sums inside, for every GPU backend.

bf16 and fp16 products that must come out in fp32 (dhidden, the dweight accumulator, fp32 logits)
use `out_dtype`, which torch has on CUDA devices since 2.8; elsewhere (older torch, the Triton
interpreter on CPU tensors) panels are widened to fp32 (`panel_gemm.py`): the same numbers, slowly.
Not here: the row pass, the chunk loop.
"""

import torch
from torch import Tensor

from pyoffline import panel_gemm
from pyoffline.calls import LinearCall, stats_dtype
from pyoffline.chunk_loop import NoShortcuts, WeightGrad, is_one
from pyoffline.kernels.configs import ROW_UNIT

ADDS_WIDE = (2, 11)  # torch before it wants the accumulator in the type of the factors
PANEL = 16384  # rows of the weight at a time where a second product is added, or a cast is due


def has_wide_gemm(x: Tensor) -> bool:
    """Whether torch multiplies this 16-bit tensor into fp32 without widening it."""
    return x.is_cuda and "dtype_out" in torch.ops.aten.mm.overloads()


def wide_mm(a: Tensor, b: Tensor, out: Tensor, beta: float = 0.0) -> Tensor:
    """out fp32 = a @ b + beta * out, both of one dtype."""
    if a.dtype == out.dtype:
        return out.addmm_(a, b, beta=beta)
    if has_wide_gemm(a):
        if beta == 0.0:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        if torch.__version__ >= ADDS_WIDE:
            return torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, out=out)
        for start in range(0, out.shape[0], PANEL):
            cut = slice(start, start + PANEL)
            part = torch.mm(a[cut], b, out_dtype=out.dtype)
            out[cut] = part.add_(out[cut], alpha=beta)
        return out
    return out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=beta)


class GpuGemm(NoShortcuts):
    """The steps of `chunk_loop.Kernels` that are GEMMs and reductions; a backend adds row_pass."""

    device = "cuda"
    asynchronous = True

    def empty(self, shape, dtype, device):
        return torch.empty(shape, dtype=dtype, device=device)

    scratch = empty

    def buffer(self, rows, vocab, dtype, device):
        stride = -(-vocab // ROW_UNIT) * ROW_UNIT
        return self.empty((rows, stride), dtype, device)[:, :vocab]

    def logits(self, call: LinearCall, hidden, adapter, out):
        if adapter is None and out.dtype == hidden.dtype:
            torch.mm(hidden, call.weight.t(), out=out)
        elif adapter is None and has_wide_gemm(hidden):
            torch.mm(hidden, call.weight.t(), out_dtype=out.dtype, out=out)
        else:
            self._summed_logits(call, hidden, adapter, out)

    def _summed_logits(self, call, hidden, adapter, out):
        """Products that are added in fp32 before the one rounding, a panel at a time."""
        for start in range(0, out.shape[1], PANEL):
            cut = slice(start, start + PANEL)
            part = self.empty((out.shape[0], out[:, cut].shape[1]), torch.float32, out.device)
            wide_mm(hidden, call.weight[cut].t(), part)
            if adapter is not None:
                wide_mm(adapter, call.adapter_weight[cut].t(), part, beta=1.0)
            out[:, cut] = part

    def dhidden(self, dlogits, weight, spare=None):
        shape = (dlogits.shape[0], weight.shape[1])
        out = self.empty(shape, stats_dtype(dlogits.dtype), dlogits.device)
        if dlogits.dtype == out.dtype or has_wide_gemm(dlogits):
            return wide_mm(dlogits, weight, out)
        panel_gemm.dhidden(dlogits, weight, out)
        return out

    def add_dweight(self, dlogits, hidden, grad: WeightGrad, last):
        if grad.acc is None and is_one(grad.scale):  # one chunk: torch rounds once, into `out`
            torch.mm(dlogits.t(), hidden, out=grad.out)
            return
        if grad.acc is None:
            for start in range(0, grad.out.shape[0], PANEL):
                cut = slice(start, start + PANEL)
                part = self.empty(grad.out[cut].shape, torch.float32, grad.out.device)
                grad.out[cut] = wide_mm(dlogits[:, cut].t(), hidden, part) * grad.scale
            return
        wide_mm(dlogits.t(), hidden, grad.acc, beta=0.0 if grad.first else 1.0)
        if not last:
            return
        if grad.out is not grad.acc:
            for start in range(0, grad.out.shape[0], PANEL):
                cut = slice(start, start + PANEL)
                part = grad.acc[cut]
                grad.out[cut] = part if is_one(grad.scale) else part * grad.scale
        elif not is_one(grad.scale):
            grad.acc.mul_(grad.scale)

    def column_sum(self, dlogits, out):
        out += dlogits.sum(0, dtype=out.dtype)

    def weighted_sum(self, loss, weights):
        wide = loss.double()
        total = wide.sum() if weights is None else (wide * weights.double()).sum()
        return total.to(loss.dtype)

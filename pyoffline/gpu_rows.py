"""What every GPU backend shares: the linear call and the logits call around one row kernel.

A backend is a `GpuRows` with a `launch`. No host sync but the row count of a compaction. A scale of
the gradient (fp16) reaches the kernel as a number on the device. Not here: the kernels, the GEMMs
(`gpu_gemm.py`), the chunk loop, fp64.
"""

import dataclasses

import torch
from torch import Tensor

from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult, RowOutputs, Rows
from pyoffline.chunk_loop import is_one, power_of_two_scale, run_linear
from pyoffline.device_flags import raise_pending
from pyoffline.gpu_gemm import GpuGemm
from pyoffline.program import CUSTOM_CODE, RowScalars, evaluate

# A row pass for the gradient alone.
NOTHING = RowOutputs(*[None] * len(dataclasses.fields(RowOutputs)))


def float32_rows(rows: Rows) -> Rows:
    """fp32, contiguous row inputs: what a kernel reads through plain pointers."""

    def plain(x):
        return (x if x.dtype == torch.int64 else x.float()).contiguous()

    shared = {
        name: plain(getattr(rows, name))
        for name in ("bias", "class_weight")
        if getattr(rows, name) is not None
    }
    return dataclasses.replace(rows.map(plain), **shared)


def _without_program(rows: Rows, coefs: Tensor | None) -> Rows:
    return dataclasses.replace(rows, codes=(), hyper=None, extras={}, coefs=coefs)


class GpuRows(GpuGemm):
    """The steps of the chunk loop; a backend adds `launch`."""

    def launch(
        self, logits: Tensor, dlogits: Tensor | None, rows: Rows, out: RowOutputs, scale
    ) -> None:
        """One kernel on the current stream of the tensors' device. `rows` are fp32 and contiguous;
        `rows.coefs` or a program without custom terms. Fields of `out` that are None are not
        written, `out.coefs` is contiguous. `scale`: fp32 [] on the device, or None for 1.
        """
        raise NotImplementedError

    def run_rows(self, logits, dlogits, rows: Rows, out: RowOutputs, scale=None) -> None:
        """One row pass; a custom Python term runs between its two halves, on C-vectors."""
        rows = float32_rows(rows)
        if rows.coefs is not None:
            given = _without_program(rows, rows.coefs)
            self.launch(logits, dlogits, given, dataclasses.replace(out, coefs=None), scale)
        elif CUSTOM_CODE in rows.codes[0::3]:
            self._run_custom(logits, dlogits, rows, out, scale)
        else:
            coefs = None if out.coefs is None else out.coefs.contiguous()
            self.launch(logits, dlogits, rows, dataclasses.replace(out, coefs=coefs), scale)
            if coefs is not out.coefs:
                out.coefs.copy_(coefs)

    def _run_custom(self, logits, dlogits, rows, out, scale):
        gap = torch.empty_like(out.lse)
        plain = _without_program(rows, None)
        self.launch(logits, None, plain, dataclasses.replace(out, gap=gap, coefs=None), None)
        scalars = RowScalars(
            out.logps, out.entropy, out.lse, gap, rows.old, rows.mu, rows.ref, rows.adv
        )
        loss, *coefs = evaluate(rows.codes, rows.hyper, scalars, rows.extras)
        counted, coefs = rows.counts(), torch.stack(coefs).contiguous()
        out.loss.copy_(torch.where(counted, loss, 0.0))
        if out.gap is not None:
            out.gap.copy_(gap)
        if out.coefs is not None:
            out.coefs.copy_(torch.where(counted, coefs, 0.0))
        if dlogits is not None:
            self.launch(logits, dlogits, _without_program(rows, coefs), NOTHING, scale)

    def row_pass(self, logits, rows, out, grad, scale):
        size = rows.labels.shape[0]
        dlogits = None
        if grad is not None:
            # a narrower gradient row starts where its logits row starts
            dlogits = logits if grad == logits.dtype else logits.view(grad)[:, : logits.shape[1]]
        part = None if dlogits is None else dlogits[:size]
        self.run_rows(logits[:size], part, rows, out, on_device(scale, logits.device))
        return dlogits


def on_device(scale, device) -> Tensor | None:
    """A number of the host is written there by a kernel: no copy, no sync."""
    if isinstance(scale, Tensor):
        return scale
    return None if is_one(scale) else torch.full((), scale, dtype=torch.float32, device=device)


def run_linear_call(k: GpuRows, call: LinearCall) -> LinearResult:
    """Fused linear call."""
    raise_pending(call.hidden.device)
    contiguous = {
        name: getattr(call, name).contiguous()
        for name in ("hidden", "weight", "adapter_hidden", "adapter_weight")
        if getattr(call, name) is not None
    }
    return run_linear(k, dataclasses.replace(call, **contiguous))


def run_logits_call(k: GpuRows, call: LogitsCall) -> LogitsResult:
    """Rows on given logits, which are never written: no compaction and no sync."""
    raise_pending(call.logits.device)
    source = call.logits if call.logits.stride(-1) == 1 else call.logits.contiguous()
    n = source.shape[0]
    out = RowOutputs.zeros(n, torch.float32, source.device, call.wants_coefs, call.wants_gap)
    scale = power_of_two_scale(call.rows, source.dtype, asynchronous=True)
    dlogits = None
    if call.needs_grad:
        dlogits = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    k.run_rows(source, dlogits, call.rows, out, on_device(scale, source.device))
    loss = k.weighted_sum(out.loss, call.rows.weights)
    return LogitsResult(loss, out, dlogits, 1.0 / scale)

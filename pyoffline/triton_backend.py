"""The Triton backend: torch's GEMMs (`gpu_gemm.py`) around the row pass of `pyoffline.kernels`.

NVIDIA sm_80 and later, AMD gfx942 and later; under TRITON_INTERPRET=1 also CPU tensors, for tests.
No host sync but the row count of a compaction. Not here: the kernels, the chunk loop, fp64.
"""

import dataclasses
import math

import torch

from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult, RowOutputs, Rows
from pyoffline.chunk_loop import power_of_two_scale, run_linear
from pyoffline.device_flags import flag_of, raise_pending
from pyoffline.gpu_gemm import GpuGemm
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.scale_by_upstream import scale_by_upstream as scale_by_upstream
from pyoffline.kernels.score_rows import score_rows, sums_nbytes
from pyoffline.plan import PlanSettings
from pyoffline.program import CUSTOM_CODE, RowScalars, evaluate


def _float32(rows: Rows) -> Rows:
    """fp32, contiguous row inputs: what the kernel reads through plain pointers."""

    def plain(x):
        return (x if x.dtype == torch.int64 else x.float()).contiguous()

    shared = {
        name: plain(getattr(rows, name))
        for name in ("bias", "class_weight")
        if getattr(rows, name) is not None
    }
    return dataclasses.replace(rows.map(plain), **shared)


def run_rows(logits, dlogits, rows: Rows, out: RowOutputs, scale=None, sweep=row_pass) -> None:
    """One row pass; a custom Python term runs between its two halves, on C-vectors. `sweep`: what
    takes its place, called with its arguments (scoring: hidden states for logits, no dlogits).
    """
    rows, flag = _float32(rows), flag_of(logits.device)
    given = rows.coefs is not None
    custom = CUSTOM_CODE in rows.codes[0::3]
    gap = torch.empty_like(out.lse) if custom else out.gap
    coefs_out = None if given or custom else out.coefs
    stats = (out.logps, out.entropy, out.lse, out.log_sum_p2, out.is_top1.view(torch.uint8))
    outputs = (out.loss, *stats, gap, coefs_out)
    if not custom:
        sweep(logits, dlogits, rows, outputs, flag, scale)
        return
    plain = dataclasses.replace(rows, codes=(), hyper=None, extras={})
    sweep(logits, None, plain, outputs, flag, None)
    scalars = RowScalars(
        out.logps, out.entropy, out.lse, gap, rows.old, rows.mu, rows.ref, rows.adv
    )
    loss, *coefs = evaluate(rows.codes, rows.hyper, scalars, rows.extras)
    counted, coefs = rows.counts(), torch.stack(coefs)
    out.loss.copy_(torch.where(counted, loss, 0.0))
    if out.coefs is not None:
        out.coefs.copy_(torch.where(counted, coefs, 0.0))
    if dlogits is not None:
        again = dataclasses.replace(plain, coefs=coefs.contiguous())
        sweep(logits, dlogits, again, (None,) * 8, flag, scale)


class TritonKernels(GpuGemm):
    """The steps of the chunk loop with the Triton row pass."""

    def row_pass(self, logits, rows, out, grad, scale):
        size = rows.labels.shape[0]
        dlogits = None
        if grad is not None:
            # a narrower gradient row starts where its logits row starts
            dlogits = logits if grad == logits.dtype else logits.view(grad)[:, : logits.shape[1]]
        scale = scale if isinstance(scale, torch.Tensor) else None
        run_rows(logits[:size], None if dlogits is None else dlogits[:size], rows, out, scale)
        return dlogits

    def score(self, call, hidden, rows, out):
        """Rows without gradient, their logits never stored; `score_rows.py` rounds a logit where
        the GEMM of a training pass does.

        False, so that logits are stored in chunks: with an adapter on the head, whose second
        product is not in the kernel; in deterministic mode, which promises the bits of the training
        pass, and so its GEMM; with given coefficients, which no call without gradients has.
        """
        if call.plan.deterministic or call.adapter_weight is not None or rows.coefs is not None:
            return False

        def sweep(x, _, rows, outputs, flag, scale):
            score_rows(x, call.weight, rows, outputs, flag, call.logits_dtype)

        size = score_block(call.plan, hidden.shape[0], call.weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            cut = slice(start, start + size)
            part = rows.map(lambda v, cut=cut: v[cut])
            results = out.map(lambda v, cut=cut: v[..., cut])
            run_rows(hidden[cut], None, part, results, sweep=sweep)
        return True


# Rows that one launch of `score_rows` takes at most: its sums stay within 64 MiB at V = 262,144.
SCORE_ROWS = 8192


def score_block(plan: PlanSettings, count: int, vocab: int) -> int:
    """Rows of a launch: what the overrides allow, evenly cut."""
    if plan.rows:
        return plan.rows
    limit = SCORE_ROWS
    if plan.budget:
        limit = min(limit, max(1, plan.budget // sums_nbytes(vocab)))
    return math.ceil(count / math.ceil(count / limit))


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the Triton backend."""
    raise_pending(call.hidden.device)
    contiguous = {
        name: getattr(call, name).contiguous()
        for name in ("hidden", "weight", "adapter_hidden", "adapter_weight")
        if getattr(call, name) is not None
    }
    return run_linear(TritonKernels(), dataclasses.replace(call, **contiguous))


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits, which are never written: no compaction and no sync."""
    raise_pending(call.logits.device)
    source = call.logits if call.logits.stride(-1) == 1 else call.logits.contiguous()
    n = source.shape[0]
    out = RowOutputs.zeros(n, torch.float32, source.device, call.wants_coefs, call.wants_gap)
    scale = power_of_two_scale(call.rows, source.dtype, asynchronous=True)
    dlogits = None
    if call.needs_grad:
        dlogits = torch.empty(source.shape, dtype=source.dtype, device=source.device)
    on_device = scale if isinstance(scale, torch.Tensor) else None
    run_rows(source, dlogits, call.rows, out, on_device)
    loss = TritonKernels().weighted_sum(out.loss, call.rows.weights)
    return LogitsResult(loss, out, dlogits, 1.0 / scale)

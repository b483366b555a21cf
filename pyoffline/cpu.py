"""The CPU backend: vendor GEMMs around the C++ row pass of `pyoffline._C`.

bf16 products go to oneDNN's tile kernel where the CPU multiplies bf16, else to MKL's
`gemm_bf16bf16f32`, fp16 products to MKL's: both lie in libtorch and accumulate in fp32 over chunks,
which torch's own API cannot. fp32 products go to torch. Where the symbols are absent, panels
of the weight are widened to fp32 and multiplied there (`panel_gemm.py`). Not here: the chunk loop.
"""

import dataclasses
import functools
import math

import torch

from pyoffline import _C, panel_gemm
from pyoffline.calls import LinearCall, LinearResult, LogitsCall, LogitsResult, RowOutputs, Rows
from pyoffline.chunk_loop import (
    NoShortcuts,
    WeightGrad,
    check_labels,
    power_of_two_scale,
    run_linear,
)
from pyoffline.objectives import TABLE
from pyoffline.plan import PlanSettings
from pyoffline.program import CUSTOM_CODE, RowScalars, evaluate

_table = {name: row.code for name, row in TABLE.items()}
if _C.codes() != _table:
    raise ImportError("pyoffline._C and pyoffline.objectives disagree on the table: rebuild")


_GEMM_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def has_vendor_gemm(dtype: torch.dtype) -> bool:
    """Whether libtorch carries the mixed-precision GEMM for this dtype."""
    return dtype.itemsize == 2 and bool(_C.gemm_info()[_GEMM_NAMES[dtype]])


def _shared(rows: Rows, out: RowOutputs) -> dict:
    """The keywords of `_C.row_pass` and `_C.score_rows` that every call has."""
    head = rows.head
    return {
        "bias": rows.bias,
        "class_weight": rows.class_weight,
        "temperature": rows.temperature,
        "softcap": head.softcap,
        "logit_scale": head.logit_scale,
        "uniform_temperature": head.temperature,
        "ignore_index": rows.ignore_index,
        "weights": rows.weights,
        "logps": out.logps,
        "entropy": out.entropy,
        "lse": out.lse,
        "log_sum_p2": out.log_sum_p2,
        "is_top1": out.is_top1,
        "threads": torch.get_num_threads(),
    }


def row_arguments(rows: Rows, out: RowOutputs) -> dict:
    """Those keywords and what a program reads per token."""
    return {
        **_shared(rows, out),
        "old": rows.old,
        "mu": rows.mu,
        "ref": rows.ref,
        "adv": rows.adv,
        "extras": tuple(rows.extras.values()),
    }


def _run_program(rows: Rows, out: RowOutputs, sweep) -> None:
    """`sweep` with the program of C++ rows, its results in `out`."""
    coefs = None if out.coefs is None else torch.empty(out.coefs.shape)
    program = {"codes": rows.codes, "hyper": rows.hyper}
    sweep(**row_arguments(rows, out), coefs_out=coefs, loss=out.loss, **program)
    if coefs is not None:
        out.coefs.copy_(coefs)


def _run_custom(rows: Rows, out: RowOutputs, sweep) -> torch.Tensor:
    """Statistics by `sweep`, then the program on C-vectors; gives its coefs [4, C]."""
    gap = torch.empty_like(out.lse)
    sweep(**_shared(rows, out), gap=gap)
    scalars = RowScalars(
        out.logps, out.entropy, out.lse, gap, rows.old, rows.mu, rows.ref, rows.adv
    )
    loss, *coefs = evaluate(rows.codes, rows.hyper, scalars, rows.extras)
    counted = rows.counts()
    out.loss.copy_(torch.where(counted, loss, 0.0))
    if out.coefs is not None:
        out.coefs.copy_(torch.where(counted, torch.stack(coefs), 0.0))
    return torch.stack(coefs)


def run_rows(logits, dlogits, rows: Rows, out: RowOutputs, scale: float) -> None:
    """One row pass; a custom Python term runs between its two halves, on C-vectors."""
    sweep = functools.partial(_C.row_pass, logits, rows.labels)
    gradient = functools.partial(sweep, dlogits=dlogits, grad_scale=scale)
    if rows.coefs is not None:
        gradient(**_shared(rows, out), coefs=rows.coefs.float().contiguous())
    elif not rows.codes:
        sweep(**_shared(rows, out), gap=out.gap)
    elif CUSTOM_CODE not in rows.codes[0::3]:
        _run_program(rows, out, gradient)
    else:
        coefs = _run_custom(rows, out, sweep)
        if dlogits is not None:
            gradient(**_shared(rows, out), coefs=coefs)


# Rows that one product of `_C.score_rows` takes at most: beyond it the weight is packed again, to
# no measured loss, and the panel of fp32 sums stays within 64 MiB.
SCORE_ROWS = 4096
# Results from here on lie in memory that is kept once the user drops them (csrc/cpu/scratch.h), so
# that the next step's gradient costs no page faults. What is smaller malloc keeps itself: its
# threshold for mapping anew ends at 32 MiB.
KEPT_RESULT = 32 << 20


def _score_block(plan: PlanSettings, count: int) -> int:
    """Rows of a block: what the overrides allow, evenly cut."""
    limit = plan.rows or SCORE_ROWS
    if plan.budget:
        limit = min(limit, max(1, plan.budget // (4 * _C.gemm_info()["panels"]["logits"])))
    return limit if plan.rows else math.ceil(count / math.ceil(count / limit))


class CpuKernels(NoShortcuts):
    """The steps of the chunk loop on a CPU."""

    device = "cpu"
    asynchronous = False

    def empty(self, shape, dtype, device):
        if math.prod(shape) * dtype.itemsize >= KEPT_RESULT:
            return self.scratch(shape, dtype, device)
        return torch.empty(shape, dtype=dtype, device=device)

    def scratch(self, shape, dtype, device):
        count = math.prod(shape)
        if count == 0:
            return self.empty(shape, dtype, device)
        memory = _C.scratch(count * dtype.itemsize)  # goes back when the tensor does
        return torch.frombuffer(memory, dtype=dtype, count=count).view(shape)

    def buffer(self, rows, vocab, dtype, device):
        return self.scratch((rows, vocab), dtype, device)

    def logits(self, call, hidden, adapter, out):
        if adapter is None and has_vendor_gemm(hidden.dtype):
            _C.gemm_logits(hidden, call.weight, out, threads=torch.get_num_threads())
        elif adapter is None and hidden.dtype == out.dtype == torch.float32:
            torch.mm(hidden, call.weight.t(), out=out)
        else:
            panel_gemm.logits(hidden, call.weight, out, adapter, call.adapter_weight)

    def row_pass(self, logits, rows, out, grad, scale):
        size = rows.labels.shape[0]
        dlogits = None
        if grad is not None:
            # a narrower gradient row starts where its logits row starts
            dlogits = logits if grad == logits.dtype else logits.view(grad)[:, : logits.shape[1]]
        run_rows(logits[:size], None if dlogits is None else dlogits[:size], rows, out, scale)
        return dlogits

    def score(self, call, hidden, rows, out):
        """Rows without gradient, their logits folded panel by panel over V and never stored."""
        if call.plan.deterministic or call.adapter_weight is not None:
            return False
        if not _C.gemm_info()[_GEMM_NAMES[hidden.dtype]] or call.logits_dtype not in _GEMM_NAMES:
            return False
        sweep = functools.partial(
            _C.score_rows,
            hidden,
            call.weight,
            rows.labels,
            logits_dtype=str(call.logits_dtype).removeprefix("torch."),
            block_rows=_score_block(call.plan, hidden.shape[0]),
        )
        if not rows.codes:
            sweep(**_shared(rows, out), gap=out.gap)
        elif CUSTOM_CODE in rows.codes[0::3]:
            _run_custom(rows, out, sweep)
        else:
            _run_program(rows, out, sweep)
        return True

    def dhidden(self, dlogits, weight, spare=None):
        out = torch.empty(dlogits.shape[0], weight.shape[1], dtype=torch.float32)
        if has_vendor_gemm(dlogits.dtype):
            _C.gemm_dhidden(
                dlogits,
                weight,
                out,
                threads=torch.get_num_threads(),
                kept=None if spare is None else spare.memory.view(-1),
                kept_is_filled=spare is not None and spare.is_filled,
            )
            if spare is not None:
                spare.is_filled = True
        elif dlogits.dtype == torch.float32:
            torch.mm(dlogits, weight, out=out)
        else:
            panel_gemm.dhidden(dlogits, weight, out)
        return out

    def add_dweight(self, dlogits, hidden, grad: WeightGrad, last):
        cast = grad.out if last and grad.out is not grad.acc else None
        if has_vendor_gemm(dlogits.dtype):
            _C.gemm_dweight(
                dlogits,
                hidden,
                grad.acc,
                beta=0.0 if grad.first else 1.0,
                out=cast,
                out_scale=grad.scale,
                threads=torch.get_num_threads(),
            )
        else:
            panel_gemm.add_dweight(dlogits, hidden, grad.acc, grad.first, cast, grad.scale)
        if last and cast is None and grad.scale != 1.0:
            grad.acc.mul_(grad.scale)

    def column_sum(self, dlogits, out):
        _C.column_sum(dlogits, out, accumulate=True, threads=torch.get_num_threads())

    def weighted_sum(self, loss, weights):
        return torch.tensor(_C.weighted_sum(loss, weights), dtype=torch.float32)


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the CPU backend."""
    contiguous = {
        name: getattr(call, name).contiguous()
        for name in ("hidden", "weight", "adapter_hidden", "adapter_weight")
        if getattr(call, name) is not None
    }
    return run_linear(CpuKernels(), dataclasses.replace(call, **contiguous))


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits: one read, one write of the gradient, the logits untouched."""
    rows, n = call.rows, call.logits.shape[0]
    counted = rows.counts()
    index = None if bool(counted.all()) else counted.nonzero()[:, 0]
    picked = rows.labels if index is None else rows.labels[index]
    check_labels(picked, call.logits.shape[1], index)
    device = call.logits.device
    out = RowOutputs.zeros(n, torch.float32, device, call.wants_coefs, call.wants_gap)
    scale = power_of_two_scale(rows.map(lambda v: v[counted]), call.logits.dtype)
    source = call.logits if call.logits.stride(-1) == 1 else call.logits.contiguous()
    dlogits = None
    if call.needs_grad:
        dlogits = CpuKernels().empty(source.shape, source.dtype, source.device)
    run_rows(source, dlogits, rows, out, scale)
    loss = torch.tensor(_C.weighted_sum(out.loss, rows.weights), dtype=torch.float32)
    return LogitsResult(loss, out, dlogits, 1.0 / scale)

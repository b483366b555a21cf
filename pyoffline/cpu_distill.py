"""Distillation on the CPU backend: the C++ row pass over two rows.

Not here: the loop (`distill_loop.py`), GEMMs and the program's arguments (`cpu.py`).
"""

from dataclasses import replace

import torch

from pyoffline import _C
from pyoffline.calls import LinearResult, Rows
from pyoffline.cpu import CpuKernels, row_arguments, run_rows
from pyoffline.distill_loop import DistillCall, DistillOutputs, TeacherRows, run_distill
from pyoffline.divergence_math import DIVERGENCES, resolve
from pyoffline.program import CUSTOM_CODE

if not hasattr(_C, "distill_row_pass"):
    raise ImportError("pyoffline._C has no distill_row_pass: rebuild")
if _C.divergence_codes() != {name: row.code for name, row in DIVERGENCES.items()}:
    raise ImportError("pyoffline._C and pyoffline.divergence_math disagree on the table: rebuild")


def _teacher(rows: TeacherRows, size: int) -> dict:
    if rows.ids is not None:
        return {"topk_ids": rows.ids, "topk_logps": rows.logps, "topk_tail": rows.tail}
    head, logits = rows.teacher.head, rows.logits[:size]
    bias = rows.teacher.bias
    return {
        "teacher": logits.float() if logits.dtype == torch.float64 else logits,
        "teacher_bias": None if bias is None else bias.float(),
        "teacher_softcap": head.softcap,
        "teacher_logit_scale": head.logit_scale,
        "teacher_temperature": head.temperature,
    }


def _divergences(call: DistillCall, part: DistillOutputs) -> dict:
    codes, hyper = [], torch.empty(len(call.divergences), 2, dtype=torch.float64)
    for k, term in enumerate(call.divergences):
        codes += [resolve(term.code, term.param), term.gate]
        hyper[k, 0], hyper[k, 1] = term.scale, term.param
    return {"divergences": codes, "divergence_hyper": hyper, **vars(part)}


def pair_pass(call: DistillCall, logits, teacher: TeacherRows, rows: Rows, results):
    """One C++ row pass over both chunks; the logits become dlogits in place."""
    out, part, grad, scale = results
    size = rows.labels.shape[0]
    dlogits = None
    if grad is not None:
        # a narrower gradient row starts where its logits row starts
        dlogits = logits if grad == logits.dtype else logits.view(grad)[:, : logits.shape[1]]
    program = {"codes": rows.codes, "hyper": rows.hyper}
    loss = out.loss
    if CUSTOM_CODE in rows.codes[0::3]:
        # Python terms run on C-vectors first; the row pass is given their coefficients
        coefs = torch.empty(4, size)
        run_rows(logits[:size], None, rows, replace(out, coefs=coefs), scale)
        program, loss = {"coefs": coefs}, torch.empty_like(out.loss)
    _C.distill_row_pass(
        logits[:size],
        rows.labels,
        dlogits=None if dlogits is None else dlogits[:size],
        grad_scale=scale,
        loss=loss,
        **row_arguments(rows, out),
        **program,
        **_teacher(teacher, size),
        **_divergences(call, part),
    )
    if loss is not out.loss:
        out.loss.add_(loss)
    return dlogits


def distill(call: DistillCall) -> tuple[LinearResult, DistillOutputs]:
    """Fused distillation on the CPU backend."""
    return run_distill(CpuKernels(), call, pair_pass)

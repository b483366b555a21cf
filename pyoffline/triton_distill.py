"""Distillation on the Triton backend: the Triton row pass over two rows.

Not here: the k + 1 buckets of a top-k teacher (`triton_top_k.py`), the loop
(`distill_loop.py`), the kernels.
"""

import dataclasses

import torch

from pyoffline.calls import LinearResult, Rows
from pyoffline.device_flags import raise_pending
from pyoffline.distill_loop import DistillCall, DistillOutputs, TeacherRows, run_distill
from pyoffline.divergence_math import resolve
from pyoffline.gpu_rows import float32_rows, on_device
from pyoffline.kernels.distill_row_pass import distill_row_pass
from pyoffline.triton_backend import TritonKernels
from pyoffline.triton_top_k import TopKRows


def pair_pass(call: DistillCall, logits, teacher: TeacherRows, rows: Rows, results):
    """The student's statistics and objective, then the divergences; dlogits in place."""
    out, part, grad, scale = results
    size = rows.labels.shape[0]
    scale = on_device(scale, logits.device)
    own, target, dlogits = logits[:size], None, None
    if grad is not None:
        # a narrower gradient row starts where its logits row starts
        dlogits = logits if grad == logits.dtype else logits.view(grad)[:, : logits.shape[1]]
        target = dlogits[:size]
    coefs = torch.zeros(4, size, dtype=torch.float32, device=logits.device)
    kernels = TritonKernels()
    kernels.run_rows(own, None, rows, dataclasses.replace(out, coefs=coefs))
    plain = dataclasses.replace(float32_rows(rows), codes=(), hyper=None, coefs=coefs)
    if teacher.ids is not None:
        TopKRows(kernels, call, own, teacher, plain, (out, part)).run(target, scale)
        return dlogits
    terms = [(resolve(t.code, t.param), t.gate, t.scale, t.param) for t in call.divergences]
    bias = teacher.teacher.bias
    theirs = Rows(
        rows.labels, head=teacher.teacher.head, bias=None if bias is None else bias.float()
    )
    outputs = (out.loss, part.values, part.teacher_entropy, part.top1_agreement.view(torch.uint8))
    distill_row_pass(own, teacher.logits[:size], target, plain, theirs, terms, outputs, scale)
    return dlogits


def distill(call: DistillCall) -> tuple[LinearResult, DistillOutputs]:
    """Fused distillation on the Triton backend."""
    raise_pending(call.linear.hidden.device)
    return run_distill(TritonKernels(), call, pair_pass)

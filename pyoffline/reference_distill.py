"""Distillation on the reference backend: the row pass over two rows in plain PyTorch.

The student's half is `reference.py`'s, in fp32 (fp64 for fp64 inputs); a top-k teacher makes
k + 1 buckets of both rows. Not here: the divergences (`divergence_math.py`), the loop
(`distill_loop.py`).
"""

import torch
from torch import Tensor

from pyoffline.calls import LinearResult, Rows
from pyoffline.distill_loop import DistillCall, DistillOutputs, TeacherRows, run_distill
from pyoffline.divergence_math import DIVERGENCE_OF_CODE, resolve
from pyoffline.program import Coefs, evaluate
from pyoffline.reference import ReferenceKernels, row_gradient, row_stats, transform


class Compared:
    """Both rows as log-probs [C, V], or [C, k + 1] where the teacher is a top-k."""

    def __init__(self, z: Tensor, logp_all: Tensor, teacher: TeacherRows):
        self.logp_all, self.ids = logp_all, teacher.ids
        if teacher.ids is None:
            rows = Rows(z, head=teacher.teacher.head, bias=teacher.teacher.bias)
            z_t = transform(teacher.logits[: z.shape[0]], rows)[0].to(z.dtype)
            top = z_t.argmax(-1, keepdim=True)
            self.log_s, self.log_t = logp_all, z_t - z_t.logsumexp(-1, keepdim=True)
        else:
            top = teacher.ids.gather(-1, teacher.logps.argmax(-1, keepdim=True))
            self.log_s = logp_all.gather(-1, teacher.ids)
            self.log_t = teacher.logps
            if teacher.ids.shape[1] < z.shape[1]:
                rest = logp_all.scatter(-1, teacher.ids, -torch.inf).logsumexp(-1, keepdim=True)
                self.log_s = torch.cat([self.log_s, rest], -1)
                self.log_t = torch.cat([self.log_t, teacher.tail.log()[:, None]], -1)
        t = self.log_t.exp()
        self.teacher_entropy = -torch.where(t == 0, 0.0, t * self.log_t).sum(-1)
        self.agrees = (z.gather(-1, top) == z.amax(-1, keepdim=True))[:, 0]

    def spread(self, dz: Tensor) -> Tensor:
        """A gradient in the buckets' logits as one in all logits: the last bucket's goes to its
        entries by their share of it.
        """
        if self.ids is None:
            return dz
        k = self.ids.shape[1]
        full = torch.zeros_like(self.logp_all)
        if k < full.shape[1]:
            share = (self.logp_all - self.log_s[:, k:]).exp()
            full = torch.where(self.logp_all == -torch.inf, 0.0, share * dz[:, k:])
        return full.scatter(-1, self.ids, dz[:, :k])


def pair_pass(
    call: DistillCall, logits: Tensor, teacher: TeacherRows, rows: Rows, results
) -> Tensor | None:
    """Fill the row outputs and `part` for rows that all count; return dlogits * scale."""
    out, part, grad, scale = results
    size = rows.labels.shape[0]
    z, slope = transform(logits[:size], rows)
    scalars, stats, logp_all = row_stats(z, rows)
    coefs = evaluate(rows.codes, rows.hyper, scalars, rows.extras)
    for name in ("logps", "entropy", "lse", "log_sum_p2", "is_top1"):
        getattr(out, name).copy_(getattr(stats, name))
    compared = Compared(z, logp_all, teacher)
    loss, dz = _divergences(call, compared, rows, part)
    out.loss.copy_(coefs.loss + loss)
    part.teacher_entropy.copy_(compared.teacher_entropy)
    part.top1_agreement.copy_(compared.agrees)
    if grad is None:
        return None
    dz = dz + row_gradient(logp_all, scalars, rows, Coefs(*coefs))
    if rows.weights is not None:
        dz = dz * rows.weights[:, None]
    padded = logits.new_zeros(logits.shape, dtype=grad)
    padded[:size] = dz * slope * scale
    return padded


def _divergences(call, compared: Compared, rows: Rows, part: DistillOutputs):
    """The sum of the divergences [C], and of their dz; a factor of 0 switches one off."""
    gates = list(rows.extras.values())
    loss = torch.zeros_like(compared.teacher_entropy)
    dz = torch.zeros_like(compared.log_s)
    for k, term in enumerate(call.divergences):
        fn = DIVERGENCE_OF_CODE[resolve(term.code, term.param)]
        value, own = fn(compared.log_s, compared.log_t, term.param)
        # a comparison drops a NaN, a value shows it
        own = torch.where(value.isnan()[:, None], torch.nan, own)
        part.values[k].copy_(value)
        factor = loss.new_full(loss.shape, term.scale)
        factor = factor if term.gate < 0 else factor * gates[term.gate]
        loss = loss + torch.where(factor == 0, 0.0, factor * value)
        factor = factor[:, None]
        dz = dz + torch.where(factor == 0, 0.0, factor * own)
    return loss, compared.spread(dz)


def distill(call: DistillCall) -> tuple[LinearResult, DistillOutputs]:
    """Fused distillation on the reference backend."""
    device = call.linear.hidden.device.type
    return run_distill(ReferenceKernels(device), call, pair_pass)

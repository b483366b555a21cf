"""A top-k teacher on the Triton backend: k + 1 buckets of both rows, around the row pass.

The listed entries are lifted out of the student's logits (set to -inf), so that the row pass over
what is left is the pass over the last bucket: its statistics give log S of that bucket, its
gradient every entry's share of it. The list itself is [C, k] numbers, in fp64. Not here: the checks
of the list (`distill_loop.top_k_rows`, which wait for the device), kernels.
"""

from dataclasses import fields, replace

import torch
from torch import Tensor

from pyoffline.calls import RowOutputs
from pyoffline.distill_loop import DistillCall, TeacherRows
from pyoffline.divergence_math import DIVERGENCE_OF_CODE, resolve
from pyoffline.gpu_rows import NOTHING
from pyoffline.triton_backend import TritonKernels


class TopKRows:
    """One chunk of student logits [C, V], which are overwritten. `rows` have the objective's
    coefficients; `results`: RowOutputs, filled but for the divergences' loss, and DistillOutputs.
    """

    def __init__(
        self,
        k: TritonKernels,
        call: DistillCall,
        logits: Tensor,
        teacher: TeacherRows,
        rows,
        results,
    ):
        self.k, self.call, self.logits, self.teacher, self.rows = k, call, logits, teacher, rows
        self.out, self.part = results
        self.has_rest = teacher.ids.shape[1] < logits.shape[1]
        self.z, self.slope = self._entries()
        self.counted = rows.counts() if rows.coefs is None else replace(rows, coefs=None).counts()

    def _entries(self) -> tuple[Tensor, Tensor]:
        """z [C, k] of the listed entries, and dz/dlogit times the weight."""
        rows, head = self.rows, self.rows.head
        x = self.logits.gather(-1, self.teacher.ids).double()
        if rows.bias is not None:
            x = x + rows.bias.double()[self.teacher.ids]
        x = x * head.logit_scale
        slope = torch.full_like(x, head.logit_scale)
        if head.softcap:
            bent = torch.tanh(x / head.softcap)
            x, slope = bent * head.softcap, slope * (1.0 - bent * bent)
        t = head.temperature if rows.temperature is None else rows.temperature.double()[:, None]
        if rows.weights is not None:
            slope = slope * rows.weights.double()[:, None]
        return x / t, slope / t

    def run(self, dlogits: Tensor | None, scale: Tensor | None) -> None:
        """Add the divergences to the loss; write dlogits [C, V] where wanted."""
        self._top1_agreement()
        log_s, log_t = self.z, self.teacher.logps.double()
        if self.has_rest:
            rest = self._lift_out()
            log_s = torch.cat([log_s, rest.lse.double()[:, None]], -1)
            log_t = torch.cat([log_t, self.teacher.tail.double().log()[:, None]], -1)
        log_s = log_s.log_softmax(-1)
        t = log_t.exp()
        entropy = -torch.where(t == 0, 0.0, t * log_t).sum(-1)
        self.part.teacher_entropy.copy_(torch.where(self.counted, entropy, 0.0))
        dz = self._divergences(log_s, log_t)
        if dlogits is None:
            return
        listed = self._listed(log_s, dz)
        poison = listed.sum(-1, keepdim=True) * 0.0  # a row with a NaN is NaN all over
        if self.has_rest:
            self._write_rest(dlogits, scale, (log_s, dz, rest, poison[:, 0]))
        listed = (listed + poison) * (1.0 if scale is None else scale.double())
        listed = torch.where(self.counted[:, None], listed, 0.0)
        dlogits.scatter_(-1, self.teacher.ids, listed.to(dlogits.dtype))

    def _top1_agreement(self) -> None:
        first = self.teacher.logps.argmax(-1, keepdim=True)
        labels = torch.where(self.counted, self.teacher.ids.gather(-1, first)[:, 0], -100)
        asked = replace(NOTHING, is_top1=self.part.top1_agreement)
        plain = replace(self.rows, labels=labels, ignore_index=-100, coefs=None, extras={})
        self.k.launch(self.logits, None, plain, asked, None)

    def _lift_out(self) -> RowOutputs:
        """Statistics of the rows without the listed entries; lse -inf where nothing is left."""
        rest = RowOutputs.zeros(self.logits.shape[0], torch.float32, self.logits.device)
        self.logits.scatter_(-1, self.teacher.ids, -torch.inf)
        kept = {f.name: None for f in fields(RowOutputs)} | {
            "entropy": rest.entropy,
            "lse": rest.lse,
        }
        plain = replace(self.rows, coefs=None, extras={})
        self.k.launch(self.logits, None, plain, RowOutputs(**kept), None, is_lifted=True)
        empty = rest.lse.isnan() & ~self.out.lse.isnan()
        return replace(rest, lse=torch.where(empty, -torch.inf, rest.lse))

    def _divergences(self, log_s: Tensor, log_t: Tensor) -> Tensor:
        """dz [C, buckets] of their sum, which joins the loss."""
        gates, total = list(self.rows.extras.values()), torch.zeros_like(log_s)
        for k, term in enumerate(self.call.divergences):
            fn = DIVERGENCE_OF_CODE[resolve(term.code, term.param)]
            value, dz = fn(log_s, log_t, term.param)
            self.part.values[k].copy_(torch.where(self.counted, value, 0.0))
            factor = torch.where(self.counted, value.new_full((), term.scale), 0.0)
            if term.gate >= 0:
                factor = torch.where(factor == 0, 0.0, factor * gates[term.gate].double())
            self.out.loss.add_(torch.where(factor == 0, 0.0, factor * value))
            dz = torch.where(value.isnan()[:, None], torch.nan, dz)
            total += torch.where(factor[:, None] == 0, 0.0, factor[:, None] * dz)
        return total

    def _listed(self, log_s: Tensor, dz: Tensor) -> Tensor:
        """dlogits [C, k] of the listed entries: the objective's and the divergences'."""
        ids, vocab = self.teacher.ids, self.logits.shape[1]
        a, b, c, e = self.rows.coefs.double()[:, :, None].unbind()
        s = log_s[:, : ids.shape[1]].exp()
        log_p = torch.where(s == 0, 0.0, log_s[:, : ids.shape[1]])
        entropy = self.out.entropy.double()[:, None]
        own = s * (c - a + e) + torch.where(b == 0, 0.0, -b * s * (log_p + entropy))
        own = own + torch.where(ids == self.rows.labels[:, None], a, 0.0) - e / vocab
        g = own + dz[:, : ids.shape[1]]
        return torch.where((self.slope == 0) & ~g.isnan(), 0.0, g * self.slope)

    def _write_rest(self, dlogits, scale, found) -> None:
        """dlogits of all other entries: a row pass whose p is their share of the last bucket."""
        log_s, dz, rest, poison = found
        a, b, c, e = self.rows.coefs.double().unbind()
        bucket = log_s[:, -1].exp()
        log_bucket = torch.where(bucket == 0, 0.0, log_s[:, -1])
        shift = log_bucket + self.out.entropy.double() - rest.entropy.double()
        own = bucket * (c - a) + a + e * (bucket - 1.0)
        own = own - torch.where(b == 0, 0.0, b * bucket * shift)
        coefs = torch.stack([a, b * bucket, own + dz[:, -1] + poison, e]).float()
        nothing = rest.lse == -torch.inf
        labels = torch.where(nothing, self.rows.ignore_index, self.rows.labels)
        rows = replace(self.rows, labels=labels, coefs=coefs, extras={})
        self.k.launch(self.logits, dlogits, rows, NOTHING, scale, is_lifted=True)

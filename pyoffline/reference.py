"""The reference backend: plain PyTorch, chunked, any float dtype up to fp64; one sitting.

The other backends are compared with this one, and this one with autograd in fp64. Logits are
rounded to `logits_dtype` as F.linear rounds them, everything after that is fp32 (fp64 for fp64
inputs), and each gradient is rounded once.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline.calls import (
    LinearCall,
    LinearResult,
    LogitsCall,
    LogitsResult,
    RowOutputs,
    Rows,
    stats_dtype,
)
from pyoffline.chunk_loop import (
    NoShortcuts,
    WeightGrad,
    check_labels,
    power_of_two_scale,
    run_linear,
)
from pyoffline.program import Coefs, RowScalars, evaluate


def transform(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
    """(z = softcap(logit_scale * (logits + bias)) / T, dz/dlogits to broadcast), fp32 or fp64."""
    x = logits.to(stats_dtype(logits.dtype))
    if rows.bias is not None:
        x = x + rows.bias
    head = rows.head
    x = x * head.logit_scale
    slope = torch.full((), head.logit_scale, dtype=x.dtype, device=x.device)
    if head.softcap:
        bent = torch.tanh(x / head.softcap)
        x = bent * head.softcap
        slope = slope * (1.0 - bent * bent)
    temperature = head.temperature if rows.temperature is None else rows.temperature[:, None]
    return x / temperature, slope / temperature


def row_stats(z: Tensor, rows: Rows) -> tuple[RowScalars, RowOutputs, Tensor]:
    """Row scalars, the public statistics and log p [C, V]."""
    m, top = z.max(-1, keepdim=True)
    shifted = z - m
    # d - 1 is summed without the 1 of the largest logit and goes to log1p: a confident row keeps
    # its 1 - p_y
    terms = shifted.exp()
    log_d = terms.scatter(-1, top, terms.gather(-1, top) - 1.0).sum(-1, keepdim=True).log1p()
    logp_all = shifted - log_d
    p = logp_all.exp()
    label = rows.labels[:, None]
    logp = (shifted.gather(-1, label) - log_d).clamp(max=0.0)[:, 0]
    entropy = (log_d - torch.where(p == 0, 0.0, p * shifted).sum(-1, keepdim=True))[:, 0]
    lse = (m + log_d)[:, 0]
    u = z.new_ones(z.shape[-1]) if rows.class_weight is None else rows.class_weight.to(z.dtype)
    gap = (u * (log_d - shifted)).mean(-1)
    log_sum_p2 = (2.0 * shifted).exp().sum(-1).log() - 2.0 * log_d[:, 0]
    is_top1 = (z.gather(-1, label) == m)[:, 0]
    scalars = RowScalars(logp, entropy, lse, gap, rows.old, rows.mu, rows.ref, rows.adv)
    zero = torch.zeros_like(logp)
    return scalars, RowOutputs(zero, logp, entropy, lse, log_sum_p2, is_top1), logp_all


def row_gradient(logp_all: Tensor, scalars: RowScalars, rows: Rows, coefs: Coefs) -> Tensor:
    """dz [C, V] from the four coefficients; a product with p_v = 0 is 0 by branch, also of inf."""
    p = logp_all.exp()
    a, b, c, e = (x[:, None] for x in (coefs.a, coefs.b, coefs.c, coefs.e))
    u = p.new_ones(p.shape[-1]) if rows.class_weight is None else rows.class_weight.to(p.dtype)
    bonus = torch.where(b == 0, 0.0, b * (logp_all + scalars.entropy[:, None]))
    rest = c + e * u.mean() - bonus
    flat = e * u / p.shape[-1]
    dz = torch.where(p == 0, 0.0, (rest - a) * p) - flat
    # at the label 1 - p_y comes from expm1 of the log-prob, never from rounding p_y first
    label = rows.labels[:, None]
    p_y, missing = p.gather(-1, label), -torch.expm1(scalars.logp)[:, None]
    dz_y = torch.where(missing == 0, 0.0, a * missing)
    dz_y = dz_y + torch.where(p_y == 0, 0.0, rest.expand_as(p).gather(-1, label) * p_y)
    dz = dz.scatter(-1, label, dz_y - flat.expand_as(p).gather(-1, label))
    still = (a == 0) & (b == 0) & (c == 0) & (e == 0)
    return torch.where(still, 0.0, dz)


def row_pass(logits: Tensor, rows: Rows, out: RowOutputs, want_grad: bool) -> Tensor | None:
    """Fill `out` for rows that all count; return weight * dlogits in fp32 (fp64), or None."""
    z, slope = transform(logits, rows)
    scalars, stats, logp_all = row_stats(z, rows)
    if rows.coefs is not None:
        coefs = Coefs(torch.zeros_like(scalars.logp), *rows.coefs.to(z.dtype))
    else:
        hyper = torch.zeros(0, 1) if rows.hyper is None else rows.hyper
        coefs = evaluate(rows.codes, hyper, scalars, rows.extras)
    out.loss.copy_(coefs.loss)
    if out.coefs is not None:
        out.coefs.copy_(torch.stack(coefs[1:]))
    if out.gap is not None:
        out.gap.copy_(scalars.gap)
    for name in ("logps", "entropy", "lse", "log_sum_p2", "is_top1"):
        getattr(out, name).copy_(getattr(stats, name))
    if not want_grad:
        return None
    dz = row_gradient(logp_all, scalars, rows, coefs)
    if rows.weights is not None:
        dz = dz * rows.weights[:, None]
    return dz * slope


class ReferenceKernels(NoShortcuts):
    """The steps of the chunk loop in torch ops."""

    asynchronous = False

    def __init__(self, device: str):
        self.device = device

    def buffer(self, rows, vocab, dtype, device):
        return torch.empty(rows, vocab, dtype=dtype, device=device)

    def empty(self, shape, dtype, device):
        return torch.empty(shape, dtype=dtype, device=device)

    scratch = empty

    def logits(self, call, hidden, adapter, out):
        if call.logits_dtype == call.hidden.dtype and adapter is None:
            out.copy_(F.linear(hidden, call.weight))
            return
        wide = torch.promote_types(call.logits_dtype, torch.float32)
        total = F.linear(hidden.to(wide), call.weight.to(wide))
        if adapter is not None:
            total += F.linear(adapter.to(wide), call.adapter_weight.to(wide))
        out.copy_(total)

    def row_pass(self, logits, rows, out, grad, scale):
        size = rows.labels.shape[0]
        dlogits = row_pass(logits[:size], rows, out, grad is not None)
        if dlogits is None:
            return None
        padded = logits.new_zeros(logits.shape, dtype=grad)
        padded[:size] = dlogits * scale
        return padded

    def dhidden(self, dlogits, weight, spare=None):
        if dlogits.dtype == torch.float16:  # the scaled rows may not fit fp16 once summed
            return dlogits.float() @ weight.float()
        return (dlogits @ weight).to(stats_dtype(dlogits.dtype))

    def add_dweight(self, dlogits, hidden, grad: WeightGrad, last):
        total = stats_dtype(dlogits.dtype)
        part = dlogits.t().to(total) @ hidden.to(total)
        acc = part if grad.first else grad.acc.add_(part)
        if last:
            grad.out.copy_(acc * grad.scale)
        elif grad.first:
            grad.acc.copy_(part)

    def column_sum(self, dlogits, out):
        out += dlogits.to(out.dtype).sum(0)

    def weighted_sum(self, loss, weights):
        wide = loss.double()
        total = wide.sum() if weights is None else (wide * weights.double()).sum()
        return total.to(loss.dtype)


def linear(call: LinearCall) -> LinearResult:
    """Fused linear call on the reference backend."""
    # torch's GEMMs round differently for transposed operands
    contiguous = {
        name: getattr(call, name).contiguous()
        for name in ("hidden", "weight", "adapter_hidden", "adapter_weight")
        if getattr(call, name) is not None
    }
    call = dataclasses.replace(call, **contiguous)
    return run_linear(ReferenceKernels(call.hidden.device.type), call)


def logits(call: LogitsCall) -> LogitsResult:
    """Rows on given logits on the reference backend."""
    n, vocab = call.logits.shape
    stats = stats_dtype(call.logits.dtype)
    wants = (call.wants_coefs, call.wants_gap)
    out = RowOutputs.zeros(n, stats, call.logits.device, *wants)
    index = call.rows.counts().nonzero()[:, 0]
    rows = call.rows.map(lambda v: v.index_select(0, index))
    check_labels(rows.labels, vocab, index)
    part = RowOutputs.zeros(index.numel(), stats, call.logits.device, *wants)
    scale = power_of_two_scale(rows, call.logits.dtype)
    dlogits = row_pass(call.logits.index_select(0, index), rows, part, call.needs_grad)
    loss = ReferenceKernels("cpu").weighted_sum(part.loss, rows.weights)
    for name, value in vars(part).items():
        if value is not None:
            getattr(out, name).index_copy_(-1, index, value)
    full = None
    if call.needs_grad:
        full = torch.zeros_like(call.logits, memory_format=torch.contiguous_format)
        full.index_copy_(0, index, (dlogits * scale).to(full.dtype))
    return LogitsResult(loss, out, full, 1.0 / scale)

"""What is true of distillation: the divergences as plain autograd on log_softmax, batches with a
teacher, and one way to run the package on them.

Written from the definitions, never from the package's own maths: every gradient here is autograd's.
In fp64 it is the truth, in the data's own dtype the reference whose error is the bar.
"""

import oracle
import torch
import torch.nn.functional as F
from compare import check_gradient
from torch import Tensor

import pyoffline as po


def _sum(p: Tensor, x: Tensor) -> Tensor:
    """sum p x over the entries that p allows."""
    return torch.where(p > 0, p * x, 0.0).sum(-1)


def forward_kl(_, s, t):
    return _sum(t.exp(), t - s)


def reverse_kl(_, s, t):
    return _sum(s.exp(), s - t)


def jsd(o, s, t):
    if o.beta in (0.0, 1.0):
        return forward_kl(o, s, t) if o.beta == 0.0 else reverse_kl(o, s, t)
    m = ((1 - o.beta) * s.exp() + o.beta * t.exp()).log()
    return o.beta * _sum(t.exp(), t - m) + (1 - o.beta) * _sum(s.exp(), s - m)


def power_sum(a, s, t):
    return torch.where((t > -torch.inf) | (s > -torch.inf), a * t + (1 - a) * s, -torch.inf)


def renyi(o, s, t):
    if o.alpha == 1:
        return forward_kl(o, s, t)
    return power_sum(o.alpha, s, t).logsumexp(-1) / (o.alpha - 1)


def alpha(o, s, t):
    if o.alpha in (0, 1):
        return forward_kl(o, s, t) if o.alpha == 1 else reverse_kl(o, s, t)
    return (power_sum(o.alpha, s, t).exp().sum(-1) - 1) / (o.alpha * (o.alpha - 1))


VALUES = {
    "ForwardKL": forward_kl,
    "ReverseKL": reverse_kl,
    "JSD": jsd,
    "TVD": lambda _, s, t: 0.5 * (s.exp() - t.exp()).abs().sum(-1),
    "RenyiDivergence": renyi,
    "AlphaDivergence": alpha,
}
# One of each, with parameters on both sides of every branch.
EACH = (
    po.ForwardKL(),
    po.ReverseKL(),
    po.JSD(0.3),
    po.JSD(0.9),
    po.TVD(),
    po.RenyiDivergence(0.3),
    po.RenyiDivergence(0.7),
    po.RenyiDivergence(2.0),
    po.AlphaDivergence(-0.5),
    po.AlphaDivergence(0.1),
    po.AlphaDivergence(0.5),
    po.AlphaDivergence(1.5),
)


def name_of(x) -> str | None:
    """Ids of parametrised tests."""
    return repr(x).replace("Divergence", "") if isinstance(x, po.Divergence) else None


def make(n=29, d=24, v=301, dtype=torch.float32, seed=0, teacher="head", **options) -> dict:
    """A batch: the student's tensors, a teacher close to it (so that no divergence is saturated),
    and labels and weights of which about a fifth do not count.
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    wide = d + 8
    batch = {"hidden": randn(n, d), "weight": randn(v, d) * 1.5 / d**0.5}
    batch["bias"] = randn(v) if options.get("bias") else None
    mix = 0.3 * randn(n, wide)
    mix[:, :d] += batch["hidden"]
    batch["t_hidden"] = mix
    batch["t_weight"] = torch.cat([batch["weight"] + 0.05 * randn(v, d), 0.1 * randn(v, 8)], 1)
    batch = {k: None if x is None else x.to(dtype) for k, x in batch.items()}
    labels = torch.randint(0, v, (n,), generator=g)
    weights = torch.rand(n, generator=g) / max(n, 1) + 0.5 / max(n, 1)
    if options.get("ignored", True) and n > 8:
        labels[3::7] = -100
        weights[5::11] = 0.0
    head, t_head = options.get("head", {}), options.get("t_head", {})
    batch |= {"labels": labels, "weights": weights, "head": head, "t_head": t_head}
    batch |= {"teacher": teacher, "extra": {}, "temperature": None}
    z = F.linear(batch["t_hidden"].double(), batch["t_weight"].double())
    z = oracle.final_logits(z, t_head)
    if teacher == "top-k":
        # given in no order of ids, as a sampler's cache is
        logps, ids = z.log_softmax(-1).topk(min(options.get("k", 12), v))
        batch |= {"ids": ids, "t_logps": logps.to(options.get("logps_dtype", torch.float32))}
    if teacher == "logits":
        batch["t_logits"] = z.to(dtype)
    return batch


def teacher_of(batch: dict):
    """The public record of the batch's teacher."""
    if batch["teacher"] == "top-k":
        return po.TeacherTopK(batch["ids"], batch["t_logps"])
    if batch["teacher"] == "logits":
        return po.TeacherLogits(batch["t_logits"])
    return po.TeacherHead(batch["t_hidden"], po.Head(batch["t_weight"], **batch["t_head"]))


def run(batch: dict, divergence, backend: str, upstream: float = 1.0, **head) -> dict:
    """`linear_distill_loss` and its gradients."""
    leaves = {
        k: batch[k].detach().clone().requires_grad_()
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    given = {k: batch[k] for k in ("labels", "weights", "temperature")}
    tokens = po.TokenBatch(**given, extra=batch["extra"] or None)
    with po.use_backend(backend):
        h = po.Head(leaves["weight"], leaves.get("bias"), **batch["head"], **head)
        out = po.linear_distill_loss(leaves["hidden"], h, teacher_of(batch), tokens, divergence)
        (out.loss * upstream).backward()
    result = {"loss": out.loss.detach(), **out.stats._asdict(), "metrics": out.metrics}
    for k, x in leaves.items():
        assert x.grad.dtype == x.dtype
        result[f"d{k}"] = x.grad if upstream == 1.0 else x.grad.double() / upstream
    return result


def _log_probs(batch, rows, dtype, logits):
    """log S and log T [C, V], or [C, k + 1] for a top-k teacher."""
    temperature = batch.get("temperature")
    z = oracle.final_logits(
        logits, batch["head"], None if temperature is None else temperature[rows]
    )
    log_s = z.log_softmax(-1)
    if batch["teacher"] == "top-k":
        ids, log_t = batch["ids"][rows], batch["t_logps"][rows].to(log_s.dtype)
        if ids.shape[1] == log_s.shape[1]:
            return z, log_s.gather(-1, ids), log_t
        others = torch.ones_like(log_s, dtype=torch.bool).scatter(-1, ids, False)
        rest = torch.where(others, log_s, -torch.inf).logsumexp(-1, keepdim=True)
        tail = torch.log1p(-log_t.double().exp().sum(-1, keepdim=True)).to(log_t.dtype)
        return z, torch.cat([log_s.gather(-1, ids), rest], -1), torch.cat([log_t, tail], -1)
    if batch["teacher"] == "logits":
        return z, log_s, oracle.final_logits(batch["t_logits"][rows].to(dtype), {}).log_softmax(-1)
    t = F.linear(batch["t_hidden"][rows].to(dtype), batch["t_weight"].to(dtype))
    return z, log_s, oracle.final_logits(t, batch["t_head"]).log_softmax(-1)


def truth(batch: dict, divergence, dtype=None, upstream: float = 1.0) -> dict[str, Tensor]:
    """The same in plain PyTorch, in `dtype` (default: the data's); see oracle.run."""
    dtype = dtype or batch["hidden"].dtype
    leaves = {
        k: batch[k].detach().to(dtype).requires_grad_()
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    rows = ((batch["labels"] != -100) & (batch["weights"] != 0)).nonzero()[:, 0]
    logits = F.linear(leaves["hidden"][rows], leaves["weight"], leaves.get("bias"))
    z, log_s, log_t = _log_probs(batch, rows, dtype, logits)
    terms, objective = divergence.parts()
    per_token = 0.0
    for term in terms:
        value = getattr(po, CLASSES[term.row])
        gate = 1.0 if term.gate is None else batch["extra"][term.gate][rows].to(z.dtype)
        made = value(term.param) if CLASSES[term.row] not in PLAIN else value()
        per_token = per_token + term.scale * gate * VALUES[CLASSES[term.row]](made, log_s, log_t)
    if objective is not None:
        t = oracle.row_scalars(z, batch["labels"][rows])
        t.extra = {k: x[rows].to(z.dtype) for k, x in batch["extra"].items()}
        per_token = per_token + oracle.losses(objective, t)
    loss = (batch["weights"][rows].to(z.dtype) * per_token).sum()
    (loss * upstream).backward()
    out = {"loss": loss.detach(), "terms": (batch["weights"][rows] * per_token).detach()}
    return out | {f"d{k}": x.grad.double() / upstream for k, x in leaves.items()}


PLAIN = ("ForwardKL", "ReverseKL", "TVD")
CLASSES = {
    "forward_kl": "ForwardKL",
    "reverse_kl": "ReverseKL",
    "jsd": "JSD",
    "tvd": "TVD",
    "renyi_divergence": "RenyiDivergence",
    "alpha_divergence": "AlphaDivergence",
}


def compare(batch, divergence, backend, chunk=None, run=run, **head):
    """Held to twice the error of PyTorch in the batch's dtype, three times for gradients."""
    exact = truth(batch, divergence, torch.float64)
    bar = truth(batch, divergence)
    with po.chunk_rows(chunk or 10_000):
        got = run(batch, divergence, backend, **head)
    grain = 4 * torch.finfo(torch.float32).eps * float(exact["terms"].abs().sum())
    error = abs(float(got["loss"].double() - exact["loss"]))
    rounding = abs(float(bar["loss"].double() - exact["loss"]))
    assert error <= max(2 * rounding, grain), (error, rounding)
    for k in ("dhidden", "dweight", "dbias"):
        if exact.get(k) is not None:
            check_gradient(k, got[k], exact[k], bar[k])
    return got

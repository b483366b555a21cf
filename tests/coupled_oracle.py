"""What is true for coupled objectives: plain PyTorch, one sequence (or group) at a time, autograd.

Written from the papers' formulas with explicit `.detach()`; it never calls the package's own
maths. In fp64 it is the truth, in the data's dtype the reference whose error is the bar.
"""

import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import oracle
import torch
import torch.nn.functional as F
from torch import Tensor

TOKEN_WEIGHTED = ("VESPO", "ImportanceWeightedSFTSequence")
GROUPED = ("RenyiRWR", "AlphaELBO")


@dataclass
class Batch:
    """Rows that count, in the batch's order, and what belongs to sequences."""

    rows: oracle.Rows
    ids: Tensor  # [n]
    weights: Tensor | None = None  # [n]
    rewards: Tensor | None = None  # [S]
    group: Tensor | None = None
    omega: Tensor | None = None
    sequences: list = field(default_factory=list)  # those that are summed; OPSM drops some

    def __post_init__(self):
        self.sequences = self.sequences or sorted(set(self.ids.tolist()))
        self.alive = sorted(set(self.ids.tolist()))

    def token_weights(self) -> Tensor:
        n = self.ids.shape[0]
        return torch.full_like(self.rows.logp, 1 / n) if self.weights is None else self.weights

    def shares(self, grouped: bool) -> dict[int, Tensor | float]:
        """A sequence's weight, or its part of the weight of its group."""
        if self.omega is not None:
            return {i: self.omega[i] for i in self.alive}
        if self.weights is not None:
            return {i: self.weights[self.ids == i].sum() for i in self.alive}
        if not grouped:
            return {i: 1 / len(self.alive) for i in self.alive}
        groups = self.groups(self.alive)
        return {i: 1 / (len(groups) * len(g)) for g in groups for i in g}

    def groups(self, sequences) -> list[list[int]]:
        found: dict[int, list[int]] = {}
        for i in sequences:
            found.setdefault(int(self.group[i]), []).append(i)
        return list(found.values())

    def one(self, i: int) -> SimpleNamespace:
        """The tensors of one sequence."""
        here = self.ids == i
        names = ("logp", "old", "mu", "ref", "adv")
        got = {k: getattr(self.rows, k) for k in names}
        q = SimpleNamespace(**{k: None if v is None else v[here] for k, v in got.items()})
        q.w = self.token_weights()[here]
        q.n = int(here.sum())
        q.A = None if q.adv is None else q.adv[0]
        q.R = None if self.rewards is None else self.rewards[i]
        return q


def clipped(s, a, low, high):
    return -torch.minimum(s * a, s.clamp(1 - low, 1 + high) * a)


def gspo(o, q):
    return clipped((q.logp - q.old).mean().exp(), q.A, o.clip_low, o.clip_high)


def gmpo(o, q):
    x, sign = q.logp - q.old, torch.sign(q.A)
    d = sign * torch.minimum(sign * x, sign * x.clamp(-o.clip, o.clip))
    return -q.A * d.mean().exp()


def topr(o, q):
    w = (q.logp - q.mu).sum().exp().detach().clamp(0, 1) if q.R < 0 else 1.0
    return -w * q.R * q.logp.sum()


def vespo(o, q):
    k, lam = (o.k_pos, o.lam_pos) if q.A >= 0 else (o.k_neg, o.lam_neg)
    log_w = (q.logp - q.old).sum().detach().clamp(torch.tensor(1e-8).log().item(), 20.0)
    phi = (k * log_w + lam * (1 - log_w.exp())).exp()
    return -(q.w * phi * q.adv * q.logp).sum()


def iw_sft(o, q):
    high = oracle.INF if o.high is None else o.high
    w = (o.alpha * (q.logp - q.ref).mean()).exp().detach().clamp(o.low, high)
    return -(q.w * w * q.logp).sum()


def power(o, q):
    w = (q.logp - q.mu).sum()
    return -q.A * (w if o.alpha == 0 else ((o.alpha * w).exp() - 1) / o.alpha)


def kl_pg(o, q):
    d = (q.logp - q.ref).detach()
    later = [d[t:].sum() if o.to_go else d.sum() for t in range(q.n)]
    return -((q.logp - q.old).exp() * (q.R - o.beta * torch.stack(later))).sum()


def log_mean(x: Tensor) -> Tensor:
    return torch.logsumexp(x, 0) - math.log(x.numel())


def renyi(o, lw, r):
    if o.alpha == 0:
        return -(torch.softmax(r, 0) * lw).sum()
    return -(log_mean(o.alpha * lw + r) - log_mean(r)) / o.alpha


def elbo(o, lw, r):
    if o.alpha == 1:  # the limit: E_w[q] + log mean W, with its gradient
        w = torch.softmax(lw, 0)
        return -((w * (r - lw)).sum() + log_mean(lw))
    return -(log_mean(o.alpha * lw + (1 - o.alpha) * r) - o.alpha * log_mean(lw)) / (1 - o.alpha)


SEQUENCE = {
    "GSPO": gspo,
    "LUSPO": lambda o, q: q.n * gspo(o, q),
    "GMPO": gmpo,
    "TOPR": topr,
    "VESPO": vespo,
    "ImportanceWeightedSFTSequence": iw_sft,
    "SequencePowerIS": power,
    "AStarPO": lambda o, q: (o.beta2 * (q.logp - q.ref).sum() - q.A) ** 2,
    "KLRegularizedPG": kl_pg,
}
GROUP = {"RenyiRWR": renyi, "AlphaELBO": elbo}


def total(o, b: Batch) -> Tensor:
    """The loss of a batch for a single or composed objective."""
    name = type(o).__name__
    if name == "_Sum":
        return sum(total(part, b) for part in o.parts)
    if name == "_Scaled" and o.gate is None:
        return o.factor * total(o.inner, b)
    if name == "OPSM":
        return total(o.objective, _kept(o, b))
    zero = 0.0 * b.rows.logp.sum()
    if name in SEQUENCE:
        share = b.shares(False)
        weigh = dict.fromkeys(b.alive, 1.0) if name in TOKEN_WEIGHTED else share
        return zero + sum(weigh[i] * SEQUENCE[name](o, b.one(i)) for i in b.sequences)
    if name in GROUP:
        share, loss = b.shares(True), zero
        for members in b.groups(b.sequences):
            qs = [b.one(i) for i in members]
            lw = torch.stack([(q.logp - (0 if q.mu is None else q.mu)).sum() for q in qs])
            r = torch.stack([q.R for q in qs]) / o.tau
            loss = loss + sum(share[i] for i in members) * GROUP[name](o, lw, r)
        return loss
    kept = torch.isin(b.ids, torch.tensor(b.sequences))
    return (b.token_weights() * oracle.losses(o, b.rows))[kept].sum()


def _kept(o, b: Batch) -> Batch:
    qs = {i: b.one(i) for i in b.sequences}
    keep = [i for i, q in qs.items() if not (q.A < 0 and (q.mu - q.logp.detach()).mean() > o.delta)]
    return Batch(b.rows, b.ids, b.weights, b.rewards, b.group, b.omega, keep or [-1])


def batch_of(batch: dict, logp_rows: oracle.Rows, index: Tensor, wide) -> Batch:
    def rows_of(name):
        x = batch.get(name)
        return None if x is None else x.to(wide)[index]

    def per_sequence(name):
        x = batch.get(name)
        return None if x is None else x.to(wide)

    t = logp_rows
    t.old, t.mu, t.ref = (rows_of(k) for k in ("old", "mu", "ref"))
    ids = batch["ids"][index]
    adv = batch.get("adv")
    t.adv = None if adv is None else adv.to(wide)[ids]
    t.extra = {k: v.to(wide)[index] for k, v in batch.get("extra", {}).items()}
    values = (per_sequence("rewards"), batch.get("group"), per_sequence("omega"))
    return Batch(t, ids, rows_of("weights"), *values)


def counted(batch: dict) -> Tensor:
    keep = batch["labels"] != -100
    if batch.get("weights") is not None:
        keep = keep & (batch["weights"] != 0)
    return keep.nonzero()[:, 0]


def run(batch: dict, objective, dtype=None, upstream: float = 1.0) -> dict[str, Tensor]:
    """F.linear in `dtype` (default: the data's), log_softmax, the objective, autograd; rows that do
    not count are left out before any arithmetic.
    """
    dtype = dtype or batch["hidden"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        k: batch[k].detach().to(dtype).requires_grad_()
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    index = counted(batch)
    temperature = batch.get("temperature")
    temperature = None if temperature is None else temperature.to(wide)[index]
    logits = F.linear(leaves["hidden"][index], leaves["weight"], leaves.get("bias"))
    z = oracle.final_logits(logits, batch.get("head", {}), temperature)
    t = oracle.row_scalars(z, batch["labels"][index])
    loss = total(objective, batch_of(batch, t, index, wide))
    (loss * upstream).backward()
    full = torch.zeros(batch["labels"].shape[0], dtype=wide)
    out = {"loss": loss.detach(), "logps": full.index_copy(0, index, t.logp.detach())}
    return out | {f"d{k}": x.grad.double() / upstream for k, x in leaves.items()}


def run_logits(logits: Tensor, batch: dict, objective) -> dict[str, Tensor]:
    """The same on given logits [N, V]; the gradient under "dlogits"."""
    z = logits.detach().clone().requires_grad_()
    index = counted(batch)
    t = oracle.row_scalars(z[index], batch["labels"][index])
    loss = total(objective, batch_of(batch, t, index, logits.dtype))
    loss.backward()
    return {"loss": loss.detach(), "dlogits": z.grad}

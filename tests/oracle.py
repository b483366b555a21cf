"""What is true: every token-local objective as plain autograd, and the head in plain PyTorch.

Written from the papers' formulas with explicit `.detach()`. It never calls the package's own maths:
a mistake there must not be repeated here. Run in fp64 it is the truth, run in the data's own dtype
it is the reference whose error is the bar.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

INF = float("inf")


@dataclass
class Rows:
    """What an objective reads: vectors of one dtype."""

    logp: Tensor
    entropy: Tensor | None = None
    lse: Tensor | None = None
    gap: Tensor | None = None
    old: Tensor | None = None
    mu: Tensor | None = None
    ref: Tensor | None = None
    adv: Tensor | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)


def ppo(ratio, adv, low, high, dual=None, delta=None):
    """min(min(r, delta) A, clip(r) A), negated; dual clip for A < 0."""
    capped = ratio if delta is None else ratio.clamp(max=delta)
    best = torch.minimum(capped * adv, ratio.clamp(1 - low, 1 + high) * adv)
    if dual is not None:
        best = torch.where(adv < 0, torch.maximum(best, dual * adv), best)
    return -best


def nll(o, t):
    loss = -(1 - o.label_smoothing) * t.logp
    if o.label_smoothing:
        loss = loss + o.label_smoothing * t.gap
    return loss + o.z_loss * t.lse**2 if o.z_loss else loss


def prob_power(o, t):
    p = t.logp.exp()
    return -(1.0 if t.adv is None else t.adv) * p**o.alpha


def luffy(o, t):
    p = t.logp.exp()
    return -t.adv * p / (p + o.gamma)


def power_is(o, t):
    w = t.logp - t.mu
    # not expm1: torch differentiates it as expm1(x) + 1, which cancels at large -x
    return -t.adv * (w if o.alpha == 0 else ((o.alpha * w).exp() - 1) / o.alpha)


def decoupled(o, t):
    behavior = (t.old - t.mu).exp().detach()
    loss = ppo((t.logp - t.old).exp(), t.adv, o.clip_low, o.clip_high) * behavior
    cap = INF if o.behavior_cap is None else o.behavior_cap
    return torch.where(behavior > cap, torch.zeros_like(loss), loss)


def sapo(o, t):
    r = (t.logp - t.old).exp()
    tau = torch.where(t.adv > 0, torch.full_like(r, o.tau_pos), torch.full_like(r, o.tau_neg))
    return -t.adv * torch.sigmoid(tau * (r - 1)) * 4 / tau


def dppo(o, t):
    r = (t.logp - t.old).exp().detach()
    p, p_old = t.logp.exp().detach(), t.old.exp()
    if o.kind == "tv":
        moved = p - p_old
        keep = torch.where(t.adv > 0, moved <= o.delta_high, moved >= -o.delta_low)
    else:
        k = p_old * (t.old - t.logp.detach())
        k = k + (1 - p_old) * ((-torch.expm1(t.old)) / (-torch.expm1(t.logp.detach()))).log()
        keep = torch.where(
            t.adv > 0, (k <= o.delta_high) | (p <= p_old), (k <= o.delta_low) | (p >= p_old)
        )
    weight = r if o.cap is None else r.clamp(max=o.cap)
    return torch.where(keep, -weight * t.adv * t.logp, torch.zeros_like(r))


def topr(o, t):
    w = (t.logp - t.mu).exp().detach().clamp(0, 1)
    return -torch.where(t.adv >= 0, torch.ones_like(w), w) * t.adv * t.logp


def distill(o, t):
    w = torch.ones_like(t.logp) if t.mu is None else (t.logp - t.mu).exp()
    return -((t.ref - t.logp) * w.clamp(o.low, o.high)).detach() * t.logp


def kl(o, t):
    d = t.logp - getattr(t, o.against)
    if o.kind == "k1":
        return d
    if o.kind == "k2":
        return d**2 / 2
    k3 = torch.exp(-d) - 1 + d
    return k3 if o.kind == "k3" else (t.logp - t.old).exp() * k3


LOSSES = {
    "NLL": nll,
    "WeightedNLL": lambda o, t: -t.adv * t.logp,
    "DFT": lambda o, t: -t.logp.exp().detach() * t.logp,
    "ProbPower": prob_power,
    "Luffy": luffy,
    "ImportanceWeightedSFT": lambda o, t: (
        -(t.logp - t.ref).exp().clamp(o.low, o.high).detach() * t.logp
    ),
    "ProximalSFT": lambda o, t: ppo(
        (t.logp - t.old).exp(), torch.ones_like(t.logp), o.clip_low, o.clip_high
    ),
    "ImportanceSampling": lambda o, t: -(t.logp - t.mu).exp() * t.adv,
    "PowerIS": power_is,
    "TruncatedIS": lambda o, t: (
        -(t.logp - t.mu).exp().clamp(o.low, o.high).detach() * t.adv * t.logp
    ),
    "PPOClip": lambda o, t: ppo(
        (t.logp - t.old).exp(), t.adv, o.clip_low, o.clip_high, o.dual_clip, o.delta
    ),
    "DecoupledPPO": decoupled,
    "CISPO": lambda o, t: -(t.logp - t.old).exp().clamp(o.low, o.high).detach() * t.adv * t.logp,
    "SAPO": sapo,
    "DPPO": dppo,
    "DRO": lambda o, t: -t.adv * t.logp + o.beta / 2 * (t.logp - t.old) ** 2,
    "AsymRE": lambda o, t: -(t.adv - o.baseline) * t.logp,
    "TOPRToken": topr,
    "DistillToken": distill,
    "KL": kl,
    "Entropy": lambda o, t: t.entropy,
    "ZLoss": lambda o, t: t.lse**2,
}


def losses(objective, t: Rows) -> Tensor:
    """Per-token loss of a single or composed objective."""
    name = type(objective).__name__
    if name == "_Sum":
        return sum(losses(part, t) for part in objective.parts)
    if name == "_Scaled":
        gate = 1.0 if objective.gate is None else t.extra[objective.gate]
        return objective.factor * gate * losses(objective.inner, t)
    return LOSSES[name](objective, t)


def magnitude(objective, t: Rows) -> Tensor:
    """Per-token size of what a composed loss adds up: the unit of its rounding."""
    name = type(objective).__name__
    if name == "_Sum":
        return sum(magnitude(part, t) for part in objective.parts)
    if name == "_Scaled":
        return abs(objective.factor) * magnitude(objective.inner, t)
    return 1.0 + losses(objective, t).abs()


def row_scalars(z: Tensor, labels: Tensor, class_weight: Tensor | None = None) -> Rows:
    """logp, entropy, lse and gap of rows of final logits, by log_softmax, differentiable."""
    logp = z.log_softmax(-1)
    entropy = -torch.special.xlogy(logp.exp(), logp.exp()).sum(-1)
    lse = z.logsumexp(-1)
    u = 1.0 if class_weight is None else class_weight.to(z.dtype)
    gap = (u * -logp).mean(-1)
    return Rows(logp.gather(-1, labels[:, None])[:, 0], entropy, lse, gap)


def final_logits(logits: Tensor, head: dict, temperature=None) -> Tensor:
    """softcap(scale * logits) / T, in fp32 (fp64 for fp64) as `.float()` of the reference gives."""
    z = logits.double() if logits.dtype == torch.float64 else logits.float()
    z = z * head.get("logit_scale", 1.0)
    if head.get("softcap"):
        z = head["softcap"] * torch.tanh(z / head["softcap"])
    return z / (head.get("temperature", 1.0) if temperature is None else temperature[:, None])


def run(batch: dict, objective, dtype=None, upstream: float = 1.0) -> dict[str, Tensor]:
    """F.linear in `dtype` (default: the data's), log_softmax, the objective, autograd.

    `batch`: hidden [N, D], weight [V, D], bias or None, labels [N], head (dict), and the vectors
    weights, temperature, old, mu, ref, adv, extra. Rows that do not count are left out before any
    arithmetic. Gradients are divided by `upstream` in fp64.
    """
    dtype = dtype or batch["hidden"].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = {
        k: batch[k].detach().to(dtype).requires_grad_()
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    counted = (batch["labels"] != -100) & (batch["weights"] != 0)
    index = counted.nonzero()[:, 0]

    def rows_of(name):
        x = batch.get(name)
        return None if x is None else x.to(wide)[index]

    logits = F.linear(leaves["hidden"][index], leaves["weight"], leaves.get("bias"))
    z = final_logits(logits, batch.get("head", {}), rows_of("temperature"))
    t = row_scalars(z, batch["labels"][index])
    t.old, t.mu, t.ref, t.adv = (rows_of(k) for k in ("old", "mu", "ref", "adv"))
    t.extra = {k: v.to(wide)[index] for k, v in batch.get("extra", {}).items()}
    per_token = losses(objective, t)
    loss = (rows_of("weights") * per_token).sum()
    (loss * upstream).backward()
    full = torch.zeros(batch["labels"].shape[0], dtype=wide)
    out = {"loss": loss.detach(), "terms": (rows_of("weights") * per_token).detach()}
    stats = {"logps": t.logp, "entropy": t.entropy, "lse": t.lse}
    out |= {k: full.index_copy(0, index, v.detach()) for k, v in stats.items()}
    return out | {f"d{k}": x.grad.double() / upstream for k, x in leaves.items()}

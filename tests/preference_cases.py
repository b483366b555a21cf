"""Preference objectives for the tests: a batch of pairs in groups, and every objective beside a
plain autograd formula of its loss in terms of per-sequence numbers.

The formulas are written from the papers and never call the package's own maths.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

import pyoffline as po

LENGTHS = (3, 5, 2, 4, 6, 1, 4, 3)  # four pairs
GROUPS = (7, 7, 2, 2, 7, 2, 7, 2)
S, P, T, D, V = len(LENGTHS), len(LENGTHS) // 2, max(LENGTHS), 5, 13
B = 0.3


@dataclass
class Sums:
    """What a formula reads of one call, chosen half first; everything plain fp64."""

    logp: Tensor  # [S, T], 0 where nothing counts
    ref: Tensor  # [S, T]
    log_sum_p2: Tensor
    n: Tensor  # [S]
    rewards: Tensor
    targets: Tensor

    @property
    def x(self):
        return (self.logp - self.ref).sum(1)

    @property
    def mean(self):
        return self.logp.sum(1) / self.n


def log_s(x):
    return F.logsigmoid(x)


def dpo(fn, score=lambda x: x):
    """Mean over the pairs of fn(beta * (score_w - score_l))."""

    def plain(s: Sums):
        up, down = score(s.x).chunk(2)
        return fn(B * (up - down)).mean()

    return plain


def sides(fn):
    return lambda s: fn(*s.x.chunk(2)).mean()


def normalised(fn):
    def plain(s: Sums):
        up, down = (s.x / s.n).chunk(2)
        return fn(up - down).mean()

    return plain


def soft(s: Sums):
    up, down = s.x.chunk(2)
    z, p = B * (up - down), s.targets[:P]
    p = 0.9 * p + 0.1 * (1 - p)
    return (-p * log_s(z) - (1 - p) * log_s(-z)).mean()


def margin(s: Sums):
    up, down = s.x.chunk(2)
    win, lose = s.rewards.chunk(2)
    return -log_s(B * (up - down) - (win - lose)).mean()


def kto(s: Sums):
    z = B * (s.x - 0.4)
    good = s.targets > 0.5
    return torch.where(good, 1.3 * (1 - z.sigmoid()), 0.7 * (1 - (-z).sigmoid())).mean()


def nll(s: Sums):
    chosen = s.logp[:P]
    return -chosen.sum() / s.n[:P].sum()


def contrast(s: Sums, fn, mean=False):
    up, down = (s.mean if mean else s.logp.sum(1)).chunk(2)
    return fn(up - down).mean()


def orpo(s: Sums):
    odds = s.mean.exp() / (1 - s.mean.exp())
    up, down = odds.log().chunk(2)
    return nll(s) - B * log_s(up - down).mean()


def alpha_po(s: Sums):
    reward = (1 - s.mean.exp() ** -0.5) / 0.5
    up, down = reward.chunk(2)
    return -log_s(B * (up - down) - 0.2).mean()


def wpo(s: Sums):
    aligned = ((s.logp - s.log_sum_p2 * (s.logp != 0)).sum(1) / s.n).detach().exp()
    up, down = s.x.chunk(2)
    weight = aligned[:P] * aligned[P:]
    return (weight * -log_s(B * (up - down))).mean()


def aot(s: Sums):
    policy, ref = s.logp.sum(1), s.ref.sum(1)
    d = (policy[:P] - policy[P:]).sort().values - (ref[:P] - ref[P:]).sort().values
    return (-0.9 * log_s(B * d) - 0.1 * log_s(-B * d)).mean()


def aot_unpaired(s: Sums):
    up, down = s.x.chunk(2)
    return -log_s(B * (up.sort().values - down.sort().values)).mean()


def listwise(s: Sums, free=False):
    total, group = 0.0, torch.tensor(GROUPS)
    for g in group.unique():
        members = (group == g).nonzero().flatten()
        order = members[s.rewards[members].argsort(descending=True)]
        score = B * (s.logp.sum(1) if free else s.x)
        for k in range(len(order)):
            total = total - score[order[k]] + score[order[k:]].logsumexp(0)
    return total / len(group.unique())


def rrhf(s: Sums):
    total, group = 0.0, torch.tensor(GROUPS)
    for i in range(S):
        for j in range(S):
            if group[i] == group[j] and s.rewards[i] > s.rewards[j]:
                total = total + (s.mean[j] - s.mean[i]).relu()
    return total / len(group.unique())


def rpo(s: Sums):
    return dpo(lambda z: -log_s(z))(s) - 0.7 * s.logp[:P].sum() / s.n.sum()


def blended(z):
    return -log_s(z) * (-z / 0.05).sigmoid() + (-z).exp() * (z / 0.05).sigmoid()


def exo(z):
    return z.sigmoid() * (log_s(z) - math.log(0.9)) + (-z).sigmoid() * (log_s(-z) - math.log(0.1))


def noisy(z):
    return (-0.9 * log_s(z) + 0.1 * log_s(-z)) / 0.8


def alpha_score(x):
    return ((-0.7 * x).exp() - 1) / -0.7


# name -> (objective, plain formula, sequence inputs it reads, reads references)
CASES = {
    "sigmoid": (po.DPO(B), dpo(lambda z: -log_s(z)), (), True),
    "free": (
        po.DPO(B, reference_free=True),
        lambda s: contrast(s, lambda d: -log_s(B * d)),
        (),
        False,
    ),
    "soft": (po.DPO(B, 0.1), soft, ("targets",), True),
    "margin": (po.DPO(B, margin=0.6), dpo(lambda z: -log_s(z - 0.6)), (), True),
    "rewards": (po.DPO(B, margin="rewards"), margin, ("rewards",), True),
    "hinge": (po.DPO(B, loss="hinge"), dpo(lambda z: (1 - z).relu()), (), True),
    "ipo": (
        po.DPO(B, loss="ipo"),
        normalised(lambda d: (d - 0.5 / B) ** 2),
        (),
        True,
    ),
    "sigmoid_norm": (
        po.DPO(B, loss="sigmoid_norm"),
        normalised(lambda d: -log_s(B * d)),
        (),
        True,
    ),
    "exo_pair": (po.DPO(B, 0.1, loss="exo_pair"), dpo(exo), (), True),
    "robust": (po.DPO(B, 0.1, loss="robust"), dpo(noisy), (), True),
    "discopop": (po.DPO(B, loss="discopop"), dpo(blended), (), True),
    "forward_kl": (
        po.DPO(B, f_divergence="forward_kl"),
        dpo(lambda z: -log_s(z), lambda x: 1 - (-x).exp()),
        (),
        True,
    ),
    "js": (
        po.DPO(B, f_divergence="js_divergence"),
        dpo(lambda z: -log_s(z), lambda x: math.log(2) + log_s(x)),
        (),
        True,
    ),
    "alpha": (
        po.DPO(B, f_divergence="alpha_divergence", alpha=0.3),
        dpo(lambda z: -log_s(z), alpha_score),
        (),
        True,
    ),
    "nca_pair": (
        po.DPO(B, loss="nca_pair"),
        sides(lambda u, v: -log_s(B * u) - 0.5 * log_s(-B * u) - 0.5 * log_s(-B * v)),
        (),
        True,
    ),
    "bco_pair": (
        po.DPO(B, loss="bco_pair"),
        sides(lambda u, v: -log_s(B * u) - log_s(-B * v)),
        (),
        True,
    ),
    "sppo_hard": (
        po.DPO(B, loss="sppo_hard"),
        sides(lambda u, v: (u - 0.5 / B) ** 2 + (v + 0.5 / B) ** 2),
        (),
        True,
    ),
    "apo_zero": (
        po.DPO(B, loss="apo_zero"),
        sides(lambda u, v: 1 - (B * u).sigmoid() + (B * v).sigmoid()),
        (),
        True,
    ),
    "apo_down": (
        po.DPO(B, loss="apo_down"),
        sides(lambda u, v: (B * u).sigmoid() + 1 - (B * (u - v)).sigmoid()),
        (),
        True,
    ),
    "aot": (po.DPO(B, 0.1, loss="aot"), aot, (), True),
    "aot_unpaired": (po.DPO(B, loss="aot_unpaired"), aot_unpaired, (), True),
    "wpo": (po.WPO(po.DPO(B)), wpo, (), True),
    "kto": (po.KTO(B, 1.3, 0.7, kl=0.4), kto, ("targets",), True),
    "cpo": (
        po.CPO(B, nll=0.8),
        lambda s: contrast(s, lambda d: -log_s(B * d)) + 0.8 * nll(s),
        (),
        False,
    ),
    "cpo_hinge": (
        po.CPO(B, loss="hinge", nll=0.0),
        lambda s: contrast(s, lambda d: (1 - B * d).relu()),
        (),
        False,
    ),
    "sim_po": (
        po.SimPO(B, 0.2),
        lambda s: contrast(s, lambda d: -log_s(B * d - 0.2), mean=True),
        (),
        False,
    ),
    "alpha_po": (po.AlphaPO(0.5, B, 0.2), alpha_po, (), False),
    "orpo": (po.ORPO(B), orpo, (), False),
    "tpo": (
        po.TPO(B, loss="ipo"),
        lambda s: contrast(s, lambda d: (d - 0.5 / B) ** 2, mean=True),
        (),
        False,
    ),
    "list_dpo": (po.ListDPO(B), listwise, ("rewards", "group_ids"), True),
    "list_free": (
        po.ListDPO(B, True),
        lambda s: listwise(s, True),
        ("rewards", "group_ids"),
        False,
    ),
    "rrhf": (po.RRHF(), rrhf, ("rewards", "group_ids"), False),
    "rpo": (po.DPO(B) + 0.7 * po.NLL().weighted_by("positive"), rpo, ("positive",), True),
}
PAIRED = [n for n in CASES if n not in ("kto", "list_dpo", "list_free", "rrhf")]
BATCHWISE = ("aot", "aot_unpaired")


def draw(name: str, seed: int = 0, dtype=torch.float64) -> dict:
    """Everything of one call: hidden [S, T, D], weight [V, D] and the TokenBatch."""
    g = torch.Generator().manual_seed(seed)
    _, _, reads, references = CASES[name]

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    hidden, weight = randn(S, T, D).to(dtype), randn(V, D).to(dtype)
    labels = torch.randint(0, V, (S, T), generator=g)
    labels[torch.arange(T) >= torch.tensor(LENGTHS)[:, None]] = -100
    kind = dtype if dtype == torch.float64 else torch.float32
    values = {
        "rewards": randn(S).to(kind),
        "targets": torch.rand(S, generator=g, dtype=torch.float64).to(kind),
        "group_ids": torch.tensor(GROUPS),
    }
    if name == "kto":
        values["targets"] = values["targets"].round()
    ref = logps(hidden, weight, labels) + 0.7 * randn(S, T)
    positive = (torch.arange(S) < P)[:, None].expand(S, T).to(kind)
    tokens = po.TokenBatch(
        labels,
        ref_logps=ref.to(kind) if references else None,
        sequences=po.SequenceBatch(**{k: v for k, v in values.items() if k in reads}),
        extra={"positive": positive} if "positive" in reads else None,
    )
    return {"hidden": hidden, "weight": weight, "tokens": tokens, "values": values, "ref": ref}


def logps(hidden, weight, labels):
    """[S, T] fp64, 0 where nothing counts."""
    full = (hidden.double() @ weight.double().T).log_softmax(-1)
    picked = full.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return torch.where(labels >= 0, picked, 0.0)


def truth(name: str, batch: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, dhidden, dweight of the plain formula in fp64."""
    x, w = (batch[k].double().detach().requires_grad_() for k in ("hidden", "weight"))
    labels = batch["tokens"].labels
    valid = labels >= 0
    full = (x @ w.T).log_softmax(-1)
    ref = torch.zeros_like(labels, dtype=torch.float64)
    if batch["tokens"].ref_logps is not None:
        ref = torch.where(valid, batch["tokens"].ref_logps.double(), 0.0)
    values = batch["values"]
    sums = Sums(
        logps(x, w, labels),
        ref,
        (2 * full).logsumexp(-1),
        valid.sum(1).double(),
        values["rewards"].double(),
        values["targets"].double(),
    )
    loss = CASES[name][1](sums)
    return loss.detach(), *torch.autograd.grad(loss, (x, w))


def run(batch: dict, objective, backend="reference", **changes):
    """Loss, dhidden, dweight, output of `linear_policy_loss`."""
    x, w = (batch[k].detach().clone().requires_grad_() for k in ("hidden", "weight"))
    with po.use_backend(backend):
        out = po.linear_policy_loss(x, po.Head(w), replace(batch["tokens"], **changes), objective)
        dx, dw = torch.autograd.grad(out.loss, (x, w))
    return out.loss.detach(), dx, dw, out

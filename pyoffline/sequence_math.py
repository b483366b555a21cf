"""Sequence-coupled objectives `fn(c: Coupled) -> CoupledLoss`: loss and coefs in closed form.

Symbols: l = log-prob, n = tokens of the sequence, A = its advantage, R = its reward, W = a product
of ratios over its tokens, omega = its weight. Everything stays in log space and is exponentiated
once; a branch that is not taken is never multiplied. Not here: groups (`group_math.py`), the public
dataclasses (`sequence_objectives.py`).
"""

import math

import torch
from torch import Tensor

from pyoffline.coupled import Coupled, CoupledLoss, CoupledRow
from pyoffline.objective_math import clamp, ppo_surrogate, product

# log W of VESPO is clamped to these (TRL's bounds: W to 1e-8, log W to 20).
VESPO_LOG_W = (math.log(1e-8), 20.0)


def _clipped_sequence(c: Coupled, weight: Tensor) -> CoupledLoss:
    """weight [S] times the PPO clip of s = exp(mean(l - old)), its coef spread over the tokens."""
    adv = c.adv_of_sequence()
    ratio = torch.exp(c.mean(c.logp - c.old))
    clip_low, clip_high = c.params[:2]
    loss, slope = ppo_surrogate(ratio, adv, clip_low, clip_high, math.inf, math.inf)
    clipped = (slope == 0) & (adv != 0) & (ratio > 0)
    return CoupledLoss(
        product(weight, loss),
        c.spread(product(weight, slope) / c.lengths.clamp(min=1)),
        metrics={"sequence_ratio/mean": ratio, "clip_ratio/region_mean": clipped.double()},
    )


def gspo(c: Coupled) -> CoupledLoss:
    """-min(s A, clip(s) A), s = exp(mean(l-old)); coef -s A/n where not clipped (2507.18071)."""
    return _clipped_sequence(c, c.omega)


def luspo(c: Coupled) -> CoupledLoss:
    """GSPO times the sequence's length (2602.05261)."""
    return _clipped_sequence(c, c.omega * c.lengths)


def gmpo(c: Coupled) -> CoupledLoss:
    """-A exp(mean d), d = l - old clipped on the side that A pushes to (2507.20673)."""
    adv = c.adv_of_sequence()
    moved, sign = c.logp - c.old, c.spread(torch.sign(adv))
    clip = c.params[0]
    over = sign * moved > clip
    d = torch.where(over, sign * clip, moved)
    # A = 0 is 0 whatever the ratios, unless one is NaN
    d = torch.where((sign == 0) & (moved == moved), 0.0, d)
    loss = product(c.omega, -product(torch.exp(c.mean(d)), adv))
    slope = c.spread(loss / c.lengths.clamp(min=1))
    return CoupledLoss(
        loss,
        torch.where(over, 0.0, slope),
        metrics={"clip_ratio/region_mean": over.double()},
    )


def topr(c: Coupled) -> CoupledLoss:
    """R >= 0: -R sum l; R < 0: -sg(clip(W, 0, 1)) R sum l, W = exp(sum(l-mu)) (2503.14286)."""
    log_w = c.sum(c.logp - c.mu)
    taper = torch.exp(torch.where(log_w > 0, 0.0, log_w))
    weight = torch.where((c.rewards < 0) | (log_w != log_w), taper, 1.0)
    weight = product(c.omega, product(weight, c.rewards))
    return CoupledLoss(-product(weight, c.sum(c.logp)), -c.spread(weight))


def vespo(c: Coupled) -> CoupledLoss:
    """-sg(W^k exp(lam (1-W))) A l, W = exp(sum(l-old)); (k, lam) by the sign of A (2602.10693)."""
    k_pos, lam_pos, k_neg, lam_neg = c.params[:4]
    log_w = clamp(c.sum(c.logp - c.old), *VESPO_LOG_W)
    rise = -torch.expm1(log_w)  # 1 - W

    def phi(k, lam):
        return torch.exp(k * log_w + lam * rise)

    up, down = phi(k_pos, lam_pos), phi(k_neg, lam_neg)
    shaped = torch.where(c.adv < 0, c.spread(down), c.spread(up))
    weight = c.weights * product(shaped, c.adv)
    mean = torch.where(c.adv_of_sequence() < 0, down, up)
    return CoupledLoss(-product(weight, c.logp), -weight, metrics={"vespo/phi_seq_mean": mean})


def importance_weighted_sft_sequence(c: Coupled) -> CoupledLoss:
    """-sg(clamp(exp(alpha mean(l-ref)), low, high)) l per token (iw-SFT, 2507.12856)."""
    alpha, low, high = c.params[:3]
    weight = clamp(torch.exp(product(c.mean(c.logp - c.ref), alpha)), low, high)
    weight = c.weights * c.spread(weight)
    return CoupledLoss(-product(weight, c.logp), -weight)


def sequence_power_is(c: Coupled) -> CoupledLoss:
    """-A (W^alpha - 1)/alpha, W = exp(sum(l-mu)); alpha = 0 is its limit -A log W."""
    alpha = c.params[0]
    log_w, adv = c.sum(c.logp - c.mu), c.adv_of_sequence()
    shaped = log_w if alpha == 0 else torch.expm1(alpha * log_w) / alpha
    power = torch.exp(product(log_w, alpha))
    return CoupledLoss(
        product(c.omega, -product(shaped, adv)), -c.spread(product(c.omega, product(power, adv)))
    )


def a_star_po(c: Coupled) -> CoupledLoss:
    """(beta2 sum(l-ref) - A)^2, A = R - V* (2505.20686)."""
    beta2 = c.params[0]
    gap = beta2 * c.sum(c.logp - c.ref) - c.adv_of_sequence()
    return CoupledLoss(product(c.omega, gap * gap), c.spread(product(c.omega, 2.0 * beta2 * gap)))


def kl_regularized_pg(c: Coupled) -> CoupledLoss:
    """-sum_t r_t sg(R - beta sum_{k>=t}(l_k - ref_k)), r = exp(l-old); all k where not to_go."""
    beta, to_go = c.params[:2]
    moved = c.logp - c.ref
    kl = c.suffix_sum(moved) if to_go else c.spread(c.sum(moved))
    gain = c.spread(c.rewards) - product(kl, beta)
    loss = -product(c.spread(c.omega), product(torch.exp(c.logp - c.old), gain))
    return CoupledLoss(loss, loss)


def opsm(c: Coupled) -> CoupledLoss:
    """A mask, 1 where kept: 0 where A < 0 and mean(mu-l) > delta (DeepSeek-V3.2, eq. 9)."""
    drift = c.spread(c.mean(c.mu - c.logp))
    keep = 1.0 - ((drift > c.params[0]) & (c.adv < 0)).double()
    keep = torch.where((drift != drift) | (c.adv != c.adv), torch.nan, keep)
    return CoupledLoss(keep, keep, metrics={"opsm/masked_fraction": 1.0 - keep})


_CLIP = ("clip_low", "clip_high")
_RATIO = ("sequence_ratio/mean", "clip_ratio/region_mean")
_PHI = ("k_pos", "lam_pos", "k_neg", "lam_neg")


def _row(code: int, fn, weighs: str, reads: str, params=(), metrics=()) -> CoupledRow:
    return CoupledRow(code, fn, "sequence", weighs, tuple(reads.split()), params, metrics=metrics)


SEQUENCE_ROWS = (
    _row(101, gspo, "sequence", "old adv", _CLIP, _RATIO),
    _row(102, luspo, "sequence", "old adv", _CLIP, _RATIO),
    _row(103, gmpo, "sequence", "old adv", ("clip",), _RATIO[1:]),
    _row(104, topr, "sequence", "mu rewards"),
    _row(105, vespo, "token", "old adv", _PHI, ("vespo/phi_seq_mean",)),
    _row(106, importance_weighted_sft_sequence, "token", "ref", ("alpha", "low", "high")),
    _row(107, sequence_power_is, "sequence", "mu adv", ("alpha",)),
    _row(108, a_star_po, "sequence", "ref adv", ("beta2",)),
    _row(109, kl_regularized_pg, "sequence", "old ref rewards", ("beta", "to_go")),
)
MASK_ROWS = (_row(151, opsm, "token", "mu adv", ("delta",), ("opsm/masked_fraction",)),)

"""Preference losses on per-sequence numbers: `(loss, dL/d chosen, dL/d rejected)`, each [P].

`chosen`, `rejected` [P] are sums x = sum(l - ref) (or l alone, or its mean); `gap` is what the
margin compares, z = beta * gap - margin. Every derivative is a closed form; nothing here calls
autograd. Exponentials are formed in log space and their difference never as inf - inf; a factor
that is exactly 0 is never multiplied by an infinite one. Not here: tokens, weights, the division
into pairs (`preference.py`).

Plain tensors of any float dtype, elementwise per pair except `aot` (the batch) and the rankings
(`ranking_math.py`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline.objective_math import product

DISCOPOP_TAU = 0.05  # 2406.08414, section 4: the value its loss was found with


def softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); F.softplus is off by 2e-9 above its threshold, which fp64 shows."""
    return -F.logsigmoid(-x)


def show_nan(loss: Tensor, *coefs: Tensor) -> tuple[Tensor, ...]:
    """A NaN loss makes its coefficients NaN: a branch must not hide it."""
    bad = loss != loss
    return (loss, *(torch.where(bad, loss, c) for c in coefs))


# gaps: (gap, d gap / d chosen, d gap / d rejected)


def exp_difference(u: Tensor, v: Tensor) -> Tensor:
    """e^u - e^v without inf - inf: +-inf where one is beyond the range, 0 where u = v."""
    high, low = torch.maximum(u, v), torch.minimum(u, v)
    size = product(torch.exp(high), -torch.expm1(low - high))
    return torch.where(u < v, -size, size)


def power_gap(chosen, rejected, k: float, n_chosen=None, n_rejected=None):
    """(e^{k x_w} - 1)/(k n_w) - (e^{k x_l} - 1)/(k n_l); k = 0 is the limit x_w/n_w - x_l/n_l.

    k = -1: forward KL; k = alpha - 1: alpha divergence; k = -alpha of mean log-probs: AlphaPO.
    """
    one = torch.ones((), dtype=chosen.dtype, device=chosen.device)
    n_w = one if n_chosen is None else n_chosen.to(chosen.dtype)
    n_l = one if n_rejected is None else n_rejected.to(rejected.dtype)
    if k == 0:
        return (
            chosen / n_w - rejected / n_l,
            (1 / n_w).expand_as(chosen),
            -1 / n_l.expand_as(chosen),
        )
    up, down = k * chosen - n_w.log(), k * rejected - n_l.log()
    gap = exp_difference(up, down) / k
    if n_chosen is not None:
        gap = gap - (1 / n_w - 1 / n_l) / k
    return gap, torch.exp(up), -torch.exp(down)


def js_gap(chosen, rejected, n_chosen=None, n_rejected=None):
    """Scores log 2 + log sigmoid(x) (Jensen-Shannon), divided by the lengths where given."""
    one = torch.ones((), dtype=chosen.dtype, device=chosen.device)
    n_w = one if n_chosen is None else n_chosen.to(chosen.dtype)
    n_l = one if n_rejected is None else n_rejected.to(rejected.dtype)
    gap = F.logsigmoid(chosen) / n_w - F.logsigmoid(rejected) / n_l
    if n_chosen is not None:
        gap = gap + math.log(2) * (1 / n_w - 1 / n_l)
    return gap, torch.sigmoid(-chosen) / n_w, -torch.sigmoid(-rejected) / n_l


# margins: (loss, d loss / dz) of z = beta * gap - margin


def sigmoid(z: Tensor, target) -> tuple[Tensor, Tensor]:
    """-p log s(z) - (1-p) log s(-z): cross entropy of p = P(chosen beats rejected). dz = s(z) - p.

    (DPO 2305.18290 eq. 7 at p = 1; soft labels 2309.06657)
    """
    loss = product(target, softplus(-z)) + product(1.0 - target, softplus(z))
    return loss, (1.0 - target) * torch.sigmoid(z) - target * torch.sigmoid(-z)


def hinge(z: Tensor) -> tuple[Tensor, Tensor]:
    """relu(1 - z); 0 at the border. (SLiC 2305.10425, RSO 2309.06657)"""
    return torch.where(z >= 1, 0.0, 1.0 - z), torch.where(z >= 1, 0.0, -torch.ones_like(z))


def squared(gap: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(gap - 1/(2 beta))^2. (IPO 2310.12036 eq. 17)"""
    error = gap - 0.5 / beta
    return error * error, 2.0 * error


def exo_pair(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """KL(s(z) || [1-eps, eps]); dz = s(z) s(-z) (z - log((1-eps)/eps)). (2402.00856 eq. 16)"""
    win, lose = torch.sigmoid(z), torch.sigmoid(-z)
    loss = product(win, -softplus(-z) - math.log1p(-eps)) + product(
        lose, -softplus(z) - math.log(eps)
    )
    return loss, product(win * lose, z - (math.log1p(-eps) - math.log(eps)))


def robust(z: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(-(1-eps) log s(z) + eps log s(-z)) / (1 - 2 eps): unbiased under flips. (2403.00409)"""
    scale = 1.0 - 2.0 * eps
    loss = product(softplus(-z), torch.full_like(z, 1.0 - eps)) - product(
        softplus(z), torch.full_like(z, eps)
    )
    slope = -(1.0 - eps) * torch.sigmoid(-z) - eps * torch.sigmoid(z)
    return loss / scale, slope / scale


def discopop(z: Tensor, tau: float = DISCOPOP_TAU) -> tuple[Tensor, Tensor]:
    """(1-m)(-log s(z)) + m e^{-z}, m = s(z/tau); m e^{-z} as one exponential. (2406.08414 eq. 5)"""
    y = z / tau
    mix, rest = torch.sigmoid(y), torch.sigmoid(-y)
    below = product(z, torch.full_like(z, 1.0 / tau - 1.0)) - softplus(y)
    blended = torch.exp(torch.where(z < 0, below, -z - softplus(-y)))
    loss = product(rest, softplus(-z)) + blended
    slope = -product(mix * rest / tau, softplus(-z)) - rest * torch.sigmoid(-z)
    return loss, slope + blended * (rest / tau - 1.0)


# losses of the two sides by themselves


def nca_pair(chosen, rejected, beta: float):
    """-log s(beta x_w) - 1/2 log s(-beta x_w) - 1/2 log s(-beta x_l). (2402.05369)"""
    u, v = beta * chosen, beta * rejected
    loss = softplus(-u) + 0.5 * softplus(u) + 0.5 * softplus(v)
    d_chosen = 0.5 * torch.sigmoid(u) - torch.sigmoid(-u)
    return loss, beta * d_chosen, 0.5 * beta * torch.sigmoid(v)


def bco_pair(chosen, rejected, beta: float):
    """-log s(beta x_w) - log s(-beta x_l), no running mean delta. (2404.04656)"""
    u, v = beta * chosen, beta * rejected
    loss = softplus(-u) + softplus(v)
    return loss, -beta * torch.sigmoid(-u), beta * torch.sigmoid(v)


def sppo_hard(chosen, rejected, beta: float):
    """(x_w - 1/(2 beta))^2 + (x_l + 1/(2 beta))^2. (2405.00675 eq. 4.7, P in {1, 0})"""
    up, down = chosen - 0.5 / beta, rejected + 0.5 / beta
    return up * up + down * down, 2.0 * up, 2.0 * down


def apo_zero(chosen, rejected, beta: float):
    """1 - s(beta x_w) + s(beta x_l). (2408.06266 eq. 7)"""
    u, v = beta * chosen, beta * rejected
    loss = torch.sigmoid(-u) + torch.sigmoid(v)
    return loss, -beta * bump(u), beta * bump(v)


def apo_down(chosen, rejected, beta: float):
    """s(beta x_w) + 1 - s(beta (x_w - x_l)). (2408.06266 eq. 8)"""
    u, z = beta * chosen, beta * (chosen - rejected)
    loss = torch.sigmoid(u) + torch.sigmoid(-z)
    return loss, beta * (bump(u) - bump(z)), beta * bump(z)


def bump(u: Tensor) -> Tensor:
    """s(u) s(-u), the derivative of the sigmoid."""
    return torch.sigmoid(u) * torch.sigmoid(-u)


UNPAIRED = {f.__name__: f for f in (nca_pair, bco_pair, sppo_hard, apo_zero, apo_down)}


def kto(x: Tensor, desirable: Tensor, beta: float, kl: float):
    """1 - s(beta (x - kl)) where desirable, else 1 - s(beta (kl - x)): (loss [S], dL/dx [S]).

    `kl` is not differentiated. (2402.01306 eq. 7)
    """
    z = beta * (x - kl)
    z = torch.where(desirable, z, -z)
    slope = beta * bump(z)
    return torch.sigmoid(-z), torch.where(desirable, -slope, slope)


# over the batch


def aot(first: Tensor, second: Tensor, beta: float, eps: float):
    """-(1-eps) log s(beta d) - eps log s(-beta d), d = sort(first) - sort(second). (2406.05882)

    (loss, dL/d first, dL/d second); loss and the first derivative belong to the entries of
    `first`, at their own places. `aot`: first = chosen - rejected of the policy, second = that of
    the reference; `aot_unpaired`: first = x_w, second = x_l. Couples the whole batch: micro-batches
    do not add up to it.
    """
    up, up_at = first.sort(stable=True)
    down, down_at = second.sort(stable=True)
    loss, slope = sigmoid(beta * (up - down), torch.full_like(up, 1.0 - eps))
    loss, slope = show_nan(loss, slope)
    back = torch.empty_like
    return (
        back(loss).scatter_(0, up_at, loss),
        back(slope).scatter_(0, up_at, beta * slope),
        back(slope).scatter_(0, down_at, -beta * slope),
    )


# reference-free scores


def orpo(chosen: Tensor, rejected: Tensor):
    """-log s(log odds), odds = p/(1-p) of the mean log-probs <= 0. (2403.07691 eq. 6)

    d log odds / dl = 1/(1-e^l). At l = 0 (p = 1) the odds are infinite: loss 0 if only the chosen
    one is there, +inf if only the rejected one; equal sides give log 2.
    """
    gap = log_odds(chosen) - log_odds(rejected)
    gap = torch.where(chosen == rejected, chosen - chosen, gap)
    pull = torch.sigmoid(-gap)
    d_chosen = product(-pull, -1.0 / torch.expm1(chosen))
    return softplus(-gap), d_chosen, product(pull, -1.0 / torch.expm1(rejected))


def log_odds(mean_logp: Tensor) -> Tensor:
    """l - log(1 - e^l), by the branch that keeps its digits."""
    near = torch.log(-torch.expm1(mean_logp))
    far = torch.log1p(-torch.exp(mean_logp))
    return mean_logp - torch.where(mean_logp > -math.log(2), near, far)

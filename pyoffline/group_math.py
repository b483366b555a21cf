"""Group-coupled objectives: reward-weighted Renyi divergence and the alpha-ELBO, in closed form.

Per group of one prompt's sequences: log W_i = sum(l-mu), W = exp(log W) is never formed; r = R/tau.
Differences of logarithms are formed by expm1 / log1p where their arguments are small, so that the
limits alpha -> 0 and alpha -> 1 keep their digits. Not here: the public dataclasses
(`sequence_objectives.py`).
"""

import math

import torch
from torch import Tensor

from pyoffline.coupled import Coupled, CoupledLoss, CoupledRow
from pyoffline.objective_math import product

# Below this |x| a difference of logarithms is log1p of a mean of expm1.
_SMALL = 0.5


def _small(c: Coupled, x: Tensor) -> Tensor:
    """[G] bool: every |x| of the group is small."""
    return c.group_max(x.abs()) < _SMALL


def _log_mean_exp(c: Coupled, w: Tensor, x: Tensor, direct: Tensor) -> Tensor:
    """[G]: log sum_i w_i e^{x_i} for weights w that sum to 1; `direct` where x is not small."""
    small = _small(c, x)
    inside = torch.where(c.group_spread(small), x, 0.0)
    near = torch.log1p(c.group_sum(product(w, torch.expm1(inside))))
    return torch.where(small, near, direct)


def _renyi(c: Coupled, alpha: float, log_w: Tensor, tilt: Tensor) -> CoupledLoss:
    x = product(log_w, alpha) + tilt
    total, q = c.group_logsumexp(x), c.group_softmax(x)
    if alpha == 0:
        per_group = c.group_sum(product(q, log_w))
    else:
        prior = c.group_softmax(tilt)
        direct = total - c.group_logsumexp(tilt)
        per_group = _log_mean_exp(c, prior, alpha * log_w, direct) / alpha
    omega = c.group_spread(c.group_omega())
    log_mean = total - c.group_size().log()
    # of neither sign: D_alpha changes it at 1, and groups of both would average to NaN
    pole = torch.where(log_mean == 0, 0.0, log_mean.abs() * math.inf)
    divergence = pole if alpha == 1 else log_mean / (alpha - 1.0)
    ess = 1.0 / (c.group_size() * c.group_sum(q * q))
    return CoupledLoss(
        -product(c.omega, c.group_spread(per_group)),
        -c.spread(product(omega, q)),
        metrics={"renyi/d_alpha": divergence, "group_ess": ess},
    )


def renyi_rwr(c: Coupled) -> CoupledLoss:
    """-(1/alpha) [log mean_i W_i^alpha e^{R_i/tau} - log mean_i e^{R_i/tau}]; coef -softmax_i(alpha
    log W_i + R_i/tau).
    """
    alpha, tau = c.params[:2]
    return _renyi(c, alpha, c.sum(c.logp - c.mu), c.rewards / tau)


def renyi_rwr_zero(c: Coupled) -> CoupledLoss:
    """alpha = 0 without behaviour log-probs: group-softmax RWR, -sum_i softmax_i(R_i/tau) sum l."""
    return _renyi(c, 0.0, c.sum(c.logp), c.rewards / c.params[1])


def alpha_elbo(c: Coupled) -> CoupledLoss:
    """-(1/(1-alpha)) [log mean_i W_i^alpha e^{(1-alpha) R_i/tau} - alpha log mean_i W_i].

    With w = softmax(log W) and q = R/tau - log W it is -(1/(1-alpha)) log sum w e^{(1-alpha) q} -
    log mean W; coef -alpha (softmax(log w + (1-alpha) q) - w)/(1-alpha).
    """
    alpha, tau = c.params[:2]
    rest = 1.0 - alpha
    log_w, tilt = c.sum(c.logp - c.mu), c.rewards / tau
    w, q = c.group_softmax(log_w), tilt - log_w
    total = c.group_logsumexp(log_w)
    if rest == 0:
        bound = c.group_sum(product(w, q))
        slope = product(w, q - c.group_spread(bound))
    else:
        mixed = product(log_w, alpha) + rest * tilt
        log_z = _log_mean_exp(c, w, rest * q, c.group_logsumexp(mixed) - total)
        bound = log_z / rest
        shift = rest * q - c.group_spread(log_z)
        near = torch.where(shift.abs() < _SMALL, shift, 0.0)
        far = c.group_softmax(mixed) - w
        part = torch.where(shift.abs() < _SMALL, product(w, torch.expm1(near)), far)
        slope = part * (alpha / rest)
    bound = bound + total - c.group_size().log()
    omega = c.group_spread(c.group_omega())
    return CoupledLoss(
        -product(c.omega, c.group_spread(bound)),
        -c.spread(product(omega, slope)),
        metrics={"alpha_elbo": bound, "group_ess": 1.0 / (c.group_size() * c.group_sum(w * w))},
    )


_PARAMS = ("alpha", "tau")


def _row(code: int, fn, reads: str, metric: str) -> CoupledRow:
    metrics = (metric, "group_ess")
    return CoupledRow(code, fn, "group", "group", tuple(reads.split()), _PARAMS, metrics=metrics)


GROUP_ROWS = (
    _row(121, renyi_rwr, "mu rewards group_ids", "renyi/d_alpha"),
    _row(122, renyi_rwr_zero, "rewards group_ids", "renyi/d_alpha"),
    _row(123, alpha_elbo, "mu rewards group_ids", "alpha_elbo"),
)

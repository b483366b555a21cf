"""What to plot: distance of data and policy, samples that leaves, the bias of RWR.

Ratios are raw: formed in log space from the given log-probs, never clamped. Means are over valid
tokens; what a masked one holds is not read; an empty mask gives 0. A NaN or inf at a valid token
makes the metric non-finite and is counted by `non_finite`. Results are 0-d tensors on the data's
device (float64 for float64 in, else float32; formed in float64), detached, no host sync. Any shape,
the same for all arguments; wrong shapes raise ValueError. Not here: metrics that need logits
(entropy, top-1).

Direction: `log_ratio = log pi - log mu` on tokens written by mu, w = exp(log_ratio). `k1(logps,
other, mask)` estimates KL(pi || other) on tokens written by pi, the policy of `logps`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pyoffline.arrays import Groups, as_mask, clean, dense_ids, log_ratio, result_dtype


class ClipFractions(NamedTuple):
    """Fractions of the valid tokens."""

    low: Tensor  # ratio < 1 - clip_low (and advantage < 0, when given)
    high: Tensor  # ratio > 1 + clip_high (and advantage > 0, when given)
    region: Tensor  # either


class RWRBias(NamedTuple):
    """log E[RWR weight of a response] - log of its exact weight e^{lam E r}/Z; [B] each term."""

    optimism: Tensor  # lam^2/2 Var[r]: does not vanish as N grows
    normalizer: Tensor  # -(log Z_eff - log Z): the same for the whole group
    finite_sample: Tensor  # (mean w^2 - w_i e^{lam^2 Var}) / N: the softmax over N samples

    @property
    def total(self):
        return self.optimism + self.normalizer + self.finite_sample


def effective_sample_size(log_ratio, mask):
    """`1 / mean((w / mean(w)) ** 2)` = (sum w)^2 / (n sum w^2), in (0, 1]. (Kish 1965)

    In log space, so no ratio overflows.
    """
    d, valid, n, dtype = _ratio(log_ratio, mask)
    d = torch.where(valid, d, -torch.inf).reshape(-1)
    log_ess = 2 * d.logsumexp(0) - (2 * d).logsumexp(0) - n.log()
    return torch.where(n > 0, log_ess.exp(), 0.0).to(dtype)


def chi2(log_ratio, mask):
    """`mean(w ** 2) - 1` = mean expm1(2 log_ratio): the chi-square divergence of pi from mu.

    verl chi2_token; with the sequences' summed log-ratios, chi2_seq.
    """
    d, valid, n, dtype = _ratio(log_ratio, mask)
    return _mean(torch.expm1(2 * d), valid, n).to(dtype)


def k1(logps, other, mask):
    """`(logps - other).mean()`: unbiased, may be negative. (Schulman 2020, joschu.net/kl-approx)"""
    d, valid, n, dtype = _difference(logps, other, mask)
    return _mean(d, valid, n).to(dtype)


def k2(logps, other, mask):
    """`((logps - other) ** 2 / 2).mean()`: biased, low variance. (Schulman 2020)"""
    d, valid, n, dtype = _difference(logps, other, mask)
    return _mean(d * d / 2, valid, n).to(dtype)


def k3(logps, other, mask):
    """`(exp(-D) - 1 + D).mean()`, D = logps - other: unbiased, every token >= 0. (Schulman 2020)"""
    d, valid, n, dtype = _difference(logps, other, mask)
    return _mean(_k3(d), valid, n).to(dtype)


def clip_fractions(log_ratio, mask, clip_low=0.2, clip_high=0.2, advantages=None):
    """`ClipFractions` outside [1 - clip_low, 1 + clip_high]. (PPO, 1707.06347, eq. 7)

    Borders are inside. With `advantages` only where the clip acts: below for A < 0, above for A > 0
    (TRL clip_ratio/*).
    """
    d, valid, n, dtype = _ratio(log_ratio, mask)
    low, high = _outside(torch.exp(d), clip_low, clip_high)
    if advantages is not None:
        a = clean(advantages, valid, "advantages")
        low, high = low & (a < 0), high & (a > 0)
    return ClipFractions(*(_mean(x.double(), valid, n).to(dtype) for x in (low, high, low | high)))


def masked_fraction(factors, mask):
    """Fraction of the valid tokens whose factor (`corrections.mask`, `corrections.m2po`) is 0."""
    f, valid, n, dtype = _ratio(factors, mask)
    return _mean((f == 0).double(), valid, n).to(dtype)


def non_finite(values, mask):
    """Number of valid tokens whose value is NaN or infinite; 0-d int64."""
    valid = as_mask(mask)
    return (~clean(values, valid, "values").isfinite()).sum()


def is_variance(log_ratio, values, mask):
    """`(w * f).var()`: E_mu[w^2 f^2] - (E_mu[w f])^2 from tokens written by mu.

    Unbiased; 0 for fewer than two tokens. E_pi[f] is estimated by mean(w f) with standard error
    sqrt(is_variance / n). Compare with f.var() on tokens of pi: Var_pi[f] = E_pi[f^2] - E_pi[f]^2
    has one factor w less. values [same shape]: rewards or advantages.
    """
    d, valid, n, dtype = _ratio(log_ratio, mask)
    f = clean(values, valid, "values")
    x = torch.where(f == 0, f, torch.exp(d) * f)
    x = torch.where(d.isnan(), d, x)
    deviation = torch.where(valid, x - _mean(x, valid, n), 0.0)
    out = (deviation**2).sum() / (n - 1).clamp(min=1)
    return out.to(torch.promote_types(dtype, result_dtype(values)))


def ratio_metrics(logps, old_logps, mask, advantages=None, clip_low=0.2, clip_high=0.2):
    """`{name: 0-d tensor}` about w = exp(logps - old_logps), tokens written by old_logps' policy.

        kl, k2_kl, k3_kl                KL(old || new) by k1, k2, k3
        chi2_token                      mean(w^2) - 1
        log_ratio_{min,mean,max}        of log w
        rollout_is_{min,mean,max,std}   of w
        rollout_is_eff_sample_size      1 / mean((w / mean w)^2)
        is_masked, is_masked_{low,high} fraction outside [1 - clip_low, 1 + clip_high], what
                                        `corrections.mask` drops with these bounds
        non_finite                      number of log-ratios that are not finite
        num_tokens                      number of valid tokens
        clip_ratio/{low,high,region}_mean  with `advantages`: `clip_fractions` where the clip acts

    Names: verl, prime-rl, TRL. For PPO's clip pass the old policy; for sampler mismatch pass
    old_logps and behavior_logps. Log-ratios come first: nothing is clamped.
    """
    d, valid, n, dtype = _difference(logps, old_logps, mask)
    w = torch.exp(d)
    mean_w = _mean(w, valid, n)
    spread = torch.where(valid, w - mean_w, 0.0)
    outside = clip_fractions(d, valid, clip_low, clip_high)
    out = {
        "kl": _mean(-d, valid, n),
        "k2_kl": _mean(d * d / 2, valid, n),
        "k3_kl": _mean(_k3(-d), valid, n),
        "chi2_token": chi2(d, valid),
        "log_ratio_min": _extreme(d, valid, n, torch.amin, torch.inf),
        "log_ratio_mean": _mean(d, valid, n),
        "log_ratio_max": _extreme(d, valid, n, torch.amax, -torch.inf),
        "rollout_is_min": _extreme(w, valid, n, torch.amin, torch.inf),
        "rollout_is_mean": mean_w,
        "rollout_is_max": _extreme(w, valid, n, torch.amax, -torch.inf),
        "rollout_is_std": ((spread**2).sum() / (n - 1).clamp(min=1)).sqrt(),
        "rollout_is_eff_sample_size": effective_sample_size(d, valid),
        "is_masked": outside.region,
        "is_masked_low": outside.low,
        "is_masked_high": outside.high,
    }
    if advantages is not None:
        clipped = clip_fractions(d, valid, clip_low, clip_high, advantages)
        out |= {f"clip_ratio/{k}_mean": v for k, v in clipped._asdict().items()}
    out = {name: value.to(dtype) for name, value in out.items()}
    return out | {"non_finite": non_finite(d, valid), "num_tokens": valid.sum()}


def rwr_bias(rewards, variance, group_ids, lam=1.0, num_samples=None):
    """`RWRBias` [B]: how far the weight of a response with one noisy reward is from e^{lam E r}/Z.

    rewards, variance [B]: mean and variance of the reward of each response (averaging m samples
    before the exp divides the variance by m); group_ids [B]: the responses of a prompt, taken as
    equally likely; num_samples: N of the softmax, by default the group's size. To second order in
    lam, exact for Gaussian rewards; the N term to first order in 1/N. With w = e^{lam E r + lam^2
    Var/2}/Z_eff (reward-weighted regression, "single-sample RWR is optimistic").
    """
    valid = torch.ones_like(rewards, dtype=torch.bool)
    index = dense_ids(group_ids)
    if rewards.dim() != 1 or index.shape != rewards.shape:
        raise ValueError(
            f"rewards, group_ids: expected [B], got {tuple(rewards.shape)}, {tuple(index.shape)}"
        )
    group = Groups(index, valid)
    mean, noise = clean(rewards, valid, "rewards"), clean(variance, valid, "variance")
    optimism = lam * lam / 2 * noise
    log_z = _log_mean_exp(lam * mean, group)
    log_z_eff = _log_mean_exp(lam * mean + optimism, group)
    w = torch.exp(lam * mean + optimism - log_z_eff)
    tilt = torch.exp(2 * optimism)
    count = group.size if num_samples is None else num_samples
    finite = (group.mean(w * w * tilt) - w * tilt) / count
    dtype = result_dtype(rewards, variance)
    return RWRBias(*(x.to(dtype) for x in (optimism, log_z - log_z_eff, finite)))


def prefix_ratio(rewards, prefix_ids, group_ids, lam=1.0, log_weights=None):
    """log pi*(prefix|x)/h(prefix|x) = log E_h[e^{lam r}|prefix] - log E_h[e^{lam r}|x]; [B].

    One number per row, that of the row's prefix. A row is one completion y ~ h(.|x): rewards [B]
    its (expected) reward, group_ids [B] its prompt x, prefix_ids [B] which prefix of x it continues
    (numbered within the prompt, any integers). log_weights [B]: log-probability of a row up to a
    constant where rows are not equally likely (an enumeration, importance sampling). Differences
    within a prompt rank prefixes: Z cancels, and only they are right where completions were drawn
    per prefix. (Gibbs policy pi* ~ h e^{lam r})
    """
    valid = torch.ones_like(rewards, dtype=torch.bool)
    prompt, prefix = dense_ids(group_ids), dense_ids(prefix_ids, "prefix_ids")
    if rewards.dim() != 1 or not rewards.shape == prompt.shape == prefix.shape:
        got = [tuple(x.shape) for x in (rewards, prefix, prompt)]
        raise ValueError(f"rewards, prefix_ids, group_ids: expected [B] each, got {got}")
    gain = lam * clean(rewards, valid, "rewards")
    base = torch.zeros_like(gain)
    if log_weights is not None:
        base = clean(log_weights, valid, "log_weights")
    at_prefix = Groups(dense_ids(prompt * max(rewards.numel(), 1) + prefix), valid)
    at_prompt = Groups(prompt, valid)
    out = [_log_mean_exp(gain + base, g) - _log_mean_exp(base, g) for g in (at_prefix, at_prompt)]
    inputs = (rewards,) if log_weights is None else (rewards, log_weights)
    return (out[0] - out[1]).to(result_dtype(*inputs))


def _ratio(values, mask):
    valid = as_mask(mask)
    return clean(values, valid, "log_ratio"), valid, valid.sum().double(), result_dtype(values)


def _difference(logps, other, mask):
    valid = as_mask(mask)
    d = log_ratio(logps, other, valid)
    return d, valid, valid.sum().double(), result_dtype(logps, other)


def _mean(x, valid, n):
    return torch.where(valid, x, 0.0).sum() / n.clamp(min=1)


def _k3(d):
    """exp(-d) - 1 + d, and its limit +inf (not inf - inf) at d = -inf."""
    return torch.where(d == -torch.inf, torch.inf, torch.expm1(-d) + d)


def _outside(w, clip_low, clip_high):
    if not clip_low >= 0 or not clip_high >= 0:
        raise ValueError(f"clip_low, clip_high: expected >= 0, got {clip_low!r}, {clip_high!r}")
    return w < 1 - clip_low, w > 1 + clip_high


def _extreme(x, valid, n, reduce, empty):
    if not x.numel():
        return x.new_zeros(())
    return torch.where(n > 0, reduce(torch.where(valid, x, empty).reshape(-1), 0), 0.0)


def _log_mean_exp(x, group):
    peak = group.max(x)
    return peak + torch.log(group.sum(torch.exp(x - peak)) / group.size)

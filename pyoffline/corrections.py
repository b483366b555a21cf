"""Off-policy corrections known at data time: factors for the *advantages*.

w = exp(old - mu), where old is what the trainer computes for the policy that should have written
the data (`old_logps`) and mu what the sampler reported (`behavior_logps`). Multiply the advantages
by the factors; never the weights, or KL and entropy terms would be scaled with them. The ratio is
formed in log space and exponentiated once; nothing is clamped before it is compared. All arguments
are [B, T] (any shape at token level); a masked token has factor 0 whatever it holds; a NaN at a
valid token stays a NaN factor of the token (of its sequence at sequence level). float64 in gives
float64, else float32; float64 inside, a few tensors of that shape; detached; no host sync. Wrong
shapes and levels raise ValueError.
"""

import math

import torch

from pyoffline.arrays import as_mask, log_ratio, result_dtype

LEVELS = ("token", "sequence", "sequence-mean")


def truncate(
    old_logps, behavior_logps, mask, level="token", low=0.0, high=2.0, batch_normalize=False
):
    """`w.clamp(low, high)`: truncated importance sampling. (Ionides 2008)

    TIS; verl rollout_is, OpenRLHF and slime tis. What w is, by `level`:

        "token"          exp(old - mu) of the token
        "sequence"       exp((old - mu).sum(-1)) on every token of the row
        "sequence-mean"  exp((old - mu).mean(-1)), its geometric mean

    Peers' `high`: verl 2.0, TRL 3.0. batch_normalize divides by the mean factor of this call, over
    valid tokens, or over sequences at a sequence level (verl rollout_is_batch_normalize).
    """
    _check(level, low, high)
    mask = as_mask(mask)
    ratio = torch.exp(_level(log_ratio(old_logps, behavior_logps, mask), mask, level))
    factor = ratio.clamp(low, high)
    return _finish(factor, mask, level, batch_normalize).to(result_dtype(old_logps, behavior_logps))


def mask(old_logps, behavior_logps, mask, level="token", low=0.0, high=2.0, batch_normalize=False):
    """`torch.where((w < low) | (w > high), 0, w)`: masked importance sampling.

    MIS, TRL sequence_mask; with low > 0 IcePop. Arguments as in `truncate`. A 0/1 rejection mask is
    `mask(...) != 0`; OpenRLHF's seq-mask-tis is that at level "sequence-mean", times
    `truncate(..., level="token")`.
    """
    _check(level, low, high)
    valid = as_mask(mask)
    ratio = torch.exp(_level(log_ratio(old_logps, behavior_logps, valid), valid, level))
    factor = torch.where((ratio < low) | (ratio > high), 0.0, ratio)
    return _finish(factor, valid, level, batch_normalize).to(
        result_dtype(old_logps, behavior_logps)
    )


def m2po(old_logps, behavior_logps, mask, tau=0.04):
    """1 or 0: drop the largest (old - mu)^2 until the mean of those that stay is below tau.

    `kept = sorted(m2)[:k]`, k the longest prefix whose mean is < tau. Tokens that tie with the
    first dropped one are dropped with it, so that the order of the batch does not matter. All
    shapes; sorts the valid tokens of the whole call. (M2PO, 2510.01161; AReaL m2_threshold)
    """
    if not tau > 0:
        raise ValueError(f"tau: expected a positive number, got {tau!r}")
    valid = as_mask(mask)
    square = log_ratio(old_logps, behavior_logps, valid) ** 2
    ordered = torch.where(valid & ~square.isnan(), square, torch.inf).reshape(-1).sort().values
    ordered = torch.cat([ordered, ordered.new_full((1,), torch.inf)])
    count = torch.arange(1, ordered.numel() + 1, device=ordered.device)
    kept = (ordered.cumsum(0) / count < tau).sum()
    factor = torch.where(square.isnan(), square, (square < ordered.gather(0, kept[None])).double())
    return torch.where(valid, factor, 0.0).to(result_dtype(old_logps, behavior_logps))


def _check(level, low, high):
    if level not in LEVELS:
        raise ValueError(f"level: expected one of {', '.join(LEVELS)}, got {level!r}")
    if not (0 <= low <= high) or low == math.inf:
        raise ValueError(f"low, high: expected 0 <= low <= high, got low={low!r}, high={high!r}")


def _level(log_w, mask, level):
    """The log-ratio at the wanted level, of the shape of log_w."""
    if level == "token":
        return log_w
    if log_w.dim() != 2:
        raise ValueError(f"level {level!r} needs [B, T], got shape {tuple(log_w.shape)}")
    total = log_w.sum(-1, keepdim=True)
    if level == "sequence-mean":
        total = total / mask.sum(-1, keepdim=True).clamp(min=1)
    return total.expand_as(log_w)


def _finish(factor, mask, level, batch_normalize):
    factor = torch.where(mask, factor, 0.0)
    if not batch_normalize:
        return factor
    if level == "token":
        mean = factor.sum() / mask.sum().clamp(min=1)
    else:
        rows = mask.any(-1)
        each = factor.sum(-1) / mask.sum(-1).clamp(min=1)
        mean = each.sum() / rows.sum().clamp(min=1)
    # A batch that was dropped as a whole has mean 0 and stays 0.
    return torch.where(mask & (mean != 0), factor / mean, 0.0)

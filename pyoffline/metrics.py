"""Metrics of one loss call by the names that people plot: raw ratios, on device, no host sync.

Everything is a mean (or min, max, count) over the positions that count. Not here: sequence-level
diagnostics (`diagnostics.py`).
"""

import torch
from torch import Tensor

from pyoffline.objectives import TABLE

# Token-local rows whose first two parameters are clip_low and clip_high of the ratio to old.
_CLIPPED = {row.code for row in TABLE.values() if row.params[:2] == ("clip_low", "clip_high")}


def _mean(x: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    return torch.where(valid, x, 0.0).sum() / count


def _range(x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_zeros(()), x.new_zeros(())
    low = torch.where(valid, x, torch.inf).amin()
    high = torch.where(valid, x, -torch.inf).amax()
    some = valid.any()
    return torch.where(some, low, 0.0), torch.where(some, high, 0.0)


def _clipped(program, ratio: Tensor, flat, count: Tensor) -> dict[str, Tensor]:
    """Fractions of the tokens that the program's first PPO row clips; empty without such a row.

    Below for A < 0, above for A > 0 (TRL's names).
    """
    codes = () if program is None else program.codes[0::3]
    at = [k for k, code in enumerate(codes) if code in _CLIPPED]
    if not at:
        return {}
    low, high = program.hyper[at[0], 1:3].unbind()
    adv = torch.ones_like(ratio) if flat.adv is None else flat.adv
    below, above = (ratio < 1.0 - low) & (adv < 0), (ratio > 1.0 + high) & (adv > 0)
    fractions = {"low": below, "high": above, "region": below | above}
    return {
        f"clip_ratio/{k}_mean": _mean(x.to(ratio.dtype), flat.valid, count)
        for k, x in fractions.items()
    }


def token_metrics(flat, program, logps, entropy, lse, log_sum_p2, is_top1) -> dict[str, Tensor]:
    """Metrics of FlatTokens and row statistics, all [N]; `program`: whose clip is measured."""
    valid = flat.valid
    count = valid.sum().to(logps.dtype).clamp(min=1.0)
    out = {
        "num_tokens": valid.sum(),
        "entropy": _mean(entropy, valid, count),
        "mean_token_accuracy": _mean(is_top1.to(logps.dtype), valid, count),
        "logps": _mean(logps, valid, count),
        "num_nonfinite": (valid & ~logps.isfinite()).sum(),
    }
    if flat.old is not None:
        moved = logps - flat.old
        ratio = moved.exp()
        out["ratio/mean"] = _mean(ratio, valid, count)
        out["ratio/min"], out["ratio/max"] = _range(ratio, valid)
        out["approx_kl"] = _mean(torch.expm1(moved) - moved, valid, count)
        out.update(_clipped(program, ratio, flat, count))
    if flat.ref is not None:
        gap = flat.ref - logps
        out["kl"] = _mean(torch.expm1(gap) - gap, valid, count)
    if flat.mu is not None:
        moved = logps - flat.mu
        weight = moved.exp()
        prefix = "sampling/importance_sampling_ratio"
        out[f"{prefix}/mean"] = _mean(weight, valid, count)
        out[f"{prefix}/min"], out[f"{prefix}/max"] = _range(weight, valid)
        out["sampling/sampling_logp_difference/mean"] = _mean(moved.abs(), valid, count)
        out["sampling/sampling_logp_difference/max"] = _range(moved.abs(), valid)[1]
        out["ess"] = _effective_fraction(moved, valid, count)
    return out


def _effective_fraction(log_w: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """`mean(w)^2 / mean(w^2)`, the largest w taken out: e^45 squared is no fp32 number."""
    top = _range(log_w, valid)[1]
    w = torch.exp(log_w - torch.where(top.isfinite(), top, 0.0))
    mean, square = _mean(w, valid, count), _mean(w * w, valid, count)
    return torch.where(square == 0, 0.0, mean * mean / square)

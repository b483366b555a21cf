"""Sequence- and group-coupled objectives: `fn(c: Coupled) -> CoupledLoss`, loss and coefficients in
closed form.

Symbols: l = log-prob, x = l minus an anchor, n = tokens of the sequence, A = its advantage, R = its
reward, omega = its weight. Everything stays in log space and is exponentiated once; a branch that
is not taken is never multiplied. Not here: the public dataclasses (`sequence_objectives.py`).
"""

import math

import torch
from torch import Tensor

from pyoffline.coupled import Coupled, CoupledLoss, CoupledRow
from pyoffline.objective_math import ppo_surrogate, product


def _clipped_sequence(c: Coupled, scale: Tensor) -> CoupledLoss:
    """omega scale min-clip of s = exp(mean(l - old)), coef spread evenly over the tokens."""
    adv = c.adv_of_sequence()
    ratio = torch.exp(c.mean(c.logp - c.old))
    clip_low, clip_high = c.params[:2]
    loss, slope = ppo_surrogate(ratio, adv, clip_low, clip_high, math.inf, math.inf)
    weight = c.omega * scale
    clipped = (slope == 0) & (adv != 0) & (ratio == ratio)
    return CoupledLoss(
        product(weight, loss),
        c.spread(product(weight, slope) / c.lengths.clamp(min=1)),
        metrics={"sequence_ratio/mean": ratio, "clip_ratio/region_mean": clipped.double()},
    )


def gspo(c: Coupled) -> CoupledLoss:
    """-min(s A, clip(s) A), s = exp(mean(l-old)); coef -s A/n where not clipped (2507.18071)."""
    return _clipped_sequence(c, torch.ones_like(c.omega))


MASK_ROWS: tuple[CoupledRow, ...] = ()
SEQUENCE_ROWS = (
    CoupledRow(
        101,
        gspo,
        "sequence",
        "sequence",
        reads=("old", "adv"),
        params=("clip_low", "clip_high"),
        metrics=("sequence_ratio/mean", "clip_ratio/region_mean"),
    ),
)

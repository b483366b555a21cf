"""The public sequence- and group-coupled objectives (OBJECTIVES.md, section 2).

Each class is one row of `coupled_table.COUPLED`. Symbols: l = log-prob of the label, old / mu / ref
as in TokenBatch, n = tokens of the sequence that count, A = its advantage (that of its first
token), R = SequenceBatch.rewards, W = exp(sum(l - mu)); the sum of omega_i L_i is minimised.
"""

import math

from pyoffline.compose import CoupledObjective
from pyoffline.token_objectives import objective

_NON_NEGATIVE = (0.0, math.inf)


@objective
class GSPO(CoupledObjective):
    """`-min(s A, clip(s, 1-clip_low, 1+clip_high) A)` per sequence, s = exp(mean(l-old))
    (2507.18071). coef -s A/n, exactly 0 where clipped; default weight 1/sequences.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    bounds = {"clip_low": (0.0, 1.0), "clip_high": _NON_NEGATIVE}

"""THE TABLE of divergences between a student's row S and a teacher's row T, by number.

A row is a function of log-probs `(log_s, log_t, param)`, each [C, V], that returns the value [C]
and dz [C, V], its gradient in the student's logits:

    dz_v = S_v (g_v - sum_u S_u g_u),  g = dD/dS

`csrc/distill.h` and `csrc/cpu/divergences.h` have the same divergence under the same number. A
product with a probability of 0 is 0 by branch, so that a masked entry (log-prob -inf, on either
side) makes no NaN. Not here: softmax, buckets of a top-k teacher, weights.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def _product(p: Tensor, x: Tensor) -> Tensor:
    """p x, and 0 where p is 0."""
    return torch.where(p == 0, 0.0, p * x)


def _by_student(s: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """sum S g, and S (g - sum S g)."""
    mean = _product(s, g).sum(-1)
    return mean, _product(s, g - mean[:, None])


def forward_kl(log_s: Tensor, log_t: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(T||S) = sum T (log T - log S); dz = S - T. +inf where T > 0 = S."""
    s, t = log_s.exp(), log_t.exp()
    return _product(t, log_t - log_s).sum(-1), s - t


def reverse_kl(log_s: Tensor, log_t: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """KL(S||T) = sum S (log S - log T); dz = S (log S - log T - KL). +inf where S > 0 = T."""
    return _by_student(log_s.exp(), log_s - log_t)


def jsd(log_s: Tensor, log_t: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """M = (1-beta) S + beta T: beta KL(T||M) + (1-beta) KL(S||M);
    dz = (1-beta) S (log(S/M) - KL(S||M)).
    """
    gap = log_t - log_s
    low, high = (gap.new_full((), x).log() for x in (1.0 - beta, beta))
    # relative to S and to T, so that the log of 1 is what is left where they agree
    by_student, dz = _by_student(log_s.exp(), -torch.logaddexp(low, high + gap))
    by_teacher = _product(log_t.exp(), -torch.logaddexp(high, low - gap)).sum(-1)
    return beta * by_teacher + (1.0 - beta) * by_student, (1.0 - beta) * dz


def tvd(log_s: Tensor, log_t: Tensor, _: float) -> tuple[Tensor, Tensor]:
    """1/2 sum |S - T|; g = 1/2 sign(S - T), 0 at the kink S = T."""
    s, t = log_s.exp(), log_t.exp()
    _, dz = _by_student(s, 0.5 * (s - t).sign())
    return 0.5 * (s - t).abs().sum(-1), dz


def _log_power(log_s: Tensor, log_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """w = log(T^alpha S^(1-alpha)), and T^alpha S^(1-alpha) less its base, T (alpha >= 1/2) or S.

    Relative to the base the power is expm1(c (log T - log S)), which keeps its digits where alpha
    is near 0 or 1. Both are those of 0 where the base is 0.
    """
    by_teacher = alpha >= 0.5
    base = log_t if by_teacher else log_s
    moved = (alpha - 1.0 if by_teacher else alpha) * (log_t - log_s)
    none = base == -torch.inf
    w = torch.where(none, -torch.inf, base + moved)
    # e^base expm1 would be inf too early, and lose digits where the power is far from the base
    far = moved.abs() > 0.34
    beyond = torch.where(far, w.exp() - base.exp(), base.exp() * torch.where(far, 0, moved).expm1())
    return w, torch.where(none, 0.0, beyond)


def renyi_divergence(log_s: Tensor, log_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """log(sum T^alpha S^(1-alpha)) / (alpha-1); dz = S - q, q that sum's terms over their sum."""
    w, beyond = _log_power(log_s, log_t, alpha)
    log_sum, excess = w.logsumexp(-1), beyond.sum(-1)
    log_sum_near = torch.where(excess.abs() < 0.5, excess, 0.0).log1p()
    value = torch.where(excess.abs() < 0.5, log_sum_near, log_sum) / (alpha - 1.0)
    q = (w - torch.where(log_sum.isfinite(), log_sum, torch.nan)[:, None]).exp()
    return value, log_s.exp() - q


def alpha_divergence(log_s: Tensor, log_t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(sum T^alpha S^(1-alpha) - 1) / (alpha (alpha-1)), any alpha but 0 and 1 (the KLs);
    dz = (S sum_u T_u^alpha S_u^(1-alpha) - T^alpha S^(1-alpha)) / alpha.
    """
    _, beyond = _log_power(log_s, log_t, alpha)
    s, excess = log_s.exp(), beyond.sum(-1)
    base = s - log_t.exp() if alpha >= 0.5 else torch.zeros_like(s)
    dz = base + (_product(s, excess[:, None].expand_as(s)) - beyond)
    return excess / (alpha * (alpha - 1.0)), dz / alpha


@dataclass(frozen=True)
class DivergenceRow:
    """The number shared with C++ and the function."""

    code: int
    fn: Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]


DIVERGENCES = {
    row.fn.__name__: row
    for row in (
        DivergenceRow(1, forward_kl),
        DivergenceRow(2, reverse_kl),
        DivergenceRow(3, jsd),
        DivergenceRow(4, tvd),
        DivergenceRow(5, renyi_divergence),
        DivergenceRow(6, alpha_divergence),
    )
}
DIVERGENCE_OF_CODE = {row.code: row.fn for row in DIVERGENCES.values()}
# (code, parameter) -> the code that is meant: JSD(0), JSD(1) by TRL's definition, the others as
# limits. Resolved when an op runs, so that no value of a parameter is a compile of its own.
_LIMITS = {(3, 0.0): 1, (3, 1.0): 2, (5, 1.0): 1, (6, 1.0): 1, (6, 0.0): 2}


def resolve(code: int, param: float) -> int:
    """The divergence that (code, param) stands for."""
    return _LIMITS.get((code, param), code)

"""The public token-local objectives (OBJECTIVES.md, section 1) and the terms that add to them.

Each class is one row of `objectives.TABLE`, or a short sum of rows; its docstring gives loss and
coef per token. Symbols: l = log-prob of the label, p = exp(l), old / mu / ref as in TokenBatch, r
= exp(l-old), w = exp(l-mu), A = advantages.
"""

import math
from dataclasses import dataclass

from pyoffline.compose import Objective, OneRow, check_floats
from pyoffline.objectives import ANCHORS, REGISTRY, Term, snake_case

NON_NEGATIVE = (0.0, math.inf)
POSITIVE = (math.ulp(0.0), math.inf)
_CLIPS = {"clip_low": (0.0, 1.0), "clip_high": NON_NEGATIVE}


def objective(cls):
    """Make a dataclass an objective that configuration files can name."""
    cls = dataclass(frozen=True)(cls)
    REGISTRY[snake_case(cls.__name__)] = cls
    return cls


def check_ordered(obj, low: float, high: float | None) -> None:
    """`low` is not above `high`."""
    if high is not None and low > high:
        raise ValueError(f"{type(obj).__name__}: low={low} is above high={high}")


@objective
class NLL(Objective):
    """`-l`, with `label_smoothing` eps mixed in as `(1-eps)(-l) + eps mean_v(lse - z_v)` and
    `z_loss * lse^2`.
    """

    label_smoothing: float = 0.0
    z_loss: float = 0.0

    def check(self):
        check_floats(self, label_smoothing=(0.0, 1.0), z_loss=NON_NEGATIVE)

    def terms(self, has_mu=False):
        eps = float(self.label_smoothing)
        out = [Term("nll", 1.0 - eps)]
        if eps:
            out.append(Term("smoothing", eps))
        if self.z_loss:
            out.append(Term("z_loss", float(self.z_loss)))
        return tuple(out)


@objective
class WeightedNLL(OneRow):
    """`-A l`, coef -A: REINFORCE, reward-weighted regression, AWR, RAFT, position weights."""


@objective
class DFT(OneRow):
    """`-sg(p) l`, coef -p (dynamic fine-tuning, 2508.05629)."""


@objective
class ProbPower(OneRow):
    """`-A p^alpha`, coef -A alpha p^alpha; advantages default to 1."""

    alpha: float = 0.5


@objective
class Luffy(OneRow):
    """`-A p/(p+gamma)`, coef -A gamma p/(p+gamma)^2 (2504.14945)."""

    gamma: float = 0.1
    bounds = {"gamma": POSITIVE}


@objective
class ImportanceWeightedSFT(OneRow):
    """`-sg(clamp(exp(l-ref), low, high)) l`, coef minus that weight (iw-SFT, 2507.12856)."""

    low: float = 0.2
    high: float | None = 1.8
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class ProximalSFT(OneRow):
    """PPO clip with A = 1: `-min(r, 1+clip_high)`, coef -r, 0 where clipped (2508.20784)."""

    clip_low: float = 0.2
    clip_high: float = 0.28
    bounds = _CLIPS


@objective
class ImportanceSampling(OneRow):
    """`-w A`, coef -w A."""


@objective
class PowerIS(OneRow):
    """`-A expm1(alpha log w)/alpha` (alpha = 0: `-A (l-mu)`), coef -A w^alpha: power shaping f(w)
    = w^alpha.
    """

    alpha: float = 0.5


@objective
class TruncatedIS(OneRow):
    """`-sg(clamp(w, low, high)) A l`, coef -clamp(w) A (TIS-PG)."""

    low: float = 0.0
    high: float | None = 1.0
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class PPOClip(OneRow):
    """`-min(min(r, delta) A, clip(r, 1-clip_low, 1+clip_high) A)`; for A < 0 at most `-dual_clip
    A` (1707.06347).

    coef -r A, exactly 0 where clipped; borders count as unclipped; A = 0 gives 0 even at r = inf.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    bounds = {**_CLIPS, "dual_clip": (1.0, math.inf), "delta": POSITIVE}


@objective
class DecoupledPPO(OneRow):
    """PPO clip on r, times `sg(exp(old-mu))`; tokens whose factor exceeds `behavior_cap` get 0
    (2505.24298).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    behavior_cap: float | None = None
    bounds = {**_CLIPS, "behavior_cap": POSITIVE}


@objective
class CISPO(OneRow):
    """`-sg(clamp(r, low, high)) A l`, absolute bounds (2506.13585)."""

    low: float = 0.0
    high: float | None = 5.0
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class SAPO(OneRow):
    """`-A sigmoid(tau (r-1)) 4/tau`, tau_pos for A > 0 else tau_neg (2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    bounds = {"tau_pos": POSITIVE, "tau_neg": POSITIVE}


@objective
class DPPO(OneRow):
    """`-sg(min(r, cap)) A l` where the move stays inside a TV or binary-KL ball, else 0
    (2602.04879).
    """

    kind: str = "tv"
    delta_low: float = 0.2
    delta_high: float = 0.2
    cap: float | None = 3.0
    bounds = {"delta_low": NON_NEGATIVE, "delta_high": NON_NEGATIVE, "cap": POSITIVE}

    def check(self):
        super().check()
        if self.kind not in ("tv", "kl"):
            raise ValueError(f"DPPO(kind={self.kind!r}): expected 'tv' or 'kl'")

    def row_name(self, has_mu):
        return f"dppo_{self.kind}"


@objective
class DRO(OneRow):
    """`-A l + beta/2 (l-old)^2`, coef -A + beta (l-old) (2405.19107)."""

    beta: float
    bounds = {"beta": NON_NEGATIVE}


@objective
class AsymRE(OneRow):
    """`-(A - baseline) l`, A = R - V_mu (2506.20520)."""

    baseline: float = -0.1


@objective
class TOPRToken(OneRow):
    """A >= 0: `-A l`; A < 0: `-sg(clamp(w, 0, 1)) A l` (token form of 2503.14286)."""


@objective
class DistillToken(OneRow):
    """`-sg((ref - l) clamp(w, low, high)) l`, ref = the teacher's log-probs; w = 1 without
    behavior_logps.
    """

    low: float = 0.0
    high: float | None = None
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)

    def row_name(self, has_mu):
        return "distill_token_is" if has_mu else "distill_token"


@objective
class KL(Objective):
    """KL estimator of D = l - anchor: k1 = D, k2 = D^2/2, k3 = exp(-D)-1+D, k3_is = r k3; anchor
    ref, old or mu.
    """

    kind: str = "k3"
    against: str = "ref"

    def check(self):
        if self.kind not in ("k1", "k2", "k3", "k3_is"):
            raise ValueError(f"KL(kind={self.kind!r}): expected k1, k2, k3 or k3_is")
        if self.against not in ANCHORS:
            raise ValueError(f"KL(against={self.against!r}): expected ref, old or mu")

    def terms(self, has_mu=False):
        return (Term(f"kl_{self.kind}", 1.0, anchor=ANCHORS[self.against]),)


@objective
class Entropy(Objective):
    """H of the row's distribution; subtract it as a bonus. Gradient -p (log p + H)."""

    def terms(self, has_mu=False):
        return (Term("entropy_term", 1.0),)


@objective
class ZLoss(Objective):
    """`lse^2`."""

    def terms(self, has_mu=False):
        return (Term("z_loss", 1.0),)

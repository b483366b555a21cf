"""The public token-local objectives and the terms that add to them.

Each class is one row of `objectives.TABLE`, or a short sum of rows; its docstring gives loss and
coef = dloss/dl per token, before its weight, and where it comes from. Symbols: l = log-prob of the
label (nats), p = exp(l), old / mu / ref as in TokenBatch, r = exp(l-old), w = exp(l-mu),
A = advantages, sg = `.detach()`. A field outside its range raises ValueError (TypeError for what is
no number) where the objective is made; a tensor that is missing, where it is used.
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
    """`-l`, or `(1-eps)(-l) + eps mean_v(lse - z_v) + z_loss lse^2` with label_smoothing eps.

    coef -(1-eps) in l. (label smoothing: 1512.00567, sec. 7; z-loss: PaLM, 2204.02311, sec. 5)
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
    """`-A l`, coef -A.

    By what A is: REINFORCE (Williams 1992), reward-weighted regression (Peters & Schaal 2007),
    AWR (1910.00177), RAFT (2304.06767), position weights (2403.12017, eq. 12); `advantages`
    makes each.
    """


@objective
class DFT(OneRow):
    """`-sg(p) l`, coef -p (dynamic fine-tuning, 2508.05629)."""


@objective
class ProbPower(OneRow):
    """`-A p^alpha`, coef -A alpha p^alpha; advantages default to 1. (LUFFY's `pow`, 2504.14945)"""

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
    """PPO clip with A = 1: `-min(r, 1+clip_high)`, coef -r, 0 where clipped (PSFT, 2508.20784).

    `clip_low` is PPO's other border, which A = 1 never reaches: it changes nothing.
    """

    clip_low: float = 0.2
    clip_high: float = 0.28
    bounds = _CLIPS


@objective
class ImportanceSampling(OneRow):
    """`-w A`, coef -w A: the policy gradient from samples of mu (Precup, Sutton & Singh 2000)."""


@objective
class PowerIS(OneRow):
    """`-A expm1(alpha log w)/alpha`, coef -A w^alpha: power shaping f(w) = w^alpha.

    alpha = 0 is the limit `-A (l-mu)`, the gradient of `WeightedNLL`; alpha = 1 is
    `ImportanceSampling`. ("Efficient Learning from Offline Samples", sec. 2; docs/theory.md)
    """

    alpha: float = 0.5


@objective
class TruncatedIS(OneRow):
    """`-sg(clamp(w, low, high)) A l`, coef -clamp(w) A: TIS-PG (Ionides 2008; ROLL 2506.06122)."""

    low: float = 0.0
    high: float | None = 1.0
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class PPOClip(OneRow):
    """`-min(min(r, delta) A, clip(r, 1-clip_low, 1+clip_high) A)`, at most `-dual_clip A` if A < 0.

    coef -r A, exactly 0 where clipped; borders count as unclipped; A = 0 gives 0 even at r = inf.
    (PPO 1707.06347, eq. 7; clip_high above clip_low: DAPO 2503.14476; dual clip: 1912.09729; delta
    as in TRL, 2505.07291)
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    delta: float | None = None
    bounds = {**_CLIPS, "dual_clip": (1.0, math.inf), "delta": POSITIVE}


@objective
class DecoupledPPO(OneRow):
    """`PPOClip` on r, times `sg(exp(old-mu))`: coef that of PPO times the factor.

    Tokens whose factor exceeds `behavior_cap` get 0. (2110.00641; AReaL 2505.24298)
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    behavior_cap: float | None = None
    bounds = {**_CLIPS, "behavior_cap": POSITIVE}


@objective
class CISPO(OneRow):
    """`-sg(clamp(r, low, high)) A l`, coef -clamp(r) A, absolute bounds (2506.13585)."""

    low: float = 0.0
    high: float | None = 5.0
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class SAPO(OneRow):
    """`-A s 4/tau`, s = sigmoid(tau (r-1)), tau_pos for A > 0 else tau_neg (2511.20347).

    coef -4 A s (1-s) r.
    """

    tau_pos: float = 1.0
    tau_neg: float = 1.05
    bounds = {"tau_pos": POSITIVE, "tau_neg": POSITIVE}


@objective
class DPPO(OneRow):
    """`-sg(min(r, cap)) A l` where the move stays in a trust region, else 0 (2602.04879).

    coef -min(r, cap) A where kept. With p_old = exp(old), kept is

        kind="tv"  p - p_old <= delta_high for A > 0, p - p_old >= -delta_low otherwise
        kind="kl"  p <= p_old or k <= delta_high for A > 0, p >= p_old or k <= delta_low
                   otherwise, k = KL of the two outcomes "label" and "not label", old || new
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
    """`-A l + beta/2 (l-old)^2`, coef -A + beta (l-old) (DRO 2405.19107; Kimi 1.5 2501.12599)."""

    beta: float
    bounds = {"beta": NON_NEGATIVE}


@objective
class AsymRE(OneRow):
    """`-(A - baseline) l`, coef -(A - baseline), A = R - V_mu (2506.20520)."""

    baseline: float = -0.1


@objective
class TOPRToken(OneRow):
    """A >= 0: `-A l`; A < 0: `-sg(clamp(w, 0, 1)) A l` (token form of TOPR, 2503.14286).

    coef -A, or -clamp(w) A.
    """


@objective
class DistillToken(OneRow):
    """`-sg((ref - l) clamp(w, low, high)) l`, ref = the teacher's log-probs of sampled tokens.

    coef minus that weight: the gradient of reverse KL on samples of mu (MiniLLM 2306.08543).
    w = 1 without behavior_logps.
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
    """An estimator of KL(policy || anchor), of D = l - anchor; anchor ref, old or mu.

        k1     D                coef 1
        k2     D^2/2            coef D
        k3     exp(-D) - 1 + D  coef 1 - exp(-D)
        k3_is  r k3             coef r D, the gradient of reverse KL on samples of old

    (Schulman 2020, joschu.net/blog/kl-approx.html; k3_is: DeepSeek-V3.2)
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
    """`H = -(p * p.log()).sum(-1)` of the row; subtract it as a bonus (A3C, 1602.01783).

    Gradient in the logits -p_v (log p_v + H).
    """

    def terms(self, has_mu=False):
        return (Term("entropy_term", 1.0),)


@objective
class ZLoss(Objective):
    """`z.logsumexp(-1) ** 2`; gradient in the logits 2 lse p_v. (PaLM, 2204.02311, sec. 5)"""

    def terms(self, has_mu=False):
        return (Term("z_loss", 1.0),)

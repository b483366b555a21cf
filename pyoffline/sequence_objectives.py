"""The public objectives of whole sequences and groups.

Each class is one row of `coupled_table.COUPLED`. Symbols: l = log-prob of the label, old / mu / ref
as in TokenBatch, n = tokens of the sequence that count, A = its advantage (that of its first
token), R = SequenceBatch.rewards, W = exp(sum(l-mu)). sum_i omega_i L_i is minimised: omega_i is
SequenceBatch.weights, or the sum of the sequence's token weights; without either it is one over the
number of units (sequences, or groups where it says so) that hold a token that counts. A sequence
without such a token is in no sum, no group and no average.
"""

import math

from pyoffline.compose import CoupledObjective, Objective, check_floats
from pyoffline.objectives import Term
from pyoffline.token_objectives import NON_NEGATIVE, POSITIVE, check_ordered, objective

_CLIPS = {"clip_low": (0.0, 1.0), "clip_high": NON_NEGATIVE}


@objective
class GSPO(CoupledObjective):
    """`-min(s A, clip(s, 1-clip_low, 1+clip_high) A)`, s = exp(mean(l-old)) (2507.18071).

    coef -s A/n, exactly 0 where clipped; borders count as unclipped.
    """

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    bounds = _CLIPS


@objective
class LUSPO(CoupledObjective):
    """GSPO times the sequence's length: `-n min(s A, clip(s) A)`, coef -s A (2602.05261)."""

    clip_low: float = 3e-4
    clip_high: float = 4e-4
    bounds = _CLIPS


@objective
class GMPO(CoupledObjective):
    """`-A exp(mean d)`, d = sgn(A) min(sgn(A) (l-old), clip) (2507.20673).

    coef -A exp(mean d)/n, exactly 0 for a clipped token.
    """

    clip: float = 0.4
    bounds = {"clip": NON_NEGATIVE}


@objective
class TOPR(CoupledObjective):
    """R >= 0: `-R sum l`; R < 0: `-sg(clip(W, 0, 1)) R sum l` (2503.14286)."""


@objective
class VESPO(CoupledObjective):
    """`-sg(W^k exp(lam (1-W))) A l` per token, W = exp(sum(l-old)) (2602.10693).

    log W is clamped to [log 1e-8, 20]; (k_pos, lam_pos) where A >= 0, else (k_neg, lam_neg).
    coef minus that factor times A. Weighted by token weights (default 1/tokens).
    """

    k_pos: float = 2.0
    lam_pos: float = 3.0
    k_neg: float = 3.0
    lam_neg: float = 2.0
    bounds = dict.fromkeys(("k_pos", "lam_pos", "k_neg", "lam_neg"), NON_NEGATIVE)


@objective
class ImportanceWeightedSFTSequence(CoupledObjective):
    """`-sg(clamp(exp(alpha mean(l-ref)), low, high)) l` per token, coef minus that factor.

    Weighted by token weights (default 1/tokens). (iw-SFT, sequence mode, 2507.12856)
    """

    alpha: float = 2.0
    low: float = 0.0
    high: float | None = 16.0
    bounds = {"low": NON_NEGATIVE}

    def check(self):
        super().check()
        check_ordered(self, self.low, self.high)


@objective
class SequencePowerIS(CoupledObjective):
    """`-A (W^alpha - 1)/alpha`, coef -A W^alpha: power shaping of a sequence's importance weight.

    alpha = 0 is its limit -A log W. ("Efficient Learning from Offline Samples", sec. 2, with
    sequences for actions; docs/theory.md)
    """

    alpha: float


@objective
class RenyiRWR(CoupledObjective):
    """`-(1/alpha) [log mean_i W_i^alpha e^{R_i/tau} - log mean_i e^{R_i/tau}]` per group.

    coef -softmax_i(alpha log W_i + R_i/tau): alpha = 0 is group-softmax reward-weighted regression
    (behavior_logps are then optional), alpha = 1 self-normalised importance sampling. It has the
    direction of D_alpha = 1/(alpha-1) log E_mu[W^alpha e^{r/tau}] without the factor that explodes
    at 1; the metric `renyi/d_alpha` is D_alpha itself (infinite at alpha = 1), `group_ess` the
    effective fraction of a group's sequences. A group of one has coef -1; a group of equal rewards
    is weighted by W^alpha alone. Default weight 1/groups. ("Efficient Learning from Offline
    Samples", sec. 2: reward-weighted Renyi divergence; docs/theory.md)
    """

    alpha: float = 0.5
    tau: float = 1.0
    bounds = {"alpha": NON_NEGATIVE, "tau": POSITIVE}

    def row_name(self, has_mu):
        return "renyi_rwr" if has_mu or self.alpha != 0 else "renyi_rwr_zero"


@objective
class AlphaELBO(CoupledObjective):
    """`-(1/(1-alpha)) [log mean_i W_i^alpha e^{(1-alpha) R_i/tau} - alpha log mean_i W_i]` per
    group, 0 <= alpha <= 1.

    Our definition of the variational Renyi bound for a policy (Li & Turner 2016, 1602.02311, with
    q = pi_theta and p = mu e^{R/tau}); the second term is 0 in expectation and keeps alpha -> 1
    finite. With w = softmax(log W), q = R/tau - log W: coef -> -w_i (q_i - sum_j w_j q_j) at alpha
    = 1 (self-normalised ELBO, KL-regularised RL); at alpha = 0 the bound is log Z and coef 0. A
    group of one has coef 0. The metric `alpha_elbo` is the bound. Default weight 1/groups.
    """

    alpha: float = 0.5
    tau: float = 1.0
    bounds = {"alpha": (0.0, 1.0), "tau": POSITIVE}


@objective
class AStarPO(CoupledObjective):
    """`(beta2 sum(l-ref) - A)^2`, A = R - V* with `advantages.astar_value` (A*-PO, 2505.20686).

    coef 2 beta2 (beta2 sum(l-ref) - A).
    """

    beta2: float = 1e-3
    bounds = {"beta2": NON_NEGATIVE}


@objective
class KLRegularizedPG(CoupledObjective):
    """`-sum_t r_t sg(R - beta sum_{k>=t}(l_k - ref_k))`, r = exp(l-old), coef the same.

    The live form of KL-shaped rewards: the sum holds the policy that is trained
    (`advantages.kl_shaped` holds old). `to_go=False` sums over every k. (The KL-regularised policy
    gradient with reward R - beta log(pi/ref), Jaques et al. 1611.02796.)
    """

    beta: float
    to_go: bool = True

    def check(self):
        if not isinstance(self.to_go, bool):
            raise TypeError(f"KLRegularizedPG(to_go={self.to_go!r}): expected a bool")
        check_floats(self, skip=("to_go",), beta=NON_NEGATIVE)


@objective
class OPSM(Objective):
    """`objective` without the sequences that are off-policy and bad (DeepSeek-V3.2, eq. 9).

    A token counts 0 where A < 0 and mean(mu - l) of its sequence > delta (nats per token). Wraps
    any objective, token-local or coupled. Weights are the wrapped objective's; nothing is
    renormalised. The metric `opsm/masked_fraction` counts tokens.
    """

    objective: Objective
    delta: float

    def check(self):
        if not isinstance(self.objective, Objective):
            raise TypeError(
                f"OPSM(objective=...) expects an objective such as po.GSPO(), got "
                f"{type(self.objective).__name__}"
            )
        check_floats(self, skip=("objective",), delta=(-math.inf, math.inf))

    def terms(self, has_mu=False):
        inner = self.objective.terms(has_mu)
        return (Term("opsm", 1.0, (float(self.delta),), anchor=len(inner)), *inner)

"""The public preference objectives.

Pairs: the first half of the batch's sequences are chosen, the second half their rejected ones, in
the same order. l = log-prob of the label, x = sum(l - ref) of a sequence (references per token,
`TokenBatch.ref_logps`, or per sequence, `SequenceBatch.ref_logps`, so that precomputed columns
serve; a reference model at hand is `ref_logps=TeacherHead(ref_hidden, ref_head)`, for the one GEMM
that any reference costs), n = tokens of a sequence that count, s = sigmoid. The default weight is
1/pairs (1/sequences for KTO, 1/groups for rankings). With token weights a pair weighs the tokens of
both its sequences; `SequenceBatch.weights` are added over the pair. A pair with tokens on one side
only is an error (on a GPU: a NaN loss); a fully ignored pair does not exist. A pair's (sequence's,
group's) NaN stays there.

Not here: the closed forms (`preference_math.py`, `ranking_math.py`), rows (`preference_rows.py`).
"""

import math
from dataclasses import replace

from pyoffline.compose import CoupledObjective, Objective
from pyoffline.coupled_table import COUPLED
from pyoffline.objectives import Term
from pyoffline.preference_rows import (
    AOT,
    DPO_LOSSES,
    JS,
    MARGIN,
    MARGIN_LOSSES,
    SOFT,
    row_name,
)
from pyoffline.token_objectives import objective

_POSITIVE = (math.ulp(0.0), math.inf)
_NON_NEGATIVE = (0.0, math.inf)
_UNIT = (0.0, 1.0)
_ANY = (-math.inf, math.inf)
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
_SMOOTHED = (*SOFT, "exo_pair", "robust", *AOT)


def _number(obj, name: str, low: float, high: float) -> None:
    value, where = getattr(obj, name), type(obj).__name__
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{where}({name}=...) expects a float, got {value!r}")
    if not low <= value <= high or math.isinf(value):  # true for NaN too
        raise ValueError(f"{where}({name}={value}) is outside [{low:g}, {high:g}] or not finite")


def _choice(obj, name: str, known) -> None:
    value = getattr(obj, name)
    if value not in known:
        where = type(obj).__name__
        raise ValueError(f"{where}({name}={value!r}): expected one of {', '.join(known)}")


def _refuse(obj, condition: bool, why: str) -> None:
    if condition:
        raise ValueError(f"{type(obj).__name__}: {why}")


def _term(row: str, scale: float = 1.0, **values: float) -> Term:
    """A row with its parameters by name; those that are not given are 0."""
    return Term(row, scale, tuple(float(values.get(name, 0.0)) for name in COUPLED[row].params))


class _Pair(CoupledObjective):
    """`loss` by pairs on numbers that are not fields one to one."""

    numbers: dict = {}

    def check(self):
        for name, (low, high) in self.numbers.items():
            _number(self, name, low, high)

    def smoothed(self, losses) -> None:
        """label_smoothing only where the loss reads it."""
        _refuse(
            self,
            self.label_smoothing != 0 and self.loss not in losses,
            f"loss={self.loss!r} takes no label_smoothing; {', '.join(losses)} do",
        )


@objective
class DPO(_Pair):
    """Direct preference optimisation (2305.18290) and its relatives, by TRL's names of `loss`.

    With scores f(x) (`f_divergence`, 2309.16240, TRL's names), z = beta (f(x_w) - f(x_l)) - margin
    and eps = label_smoothing:

        sigmoid        -p log s(z) - (1-p) log s(-z), p = sequences.targets of the chosen row, or 1,
                       mixed as (1-eps) p + eps (1-p) (soft labels 2309.06657, cDPO)
        sigmoid_norm   the same, scores divided by n (Tulu 3, 2411.15124)
        hinge          relu(1 - z) (SLiC 2305.10425, RSO 2309.06657)
        ipo            (f(x_w)/n_w - f(x_l)/n_l - 1/(2 beta))^2 (2310.12036)
        robust         (-(1-eps) log s(z) + eps log s(-z)) / (1 - 2 eps) (2403.00409)
        exo_pair       KL(s(z) || [1-eps, eps]), eps > 0 (2402.00856)
        discopop       (1-m)(-log s(z)) + m e^-z, m = s(z / 0.05) (2406.08414)
        nca_pair       -log s(u) - 1/2 log s(-u) - 1/2 log s(-v) (2402.05369), here and below
                       u = beta x_w, v = beta x_l
        bco_pair       -log s(u) - log s(-v) (2404.04656)
        sppo_hard      (x_w - 1/(2 beta))^2 + (x_l + 1/(2 beta))^2 (2405.00675)
        apo_zero       1 - s(u) + s(v) (2408.06266)
        apo_down       s(u) + 1 - s(u - v) (2408.06266)
        aot            -(1-eps) log s(beta d) - eps log s(-beta d), d = sort over the batch of the
                       policy's sum l_w - sum l_l minus sort of the reference's (2406.05882).
                       Micro-batches do not add up to the batch.
        aot_unpaired   the same, d = sort of x_w minus sort of x_l

    coef of every chosen token dL/dx_w, of a rejected one dL/dx_l: for sigmoid -+beta s(-z), p = 1.
    `reference_free`: ref = 0. `margin`: a number, or "rewards": the pair's reward gap
    `sequences.rewards[w] - rewards[l]` (scale rewards as you like; ODPO 2402.10571). `alpha` is the
    coefficient of "alpha_divergence". f-divergences and margins belong to the losses of z (f also
    to ipo). TRL's sigmoid ignores its label_smoothing and its alpha scores saturate at e^80; ours
    do not. RPO = `DPO() + c * NLL().weighted_by("positive")`.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_free: bool = False
    loss: str = "sigmoid"
    f_divergence: str = "reverse_kl"
    alpha: float = 0.5
    margin: float | str = 0.0
    numbers = {"beta": _POSITIVE, "label_smoothing": _UNIT, "alpha": _ANY}

    def check(self):
        super().check()
        _choice(self, "loss", DPO_LOSSES)
        _choice(self, "f_divergence", F_DIVERGENCES)
        if not isinstance(self.reference_free, bool):
            raise TypeError(f"DPO(reference_free={self.reference_free!r}): expected a bool")
        if isinstance(self.margin, str):
            _refuse(
                self, self.margin != "rewards", f"margin={self.margin!r}: a number or 'rewards'"
            )
        else:
            _number(self, "margin", *_ANY)
        eps, loss = self.label_smoothing, self.loss
        self.smoothed(_SMOOTHED)
        _refuse(self, loss == "robust" and eps >= 0.5, "robust needs label_smoothing below 0.5")
        _refuse(
            self,
            loss == "exo_pair" and not 0 < eps < 1,
            "exo_pair needs label_smoothing inside (0, 1); the paper recommends 1e-3",
        )
        _refuse(
            self,
            self.f_divergence != "reverse_kl" and loss not in MARGIN,
            f"loss={loss!r} has no f-divergence scores; {', '.join(MARGIN)} have",
        )
        _refuse(
            self,
            self.alpha != 0.5 and self.f_divergence != "alpha_divergence",
            "alpha belongs to f_divergence='alpha_divergence'",
        )
        _refuse(
            self,
            self.margin != 0 and loss not in MARGIN_LOSSES,
            f"loss={loss!r} takes no margin; {', '.join(MARGIN_LOSSES)} do",
        )

    def power(self) -> float:
        """Scores are (e^{power x} - 1)/power; infinity stands for Jensen-Shannon."""
        power = {
            "reverse_kl": 0.0,
            "forward_kl": -1.0,
            "js_divergence": JS,
            "alpha_divergence": self.alpha - 1.0,
        }[self.f_divergence]
        return 0.0 if abs(power) < 1e-6 else power

    def terms(self, has_mu=False):
        rewarded = self.margin == "rewards"
        row = row_name(self.loss, self.reference_free, rewarded)
        values = {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "power": self.power(),
            "margin": 0.0 if rewarded else self.margin,
        }
        return (_term(row, **values),)


@objective
class KTO(_Pair):
    """`1 - s(beta (x - kl))` for a desirable sequence (targets = 1), `1 - s(beta (kl - x))` for an
    undesirable one (targets = 0), times `desirable` / `undesirable`. (2402.01306 eq. 7)

    coef -+beta s s(-.) on every token; the unit is the sequence. `kl`: the caller's estimate of
    E[sum(l - ref)] on mismatched answers, a float or a 0-d tensor (read once, a host sync on a
    GPU), not differentiated, clamped at 0 as in the paper; kl = 0 is TRL's apo_zero_unpaired.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    kl: float = 0.0
    numbers = {
        "beta": _POSITIVE,
        "desirable": _NON_NEGATIVE,
        "undesirable": _NON_NEGATIVE,
        "kl": _NON_NEGATIVE,
    }

    def __post_init__(self):
        kl = self.kl
        if hasattr(kl, "dim"):
            if kl.dim():
                raise ValueError(f"KTO(kl=...): expected a float or a 0-d tensor, got {kl.shape}")
            kl = float(kl)
        if isinstance(kl, (int, float)) and kl < 0:
            kl = 0.0
        object.__setattr__(self, "kl", kl)
        super().__post_init__()


@objective
class CPO(_Pair):
    """Contrastive preference optimisation (2401.08417): DPO without a reference, plus `nll` times
    the mean of -l over all chosen tokens.

    loss: sigmoid (with label_smoothing), hinge, or ipo (on means). With token weights each chosen
    token's -l carries its own weight instead of 1/chosen tokens.
    """

    beta: float = 0.1
    label_smoothing: float = 0.0
    loss: str = "sigmoid"
    nll: float = 1.0
    numbers = {"beta": _POSITIVE, "label_smoothing": _UNIT, "nll": _NON_NEGATIVE}

    def check(self):
        super().check()
        _choice(self, "loss", ("sigmoid", "hinge", "ipo"))
        self.smoothed(("sigmoid",))

    def terms(self, has_mu=False):
        values = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        return (_term(row_name(self.loss, True), **values), *_nll(self.nll))


def _nll(scale: float) -> tuple[Term, ...]:
    return (_term("chosen_nll", scale),) if scale else ()


@objective
class SimPO(_Pair):
    """`-log s(beta (mean l_w - mean l_l) - gamma)`, no reference (2405.14734), with label smoothing
    as in DPO, plus `nll` times the mean of -l over all chosen tokens (CPO-SimPO).
    """

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0
    nll: float = 0.0
    numbers = {
        "beta": _POSITIVE,
        "gamma": _ANY,
        "label_smoothing": _UNIT,
        "nll": _NON_NEGATIVE,
    }

    def terms(self, has_mu=False):
        values = {"beta": self.beta, "label_smoothing": self.label_smoothing, "margin": self.gamma}
        return (_term(row_name("sigmoid_norm", True), **values), *_nll(self.nll))


@objective
class AlphaPO(_Pair):
    """SimPO on `r = (1 - p^-alpha)/alpha`, p = exp(mean l); alpha = 0 is SimPO. (2501.03884)

    dr/d mean l = p^-alpha, which overflows visibly where alpha mean l is below -709.
    """

    alpha: float = 0.25
    beta: float = 2.5
    gamma: float = 0.25
    label_smoothing: float = 0.0
    nll: float = 0.0
    numbers = {
        "alpha": _ANY,
        "beta": _POSITIVE,
        "gamma": _ANY,
        "label_smoothing": _UNIT,
        "nll": _NON_NEGATIVE,
    }

    def terms(self, has_mu=False):
        names = ("alpha", "beta", "gamma", "label_smoothing")
        return (_term("alpha_po", **{n: getattr(self, n) for n in names}), *_nll(self.nll))


@objective
class ORPO(_Pair):
    """`mean of -l over all chosen tokens - beta log s(log odds_w - log odds_l)`, odds = p/(1-p) of
    p = exp(mean l). (2403.07691 eq. 6; beta is the paper's lambda)

    TRL's first term runs over prompt and answer: give it the labels of both. With token weights
    each chosen token's -l carries its own weight.
    """

    beta: float = 0.1
    numbers = {"beta": _NON_NEGATIVE}

    def terms(self, has_mu=False):
        return (_term("orpo_odds", beta=self.beta), *_nll(1.0))


@objective
class TPO(_Pair):
    """The contrast of triple preference optimisation (2405.16681): loss sigmoid, hinge, ipo (on
    means) or "tpo-l" (means, minus `gamma`), no reference.

    Its third answer, the gold one, is no part of a pair: add
    `linear_policy_loss(gold_hidden, head, TokenBatch(gold_labels), alpha * NLL()).loss`.
    """

    beta: float = 0.01
    label_smoothing: float = 0.0
    loss: str = "sigmoid"
    gamma: float = 0.5
    numbers = {"beta": _POSITIVE, "label_smoothing": _UNIT, "gamma": _ANY}

    def check(self):
        super().check()
        _choice(self, "loss", ("sigmoid", "hinge", "ipo", "tpo-l"))
        self.smoothed(("sigmoid", "tpo-l"))

    def terms(self, has_mu=False):
        values = {"beta": self.beta, "label_smoothing": self.label_smoothing}
        if self.loss == "tpo-l":
            return (_term(row_name("sigmoid_norm", True), margin=self.gamma, **values),)
        return (_term(row_name(self.loss, True), **values),)


@objective
class WPO(Objective):
    """Weigh each pair of `objective` by `exp(mean_w(l - log sum p^2) + mean_l(l - log sum p^2))`,
    not differentiated: pairs that the policy would have written count more. (2406.11827 eq. 2)

    sum p^2 is a statistic of the row pass. `objective` is one of this module's pair losses; what it
    adds to them (CPO's NLL) stays as it is.
    """

    objective: Objective

    def terms(self, has_mu=False):
        if not isinstance(self.objective, Objective):
            raise TypeError(f"WPO expects an objective, got {self.objective!r}")
        return tuple(self._weighted(t) for t in self.objective.terms(has_mu))

    def _weighted(self, t: Term) -> Term:
        names = COUPLED[t.row].params if t.row in COUPLED else ()
        if "wpo" in names:
            at = names.index("wpo")
            return replace(t, params=(*t.params[:at], 1.0, *t.params[at + 1 :]))
        if t.row == "chosen_nll":
            return t
        raise ValueError(f"WPO weighs pairs; {t.row} is none (add it outside of WPO)")


@objective
class ListDPO(_Pair):
    """List-wise DPO: the Plackett-Luce likelihood of each group's ranking with scores beta x.
    (2305.18290, appendix A.3)

    `-sum_i (beta x_i - logsumexp of beta x over i and all ranked below i)`; the group
    (`sequences.group_ids`) is the unit, larger `sequences.rewards` rank higher. Tied answers are
    not compared with each other; a group of one, or of ties, gives 0. Two answers: DPO.
    """

    beta: float = 0.1
    reference_free: bool = False
    numbers = {"beta": _POSITIVE}

    def terms(self, has_mu=False):
        return (_term("list_dpo_free" if self.reference_free else "list_dpo", beta=self.beta),)


@objective
class RRHF(_Pair):
    """Ranking hinge `sum_{R_i > R_j} relu(mean l_j - mean l_i)` over the pairs of a group.
    (2304.05302; its SFT term is `NLL().weighted_by("best")`)

    The group (`sequences.group_ids`) is the unit; ties are not compared.
    """

    def terms(self, has_mu=False):
        return (_term("rrhf"),)

"""Rows of the coupled table for preference: from tokens to per-sequence numbers and back.

Each row sums log-probs over sequences, calls a closed form of `preference_math` or `ranking_math`,
multiplies by the weight of the pair (sequence, group) and spreads dL/dx over the sequence's tokens.
A pair's loss lies half on each of its sequences. Not here: the public dataclasses
(`preference.py`).

A pair needs tokens that count on both sides: where one side is empty the CPU raises, another device
gives a NaN loss (reading it would be a host sync). A pair with two empty sides is not a pair.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyoffline import preference_math as pm
from pyoffline import ranking_math as rm
from pyoffline.coupled import Coupled, CoupledLoss, CoupledRow
from pyoffline.objective_math import product

JS = math.inf  # `power` of the Jensen-Shannon scores
REFERENCE = (("ref", "ref_sums"),)
PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def refuse(bad: Tensor, what: str) -> Tensor:
    """0, or NaN where `bad`; on the CPU a ValueError instead, which costs no sync there."""
    if bad.device.type == "cpu" and bool(bad.any()):
        raise ValueError(f"{what} ({int(bad.sum())} of {bad.numel()} here)")
    return torch.where(bad, torch.nan, 0.0).double()


def log_ratios(c: Coupled, free: bool) -> Tensor:
    """[S]: sum(l - ref), from the references per token or per sequence; sum l if `free`."""
    if free:
        return c.sum(c.logp)
    if c.ref is not None:
        return c.sum(c.logp - c.ref)
    return c.sum(c.logp) - c.ref_sums


def whole_pairs(c: Coupled) -> Tensor:
    """[P] zeros, NaN (or an error) where a pair has tokens on one side only."""
    first, second = c.pairs()
    lone = (c.lengths[first] == 0) | (c.lengths[second] == 0)
    return refuse(
        lone,
        "a preference pair has tokens that count on one side only: sequence i is chosen and "
        "sequence i + S/2 its rejected one; mask both (ignore_index or weight 0) or neither",
    )


def pair_metrics(c: Coupled, x: Tensor, beta: float) -> dict[str, Tensor]:
    """What TRL plots, from the log-ratios (not the f-divergence scores)."""
    first, second = c.pairs()
    logps = c.sum(c.logp)
    up, down = beta * x[first], beta * x[second]
    values = (up, down, (up > down).double(), up - down, logps[first], logps[second])
    return dict(zip(PAIR_METRICS, values, strict=True))


def on_sequences(c: Coupled, first: Tensor, second: Tensor) -> Tensor:
    """[P], [P] -> [S]: values of chosen and rejected at their sequences."""
    chosen, rejected = c.pairs()
    return torch.zeros_like(c.omega).scatter_(0, chosen, first).scatter_(0, rejected, second)


def pair_loss(c: Coupled, loss, d_chosen, d_rejected, metrics) -> CoupledLoss:
    """Pairs' losses and dL/dx times the pairs' weights, spread over the tokens."""
    loss, d_chosen, d_rejected = pm.show_nan(loss + whole_pairs(c), d_chosen, d_rejected)
    omega = c.pair_omega()
    half = 0.5 * product(omega, loss)
    slopes = on_sequences(c, product(omega, d_chosen), product(omega, d_rejected))
    return CoupledLoss(on_sequences(c, half, half), c.spread(slopes), metrics=metrics)


def wpo_weight(c: Coupled) -> Tensor:
    """[P]: exp of both sides' mean (l - log sum p^2), not differentiated. (WPO 2406.11827 eq. 2)"""
    chosen, rejected = c.pairs()
    aligned = c.mean(c.logp - c.log_sum_p2)
    return torch.exp(aligned[chosen] + aligned[rejected])


def weigh(c: Coupled, wpo: float, *parts: Tensor) -> tuple[Tensor, ...]:
    """`parts` times the WPO weight where it is asked for."""
    if not wpo:
        return parts
    weight = wpo_weight(c)
    return tuple(product(weight, x) for x in parts)


def target_of(c: Coupled, smoothing: float) -> Tensor:
    """[P]: P(chosen beats rejected), 1 or the target of the chosen row, mixed with its flip."""
    chosen = c.pairs()[0]
    p = torch.ones_like(c.omega[chosen]) if c.targets is None else c.targets[chosen]
    p = p + refuse(
        (p < 0) | (p > 1), "sequences.targets: expected P(chosen beats rejected) in [0, 1]"
    )
    return (1.0 - smoothing) * p + smoothing * (1.0 - p)


# of z = beta * gap - margin, with the arguments that each one takes
MARGIN_LOSSES: dict[str, Callable] = {
    "sigmoid": lambda c, z, eps: pm.sigmoid(z, target_of(c, eps)),
    "sigmoid_norm": lambda c, z, eps: pm.sigmoid(z, target_of(c, eps)),
    "hinge": lambda c, z, eps: pm.hinge(z),
    "exo_pair": lambda c, z, eps: pm.exo_pair(z, eps),
    "robust": lambda c, z, eps: pm.robust(z, eps),
    "discopop": lambda c, z, eps: pm.discopop(z),
}
NORMALISED = ("ipo", "sigmoid_norm")  # scores divided by the lengths
SOFT = ("sigmoid", "sigmoid_norm")  # read sequences.targets
MARGIN = (*MARGIN_LOSSES, "ipo")
AOT = ("aot", "aot_unpaired")
DPO_LOSSES = (*MARGIN, *pm.UNPAIRED, *AOT)


def score_gap(c: Coupled, x: Tensor, power: float, normalised: bool):
    """f-divergence scores of chosen minus rejected, with slopes. (f-DPO 2309.16240)"""
    chosen, rejected = c.pairs()
    lengths = ()
    if normalised:
        lengths = tuple(c.lengths[i].clamp(min=1) for i in (chosen, rejected))
    if power == JS:
        return pm.js_gap(x[chosen], x[rejected], *lengths)
    return pm.power_gap(x[chosen], x[rejected], power, *lengths)


def margin_row(loss: str, free: bool, rewarded: bool) -> Callable[[Coupled], CoupledLoss]:
    """The function of a DPO loss on the margin z = beta * gap - margin."""

    def row(c: Coupled) -> CoupledLoss:
        beta, smoothing, power, margin, wpo = c.params[:5]
        x = log_ratios(c, free)
        gap, up, down = score_gap(c, x, power, loss in NORMALISED)
        if loss == "ipo":
            value, slope = pm.squared(gap, beta)
        else:
            chosen, rejected = c.pairs()
            shift = c.rewards[chosen] - c.rewards[rejected] if rewarded else margin
            value, slope = MARGIN_LOSSES[loss](c, beta * gap - shift, smoothing)
            slope = beta * slope
        parts = weigh(c, wpo, value, product(slope, up), product(slope, down))
        return pair_loss(c, *parts, pair_metrics(c, x, beta))

    return row


def sides_row(loss: str, free: bool) -> Callable[[Coupled], CoupledLoss]:
    """The function of a DPO loss on x_w and x_l by themselves."""

    def row(c: Coupled) -> CoupledLoss:
        beta, wpo = c.params[:2]
        x, (chosen, rejected) = log_ratios(c, free), c.pairs()
        parts = weigh(c, wpo, *pm.UNPAIRED[loss](x[chosen], x[rejected], beta))
        return pair_loss(c, *parts, pair_metrics(c, x, beta))

    return row


def aot_row(loss: str, free: bool) -> Callable[[Coupled], CoupledLoss]:
    """The function of an AOT loss: sorted over the batch."""

    def row(c: Coupled) -> CoupledLoss:
        beta, eps = c.params[:2]
        x, (chosen, rejected) = log_ratios(c, free), c.pairs()
        if loss == "aot":
            policy = c.sum(c.logp)
            gap = policy[chosen] - policy[rejected]
            ref = policy - x  # 0 if free
            value, slope, _ = pm.aot(gap, ref[chosen] - ref[rejected], beta, eps)
            slopes = slope, -slope
        else:
            value, *slopes = pm.aot(x[chosen], x[rejected], beta, eps)
        return pair_loss(c, value, *slopes, pair_metrics(c, x, beta))

    return row


def kto(c: Coupled) -> CoupledLoss:
    """1 - s(beta (x - kl)) where targets are 1, 1 - s(beta (kl - x)) where 0. (2402.01306)"""
    beta, desirable, undesirable, kl = c.params[:4]
    good = c.targets == 1
    wrong = refuse(
        ~good & (c.targets != 0) & (c.targets == c.targets),
        "KTO reads sequences.targets: expected 1 (desirable) or 0 (undesirable) per sequence",
    )
    x = log_ratios(c, False)
    loss, slope = pm.kto(x, good, beta, kl)
    weight = torch.where(good, desirable * c.omega, undesirable * c.omega)
    loss, slope = pm.show_nan(loss + wrong + (c.targets - c.targets), slope)
    metrics = {"rewards/mean": beta * x, "logps/mean": c.sum(c.logp)}
    return CoupledLoss(product(weight, loss), c.spread(product(weight, slope)), metrics=metrics)


def orpo_odds(c: Coupled) -> CoupledLoss:
    """-beta log s(log odds of chosen - log odds of rejected), of mean log-probs. (2403.07691)"""
    beta, wpo = c.params[:2]
    mean, (chosen, rejected) = c.mean(c.logp), c.pairs()
    n = c.lengths.clamp(min=1).double()
    loss, up, down = pm.orpo(mean[chosen], mean[rejected])
    parts = weigh(c, wpo, beta * loss, beta * up / n[chosen], beta * down / n[rejected])
    return pair_loss(c, *parts, pair_metrics(c, mean, beta))


def alpha_po(c: Coupled) -> CoupledLoss:
    """Sigmoid loss of z = beta (r_w - r_l) - gamma, r = (1 - p^-alpha)/alpha. (2501.03884)"""
    beta, smoothing, alpha, gamma, wpo = c.params[:5]
    mean, (chosen, rejected) = c.mean(c.logp), c.pairs()
    n = c.lengths.clamp(min=1).double()
    gap, up, down = pm.power_gap(mean[chosen], mean[rejected], -alpha)
    loss, slope = pm.sigmoid(beta * gap - gamma, target_of(c, smoothing))
    slope = beta * slope
    slopes = product(slope, up) / n[chosen], product(slope, down) / n[rejected]
    return pair_loss(c, *weigh(c, wpo, loss, *slopes), pair_metrics(c, mean, beta))


def chosen_nll(c: Coupled) -> CoupledLoss:
    """-l of the chosen tokens: their mean over the batch, or their sum with the given weights."""
    weight = product(c.weights, c.spread(c.omega))
    return CoupledLoss(product(weight, -c.logp), -weight)


def ranked(c: Coupled, score: Tensor, loss: Tensor, slope: Tensor, beta: float) -> CoupledLoss:
    """A group's loss and slopes times the group's weight."""
    weight = c.group_spread(c.group_omega())
    loss, slope = pm.show_nan(loss, slope)
    best = rm.group_best(c.rewards, c.group)
    metrics = {"rewards/mean": beta * score, "rewards/best": beta * score[best]}
    return CoupledLoss(product(weight, loss), product(weight, slope), metrics=metrics)


def list_row(free: bool) -> Callable[[Coupled], CoupledLoss]:
    """The function of list-wise DPO."""

    def row(c: Coupled) -> CoupledLoss:
        beta = c.params[0]
        x = log_ratios(c, free)
        loss, slope = rm.plackett_luce(beta * x, c.rewards, c.group)
        out = ranked(c, x, loss, beta * slope, beta)
        return CoupledLoss(out.loss, c.spread(out.a), metrics=out.metrics)

    return row


def rrhf(c: Coupled) -> CoupledLoss:
    """sum over pairs of a group of relu(worse - better), mean log-probs. (2304.05302)"""
    mean = c.mean(c.logp)
    out = ranked(c, mean, *rm.ranking_hinge(mean, c.rewards, c.group), 1.0)
    slope = out.a / c.lengths.clamp(min=1)
    return CoupledLoss(out.loss, c.spread(slope), metrics=out.metrics)


def row_name(loss: str, free: bool, rewarded: bool = False) -> str:
    """dpo_sigmoid, dpo_hinge_free, dpo_sigmoid_rewards, ..."""
    return f"dpo_{loss}{'_free' if free else ''}{'_rewards' if rewarded else ''}"


def _dpo_row(code: int, loss: str, free: bool, rewarded: bool) -> CoupledRow:
    if loss in MARGIN:
        fn = margin_row(loss, free, rewarded)
        params = ("beta", "label_smoothing", "power", "margin", "wpo")
    elif loss in AOT:
        fn, params = aot_row(loss, free), ("beta", "label_smoothing")
    else:
        fn, params = sides_row(loss, free), ("beta", "wpo")
    fn.__name__ = row_name(loss, free, rewarded)
    return CoupledRow(
        code,
        fn,
        "batch" if loss in AOT else "pair",
        "pair",
        reads=("rewards",) if rewarded else (),
        params=params,
        optional=("targets",) if loss in SOFT else (),
        one_of=() if free else REFERENCE,
        metrics=PAIR_METRICS,
        pairs=True,
    )


def _dpo_rows() -> list[CoupledRow]:
    rows, code = [], 200
    for loss in DPO_LOSSES:
        for free in (False, True):
            for rewarded in (False, True) if loss in MARGIN_LOSSES else (False,):
                rows.append(_dpo_row(code, loss, free, rewarded))
                code += 1
    return rows


def _list_row(code: int, free: bool) -> CoupledRow:
    fn = list_row(free)
    fn.__name__ = "list_dpo_free" if free else "list_dpo"
    reads, metrics = ("rewards", "group_ids"), ("rewards/mean", "rewards/best")
    references = () if free else REFERENCE
    return CoupledRow(
        code, fn, "group", "group", reads, ("beta",), one_of=references, metrics=metrics
    )


_KTO = ("beta", "desirable", "undesirable", "kl")
_ALPHA_PO = ("beta", "label_smoothing", "alpha", "gamma", "wpo")
PREFERENCE_ROWS: tuple[CoupledRow, ...] = (
    *_dpo_rows(),
    CoupledRow(
        300,
        kto,
        "sequence",
        "sequence",
        ("targets",),
        _KTO,
        one_of=REFERENCE,
        metrics=("rewards/mean", "logps/mean"),
    ),
    CoupledRow(
        301, orpo_odds, "pair", "pair", (), ("beta", "wpo"), metrics=PAIR_METRICS, pairs=True
    ),
    CoupledRow(
        302,
        alpha_po,
        "pair",
        "pair",
        (),
        _ALPHA_PO,
        optional=("targets",),
        metrics=PAIR_METRICS,
        pairs=True,
    ),
    CoupledRow(303, chosen_nll, "sequence", "chosen", pairs=True),
    _list_row(304, False),
    _list_row(305, True),
    CoupledRow(
        306,
        rrhf,
        "group",
        "group",
        ("rewards", "group_ids"),
        metrics=("rewards/mean", "rewards/best"),
    ),
)

"""Preference losses on per-sequence numbers: every coefficient against fp64 autograd of the plain
formula, extreme margins, and what a NaN may reach.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from pyoffline import preference_math as pm
from pyoffline import ranking_math as rm

BETA, EPS, P = 0.3, 0.2, 40


def log_s(x):
    return F.logsigmoid(x)


def scalar(fn, plain, *args):
    """A row of z-losses: `fn(z, *args)` against `plain(z)`."""
    return fn, plain, args


TARGET = torch.linspace(0, 1, P, dtype=torch.float64)
MARGINS = {
    "sigmoid": scalar(pm.sigmoid, lambda z: -log_s(z), torch.ones(P, dtype=torch.float64)),
    "sigmoid soft labels": scalar(
        pm.sigmoid, lambda z: -TARGET * log_s(z) - (1 - TARGET) * log_s(-z), TARGET
    ),
    "hinge": scalar(pm.hinge, lambda z: (1 - z).relu()),
    "ipo": scalar(pm.squared, lambda z: (z - 1 / (2 * BETA)) ** 2, BETA),
    "exo_pair": scalar(
        pm.exo_pair,
        lambda z: (
            z.sigmoid() * (log_s(z) - math.log(1 - EPS))
            + (-z).sigmoid() * (log_s(-z) - math.log(EPS))
        ),
        EPS,
    ),
    "robust": scalar(
        pm.robust, lambda z: (-(1 - EPS) * log_s(z) + EPS * log_s(-z)) / (1 - 2 * EPS), EPS
    ),
    "robust eps=0": scalar(pm.robust, lambda z: -log_s(z), 0.0),
    "discopop": scalar(
        pm.discopop,
        lambda z: -log_s(z) * (-z / 0.05).sigmoid() + (-z).exp() * (z / 0.05).sigmoid(),
    ),
    "discopop tau=2": scalar(
        pm.discopop, lambda z: -log_s(z) * (-z / 2).sigmoid() + (-z).exp() * (z / 2).sigmoid(), 2.0
    ),
}
SIDES = {
    "nca_pair": lambda u, v: -log_s(u) - 0.5 * log_s(-u) - 0.5 * log_s(-v),
    "bco_pair": lambda u, v: -log_s(u) - log_s(-v),
    "sppo_hard": lambda u, v: (u / BETA - 0.5 / BETA) ** 2 + (v / BETA + 0.5 / BETA) ** 2,
    "apo_zero": lambda u, v: 1 - u.sigmoid() + v.sigmoid(),
    "apo_down": lambda u, v: u.sigmoid() + 1 - (u - v).sigmoid(),
}
GAPS = {
    "reverse_kl": (lambda *a: pm.power_gap(*a[:2], 0.0, *a[2:]), lambda x: x),
    "forward_kl": (lambda *a: pm.power_gap(*a[:2], -1.0, *a[2:]), lambda x: 1 - (-x).exp()),
    "alpha": (lambda *a: pm.power_gap(*a[:2], -0.5, *a[2:]), lambda x: ((-x / 2).exp() - 1) / -0.5),
    "alpha above 1": (
        lambda *a: pm.power_gap(*a[:2], 0.7, *a[2:]),
        lambda x: (0.7 * x).expm1() / 0.7,
    ),
    "js": (pm.js_gap, lambda x: math.log(2) + log_s(x)),
}


def values(seed, n=P, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(n, generator=g, dtype=torch.float64)).requires_grad_()


def same(got, want):
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MARGINS)
def test_margin_losses_and_slopes_equal_fp64_autograd(name):
    fn, plain, args = MARGINS[name]
    z = values(1, scale=4.0)
    want = plain(z)
    (slope,) = torch.autograd.grad(want.sum(), z)
    loss, dz = fn(z.detach(), *args)
    same(loss, want.detach())
    same(dz, slope)


@pytest.mark.parametrize("name", SIDES)
def test_two_sided_losses_and_slopes_equal_fp64_autograd(name):
    chosen, rejected = values(2), values(3)
    want = SIDES[name](BETA * chosen, BETA * rejected)
    slopes = torch.autograd.grad(want.sum(), (chosen, rejected), allow_unused=True)
    loss, dw, dl = pm.UNPAIRED[name](chosen.detach(), rejected.detach(), BETA)
    same(loss, want.detach())
    same(dw, slopes[0])
    same(dl, slopes[1])


@pytest.mark.parametrize("lengths", [False, True])
@pytest.mark.parametrize("name", GAPS)
def test_f_divergence_scores_equal_their_formula_and_autograd(name, lengths):
    fn, score = GAPS[name]
    chosen, rejected = values(4), values(5)
    n_w, n_l = torch.arange(1, P + 1), torch.arange(P, 0, -1)
    scale = (n_w, n_l) if lengths else (1, 1)
    want = score(chosen) / scale[0] - score(rejected) / scale[1]
    slopes = torch.autograd.grad(want.sum(), (chosen, rejected))
    gap, dw, dl = fn(chosen.detach(), rejected.detach(), *(scale if lengths else ()))
    same(gap, want.detach())
    same(dw, slopes[0])
    same(dl, slopes[1])


def test_kto_equals_its_formula_on_both_labels():
    x = values(6)
    good = torch.arange(P) % 3 == 0
    want = torch.where(good, 1 - (BETA * (x - 0.4)).sigmoid(), 1 - (BETA * (0.4 - x)).sigmoid())
    (slope,) = torch.autograd.grad(want.sum(), x)
    loss, dx = pm.kto(x.detach(), good, BETA, 0.4)
    same(loss, want.detach())
    same(dx, slope)


@pytest.mark.parametrize("eps", [0.0, EPS])
def test_aot_sorts_both_sides_and_gives_each_entry_its_own_slope(eps):
    first, second = values(7), values(8)
    d = first.sort().values - second.sort().values
    want = -(1 - eps) * log_s(BETA * d) - eps * log_s(-BETA * d)
    slopes = torch.autograd.grad(want.sum(), (first, second))
    loss, da, db = pm.aot(first.detach(), second.detach(), BETA, eps)
    same(loss.sum(), want.sum().detach())
    same(loss, want.detach()[first.argsort().argsort()])
    same(da, slopes[0])
    same(db, slopes[1])


def test_orpo_equals_the_odds_ratio_and_keeps_digits_near_p_1():
    chosen, rejected = (-values(9).detach().abs()).requires_grad_(), -values(10).detach().abs()
    rejected.requires_grad_()
    odds = [x.exp() / (1 - x.exp()) for x in (chosen, rejected)]
    want = -log_s(odds[0].log() - odds[1].log())
    slopes = torch.autograd.grad(want.sum(), (chosen, rejected))
    loss, dw, dl = pm.orpo(chosen.detach(), rejected.detach())
    same(loss, want.detach())
    same(dw, slopes[0])
    same(dl, slopes[1])
    near = pm.log_odds(torch.tensor([-1e-30, -1e-5, -100.0], dtype=torch.float64))
    same(near, torch.tensor([-math.log(1e-30), math.log(99999.5), -100.0], dtype=torch.float64))


BIG = (-1e4, -700.0, -100.0, -88.0, 0.0, 88.0, 100.0, 700.0, 1e4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_margins_give_the_value_or_a_visible_inf_and_never_nan(dtype):
    grid = torch.tensor(BIG, dtype=dtype)
    chosen, rejected = (g.reshape(-1) for g in torch.meshgrid(grid, grid, indexing="ij"))
    seen = {}
    for name, (fn, _, args) in MARGINS.items():
        args = tuple(
            torch.full_like(chosen, 0.25) if isinstance(a, torch.Tensor) else a for a in args
        )
        seen[name] = fn(chosen - rejected, *args)
    for name, fn in pm.UNPAIRED.items():
        seen[name] = fn(chosen, rejected, BETA)
    for name, (fn, _) in GAPS.items():
        gap, dw, dl = fn(chosen, rejected)
        loss, dz = pm.sigmoid(gap, torch.ones_like(gap))
        seen[name] = gap, loss, pm.product(dz, dw), pm.product(dz, dl)
    seen["kto"] = pm.kto(chosen, rejected > 0, BETA, 0.0)
    seen["aot"] = pm.aot(chosen, rejected, BETA, EPS)
    seen["orpo"] = pm.orpo(-chosen.abs(), -rejected.abs())
    for name, tensors in seen.items():
        for t in tensors:
            assert not t.isnan().any(), (name, chosen[t.isnan()], rejected[t.isnan()])
    for name in ("sigmoid", "hinge", "exo_pair", "discopop", "bco_pair", "apo_zero", "kto"):
        assert all(t.isfinite().all() for t in seen[name]), name


def test_discopop_at_a_large_negative_margin_is_the_logistic_value():
    """e^{-z} overflows there while its mixing weight is 0: the product of the two is NaN."""
    z = torch.tensor([-1e4, -50.0], dtype=torch.float64)
    loss, dz = pm.discopop(z)
    same(loss, -z)
    same(dz, -torch.ones_like(z))


def test_exp_difference_never_subtracts_two_infinities():
    u = torch.tensor([1e4, 1e4, 0.0, 5.0, -1e4], dtype=torch.float64)
    v = torch.tensor([1e4, 9e3, 1e4, 5.0, -2e4], dtype=torch.float64)
    want = torch.tensor([0.0, math.inf, -math.inf, 0.0, 0.0], dtype=torch.float64)
    assert torch.equal(pm.exp_difference(u, v), want)


@pytest.mark.parametrize("name", [*MARGINS, *SIDES, *GAPS])
def test_n3_a_nan_stays_in_its_pair(name):
    chosen, rejected = values(11).detach(), values(12).detach()

    def run():
        if name in MARGINS:
            fn, _, args = MARGINS[name]
            return pm.show_nan(*fn(chosen - rejected, *args))
        if name in SIDES:
            return pm.show_nan(*pm.UNPAIRED[name](chosen, rejected, BETA))
        return pm.show_nan(*GAPS[name][0](chosen, rejected))

    clean = run()
    chosen[3] = torch.nan
    others = torch.arange(P) != 3
    for was, now in zip(clean, run(), strict=True):
        assert now[3].isnan()
        assert torch.equal(was[others], now[others])


GROUP = torch.tensor([0, 1, 0, 1, 1, 0, 2, 0, 1, 3, 3, 3])
RANK = torch.tensor([3.0, 1, 1, 2, 4, 2, 5, 4, 3, 1, 1, 1], dtype=torch.float64)


def listwise(score):
    """-log of the Plackett-Luce probability, answer by answer."""
    total = 0.0
    for g in (0, 1, 2):
        members = (GROUP == g).nonzero().flatten()
        order = members[RANK[members].argsort(descending=True)]
        for k in range(len(order)):
            total = total - score[order[k]] + score[order[k:]].logsumexp(0)
    return total


def test_plackett_luce_is_the_likelihood_of_the_ranking():
    score = values(13, 12)
    want = listwise(score)
    (slope,) = torch.autograd.grad(want, score)
    loss, ds = rm.plackett_luce(score.detach(), RANK, GROUP)
    same(loss.sum(), want.detach())
    same(ds, slope)


def test_plackett_luce_of_two_answers_is_dpo_and_of_ties_is_0():
    score = torch.tensor([0.3, -0.4, 2.0, 2.5], dtype=torch.float64)
    rank = torch.tensor([1.0, 0.0, 7.0, 7.0], dtype=torch.float64)
    loss, ds = rm.plackett_luce(score, rank, torch.tensor([5, 5, 2, 2]))
    same(loss, torch.stack([-log_s(score[0] - score[1]), *torch.zeros(3, dtype=torch.float64)]))
    assert torch.equal(ds[2:], torch.zeros(2, dtype=torch.float64))
    same(ds[0], -torch.sigmoid(score[1] - score[0]))
    same(ds[1], -ds[0])


def test_tied_answers_are_each_compared_with_what_is_below_them():
    score = values(14, 3)
    want = sum(-log_s(score[i] - score[2]) for i in (0, 1))
    (slope,) = torch.autograd.grad(want, score)
    rank = torch.tensor([2.0, 2.0, 1.0], dtype=torch.float64)
    loss, ds = rm.plackett_luce(score.detach(), rank, torch.zeros(3, dtype=torch.int64))
    same(loss.sum(), want.detach())
    same(ds, slope)


def test_ranking_hinge_counts_the_pairs_out_of_order():
    score = values(15, 12)
    want = sum(
        (score[j] - score[i]).relu()
        for i in range(12)
        for j in range(12)
        if GROUP[i] == GROUP[j] and RANK[i] > RANK[j]
    )
    (slope,) = torch.autograd.grad(want, score)
    loss, ds = rm.ranking_hinge(score.detach(), RANK, GROUP)
    same(loss.sum(), want.detach())
    same(ds, slope)
    assert ds[6] == 0 and (ds[9:] == 0).all()  # alone; tied


@pytest.mark.parametrize("fn", [rm.plackett_luce, rm.ranking_hinge])
@pytest.mark.parametrize("where", ["score", "rank"])
def test_n3_a_nan_stays_in_its_group(fn, where):
    score, rank = values(16, 12).detach(), RANK.clone()
    clean = fn(score, rank, GROUP)
    (score if where == "score" else rank)[3] = torch.nan
    got = fn(score, rank, GROUP)
    for was, now in zip(clean, got, strict=True):
        assert torch.equal(was[GROUP != 1], now[GROUP != 1])
    assert got[0][GROUP == 1].isnan().any() and got[1][3].isnan()


@pytest.mark.parametrize("fn", [rm.plackett_luce, rm.ranking_hinge])
def test_rankings_hold_at_extreme_scores_and_for_no_sequence(fn):
    score = torch.tensor([1e4, -1e4, 0.0, 1e4], dtype=torch.float64)
    rank = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    loss, ds = fn(score, rank, torch.zeros(4, dtype=torch.int64))
    assert loss.isfinite().all() and ds.isfinite().all()
    empty = torch.zeros(0, dtype=torch.float64)
    loss, ds = fn(empty, empty, torch.zeros(0, dtype=torch.int64))
    assert loss.shape == ds.shape == (0,)


def test_group_best_marks_the_top_of_each_group():
    best = rm.group_best(RANK, GROUP)
    assert best.nonzero().flatten().tolist() == [4, 6, 7, 9, 10, 11]

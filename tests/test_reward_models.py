"""Reward-model losses against their closed forms, limits, extreme scores and bad input."""

import math
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

import pyoffline as po

rm = po.reward_models


def draw(seed, *shape, scale=2.0):
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g, dtype=torch.float64)).requires_grad_()


def same(got, want, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


def test_bradley_terry_is_the_logistic_likelihood_with_the_closed_form_gradient():
    up, down, margin = draw(0, 9), draw(1, 9), draw(2, 9).detach().abs()
    loss = rm.bradley_terry(up, down, margin)
    same(loss, -F.logsigmoid(up - down - margin).mean())
    gradients = torch.autograd.grad(loss, (up, down))
    pull = torch.sigmoid(-(up - down - margin)).detach() / 9
    same(gradients[0], -pull)
    same(gradients[1], pull)
    same(rm.bradley_terry(up, down, 0.5), rm.bradley_terry(up, down, torch.full((9,), 0.5)))


def test_weights_are_the_aggregation_and_weight_0_is_never_read():
    up, down, w = draw(3, 6), draw(4, 6), draw(14, 6).detach().abs()
    w[2] = 0.0
    want = (w * -F.logsigmoid(up - down)).sum()
    same(rm.bradley_terry(up, down, weights=w), want)
    bad = up.detach().clone()
    bad[2] = torch.nan
    bad.requires_grad_()
    loss = rm.bradley_terry(bad, down, weights=w)
    same(loss, want)
    (grad,) = torch.autograd.grad(loss, bad)
    assert grad[2] == 0 and grad.isfinite().all()


@pytest.mark.parametrize("link", rm.LINKS)
def test_variance_links_are_their_equations(link):
    up, down = draw(5, 30, scale=0.7), draw(6, 30, scale=0.7)
    a, b = (draw(13, 2, 30).detach().abs() + 0.3).unbind()
    gap, s2 = up - down, a * a + b * b
    want = {
        "logistic": torch.sigmoid(gap / (s2 / 2).sqrt()),
        "probit": 0.5 + 0.5 * torch.erf(gap / (2 * s2).sqrt()),
        "tanh": 0.5 + 0.5 * torch.tanh(gap / (2 * s2).sqrt()),
    }[link]
    loss = rm.bradley_terry_variance(up, down, a, b, link)
    same(loss, -want.log().mean(), 1e-9)
    got = torch.autograd.grad(loss, (up, down))
    expected = torch.autograd.grad(-want.log().mean(), (up, down))
    for x, y in zip(got, expected, strict=True):
        same(x, y, 1e-8)


def test_variance_1_is_bradley_terry_and_tanh_is_the_logistic_link():
    up, down, one = draw(7, 8), draw(8, 8), torch.ones(8, dtype=torch.float64)
    same(rm.bradley_terry_variance(up, down, one, one), rm.bradley_terry(up, down))
    a, b = one * 0.7, one * 1.9
    pair = [rm.bradley_terry_variance(up, down, a, b, link) for link in ("tanh", "logistic")]
    assert torch.equal(*pair)


def test_a_wide_spread_makes_every_comparison_a_coin_and_a_narrow_one_makes_it_certain():
    up, down = draw(9, 8).detach(), draw(10, 8).detach()
    for link in rm.LINKS:
        wide = torch.full((8,), 1e9, dtype=torch.float64)
        same(rm.bradley_terry_variance(up, down, wide, wide, link).item(), math.log(2), 1e-8)
        narrow = torch.full((8,), 1e-9, dtype=torch.float64)
        high = torch.maximum(up, down) + 1
        sure = rm.bradley_terry_variance(high, torch.minimum(up, down), narrow, narrow, link)
        assert sure == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("link", rm.LINKS)
def test_far_tails_keep_their_value_and_gradient(link, dtype):
    """-log P ~ g^2/(2 s2) (probit) or g sqrt(2/s2) (logistic) at g = -1e4, where P itself is 0."""
    up = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    zero, one = torch.zeros(2, dtype=dtype), torch.ones(2, dtype=dtype)
    loss = rm.bradley_terry_variance(up, zero, one, one, link, torch.ones(2, dtype=dtype))
    (grad,) = torch.autograd.grad(loss, up)
    want = (1e8 / 4, -1e4 / 2) if link == "probit" else (1e4, -1.0)
    torch.testing.assert_close(loss.double().item(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(grad[0].double().item(), want[1], rtol=1e-5, atol=0)
    assert grad[1] == 0


def test_plackett_luce_is_a_distribution_over_orders():
    scores = draw(11, 1, 4).detach()
    orders = torch.tensor(list(permutations(range(4))))
    each = torch.stack([rm.plackett_luce(scores[:, o]) for o in orders])
    same(torch.exp(-each).sum().item(), 1.0)
    best = orders[each.argmin()]
    assert best.tolist() == scores[0].argsort(descending=True).tolist()


def test_plackett_luce_limits_mask_and_shift():
    scores = draw(12, 5, 4)
    same(rm.plackett_luce(scores[:, :2]), rm.bradley_terry(scores[:, 0], scores[:, 1]))
    assert rm.plackett_luce(scores[:, :1]) == 0
    same(rm.plackett_luce(scores + 1e3), rm.plackett_luce(scores), 1e-10)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0] * 4]).bool()
    parts = [rm.plackett_luce(scores[i : i + 1, : int(mask[i].sum())]) for i in range(4)]
    loss = rm.plackett_luce(torch.where(mask, scores, torch.nan), mask)
    same(loss, sum(parts) / 5)
    (grad,) = torch.autograd.grad(loss, scores)
    want = torch.autograd.grad(sum(parts) / 5, scores)[0]
    same(grad, want)
    assert (grad[~mask] == 0).all()


def test_plackett_luce_holds_at_extreme_scores_and_weights_rows():
    scores = torch.tensor([[-1e4, 1e4, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    scores.requires_grad_()
    loss = rm.plackett_luce(scores, weights=torch.tensor([1.0, 0.0], dtype=torch.float64))
    same(loss.item(), 2e4)
    (grad,) = torch.autograd.grad(loss, scores)
    assert grad.isfinite().all() and (grad[1] == 0).all()


def test_a_nan_that_counts_shows():
    bad = torch.tensor([0.0, torch.nan], dtype=torch.float64)
    fine = torch.zeros(2, dtype=torch.float64)
    assert rm.bradley_terry(bad, fine).isnan()
    assert rm.bradley_terry_variance(fine, fine, fine + 1, bad + 1).isnan()
    assert rm.plackett_luce(bad[None]).isnan()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: rm.bradley_terry(x, x[:2]), "rejected: expected shape"),
        (lambda x: rm.bradley_terry(x, x, margin=x[:1]), "margin: expected shape"),
        (lambda x: rm.bradley_terry(x, x, weights=x[:1]), "weights: expected shape"),
        (lambda x: rm.bradley_terry_variance(x, x, x + 1, x + 1, "erf"), "logistic, probit, tanh"),
        (lambda x: rm.bradley_terry_variance(x, x, x, x + 1), "expected positive spreads, 3 of 3"),
        (lambda x: rm.plackett_luce(x), r"expected \[B, K\]"),
        (
            lambda x: rm.plackett_luce(x[None], torch.tensor([[True, False, True]])),
            "row 0 has an answer behind a gap",
        ),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(3, dtype=torch.float64))


def test_no_pairs_are_0():
    empty = torch.zeros(0, dtype=torch.float64)
    assert rm.bradley_terry(empty, empty) == 0
    assert rm.plackett_luce(torch.zeros(0, 3)) == 0

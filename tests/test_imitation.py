"""The f-divergence table, rewards that really descend it, and the discriminator's loss."""

import math

import pytest
import torch
import torch.nn.functional as F

import pyoffline as po

im = po.imitation
CASES = [
    ("reverse_kl", None),
    ("js", None),
    ("forward_kl", None),
    ("alpha", 0.5),
    ("alpha", 2.0),
    ("alpha", -1.0),
    ("alpha", 1.0),
    ("alpha", 0.0),
]
U = torch.tensor([0.05, 0.4, 1.0, 1.7, 6.0], dtype=torch.float64)


def same(got, want, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


PLAIN = {
    "reverse_kl": lambda u, a: -u.log(),
    "js": lambda u, a: -(u + 1) * ((1 + u) / 2).log() + u * u.log(),
    "forward_kl": lambda u, a: u * u.log(),
}


def plain_alpha(u, a):
    if a == 1:
        return u - 1 - u.log()
    if a == 0:
        return u * u.log() - u + 1
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_f_is_the_sources_and_its_slope_is_its_derivative(name, alpha):
    table = im.divergence(name, alpha)
    u = U.clone().requires_grad_()
    want = PLAIN.get(name, plain_alpha)(u, alpha)
    same(table.f(U), want.detach())
    (slope,) = torch.autograd.grad(want.sum(), u)
    same(table.slope(U), slope)
    assert table.f(torch.ones(1, dtype=torch.float64)).abs() < 1e-15


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_the_conjugate_is_the_supremum_of_ut_minus_f(name, alpha):
    """At t = f'(u) the supremum is at u: f*(f'(u)) = u f'(u) - f(u), and no other u beats it."""
    table = im.divergence(name, alpha)
    t = table.slope(U)
    same(table.conjugate(t), U * t - table.f(U))
    other = torch.linspace(0.01, 12, 400, dtype=torch.float64)
    reach = other[None] * t[:, None] - table.f(other)[None]
    assert (reach <= table.conjugate(t)[:, None] + 1e-12).all()


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_rewards_are_f_and_its_conjugate_at_the_density_ratio(name, alpha):
    table = im.divergence(name, alpha)
    same(im.policy_rewards(U.log(), name, alpha), U * table.slope(U) - table.f(U))
    same(im.policy_rewards(U.log(), name, alpha, "f_max"), -table.f(U))


@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_the_gradient_reward_descends_the_divergence_exactly(name, alpha):
    """On a finite space with the optimal discriminator: -E_pi[r grad log pi] = grad D_f."""
    g = torch.Generator().manual_seed(1)
    expert = torch.rand(6, generator=g, dtype=torch.float64).softmax(0)
    theta = torch.randn(6, generator=g, dtype=torch.float64, requires_grad=True)
    log_pi = theta.log_softmax(0)
    u = expert / log_pi.exp()
    (want,) = torch.autograd.grad(
        (log_pi.exp() * PLAIN.get(name, plain_alpha)(u, alpha)).sum(), theta
    )
    reward = im.policy_rewards(u.log(), name, alpha)
    log_pi = theta.log_softmax(0)
    (got,) = torch.autograd.grad(-(log_pi.exp().detach() * reward * log_pi).sum(), theta)
    same(got, want)


@pytest.mark.parametrize(("name", "alpha"), CASES)
@pytest.mark.parametrize("form", ["gradient", "f_max"])
def test_at_the_expert_every_answer_is_paid_the_same(name, alpha, form):
    reward = im.policy_rewards(torch.zeros(4, dtype=torch.float64), name, alpha, form)
    assert torch.equal(reward, reward[:1].expand(4))


def test_the_named_rewards():
    d = torch.linspace(-4, 4, 9, dtype=torch.float64)
    big = torch.sigmoid(d)
    same(im.airl_rewards(d), big.log() - (1 - big).log())
    same(im.gail_rewards(d), -(1 - big).log())
    same(im.fairl_rewards(d), -d * d.exp())
    same(im.policy_rewards(d) + 1, im.airl_rewards(d))
    same(im.policy_rewards(d, "js") + math.log(2), im.gail_rewards(d))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["gradient", "f_max"])
@pytest.mark.parametrize(("name", "alpha"), CASES)
def test_extreme_logits_give_a_value_or_a_visible_inf(name, alpha, form, dtype):
    d = torch.tensor([-1e4, -800, -100, -20, 0, 20, 100, 800, 1e4], dtype=dtype)
    reward = im.policy_rewards(d, name, alpha, form)
    assert not reward.isnan().any()
    assert reward[3:6].isfinite().all()
    nan = im.policy_rewards(torch.tensor([torch.nan, 0.0], dtype=dtype), name, alpha, form)
    assert nan[0].isnan() and nan[1].isfinite()
    for fn in (im.airl_rewards, im.gail_rewards, im.fairl_rewards):
        assert not fn(d).isnan().any()


def test_alpha_1_is_reverse_kl_and_alpha_0_forward_kl_up_to_u_minus_1():
    same(im.divergence("alpha", 1.0).f(U), im.REVERSE_KL.f(U) + U - 1)
    same(im.divergence("alpha", 0.0).f(U), im.FORWARD_KL.f(U) - U + 1)
    same(im.policy_rewards(U.log(), "alpha", 1 - 1e-7), im.airl_rewards(U.log()), 1e-5)


def test_discriminator_loss_is_binary_cross_entropy_and_its_optimum_is_the_log_ratio():
    g = torch.Generator().manual_seed(2)
    expert, policy = torch.randn(2, 50, generator=g, dtype=torch.float64)
    want = F.binary_cross_entropy_with_logits(expert, torch.ones_like(expert))
    want = want + F.binary_cross_entropy_with_logits(policy, torch.zeros_like(policy))
    same(im.discriminator_loss(expert, policy), want)
    same(im.discriminator_loss(expert * 0, policy * 0).item(), 2 * math.log(2))
    p, q = torch.rand(2, 5, generator=g, dtype=torch.float64).softmax(1)
    d = (p / q).log().requires_grad_()
    weighted = (p * -F.logsigmoid(d)).sum() + (q * -F.logsigmoid(-d)).sum()
    (slope,) = torch.autograd.grad(weighted, d)
    same(slope, torch.zeros_like(slope))


def test_masked_tokens_are_not_read_and_trajectories_sum_theirs():
    d = torch.tensor([[0.5, -1.0, torch.nan], [2.0, torch.inf, torch.nan]], dtype=torch.float64)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    d.requires_grad_()
    total = im.trajectory_logits(d, mask)
    same(total.detach(), torch.tensor([-0.5, 2.0], dtype=torch.float64))
    loss = im.discriminator_loss(d, d, mask, mask)
    flat = d.detach()[mask]
    same(loss.detach(), im.discriminator_loss(flat, flat))
    (grad,) = torch.autograd.grad(loss, d)
    assert (grad[~mask] == 0).all() and grad.isfinite().all()
    nothing = torch.zeros_like(mask)
    assert im.discriminator_loss(d, d, nothing, nothing) == 0


def test_rewards_are_detached():
    d = torch.zeros(3, requires_grad=True)
    assert not im.policy_rewards(d).requires_grad
    assert not im.airl_rewards(d).requires_grad and not im.fairl_rewards(d).requires_grad


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda d: im.divergence("kl"), "reverse_kl, js, forward_kl, alpha"),
        (lambda d: im.divergence("alpha"), "needs a finite alpha"),
        (lambda d: im.divergence("js", 0.5), "alpha belongs to divergence 'alpha'"),
        (lambda d: im.policy_rewards(d, form="fmax"), "'gradient' or 'f_max'"),
        (lambda d: im.trajectory_logits(d), r"expected \[B, T\]"),
        (lambda d: im.discriminator_loss(d, d, d[:2].bool()), "expert_mask: expected shape"),
    ],
)
def test_bad_input_is_named(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(TypeError, match="policy_mask: expected bool"):
        im.discriminator_loss(torch.zeros(2), torch.zeros(2), None, torch.zeros(2))

"""Adversarial imitation: a discriminator between demonstrations and the policy's own samples, and
what the policy is paid for.

A discriminator logit d estimates log u, u = rho_expert / rho_policy: D = sigmoid(d) =
rho_expert / (rho_expert + rho_policy) (2403.12017, eq. 16). The policy minimises D_f(expert ||
policy) = E_policy[f(u)]; `divergence(name)` is the table of f, f' and f*. At token level d belongs
to a token and so do the rewards; at trajectory level it belongs to a whole answer
(`trajectory_logits` sums log-ratios over tokens). Rewards are advantages for `WeightedNLL`,
`PPOClip`, ..., after a baseline from `advantages`.

Plain functions of small tensors, any float dtype, everything from d in log space: an extreme logit
gives its value or a visible inf, never NaN. Rewards are detached. Not here: the discriminator.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline.objective_math import product

NAMES = ("reverse_kl", "js", "forward_kl", "alpha")


class Divergence(NamedTuple):
    """A generator: convex `f` with f(1) = 0, its derivative, its conjugate f*(t) = max_u ut - f(u),
    and the two rewards as functions of d = log u.

    f'(u) is the best witness of the variational bound E_expert[T] - E_policy[f*(T)].
    """

    f: Callable[[Tensor], Tensor]  # of u >= 0
    slope: Callable[[Tensor], Tensor]  # f'(u)
    conjugate: Callable[[Tensor], Tensor]  # f*(t), t in the range of f'
    gradient_reward: Callable[[Tensor], Tensor]  # f*(f'(e^d)) = u f'(u) - f(u)
    f_max_reward: Callable[[Tensor], Tensor]  # -f(e^d)


def _log1p_exp(d: Tensor) -> Tensor:
    return -F.logsigmoid(-d)


def _js_f_max(d: Tensor) -> Tensor:
    """(1+u) log((1+u)/2) - u log u = (1+u)(s(d) - log 2) - u d, s = softplus, exact at both ends.

    = s(d) - log 2 + u (s(-d) - log 2).
    """
    return _log1p_exp(d) - math.log(2) + product(torch.exp(d), _log1p_exp(-d) - math.log(2))


REVERSE_KL = Divergence(
    f=lambda u: -u.log(),
    slope=lambda u: -1 / u,
    conjugate=lambda t: -1 - (-t).log(),
    gradient_reward=lambda d: d - 1,
    f_max_reward=lambda d: d,
)
JS = Divergence(
    f=lambda u: -(u + 1) * ((1 + u) / 2).log() + torch.xlogy(u, u),
    slope=lambda u: (2 * u / (1 + u)).log(),
    conjugate=lambda t: -(2 - t.exp()).log(),
    gradient_reward=lambda d: _log1p_exp(d) - math.log(2),
    f_max_reward=_js_f_max,
)
FORWARD_KL = Divergence(
    f=lambda u: torch.xlogy(u, u),
    slope=lambda u: 1 + u.log(),
    conjugate=lambda t: (t - 1).exp(),
    gradient_reward=torch.exp,
    f_max_reward=lambda d: -product(d, torch.exp(d)),
)


def _power(d: Tensor, k: float) -> Tensor:
    """(e^{k d} - 1)/k, and its limit d at k = 0."""
    return d.clone() if k == 0 else torch.expm1(k * d) / k


def _alpha_f(d: Tensor, alpha: float) -> Tensor:
    """(u^{1-a} - (1-a) u - a)/(a (a-1)) of d = log u; a = 1: u - 1 - d, a = 0: u d - u + 1."""
    u = torch.expm1(d)  # u - 1
    if alpha == 1:
        return u - d
    if alpha == 0:
        return product(d, torch.exp(d)) - u
    return (torch.expm1((1 - alpha) * d) - (1 - alpha) * u) / (alpha * (alpha - 1))


def _alpha_divergence(alpha: float) -> Divergence:
    def conjugate(t: Tensor) -> Tensor:
        log_u = t if alpha == 0 else -torch.log1p(-alpha * t) / alpha
        return _power(log_u, 1 - alpha)

    def f_max(d: Tensor) -> Tensor:
        # u^{1-a} and u overflow together: the larger power decides
        value = -_alpha_f(d, alpha)
        return torch.where(value.isnan() & ~d.isnan(), -torch.inf, value)

    return Divergence(
        f=lambda u: _alpha_f(u.log(), alpha),
        slope=lambda u: _power(u.log(), -alpha),
        conjugate=conjugate,
        gradient_reward=lambda d: _power(d, 1 - alpha),
        f_max_reward=f_max,
    )


def divergence(name: str, alpha: float | None = None) -> Divergence:
    """The table (2403.12017, eq. 28 to 30; f-MAX 1911.02256):

        reverse_kl  f = -log u                                   f' = -1/u            AIRL
        js          f = -(u+1) log((1+u)/2) + u log u            f' = log(2u/(1+u))   GAIL
        forward_kl  f = u log u                                  f' = 1 + log u       FAIRL
        alpha       f = (u^(1-a) - (1-a) u - a)/(a (a-1))        f' = (1 - u^-a)/a    alpha-IRL

    `alpha` is any finite number a; its limits are KLs up to the term u - 1, whose mean is 0: a = 1
    reverse, a = 0 forward. Raises ValueError for an unknown name, or an `alpha` that is missing or
    not read.
    """
    fixed = {"reverse_kl": REVERSE_KL, "js": JS, "forward_kl": FORWARD_KL}
    if name == "alpha":
        if alpha is None or not math.isfinite(alpha):
            raise ValueError(f"divergence('alpha') needs a finite alpha, got {alpha!r}")
        return _alpha_divergence(float(alpha))
    if name not in fixed:
        raise ValueError(f"divergence {name!r}: expected one of {', '.join(NAMES)}")
    if alpha is not None:
        raise ValueError(f"alpha belongs to divergence 'alpha', not to {name!r}")
    return fixed[name]


def policy_rewards(
    logits: Tensor,  # [...] discriminator logits of the policy's samples
    name: str = "reverse_kl",
    alpha: float | None = None,
    form: str = "gradient",
) -> Tensor:
    """Rewards of the logits' shape under which a policy-gradient step lowers D_f(expert || policy).

    form="gradient": u f'(u) - f(u), for which `-E_policy[reward * grad log pi]` *is* the gradient
    of D_f at the optimal discriminator. form="f_max": -f(u), the density ratio taken as fixed
    (f-MAX): near the expert its slope in d is -f'(1), so it descends for reverse_kl, is flat to
    first order for js and alpha, and ascends for forward_kl. The named ones: `airl_rewards`,
    `gail_rewards`, `fairl_rewards`.
    """
    if form not in ("gradient", "f_max"):
        raise ValueError(f"form={form!r}: expected 'gradient' or 'f_max'")
    table = divergence(name, alpha)
    d = logits.detach()
    return table.gradient_reward(d) if form == "gradient" else table.f_max_reward(d)


def airl_rewards(logits: Tensor) -> Tensor:
    """`log D - log(1 - D) = d`: reverse KL, mode seeking. (2403.12017 eq. 17; AIRL 1710.11248)"""
    return logits.detach().clone()


def gail_rewards(logits: Tensor) -> Tensor:
    """`-log(1 - D) = softplus(d)`: Jensen-Shannon. (2403.12017 eq. 22; GAIL 1606.03476)"""
    return _log1p_exp(logits.detach())


def fairl_rewards(logits: Tensor) -> Tensor:
    """`-d e^d`: forward KL in the f-MAX form, as published. (FAIRL 1911.02256)

    Its slope at d = 0 is -1: near the expert a policy-gradient step on it *raises* forward KL
    (the step is minus the gradient form's; `examples/adversarial_imitation.py` diverges with it).
    `policy_rewards(d, "forward_kl")` = e^d descends forward KL.
    """
    return FORWARD_KL.f_max_reward(logits.detach())


def discriminator_loss(
    expert_logits: Tensor,  # [...] logits on demonstrations
    policy_logits: Tensor,  # [...] logits on the policy's samples
    expert_mask: Tensor | None = None,  # bool, which of them count
    policy_mask: Tensor | None = None,
) -> Tensor:
    """`mean(softplus(-d_expert)) + mean(softplus(d_policy))`: binary cross entropy, 0-d.

    (2403.12017 eq. 18 with its sign turned; 2 log 2 where D cannot tell.) Masked positions are not
    read; a side without positions gives 0. Raises for a mask of another shape or dtype.
    """
    sides = ((expert_logits, expert_mask, -1.0), (policy_logits, policy_mask, 1.0))
    total = 0.0
    for (logits, mask, sign), name in zip(sides, ("expert_mask", "policy_mask"), strict=True):
        x, mask = _valid(logits, mask, name)
        loss = torch.where(mask, _log1p_exp(sign * x), 0.0)
        total = total + loss.sum() / mask.sum().clamp(min=1)
    return total


def trajectory_logits(
    logits: Tensor,  # [B, T] one log-ratio per token
    mask: Tensor | None = None,  # [B, T] bool
) -> Tensor:
    """`sum_t d_t` [B]: the log density ratio of whole answers, differentiable."""
    if logits.dim() != 2:
        raise ValueError(f"logits: expected [B, T], got shape {tuple(logits.shape)}")
    return _valid(logits, mask, "mask")[0].sum(1)


def _valid(logits: Tensor, mask: Tensor | None, name: str) -> tuple[Tensor, Tensor]:
    """Logits with 0 where they do not count, and the mask."""
    if mask is None:
        return logits, torch.ones_like(logits, dtype=torch.bool)
    if mask.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool, got {mask.dtype}")
    if mask.shape != logits.shape:
        raise ValueError(f"{name}: expected shape {tuple(logits.shape)}, got {tuple(mask.shape)}")
    return torch.where(mask, logits, 0.0), mask

"""Losses of reward models: scalar scores of whole answers against human comparisons.

Plain differentiable functions of small tensors of any float dtype; the result is a 0-d tensor,
`sum(weights * loss)`, by default the mean. An entry of weight 0 contributes exactly 0 whatever it
holds. A NaN or inf at one that counts shows in the loss. Not here: the model that gives the scores;
preference losses of a policy (`preference.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

LINKS = ("logistic", "probit", "tanh")


def bradley_terry(
    chosen: Tensor,  # [P] any float
    rejected: Tensor,  # [P]
    margin: Tensor | float = 0.0,  # [P] or a number
    weights: Tensor | None = None,  # [P]; default 1/P
) -> Tensor:
    """`-log sigmoid(chosen - rejected - margin)`. (Bradley & Terry 1952; margin: 2307.09288 eq. 2)

    dL/dchosen = -sigmoid(-(chosen - rejected - margin)) = -dL/drejected. Raises ValueError for
    shapes that differ.
    """
    weights, counted = _counted(chosen, weights, rejected=rejected)
    if isinstance(margin, Tensor) and margin.dim():
        _same_shape(chosen, margin=margin)
        margin = torch.where(counted, margin, 0.0)
    gap = torch.where(counted, chosen, 0.0) - torch.where(counted, rejected, 0.0)
    return _total(weights, counted, -F.logsigmoid(gap - margin))


def bradley_terry_variance(
    chosen: Tensor,  # [P] mean scores
    rejected: Tensor,  # [P]
    chosen_std: Tensor,  # [P] > 0, V of the source
    rejected_std: Tensor,  # [P] > 0
    link: str = "logistic",
    weights: Tensor | None = None,  # [P]; default 1/P
) -> Tensor:
    """`-log P(chosen beats rejected)` of scores with their own spread. (2403.12017, eq. 24 to 26)

    With g = chosen - rejected and s2 = chosen_std^2 + rejected_std^2:

        logistic  P = sigmoid(g / sqrt(s2 / 2))           eq. 26; V = 1 on both sides: Bradley-Terry
        probit    P = 1/2 + 1/2 erf(g / sqrt(2 s2))       eq. 24: two Gaussian performances
        tanh      P = 1/2 + 1/2 tanh(g / sqrt(2 s2))      eq. 25: equal to logistic, identically

    All in log space, so a far tail keeps its value and its gradient. Raises ValueError for an
    unknown link, shapes that differ, and on the CPU for a spread that is not positive (elsewhere
    that pair is NaN).
    """
    if link not in LINKS:
        raise ValueError(f"link={link!r}: expected one of {', '.join(LINKS)}")
    named = {"rejected": rejected, "chosen_std": chosen_std, "rejected_std": rejected_std}
    weights, counted = _counted(chosen, weights, **named)
    gap = torch.where(counted, chosen, 0.0) - torch.where(counted, rejected, 0.0)
    up, down = (torch.where(counted, v, 1.0) for v in (chosen_std, rejected_std))
    bad = (up <= 0) | (down <= 0)
    if bad.device.type == "cpu" and bool(bad.any()):
        raise ValueError(
            f"chosen_std, rejected_std: expected positive spreads, {int(bad.sum())} of "
            f"{bad.numel()} pairs have one that is not; pass exp or softplus of the model's output"
        )
    spread = torch.where(bad, torch.nan, torch.hypot(up, down))
    if link == "probit":
        # fp64: in fp32 the derivative of log_ndtr at -1e4 is off by a factor of 6 (torch 2.13)
        log_p = torch.special.log_ndtr(gap.double() / spread.double()).to(gap.dtype)
    else:
        log_p = F.logsigmoid(gap / spread * 2**0.5)
    return _total(weights, counted, -log_p)


def plackett_luce(
    scores: Tensor,  # [B, K] any float, best answer first
    mask: Tensor | None = None,  # [B, K] bool, False behind the last answer of a row
    weights: Tensor | None = None,  # [B]; default 1/B
) -> Tensor:
    """`-sum_k (r_k - logsumexp(r_k ... r_K))`, row by row. (Plackett 1975, Luce 1959)

    K = 2 is `bradley_terry`; K = 1 gives 0. Invariant to a constant on a row. Memory: B K^2.
    Raises ValueError for shapes that differ, or an answer behind a gap in the mask (CPU only).
    """
    if scores.dim() != 2:
        raise ValueError(f"scores: expected [B, K], best first, got shape {tuple(scores.shape)}")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    elif mask.dtype != torch.bool:
        raise TypeError(f"mask: expected bool, got {mask.dtype}")
    _same_shape(scores, mask=mask)
    gap = ~mask[:, :-1] & mask[:, 1:]
    if gap.device.type == "cpu" and bool(gap.any()):
        row = int(gap.any(1).nonzero()[0])
        raise ValueError(f"mask: row {row} has an answer behind a gap; put the answers first")
    rows = scores.new_zeros(scores.shape[0])
    weights, counted = _counted(rows, weights)
    mask = mask & counted[:, None]
    scores = torch.where(mask, scores, 0.0)
    size = scores.shape[1]
    later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu()
    alone = torch.eye(size, dtype=torch.bool, device=scores.device)
    choices = later & mask[:, None, :] | alone  # the diagonal keeps a masked row finite
    log_z = torch.where(choices, scores[:, None, :], -torch.inf).logsumexp(2)
    return _total(weights, counted, torch.where(mask, log_z - scores, 0.0).sum(1))


def _same_shape(like: Tensor, **named: Tensor) -> None:
    for name, x in named.items():
        if x.shape != like.shape:
            raise ValueError(f"{name}: expected shape {tuple(like.shape)}, got {tuple(x.shape)}")


def _counted(like: Tensor, weights: Tensor | None, **named: Tensor) -> tuple[Tensor, Tensor]:
    """The weights, by default 1/number, and where they are not 0."""
    _same_shape(like, **named)
    if weights is None:
        weights = torch.full_like(like, 1.0 / max(like.numel(), 1), requires_grad=False)
    _same_shape(like, weights=weights)
    return weights, weights != 0


def _total(weights: Tensor, counted: Tensor, loss: Tensor) -> Tensor:
    return (weights * torch.where(counted, loss, 0.0)).sum()

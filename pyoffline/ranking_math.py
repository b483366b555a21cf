"""Losses over a group's ranking, on per-sequence numbers: `(loss, dL/d score)`, each [S].

`score` [S] belongs to a sequence, `group` [S] says which sequences were answers to one prompt,
`rank` [S] orders them: larger is better. Equal ranks are not compared with each other, so a group
of ties gives 0. A group's loss lies on its members: on the one that beats others (`plackett_luce`)
or on the better one of each pair (`ranking_hinge`). Memory: a few [S, S] matrices; S is the number
of sequences, not of tokens. Elementwise per group, so a NaN stays in its group. Not here: weights,
tokens (`preference.py`).
"""

import torch
from torch import Tensor


def beats(rank: Tensor, group: Tensor) -> Tensor:
    """[S, S] bool: row i and column j share a group and i is ranked above j."""
    return (group[:, None] == group[None, :]) & (rank[:, None] > rank[None, :])


def plackett_luce(score: Tensor, rank: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """`-sum_i (s_i - logsumexp_{j = i or ranked below i} s_j)` per group.

    Without ties the Plackett-Luce likelihood of the ranking (list-wise DPO 2305.18290, appendix
    A.3, s = beta x). ds_j = sum_{i: j among i's choices} softmax_i(j) - 1[j beats somebody].
    """
    below = beats(rank, group)
    choices = below | torch.eye(len(score), dtype=torch.bool, device=score.device)
    compares = below.any(1)
    log_z = torch.where(choices, score[None, :], -torch.inf).logsumexp(1)
    loss = torch.where(compares, log_z - score, 0.0)
    share = torch.where(
        choices & compares[:, None], torch.exp(score[None, :] - log_z[:, None]), 0.0
    )
    own = torch.where(compares, share.diagonal() - 1.0, 0.0)
    others = torch.where(below, share, 0.0).sum(0)
    poison = rank - rank  # 0, NaN where the rank is not finite
    return loss + poison, own + others + poison


def ranking_hinge(score: Tensor, rank: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_{i beats j} relu(s_j - s_i)` per group, s the mean log-prob. (RRHF 2304.05302)

    ds_j counts the better answers that score below j, minus the worse ones that score above; equal
    scores give 0.
    """
    below = beats(rank, group)
    gap = score[None, :] - score[:, None]
    lost = below & (gap > 0)
    pairs = torch.where(below & ~(gap <= 0), gap, 0.0)
    bad = torch.where(below & (gap != gap), gap, 0.0)
    slope = lost.to(score.dtype)
    poison = bad.sum(0) + bad.sum(1) + (rank - rank)  # NaN where a score or a rank is
    return pairs.sum(1) + (rank - rank), slope.sum(0) - slope.sum(1) + poison


def group_best(rank: Tensor, group: Tensor) -> Tensor:
    """[S] bool: nobody in the group is ranked above (RRHF's cross entropy term)."""
    return ~beats(rank, group).any(0)

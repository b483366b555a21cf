"""The critic's loss: a plain function of values, no logits."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ValueLoss:
    """`0.5 * max((v - R)^2, (v_old + (v - v_old).clamp(-clip, clip) - R)^2)`, weighted and summed.

    `ValueLoss(clip=0.2)(values, returns, old_values)`; `clip=None` is the plain square. (PPO,
    1707.06347, eq. 9; the clip is that of OpenAI baselines' ppo2.)
    """

    clip: float | None = None

    def __post_init__(self):
        if self.clip is not None and not 0.0 < self.clip < math.inf:
            raise ValueError(f"ValueLoss(clip={self.clip}): expected a positive float or None")

    def __call__(
        self,
        values: Tensor,  # [...] any float
        returns: Tensor,  # [...]
        old_values: Tensor | None = None,  # [...], needed with clip
        weights: Tensor | None = None,  # [...]; default 1 / number of values
    ) -> Tensor:
        """0-d loss, differentiable in `values`; a value of weight 0 contributes exactly 0.

        Raises ValueError for shapes that differ, a clip without `old_values`, or the reverse.
        """
        for name, x in (("returns", returns), ("old_values", old_values), ("weights", weights)):
            if x is not None and x.shape != values.shape:
                raise ValueError(
                    f"{name}: expected the values' shape {tuple(values.shape)}, "
                    f"got {tuple(x.shape)}"
                )
        if self.clip is not None and old_values is None:
            raise ValueError("ValueLoss(clip=...) needs old_values: the values at sampling time")
        if self.clip is None and old_values is not None:
            raise ValueError("ValueLoss(clip=None) does not read old_values: leave them out")
        if weights is None:
            weights = torch.full_like(values, 1.0 / max(values.numel(), 1))
        counted = weights != 0
        values = torch.where(counted, values, 0.0)
        returns = torch.where(counted, returns, 0.0)
        loss = (values - returns) ** 2
        if self.clip is not None:
            old = torch.where(counted, old_values, 0.0)
            near = old + (values - old).clamp(-self.clip, self.clip)
            loss = torch.maximum(loss, (near - returns) ** 2)
        return (weights * 0.5 * loss).sum()

"""RewardTrainer: a sequence classifier trained on pairs by Bradley-Terry (with variance: two scores
a sequence), or on ranked groups by Plackett-Luce.

`objective: {name: bradley_terry}` of a configuration, and its kin. The score is the model's own
forward, so that what is saved scores as it was trained; there is no vocabulary, so no logits to
avoid. Weights over micro-batches and ranks, checkpoints and evaluation are OfflineTrainer's. Not
here: the losses of pairs (reward_models.py).
"""

import torch
from torch import Tensor

from pyoffline.config_objective import (
    BradleyTerry,
    BradleyTerryVariance,
    PlackettLuce,
    RewardObjective,
)
from pyoffline.ranking_math import beats
from pyoffline.records import LossOutput
from pyoffline.reward_models import bradley_terry, bradley_terry_variance
from pyoffline.trainer import OfflineTrainer

METRICS = {
    BradleyTerry: ("chosen", "rejected", "margins", "accuracies"),
    BradleyTerryVariance: ("chosen", "rejected", "margins", "accuracies", "spread"),
    PlackettLuce: ("margins", "accuracies"),
}


class RewardTrainer(OfflineTrainer):
    """Trains `model` (`num_labels`: the objective's `scores`) on batches of pairs, all chosen
    first, or of whole groups with `rewards` and `group_ids` [S].

    Metrics: rewards/margins, rewards/accuracies, of pairs rewards/chosen and rewards/rejected too,
    with variance rewards/spread. ValueError for a model with another number of scores, or without a
    pad token in its configuration.
    """

    def _bind(self, ref_model, teacher_model) -> None:
        if ref_model is not None or teacher_model is not None:
            raise ValueError("a reward model reads no ref_model and no teacher_model")
        if not isinstance(self.objective, RewardObjective):
            raise TypeError(
                "objective: expected BradleyTerry, BradleyTerryVariance or PlackettLuce, got "
                f"{self.objective!r}"
            )
        config, scores = self.model.config, self.objective.scores
        if config.num_labels != scores or config.pad_token_id is None:
            raise ValueError(
                f"{self.objective} needs a model of num_labels={scores} and a pad token that ends "
                f"its sequences, got num_labels={config.num_labels}, "
                f"pad_token_id={config.pad_token_id}"
            )
        self._weighs = frozenset({self.objective.unit})
        self._unit_metrics = frozenset(f"rewards/{n}" for n in METRICS[type(self.objective)])

    def _fused_forward(self, model, inputs) -> LossOutput:
        with self.accelerator.autocast():
            out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        scores = out.logits.to(self._dtype)  # [S, 1], or r and log V: [S, 2]
        loss_of = self._ranked if isinstance(self.objective, PlackettLuce) else self._paired
        loss, means = loss_of(scores, inputs)
        return LossOutput(loss, None, {f"rewards/{name}": x for name, x in means.items()})

    def _paired(self, scores: Tensor, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        chosen, rejected = scores[:, 0].chunk(2)
        first, second = inputs["omega"].chunk(2)  # a pair weighs both its sequences
        weights = first + second
        means = _pair_means(chosen.detach(), rejected.detach(), first)
        if not isinstance(self.objective, BradleyTerryVariance):
            margin = self._margin(inputs)
            return bradley_terry(chosen, rejected, margin, weights=weights), means
        spread = scores[:, 1].exp()
        link = self.objective.link
        loss = bradley_terry_variance(chosen, rejected, *spread.chunk(2), link, weights)
        return loss, means | {"spread": _mean(spread.detach(), inputs["omega"] > 0)}

    def _margin(self, inputs) -> Tensor | float:
        if self.objective.margin != "rewards":
            return float(self.objective.margin)
        chosen, rejected = inputs["rewards"].to(self._dtype).chunk(2)
        return chosen - rejected

    def _ranked(self, scores: Tensor, inputs: dict) -> tuple[Tensor, dict[str, Tensor]]:
        """Plackett-Luce by groups; a sequence that does not count is in no group."""
        score, omega, group = scores[:, 0], inputs["omega"], inputs["group_ids"]
        live = omega > 0
        below = beats(inputs["rewards"], group) & live[:, None] & live
        alone = torch.eye(len(score), dtype=torch.bool, device=score.device)
        choices = torch.where(below | alone, score, -torch.inf)
        loss = choices.logsumexp(1) - score  # exactly 0 where nobody is ranked below
        weight = torch.where(group[:, None] == group, omega, 0.0).sum(1)  # of the whole group
        total = (weight * torch.where(live, loss, 0.0)).sum()
        gap = (score[:, None] - score).detach()
        means = {"margins": _mean(gap, below), "accuracies": _mean((gap > 0).to(gap.dtype), below)}
        return total, means


def _mean(x: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, x, 0.0).sum() / counts.sum().clamp(min=1)


def _pair_means(chosen: Tensor, rejected: Tensor, omega: Tensor) -> dict[str, Tensor]:
    """Over the pairs that count."""
    live = omega > 0
    values = {
        "chosen": chosen,
        "rejected": rejected,
        "margins": chosen - rejected,
        "accuracies": (chosen > rejected).to(chosen.dtype),
    }
    return {name: _mean(x, live) for name, x in values.items()}

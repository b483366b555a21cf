"""RewardTrainer: a sequence classifier with one score, trained on pairs by Bradley-Terry.

`objective: {name: bradley_terry}` of a configuration. The score is the model's own forward, so that
what is saved scores as it was trained; there is no vocabulary, so no logits to avoid. Weights over
micro-batches and ranks, checkpoints and evaluation are OfflineTrainer's. Not here: the loss
(reward_models.py).
"""

from torch import Tensor

from pyoffline.config_objective import BradleyTerry
from pyoffline.records import LossOutput
from pyoffline.reward_models import bradley_terry
from pyoffline.trainer import OfflineTrainer


class RewardTrainer(OfflineTrainer):
    """Trains `model` (one score a sequence: `num_labels=1`) on batches of pairs, all chosen first.

    Metrics: rewards/chosen, rewards/rejected, rewards/margins, rewards/accuracies. ValueError for a
    model with another number of scores, or without a pad token in its configuration.
    """

    def _bind(self, ref_model, teacher_model) -> None:
        if ref_model is not None or teacher_model is not None:
            raise ValueError("a reward model reads no ref_model and no teacher_model")
        if not isinstance(self.objective, BradleyTerry):
            raise TypeError(f"objective: expected BradleyTerry, got {self.objective!r}")
        config = self.model.config
        if config.num_labels != 1 or config.pad_token_id is None:
            raise ValueError(
                "a reward model has one score and a pad token that ends its sequences, got "
                f"num_labels={config.num_labels}, pad_token_id={config.pad_token_id}"
            )
        self._weighs = frozenset({"pair"})
        self._unit_metrics = frozenset(
            f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")
        )

    def _fused_forward(self, model, inputs) -> LossOutput:
        with self.accelerator.autocast():
            out = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        chosen, rejected = out.logits[:, 0].to(self._dtype).chunk(2)
        first, second = inputs["omega"].chunk(2)  # a pair weighs both its sequences
        loss = bradley_terry(chosen, rejected, self._margin(inputs), weights=first + second)
        return LossOutput(loss, None, self._pair_means(chosen.detach(), rejected.detach(), first))

    def _margin(self, inputs) -> Tensor | float:
        if self.objective.margin != "rewards":
            return float(self.objective.margin)
        chosen, rejected = inputs["rewards"].to(self._dtype).chunk(2)
        return chosen - rejected

    @staticmethod
    def _pair_means(chosen: Tensor, rejected: Tensor, omega: Tensor) -> dict[str, Tensor]:
        """Over the pairs that count."""
        live = (omega > 0).to(chosen.dtype)
        values = {
            "chosen": chosen,
            "rejected": rejected,
            "margins": chosen - rejected,
            "accuracies": (chosen > rejected).to(chosen.dtype),
        }
        count = live.sum().clamp(min=1)
        return {f"rewards/{name}": (x * live).sum() / count for name, x in values.items()}

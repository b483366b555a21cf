"""Models that a run reads and never trains: `ref_model` (reference log-probs that no column gives)
and `teacher_model` (the distribution that a divergence compares with).

Each runs its base model without gradients beside the policy's, on the same inputs; its head goes
through the loss's own chunks, so no [N, V] of it exists. Not here: loading them (training.py), the
losses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyoffline import teacher_columns
from pyoffline.divergences import Divergence
from pyoffline.head import Head, backbone
from pyoffline.teachers import TeacherHead, TeacherTopK, same_vocabulary
from pyoffline.units import reads_reference

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "inputs_embeds", "token_type_ids")


def last_hidden(model, batch: dict[str, Tensor]) -> Tensor:
    """[B, T, D] from the base model: the forward of a causal LM without its head."""
    inputs = {name: batch[name] for name in MODEL_INPUTS if name in batch}
    return backbone(model)(**inputs, use_cache=False).last_hidden_state


def vocabulary(model) -> int:
    """Rows of the head."""
    with torch.no_grad():
        return Head.of(model).tensors().weight.shape[0]


def outside_model(samples: list, model) -> list[tuple[int, str, str]]:
    """(line, column, why) of samples that the model cannot read."""
    return _without_embedding(samples, model) + _beyond_positions(samples, model)


def _without_embedding(samples: list, model) -> list[tuple[int, str, str]]:
    """A token that the model has no embedding for."""
    size = model.get_input_embeddings().weight.shape[0]
    why = (
        f"outside the model's {size} embeddings, which its tokenizer exceeds: resize the model, or "
        "take the tokenizer that it was trained with"
    )
    tops = ((s.line, max(s.ids)) for s in samples)
    return [(line, "tokens", f"token {top} is {why}") for line, top in tops if top >= size]


def _beyond_positions(samples: list, model) -> list[tuple[int, str, str]]:
    """More tokens than learned positions (GPT-2, OPT). Rotary models have no such table, and are
    not held to what they were trained on.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    tables = [x for x in model.modules() if isinstance(x, torch.nn.Embedding)]
    tables = [x for x in tables if x is not model.get_input_embeddings()]
    # OPT's table has two rows more than positions
    if limit is None or not any(limit <= x.num_embeddings <= limit + 2 for x in tables):
        return []
    why = (
        f"the model has {limit} positions; data.max_length: {limit} (score --max-length) and "
        "data.too_long cut or drop such rows, --skip-bad leaves them out"
    )
    return [
        (s.line, "tokens", f"{len(s.ids)} tokens, {why}") for s in samples if len(s.ids) > limit
    ]


@dataclass(frozen=True, eq=False)
class FixedModels:
    """`ref` and `teacher`, each a causal LM or None, frozen and in eval mode once made."""

    ref: object = None
    teacher: object = None

    @staticmethod
    def of(objective, policy, device, ref, teacher) -> "FixedModels":
        """ValueError: one that the objective does not read, or of another vocabulary."""
        if ref is not None and not reads_reference(objective):
            raise ValueError(f"ref_model: {objective} reads no reference log-probs")
        if teacher is not None and not isinstance(objective, Divergence):
            raise ValueError(f"teacher_model: {objective} compares with no teacher's distribution")
        for name, model in (("ref_model", ref), ("teacher_model", teacher)):
            if model is not None:
                same_vocabulary(name, vocabulary(model), vocabulary(policy))
                model.requires_grad_(False).eval().to(device)
        return FixedModels(ref, teacher)

    def reference(self, batch: dict[str, Tensor]) -> TeacherHead | None:
        """What `ref_logps` is where the batch has none."""
        given = "ref_logps" in batch or "ref_sums" in batch
        return None if self.ref is None or given else _head(self.ref, batch)

    def distribution(self, batch: dict[str, Tensor], shift) -> TeacherHead | TeacherTopK:
        """The teacher of a batch: the model, or its cached top-k columns, shifted as labels are."""
        if self.teacher is not None:
            return _head(self.teacher, batch)
        missing = [name for name in teacher_columns.COLUMNS if name not in batch]
        if missing:
            raise ValueError(
                f"the objective compares with a teacher: give teacher_model, or {missing[0]} in "
                "the batch"
            )
        return TeacherTopK(*(shift(batch[name]) for name in teacher_columns.COLUMNS))


def _head(model, batch: dict[str, Tensor]) -> TeacherHead:
    with torch.no_grad():
        return TeacherHead(last_hidden(model, batch), Head.of(model))

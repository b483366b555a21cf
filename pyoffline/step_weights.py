"""Aggregation weights of one optimiser step, from counts over its micro-batches and ranks.

The only owner of the normaliser in training and evaluation: the loss of a micro-batch is
sum(weights * loss_t), and the micro-batches add up. Not here: the modes themselves (aggregate.py).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pyoffline.aggregate import ALIASES, GlobalCounts, shift_labels, token_weights

LOCAL = "token-mean-local"


def aligned_labels(batch: dict) -> Tensor:
    """[B, T] labels such that position i predicts entry i; a batch's `shift_labels` as it is."""
    if "shift_labels" in batch:
        return batch["shift_labels"]
    if "labels" not in batch:
        raise ValueError(
            f"the batch has no labels, only {', '.join(sorted(batch))}: a data collator makes them "
            "(pyoffline.collate.Collator, or transformers' DataCollatorForLanguageModeling)"
        )
    return shift_labels(batch["labels"], sequence_ids=batch.get("sequence_ids"))


def step_weights(
    batches: list[dict],
    mode: str,
    horizon: int | None,
    reduce: Callable[[Tensor], Tensor],
    world_size: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """(weights of each micro-batch, aligned with hidden; number of tokens of the step).

    `reduce` sums a tensor over ranks. Weights are multiplied by `world_size`, which a data-parallel
    host divides by.
    """
    mode = ALIASES.get(mode, mode)
    masks = [aligned_labels(b) != -100 for b in batches]
    pairs = list(zip(batches, masks, strict=True))
    totals = [sum(m.sum() for m in masks), sum(_n_sequences(b, m, mode) for b, m in pairs)]
    tokens, sequences = reduce(torch.stack(totals))
    if mode == LOCAL:
        # The mean over micro-batches is part of this mode's definition; the host averages ranks.
        parts = [token_weights(m, mode, dtype=dtype) / len(batches) for m in masks]
        return parts, tokens
    units, prompts = [None] * len(batches), None
    if mode == "prompt-mean":
        if world_size > 1:
            raise NotImplementedError(
                "aggregation prompt-mean over several ranks: prompts are counted on one rank only"
            )
        units, prompts = _prompt_tokens(batches, masks)
    weights = []
    for batch, mask, unit in zip(batches, masks, units, strict=True):
        counts = GlobalCounts(
            tokens=tokens,
            sequences=sequences,
            prompts=prompts,
            horizon=horizon,
            unit_tokens=unit,
            dp_size=world_size,
        )
        groups = batch.get("group_ids") if mode == "prompt-mean" else None
        ids = batch.get("sequence_ids")
        weights.append(
            token_weights(
                mask, mode, counts=counts, sequence_ids=ids, group_ids=groups, dtype=dtype
            )
        )
    return weights, tokens


def sequence_tokens(batch: dict, mask: Tensor) -> Tensor:
    """[S] valid tokens of each sequence."""
    if "sequence_ids" not in batch:
        return mask.sum(-1)
    ids = batch["sequence_ids"].reshape(-1)
    out = torch.zeros(int(ids.max()) + 1, dtype=torch.int64, device=ids.device)
    return out.index_add_(0, ids, mask.reshape(-1).long())


def _n_sequences(batch: dict, mask: Tensor, mode: str) -> Tensor:
    tokens = sequence_tokens(batch, mask)
    return (
        torch.tensor(len(tokens), device=mask.device) if mode == "constant" else (tokens > 0).sum()
    )


def _prompt_tokens(batches: list[dict], masks: list[Tensor]) -> tuple[list[Tensor], int]:
    """Tokens of each row's prompt over the step, [S] a micro-batch, and the number of prompts."""
    missing = [b for b in batches if "group_ids" not in b]
    if missing:
        raise ValueError("aggregation prompt-mean needs the column `group`")
    groups = torch.cat([b["group_ids"] for b in batches])
    tokens = torch.cat([sequence_tokens(b, m) for b, m in zip(batches, masks, strict=True)])
    _, index = groups.unique(return_inverse=True)
    sums = torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=index.device).index_add_(
        0, index, tokens
    )
    per_row = sums[index].split([len(b["group_ids"]) for b in batches])
    return list(per_row), int((sums > 0).sum())

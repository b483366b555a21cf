"""The records of the public API: TokenBatch, SequenceBatch go in, LossOutput, TokenStats come out.

Plain frozen containers, no computation. Their contents are checked where they are used
(`checks.py`, `flatten.py`), so that an error can name the objective that reads the tensor.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Field -> the name that objective functions read it by.
TOKEN_FIELDS = {
    "old_logps": "old",
    "behavior_logps": "mu",
    "ref_logps": "ref",
    "advantages": "adv",
}
SEQUENCE_FIELDS = {
    "rewards": "rewards",
    "group_ids": "group_ids",
    "targets": "targets",
    "ref_logps": "ref_sums",
    "weights": "omega",
}


@dataclass(frozen=True, eq=False)
class SequenceBatch:
    """What belongs to whole sequences: S leading rows of a padded batch, or S `sequence_ids`.

    Args:
        rewards: [S] float, one reward per sequence.
        group_ids: [S] integer, sequences of one prompt share a value.
        targets: [S] float, bool or integer. KTO: 1 desirable, 0 not. DPO: P(chosen beats
            rejected), read at the chosen row.
        ref_logps: [S] float, per-sequence sums of reference log-probs (nats).
        weights: [S] float, omega_i of the sequence losses. Default: the sums of the tokens'
            weights; without these 1 / number of the objective's units.
    """

    rewards: Tensor | None = None
    group_ids: Tensor | None = None
    targets: Tensor | None = None
    ref_logps: Tensor | None = None
    weights: Tensor | None = None


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """What an objective reads, aligned with `hidden`: position i is about predicting `labels[i]`.

    Args:
        labels: [...] integer, token ids in [0, V) or `ignore_index`.
        advantages: [...] per token, or [S] per sequence and broadcast; if both fit, per token.
        old_logps: [...] log-probs of the proximal policy (nats), read as `old`.
        ref_logps: [...] log-probs of the reference (or teacher), read as `ref`; or
            `po.TeacherHead(ref_hidden, ref_head)`, which are scored in the same call.
        behavior_logps: [...] log-probs of the policy that wrote the data, read as `mu`.
        weights: [...] aggregation weights; the loss is sum(weights * loss_t). Default: 1 / number
            of labels that are not `ignore_index` (of a coupled objective: 1 / number of its units).
        temperature: [...] per-token temperature, replaces the head's.
        sequence_ids: [...] 0..S-1, non-decreasing, for packed batches.
        sequences: per-sequence values.
        extra: named [...] tensors, read by custom objectives and `weighted_by`.
        ignore_index: the label of a position that does not count.
        n_valid: the number of rows that count, when the caller knows it: a GPU is then not asked.

    A position whose label is `ignore_index` or whose weight is 0 is never read: whatever its other
    entries hold (NaN, inf), it contributes exactly 0.
    """

    labels: Tensor
    advantages: Tensor | None = None
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    behavior_logps: Tensor | None = None
    weights: Tensor | None = None
    temperature: Tensor | None = None
    sequence_ids: Tensor | None = None
    sequences: SequenceBatch | None = None
    extra: Mapping[str, Tensor] | None = None
    ignore_index: int = -100
    n_valid: int | None = None


class TokenStats(NamedTuple):
    """Row statistics of the labels' shape, fp32 (fp64 for fp64 inputs), 0 where nothing counts.

    With z the final logits of a row and p = softmax(z), in nats:

        logps       z.log_softmax(-1)[label]
        entropy     -(p * p.log()).sum(-1)
        lse         z.logsumexp(-1)
        log_sum_p2  (p * p).sum(-1).log()
        is_top1     z[label] == z.max(-1), bool

    The first three are differentiable where `linear_token_logps` / `token_logps` return them.
    """

    logps: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_p2: Tensor
    is_top1: Tensor


class LossOutput(NamedTuple):
    """`loss`, 0-d and differentiable; `stats` and `metrics`, detached and on the device.

    `metrics`: name -> 0-d tensor, from raw ratios, before any clamping.
    """

    loss: Tensor
    stats: TokenStats
    metrics: dict[str, Tensor]

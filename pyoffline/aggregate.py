"""Aggregation as per-token weights: the loss is sum(weights * loss_t).

One table row per mode says what a weight divides by: a count over the whole step (tokens,
sequences, prompts), the tokens of the unit that is averaged first (sequence, prompt), a constant
horizon. Counts that span micro-batches and ranks come in through `GlobalCounts`; then the weights
of the micro-batches add up to the full batch's for every split. Also here: `shift_labels`. Not
here: the loss, and anything that depends on a log-prob.
"""

import difflib
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyoffline.arrays import as_mask, dense_ids


class _Rule(NamedTuple):
    count: str | None  # what is averaged over: a field of GlobalCounts, or None for a plain sum
    within: str | None = None  # the unit that is averaged first: "sequence" or "prompt"
    horizon: bool = False  # also divide by a constant length
    empty_rows: bool = False  # sequences without a valid token count too
    local: bool = False  # this micro-batch only: the host's own average is part of the definition


MODES = {
    "token-mean": _Rule("tokens"),  # verl, TRL dapo, prime-rl, OpenRLHF
    "token-mean-local": _Rule("tokens", local=True),  # TRL bnpo
    "seq-mean-token-mean": _Rule("sequences", within="sequence"),  # verl, TRL grpo and sapo
    "seq-mean-token-sum": _Rule("sequences"),  # verl; LUSPO
    "seq-mean-token-sum-norm": _Rule("sequences", horizon=True),  # verl
    "token-sum": _Rule(None),  # verl, tinker
    "prompt-mean": _Rule("prompts", within="prompt"),  # SkyRL
    "constant": _Rule("sequences", horizon=True, empty_rows=True),  # Dr.GRPO (2503.20783)
}
# The same modes by the names of TRL's loss_type and SkyRL's loss_reduction.
ALIASES = {
    "dapo": "token-mean",
    "bnpo": "token-mean-local",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "constant",
    "token_mean": "token-mean",
    "sequence_mean": "seq-mean-token-mean",
    "seq_mean_token_sum_norm": "seq-mean-token-sum-norm",
    "prompt_mean": "prompt-mean",
}


@dataclass(frozen=True, eq=False)
class GlobalCounts:
    """Facts about the whole optimiser step, over its micro-batches and ranks.

    A mode reads those it needs. `grad_accum` and `dp_size` are what the *host* divides by: a
    trainer that averages the losses of its micro-batches, a DDP or FSDP that averages gradients
    over ranks. The weights are multiplied by both, so that the result is the sum over the step.
    Leave them 1 where the host sums, or undoes its own division (HF Trainer with
    num_items_in_batch).
    """

    # Counts are ints or one-element tensors on any device.
    tokens: int | Tensor | None = None  # valid tokens (HF: num_items_in_batch)
    sequences: int | Tensor | None = None  # sequences with a valid token ("constant": all rows)
    prompts: int | Tensor | None = None  # groups with a valid token
    horizon: int | None = None  # length that "constant" and "seq-mean-token-sum-norm" divide by
    # [S] tokens of each row's sequence (prompt-mean: of its group), for splits that cut through one
    unit_tokens: Tensor | None = None
    grad_accum: int = 1
    dp_size: int = 1


def token_weights(
    mask,  # [S, T] (or [..., T]) bool, one sequence a row; any shape when sequence_ids is given
    mode="token-mean",
    *,
    num_items_in_batch=None,  # int or one-element tensor: short for GlobalCounts(tokens=...)
    counts=None,  # GlobalCounts
    sequence_ids=None,  # integers of the mask's shape: a packed batch
    group_ids=None,  # [S] integers, rows of one prompt ("prompt-mean" only)
    dtype=torch.float32,
):
    """Weights such that `(weights * loss_t).sum()` is the aggregated loss; 0 where masked.

    Of the mask's shape. With n_i the tokens of sequence i and m_g those of prompt g, a valid token
    weighs
        token-mean               1 / tokens
        token-mean-local         1 / tokens of this micro-batch
        seq-mean-token-mean      1 / (sequences n_i)
        seq-mean-token-sum       1 / sequences
        seq-mean-token-sum-norm  1 / (sequences horizon)
        token-sum                1
        prompt-mean              1 / (prompts m_g)
        constant                 1 / (rows horizon)
    times `counts.grad_accum * counts.dp_size` (not for token-mean-local, whose average over
    micro-batches is the host's). A count that is not given is taken from `mask`, which must then be
    the whole step: with grad_accum or dp_size above 1 that raises. Sequences without a valid token
    do not count (as in verl), except in "constant". `horizon` defaults to the padded length when
    nothing else is given. A sequence or prompt must lie in one micro-batch, or its size is given by
    `counts.unit_tokens`. TRL's and SkyRL's names of the modes are accepted (`ALIASES`).

    float32 or float64; formed in float64, rounded once. An empty mask gives zeros. ValueError:
    unknown mode, wrong shape, a missing count, an argument that the mode does not read; TypeError:
    wrong kinds. No host sync, but for packed prompt-mean. Allocates a few float64 tensors of the
    mask's shape.
    """
    name, rule = _lookup(mode)
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype: expected torch.float32 or torch.float64, got {dtype}")
    mask = as_mask(mask)
    if mask.dim() == 0:
        raise ValueError("mask: expected at least one dimension, got a 0-d tensor")
    counts = _merge(counts, num_items_in_batch, name, rule)
    if (group_ids is not None) != (rule.within == "prompt"):
        verb = "needs" if group_ids is None else "does not read"
        raise ValueError(f"mode {name!r} {verb} group_ids (prompt-mean is the mode that does)")
    denominator = _denominator(mask, name, rule, counts, sequence_ids, group_ids)
    host = 1 if rule.local else counts.grad_accum * counts.dp_size
    weights = torch.where(mask, host / denominator, 0.0)
    return weights.to(dtype)


def shift_labels(
    labels,  # [..., T] int64
    ignore_index=-100,
    sequence_ids=None,  # [..., T] integers: packed sequences
):
    """Labels aligned with the hidden states: `F.pad(labels[..., 1:], (0, 1), value=ignore_index)`.

    Position i predicts `labels[..., i + 1]`; the last position of a row, and of each packed
    sequence when `sequence_ids` is given, predicts nothing. A new tensor of the same dtype; the
    input is not written. TypeError for non-integer labels.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32):
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels: expected an int64 (or int32) tensor, got {got}")
    if labels.dim() == 0:
        raise ValueError("labels: expected [..., T], got a 0-d tensor")
    shifted = torch.full_like(labels, ignore_index, memory_format=torch.contiguous_format)
    shifted[..., :-1] = labels[..., 1:]
    if sequence_ids is not None:
        _check_ids(sequence_ids, labels.shape)
        ends = sequence_ids[..., :-1] != sequence_ids[..., 1:]
        shifted[..., :-1].masked_fill_(ends, ignore_index)
    return shifted


def _lookup(mode):
    name = ALIASES.get(mode, mode)
    if name in MODES:
        return name, MODES[name]
    known = [*MODES, *ALIASES]
    near = difflib.get_close_matches(str(mode), known, n=1, cutoff=0.0)
    raise ValueError(
        f"mode: got {mode!r}, nearest is {near[0]!r}; the modes are {', '.join(MODES)}"
    )


def _check_ids(sequence_ids, shape):
    if tuple(sequence_ids.shape) != tuple(shape):
        raise ValueError(
            f"sequence_ids: expected shape {tuple(shape)}, got {tuple(sequence_ids.shape)}"
        )


def _merge(counts, num_items, name, rule):
    """One GlobalCounts; the count the rule reads is there unless the mask is the whole step."""
    counts = GlobalCounts() if counts is None else counts
    if not isinstance(counts, GlobalCounts):
        raise TypeError(f"counts: expected GlobalCounts, got {type(counts).__name__}")
    for field in ("grad_accum", "dp_size"):
        value = getattr(counts, field)
        if type(value) is not int or value < 1:
            raise ValueError(f"counts.{field}: expected an int >= 1, got {value!r}")
    if num_items is not None:
        if rule.count != "tokens" or rule.local:
            raise ValueError(
                f"mode {name!r} does not read num_items_in_batch; drop it, or pass it as a fact "
                "of the step in GlobalCounts(tokens=...)"
            )
        if counts.tokens is not None:
            raise ValueError(
                "num_items_in_batch and counts.tokens are the same count: pass one of them"
            )
        counts = replace(counts, tokens=num_items)
    if rule.local or rule.count is None or getattr(counts, rule.count) is not None:
        return counts
    if counts.grad_accum > 1 or counts.dp_size > 1 or counts.unit_tokens is not None:
        raise ValueError(
            f"mode {name!r} with grad_accum={counts.grad_accum}, dp_size={counts.dp_size} needs "
            f"the number of {rule.count} of the whole step: pass GlobalCounts({rule.count}=...)"
        )
    return counts


def _number(value, field, device):
    """A count as float64: an int stays on the host, a tensor goes to the mask's device."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(
                f"counts.{field}: expected one element, got shape {tuple(value.shape)}"
            )
        return value.detach().reshape(()).to(device, torch.float64)
    if type(value) is not int or value < 0:
        raise ValueError(
            f"counts.{field}: expected an int >= 0 or a one-element tensor, got {value!r}"
        )
    return torch.full((), float(value), dtype=torch.float64, device=device)


def _denominator(mask, name, rule, counts, sequence_ids, group_ids):
    device = mask.device
    denominator = torch.ones((), dtype=torch.float64, device=device)
    if rule.count is None:
        return denominator
    given = None if rule.local else getattr(counts, rule.count)
    if rule.count == "tokens":
        return mask.sum().double() if given is None else _number(given, "tokens", device)
    index, rows = _sequence_index(mask, name, sequence_ids)
    unit = index if rule.within != "prompt" else _prompt_index(index, rows, group_ids)
    sizes = torch.zeros(mask.numel() + rows, dtype=torch.float64, device=device)
    sizes.index_add_(0, unit.reshape(-1), mask.reshape(-1).double())
    if given is not None:
        denominator = _number(given, rule.count, device)
    elif rule.empty_rows and sequence_ids is None:
        denominator = denominator * rows
    else:
        denominator = (sizes > 0).sum().double()
    if rule.within and counts.unit_tokens is not None:
        if counts.unit_tokens.dim() != 1:
            raise ValueError(
                f"counts.unit_tokens: expected [S], got {tuple(counts.unit_tokens.shape)}"
            )
        _check_length(counts.unit_tokens.shape[0], index, rows, "counts.unit_tokens")
        denominator = denominator * counts.unit_tokens.to(device, torch.float64)[index]
    elif rule.within:
        denominator = denominator * sizes[unit]
    if rule.horizon:
        denominator = denominator * _horizon(mask, name, counts, given, sequence_ids)
    return denominator


def _sequence_index(mask, name, sequence_ids):
    """(sequence of each position, of the mask's shape; number of rows, 0 for a packed batch)."""
    if sequence_ids is not None:
        _check_ids(sequence_ids, mask.shape)
        return dense_ids(sequence_ids, "sequence_ids").to(mask.device), 0
    if mask.dim() < 2:
        raise ValueError(
            f"mode {name!r} on a 1-D mask needs sequence_ids (or a mask [S, T], one sequence a row)"
        )
    rows = mask.shape[:-1].numel()
    return torch.arange(rows, device=mask.device).reshape(*mask.shape[:-1], 1).expand(
        mask.shape
    ), rows


def _check_length(length, index, rows, name):
    """[S] arrays have one entry a row; packed: one a sequence, by ascending id."""
    found = rows if rows or not index.numel() else int(index.max()) + 1
    if length != found:
        raise ValueError(
            f"{name}: expected one entry for each of the {found} sequences, got {length}"
        )


def _prompt_index(index, rows, group_ids):
    if group_ids.dim() != 1:
        raise ValueError(f"group_ids: expected [S], got {tuple(group_ids.shape)}")
    _check_length(group_ids.shape[0], index, rows, "group_ids")
    return dense_ids(group_ids).to(index.device)[index]


def _horizon(mask, name, counts, given, sequence_ids):
    if counts.horizon is not None:
        if type(counts.horizon) is not int or counts.horizon < 1:
            raise ValueError(f"counts.horizon: expected an int >= 1, got {counts.horizon!r}")
        return counts.horizon
    if given is not None or sequence_ids is not None:
        raise ValueError(
            f"mode {name!r} needs counts.horizon here: the padded length differs between "
            "micro-batches, and a packed batch has none"
        )
    return max(mask.shape[-1], 1)

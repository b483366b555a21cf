"""Cached distributions of a teacher in a file of samples: one list of k entries a token.

`pyoffline score --teacher-topk K` writes `teacher_topk_ids` and `teacher_topk_logps`;
`objective: {name: distill}` reads them as TeacherTopK. A row's lists become one [n, k] tensor each,
since Python numbers take ten times the memory.

Not here: the divergences, other columns (row_checks.py).
"""

import math

import torch
from torch import Tensor

IDS, LOGPS = "teacher_topk_ids", "teacher_topk_logps"
COLUMNS = (IDS, LOGPS)
SLACK = 1e-3  # as TeacherTopK: rounding of the cache may lift a sum above 1 by this much


def check(row: dict) -> list[tuple[str, str]]:
    """What is wrong with the two columns of a row, as (field, why)."""
    found = [*_check_lists(IDS, row[IDS]), *_check_lists(LOGPS, row[LOGPS])]
    if found:
        return found
    if [len(x) for x in row[IDS]] != [len(x) for x in row[LOGPS]]:
        return [(LOGPS, f"not of the shape of {IDS}: one log-prob for each id")]
    for i, (ids, logps) in enumerate(zip(row[IDS], row[LOGPS], strict=True)):
        found += _check_position(i, ids, logps)
        if found:
            return found
    return []


def _check_lists(name: str, value) -> list[tuple[str, str]]:
    good = isinstance(value, list) and all(isinstance(x, list) and x for x in value)
    if not good or not value:
        return [(name, "expected a list with one list of k entries per completion token")]
    k = len(value[0])
    odd = next((i for i, x in enumerate(value) if len(x) != k), None)
    if odd is not None:
        return [(f"{name}[{odd}]", f"{len(value[odd])} entries, the first token has {k}")]
    return []


def _check_position(i: int, ids: list, logps: list) -> list[tuple[str, str]]:
    if not all(type(x) is int and x >= 0 for x in ids):
        return [(f"{IDS}[{i}]", "expected token ids")]
    if len(set(ids)) < len(ids):
        return [(f"{IDS}[{i}]", "an id comes twice, so it is no top-k of a distribution")]
    for x in logps:
        if isinstance(x, bool) or not isinstance(x, int | float):
            return [(f"{LOGPS}[{i}]", f"expected numbers, got {x!r}")]
        if not math.isfinite(x):
            return [(f"{LOGPS}[{i}]", f"{x} is not a finite number")]
    total = sum(math.exp(min(x, 1.0)) for x in logps)  # above 0 is refused, and must not overflow
    if total > 1.0 + SLACK:
        why = f"the probabilities sum to {total:.4g}, above 1: no part of a distribution"
        return [(f"{LOGPS}[{i}]", f"{why} (log-probs of the teacher's full softmax, in nats)")]
    return []


def pack(row: dict) -> dict:
    """A checked row with its two columns as tensors [n, k]."""
    return row | {
        IDS: torch.tensor(row[IDS], dtype=torch.int32),
        LOGPS: torch.tensor(row[LOGPS], dtype=torch.float32),
    }


def uneven(samples: list) -> list[tuple[int, str, str]]:
    """Samples whose k is not that of the first."""
    k = samples[0].columns[IDS].shape[1] if samples else 0
    return [
        (s.line, IDS, f"{s.columns[IDS].shape[1]} entries a token here, {k} in the first row")
        for s in samples
        if s.columns[IDS].shape[1] != k
    ]


def outside(samples: list, vocab: int) -> list[tuple[int, str, str]]:
    """Samples with an id that the model's head does not have."""
    tops = ((s.line, int(s.columns[IDS].max())) for s in samples)
    why = f"is outside the model's vocabulary of {vocab}: a teacher of another vocabulary"
    return [(line, IDS, f"id {top} {why}") for line, top in tops if top >= vocab]


def padded(samples: list, name: str, width: int) -> Tensor:
    """[B, width, k] of a column: at the tokens of the completions, 0 elsewhere."""
    first = samples[0].columns[name]
    out = first.new_zeros(len(samples), width, first.shape[1])
    for row, s in zip(out, samples, strict=True):
        row[s.n_prompt : len(s.ids)] = s.columns[name]
    return out


def packed(samples: list, name: str) -> Tensor:
    """[1, T, k] of a column, the samples end to end."""
    return torch.cat([padded([s], name, len(s.ids)) for s in samples], 1)

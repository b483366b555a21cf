"""From the public records to the sequence tensors of the coupled ops: ids of padded and packed
batches, the [S] values, and which of them an objective reads.

Not here: per-token tensors (`flatten.py`), sorting into units (`coupled_units.py`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pyoffline import checks
from pyoffline.coupled_units import check_sequence_ids
from pyoffline.program import Program
from pyoffline.records import SEQUENCE_FIELDS, TOKEN_FIELDS, SequenceBatch, TokenBatch

_ORDER = ("rewards", "group_ids", "targets", "ref_sums", "omega")
_PUBLIC = {short: f"tokens.{field}" for field, short in TOKEN_FIELDS.items()}
_PUBLIC |= {short: f"tokens.sequences.{field}" for field, short in SEQUENCE_FIELDS.items()}


@dataclass(frozen=True, eq=False)
class FlatSequences:
    """`ids` [N] int64 and the [S] tensors in the op's dtype; None where not given."""

    ids: Tensor
    rewards: Tensor | None
    group_ids: Tensor | None
    targets: Tensor | None
    ref_sums: Tensor | None
    omega: Tensor | None

    @property
    def args(self) -> tuple:
        return (self.ids, *(getattr(self, name) for name in _ORDER))


def _ids(tokens: TokenBatch, shape, device, owner) -> Tensor:
    if tokens.sequence_ids is not None:
        ids = tokens.sequence_ids.reshape(-1).long()
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_sequence_ids(ids)
        return ids
    if len(shape) < 2:
        raise ValueError(
            f"{owner} couples the tokens of a sequence: give labels [sequences, length], or "
            f"tokens.sequence_ids beside packed labels of shape {tuple(shape)}"
        )
    each = 1
    for size in shape[1:]:
        each *= size
    rows = torch.arange(shape[0], device=device)
    return rows[:, None].expand(shape[0], each).reshape(-1)


def _value(name: str, x, device, dtype) -> Tensor:
    public = _PUBLIC[name]
    checks.tensor(public, x, 1)
    checks.same_device(public, x, device)
    if name == "group_ids":
        if x.dtype not in checks.INTEGERS:
            raise TypeError(f"{public}: expected integers, got {x.dtype}")
        return x.long().contiguous()
    if name == "targets" and x.dtype in (torch.bool, *checks.INTEGERS):
        x = x.to(dtype)
    return checks.floating(public, x).detach().to(dtype).contiguous()


def flatten_sequences(tokens: TokenBatch, shape, device, dtype, owner) -> FlatSequences:
    """Check and flatten what belongs to whole sequences."""
    ids = _ids(tokens, shape, device, owner)
    batch = tokens.sequences or SequenceBatch()
    values = {}
    count = shape[0] if tokens.sequence_ids is None else None
    for field, name in SEQUENCE_FIELDS.items():
        x = getattr(batch, field)
        values[name] = None if x is None else _value(name, x, device, dtype)
        if x is not None and count not in (None, x.shape[0]):
            raise ValueError(
                f"{_PUBLIC[name]}: expected one value for each of {count} sequences, got shape "
                f"{tuple(x.shape)}"
            )
    return FlatSequences(ids, **values)


def check_sequences_read(tokens: TokenBatch, program: Program, owner) -> None:
    """Every sequence tensor that is given is read, every one that is read is given."""
    batch = tokens.sequences or SequenceBatch()
    if not isinstance(batch, SequenceBatch):
        raise TypeError(
            f"tokens.sequences: expected a po.SequenceBatch, got {type(batch).__name__}"
        )
    allowed = program.sequence_reads | program.optional
    # no `|=`: Dynamo before 2.12 takes it for a method of the frozenset; a list, as in program.py
    allowed = allowed | frozenset([name for names in program.one_of for name in names])
    if any(row.weighs != "token" for row in program.coupled):
        allowed = allowed | {"omega"}
    for field, name in SEQUENCE_FIELDS.items():
        given = getattr(batch, field) is not None
        if given and name not in allowed:
            local = "" if program.coupled else " is token-local and"
            raise ValueError(f"{_PUBLIC[name]} is given but {owner}{local} does not read it")
        if name in program.sequence_reads and not given:
            raise ValueError(f"{owner} reads {_PUBLIC[name]}, which is missing")
    for names in program.one_of:
        there = [n for n in names if _is_given(tokens, batch, n)]
        if len(there) != 1:
            wanted = " or ".join(_PUBLIC[n] for n in names)
            got = " and ".join(_PUBLIC[n] for n in there) or "neither"
            raise ValueError(f"{owner} reads {wanted}: expected one of them, got {got}")


def _is_given(tokens: TokenBatch, batch: SequenceBatch, name: str) -> bool:
    for record, fields in ((tokens, TOKEN_FIELDS), (batch, SEQUENCE_FIELDS)):
        for field, short in fields.items():
            if short == name:
                return getattr(record, field) is not None
    return False

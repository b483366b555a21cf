"""What a student is distilled from: a head on hidden states, logits, or cached top-k log-probs.

Public records and their flat form. A teacher's tensors are constants. Not here: the divergences.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyoffline import checks, ops
from pyoffline.flatten import flatten_head
from pyoffline.head import Head


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """The teacher's hidden states and its head: `head(hidden)`, one GEMM a chunk.

    Shapes: hidden [..., D'], any width; the head's vocabulary is the student's. Softcap, scale,
    temperature and LoRA are the head's own. Neither has a gradient.
    """

    hidden: Tensor  # [..., D']
    head: Head


@dataclass(frozen=True, eq=False)
class TeacherLogits:
    """Logits [..., V] that the caller has, divided by `temperature`; never written."""

    logits: Tensor  # [..., V]
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The k most probable entries of each position, cached: ids [..., k] and logps [..., k].

    `logps` are log-probs (nats) as the teacher's full softmax gave them; what is missing to 1 is
    one tail bucket, and the student's other entries are compared with it as one. k = V has none.
    A row that sums to more than 1 (by 1e-3; fp16 and bf16 logps by 2^-6) is no distribution and
    raises, as does an id that comes twice.
    """

    ids: Tensor  # [..., k] integer
    logps: Tensor  # [..., k] any float


class FlatTeacher(NamedTuple):
    """The op's teacher arguments, in its order."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    adapter_hidden: Tensor | None
    adapter_weight: Tensor | None
    logits: Tensor | None
    ids: Tensor | None
    logps: Tensor | None
    head: Tensor
    logits_dtype: int


def _leading(name: str, x: Tensor, shape) -> None:
    if tuple(x.shape[:-1]) != tuple(shape):
        raise ValueError(
            f"{name}: expected the student's leading shape {tuple(shape)}, got "
            f"{tuple(x.shape[:-1])}; teacher and student are aligned position by position"
        )


def same_vocabulary(name: str, got: int, vocab: int) -> None:
    """ValueError where a teacher (or reference) has another number of entries."""
    if got != vocab:
        raise ValueError(
            f"{name}: the teacher's vocabulary has {got} entries, the student's {vocab}; expected "
            "one vocabulary. Where only padding rows differ, cut both heads to the common ids"
        )


def _from_head(teacher: TeacherHead, shape, device, vocab: int) -> FlatTeacher:
    if not isinstance(teacher.head, Head):
        raise TypeError(
            f"TeacherHead(head): expected a po.Head, got {type(teacher.head).__name__}; use "
            "po.Head.of(model)"
        )
    checks.floating("TeacherHead(hidden)", teacher.hidden)
    checks.same_device("TeacherHead(hidden)", teacher.hidden, device)
    with torch.no_grad():
        try:
            x = flatten_head(teacher.hidden, teacher.head.tensors())
        except (TypeError, ValueError) as error:
            raise type(error)(f"TeacherHead: {error}") from error
    _leading("TeacherHead(hidden)", teacher.hidden, shape)
    same_vocabulary("TeacherHead(head)", x.weight.shape[0], vocab)
    tensors = [None if t is None else t.detach() for t in x.linear]
    return FlatTeacher(*tensors, None, None, None, x.scalars, x.logits_dtype)


def _scalars(temperature: float = 1.0) -> Tensor:
    return torch.tensor([0.0, 1.0, temperature], dtype=torch.float64, device="cpu")


def _from_logits(teacher: TeacherLogits, shape, device, vocab: int) -> FlatTeacher:
    x, temperature = teacher.logits, teacher.temperature
    checks.floating("TeacherLogits(logits)", x)
    checks.same_device("TeacherLogits(logits)", x, device)
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"TeacherLogits(temperature): expected a float above 0, got {temperature!r}"
        )
    if not 0.0 < temperature < math.inf:
        raise ValueError(
            f"TeacherLogits(temperature): expected a finite float above 0, got {temperature!r}"
        )
    if x.dim() < 1:
        raise ValueError("TeacherLogits(logits): expected [..., V], got a 0-d tensor")
    _leading("TeacherLogits(logits)", x, shape)
    same_vocabulary("TeacherLogits(logits)", x.shape[-1], vocab)
    flat = x.detach().reshape(-1, vocab)
    dtype = ops.DTYPES.index(flat.dtype)
    return FlatTeacher(*[None] * 5, flat, None, None, _scalars(float(temperature)), dtype)


def _from_top_k(teacher: TeacherTopK, shape, device, vocab: int) -> FlatTeacher:
    ids, logps = teacher.ids, teacher.logps
    checks.tensor("TeacherTopK(ids)", ids)
    if ids.dtype not in checks.INTEGERS:
        raise TypeError(f"TeacherTopK(ids): expected int64 (or int32), got {ids.dtype}")
    checks.floating("TeacherTopK(logps)", logps)
    checks.same_device("TeacherTopK(ids)", ids, device)
    checks.same_device("TeacherTopK(logps)", logps, device)
    if ids.shape != logps.shape or ids.dim() < 1:
        raise ValueError(
            f"TeacherTopK: expected ids and logps of one shape [..., k], got {tuple(ids.shape)} "
            f"and {tuple(logps.shape)}"
        )
    _leading("TeacherTopK(ids)", ids, shape)
    k = ids.shape[-1]
    if not 1 <= k <= vocab:
        raise ValueError(
            f"TeacherTopK: expected k from 1 to the vocabulary's {vocab}, got {k} columns"
        )
    flat = (ids.detach().reshape(-1, k).long(), logps.detach().reshape(-1, k))
    return FlatTeacher(*[None] * 6, *flat, _scalars(), 0)


_FLATTEN = {TeacherHead: _from_head, TeacherLogits: _from_logits, TeacherTopK: _from_top_k}


def flatten_teacher(teacher, shape, device, vocab: int, dtype: torch.dtype) -> FlatTeacher:
    """Check and flatten a teacher for a student of this leading shape, vocabulary and dtype."""
    flatten = _FLATTEN.get(type(teacher))
    if flatten is None:
        raise TypeError(
            "teacher: expected a po.TeacherHead, po.TeacherLogits or po.TeacherTopK, got "
            f"{type(teacher).__name__}"
        )
    flat = flatten(teacher, shape, device, vocab)
    if flat.hidden is not None and flat.hidden.dtype == torch.float64 != dtype:
        raise TypeError(
            f"TeacherHead: hidden and weight are float64 beside a student in {dtype}; cast them"
        )
    return flat

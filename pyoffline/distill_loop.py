"""Distillation in the chunk loop: the teacher's chunk beside the student's, one row pass over both.

`run_linear` keeps the loop; a backend's kernels are wrapped so that the row pass of a chunk first
makes the teacher's rows: one GEMM for a head, a copy for given logits, a sort for a top-k teacher.
The chunk budget covers both chunks. A teacher has no gradient. Not here: the row pass over two
rows (`reference_distill.py`, `cpu_distill.py`), the loop (`chunk_loop.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline.calls import (
    HeadScalars,
    LinearCall,
    LinearResult,
    Needs,
    RowOutputs,
    Rows,
    stats_dtype,
)
from pyoffline.chunk_loop import Kernels, NoShortcuts, run_linear

# How far above 1 a cached top-k may sum: rounding of the cached log-probs, by their dtype.
EXCESS = {2: 2.0**-6, 4: 1e-3, 8: 1e-3}


@dataclass(frozen=True, eq=False)
class Teacher:
    """Flat tensors of one kind of teacher; the others are None."""

    head: HeadScalars = HeadScalars()
    logits_dtype: torch.dtype = torch.float32
    hidden: Tensor | None = None  # [N, D']
    weight: Tensor | None = None  # [V, D']
    bias: Tensor | None = None  # [V]
    adapter_hidden: Tensor | None = None
    adapter_weight: Tensor | None = None
    logits: Tensor | None = None  # [N, V]
    ids: Tensor | None = None  # [N, k] int64
    logps: Tensor | None = None  # [N, k]


@dataclass(frozen=True)
class DivergenceUse:
    """One divergence of a call: `scale * extras[gate] * row(param)`."""

    code: int
    gate: int
    scale: float
    param: float


@dataclass(frozen=True, eq=False)
class DistillCall:
    """A fused linear call with a teacher; `linear.rows` holds the objective that is added."""

    linear: LinearCall
    teacher: Teacher
    divergences: tuple[DivergenceUse, ...]


@dataclass(frozen=True, eq=False)
class DistillOutputs:
    """Results per row beside RowOutputs; `values` [K, N] are before scale and gate."""

    values: Tensor
    teacher_entropy: Tensor  # [N]; of the k + 1 buckets for a top-k teacher
    top1_agreement: Tensor  # [N] bool

    @staticmethod
    def zeros(terms: int, n: int, dtype: torch.dtype, device) -> "DistillOutputs":
        return DistillOutputs(
            torch.zeros(terms, n, dtype=dtype, device=device),
            torch.zeros(n, dtype=dtype, device=device),
            torch.zeros(n, dtype=torch.bool, device=device),
        )


@dataclass(frozen=True, eq=False)
class TeacherRows:
    """The teacher of one chunk: logits [C, V], or ascending ids and their log-probs [C, k] with the
    probability of all other entries [C] (0 where k = V).
    """

    teacher: Teacher
    logits: Tensor | None = None
    ids: Tensor | None = None
    logps: Tensor | None = None
    tail: Tensor | None = None


PairPass = Callable[..., Tensor | None]


class PairKernels(NoShortcuts):
    """A backend's kernels with the row pass over two rows in place of its own."""

    def __init__(self, base: Kernels, call: DistillCall, pair_pass: PairPass):
        self.base, self.call, self.pair_pass = base, call, pair_pass
        hidden = call.linear.hidden
        self.stats = stats_dtype(hidden.dtype)
        self.out = DistillOutputs.zeros(
            len(call.divergences), hidden.shape[0], self.stats, hidden.device
        )
        self.buffer_t: Tensor | None = None

    def __getattr__(self, name: str):
        return getattr(self.base, name)

    def row_pass(self, logits: Tensor, rows: Rows, out: RowOutputs, grad, scale: float):
        """The teacher's rows, then both."""
        index, size = rows.index, rows.labels.shape[0]
        teacher = self.read_teacher(index, logits)
        part = DistillOutputs.zeros(
            len(self.call.divergences), size, self.stats, self.out.values.device
        )
        dlogits = self.pair_pass(self.call, logits, teacher, rows, (out, part, grad, scale))
        for name, value in vars(part).items():
            getattr(self.out, name).index_copy_(-1, index, value)
        return dlogits

    def read_teacher(self, index: Tensor, logits: Tensor) -> TeacherRows:
        """The teacher's rows `index`, in the same height as the student's chunk."""
        t = self.call.teacher
        if t.ids is not None:
            return top_k_rows(t, index, logits.shape[1], self.stats)
        height, vocab = logits.shape
        if self.buffer_t is None:
            dtype = t.logits_dtype if t.logits is None else t.logits.dtype
            self.buffer_t = self.base.buffer(height, vocab, dtype, logits.device)
        out = self.buffer_t[:height]
        if t.logits is not None:
            out[: index.numel()] = t.logits.index_select(0, index)
            return TeacherRows(t, out)
        x, u = (_rows(v, index, height) for v in (t.hidden, t.adapter_hidden))
        self.base.logits(_teacher_call(t, self.call.linear), x, u, out)
        return TeacherRows(t, out)


def _rows(x: Tensor | None, index: Tensor, height: int) -> Tensor | None:
    """Rows of x, zero-padded to `height` as the student's are in deterministic mode."""
    if x is None:
        return None
    picked = x.index_select(0, index)
    return F.pad(picked, (0, 0, 0, height - picked.shape[0]))


def _teacher_call(t: Teacher, linear: LinearCall) -> LinearCall:
    return replace(
        linear,
        hidden=t.hidden,
        weight=t.weight,
        needs=Needs(),
        logits_dtype=t.logits_dtype,
        adapter_hidden=t.adapter_hidden,
        adapter_weight=t.adapter_weight,
    )


def top_k_rows(t: Teacher, index: Tensor, vocab: int, dtype: torch.dtype) -> TeacherRows:
    """Checked rows of a top-k teacher, ids ascending.

    Raises IndexError for an id outside [0, vocab), ValueError for an id that comes twice and for
    log-probs that are no distribution; both name the row of the flattened batch.
    """
    ids, order = t.ids.index_select(0, index).sort(-1)
    logps = t.logps.index_select(0, index).to(dtype).gather(-1, order)

    def first(bad):
        row = int(bad.nonzero()[0, 0])
        return row, int(index[row])

    outside = (ids < 0) | (ids >= vocab)
    if outside.any():
        row, at = first(outside)
        raise IndexError(
            f"TeacherTopK(ids): row {at} holds {int(ids[row][outside[row]][0])}, outside "
            f"[0, {vocab}); ids are entries of the student's vocabulary"
        )
    twice = ids[:, 1:] == ids[:, :-1]
    if twice.any():
        row, at = first(twice)
        raise ValueError(
            f"TeacherTopK(ids): row {at} holds {int(ids[row, 1:][twice[row]][0])} twice; expected "
            "distinct ids"
        )
    total = logps.double().exp().sum(-1)
    above = (total > 1.0 + EXCESS[t.logps.dtype.itemsize])[:, None]
    if above.any():
        row, at = first(above)
        raise ValueError(
            f"TeacherTopK(logps): row {at} sums to {total[row].item():.6g}; expected log-probs of "
            "a distribution (at most 1). Logits, or log-probs renormalised after a cut? Pass "
            "log_softmax over the teacher's whole vocabulary"
        )
    # what is missing to 1 within rounding is nothing: a student may have no other entry
    tail = 1.0 - total
    tail = torch.where(tail < 16 * torch.finfo(dtype).eps, 0.0, tail).to(dtype)
    return TeacherRows(t, ids=ids, logps=logps, tail=tail * (ids.shape[1] < vocab))


def run_distill(
    k: Kernels, call: DistillCall, pair_pass: PairPass
) -> tuple[LinearResult, DistillOutputs]:
    """One fused distillation call on these kernels."""
    linear = call.linear
    # torch's GEMMs round differently for transposed operands
    names = ("hidden", "weight", "adapter_hidden", "adapter_weight")
    dense = {n: getattr(linear, n) for n in names}
    dense = {n: x.contiguous() for n, x in dense.items() if x is not None}
    n = linear.hidden.shape[0]
    index = torch.arange(n, device=linear.hidden.device)
    rows = replace(linear.rows, index=index)
    t = call.teacher
    chunk = t.logits_dtype if t.logits is None else t.logits.dtype
    beside = 0 if t.ids is not None else chunk.itemsize
    linear = replace(linear, rows=rows, beside=beside, **dense)
    call = replace(call, linear=linear)
    kernels = PairKernels(k, call, pair_pass)
    return run_linear(kernels, linear), kernels.out

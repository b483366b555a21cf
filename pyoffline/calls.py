"""Flat records between the custom ops and the backends: tensors of N rows, no public objects.

`Rows` is what a row pass reads, `RowOutputs` what it writes; `LinearCall` / `LogitsCall` add where
the logits come from. A backend implements `linear(LinearCall)` and `logits(LogitsCall)`. Not here:
checks, shapes other than flat.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor

from pyoffline.plan import PlanSettings


def stats_dtype(dtype: torch.dtype) -> torch.dtype:
    """Row scalars are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class HeadScalars:
    """z = softcap(logit_scale * (x W^T + bias)) / temperature; softcap 0 means none."""

    softcap: float = 0.0
    logit_scale: float = 1.0
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Rows:
    """Per-row inputs [N], labels int64, others fp32 or fp64; and what all rows share."""

    labels: Tensor
    weights: Tensor | None = None
    old: Tensor | None = None
    mu: Tensor | None = None
    ref: Tensor | None = None
    adv: Tensor | None = None
    temperature: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    coefs: Tensor | None = None  # [4, N] given (a, b, c, e) instead of a program
    codes: tuple[int, ...] = ()
    hyper: Tensor | None = None  # [K, 8] fp64 on the CPU
    head: HeadScalars = HeadScalars()
    bias: Tensor | None = None  # [V]
    class_weight: Tensor | None = None  # [V]
    ignore_index: int = -100
    index: Tensor | None = None  # [N] where a row lies in the call's batch, int64

    def counts(self) -> Tensor:
        """[N] bool: rows that are read at all."""
        keep = self.labels != self.ignore_index
        if self.weights is not None:
            keep = keep & (self.weights != 0)
        if self.coefs is not None:
            keep = keep & (self.coefs != 0).any(0)
        return keep

    def map(self, fn) -> "Rows":
        """Apply `fn` to every per-row tensor; [4, N] coefs row by row."""
        new = {
            f.name: fn(getattr(self, f.name))
            for f in fields(self)
            if f.name in _PER_ROW and getattr(self, f.name) is not None
        }
        if self.coefs is not None:
            new["coefs"] = torch.stack([fn(c) for c in self.coefs])
        return replace(self, extras={k: fn(v) for k, v in self.extras.items()}, **new)


_PER_ROW = frozenset({"labels", "weights", "old", "mu", "ref", "adv", "temperature", "index"})


@dataclass(frozen=True, eq=False)
class RowOutputs:
    """Per-row results [N]; `loss` is before the weight, `coefs` [4, N] and `gap` where asked."""

    loss: Tensor
    logps: Tensor
    entropy: Tensor
    lse: Tensor
    log_sum_p2: Tensor
    is_top1: Tensor
    coefs: Tensor | None = None
    gap: Tensor | None = None

    @staticmethod
    def zeros(
        n: int, dtype: torch.dtype, device, coefs: bool = False, gap: bool = False
    ) -> "RowOutputs":
        # separate storages: outputs of a custom op may not alias each other
        floats = (torch.zeros(n, dtype=dtype, device=device) for _ in range(5))
        given = torch.zeros(4, n, dtype=dtype, device=device) if coefs else None
        # NaN: a backend that does not fill it shows
        spare = torch.full((n,), torch.nan, dtype=dtype, device=device) if gap else None
        return RowOutputs(*floats, torch.zeros(n, dtype=torch.bool, device=device), given, spare)

    def map(self, fn) -> "RowOutputs":
        """Apply `fn` along the rows (the last dimension) of every tensor."""
        new = (getattr(self, f.name) for f in fields(self))
        return RowOutputs(*(None if x is None else fn(x) for x in new))


@dataclass(frozen=True)
class Needs:
    """Which gradients are wanted."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    adapter_hidden: bool = False
    adapter_weight: bool = False

    @property
    def any(self) -> bool:
        return any(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, eq=False)
class LinearCall:
    """logits = hidden @ weight^T (+ adapter_hidden @ adapter_weight^T), then the rows."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    rows: Rows
    needs: Needs
    plan: PlanSettings
    logits_dtype: torch.dtype
    adapter_hidden: Tensor | None = None  # [N, r]
    adapter_weight: Tensor | None = None  # [V, r]
    wants_coefs: bool = False
    # (kernels, call) -> LinearResult: another loop over the same kernels (coupled objectives)
    loop: Callable | None = None
    beside: int = 0  # bytes per logit that the row pass keeps beside the chunk (a teacher's chunk)


@dataclass(frozen=True, eq=False)
class LinearResult:
    """Gradients are None where not needed; `metrics` [M] of a coupled objective.

    fp16 inputs have fp32 gradients: they are cast once, after the upstream gradient.
    """

    loss: Tensor
    out: RowOutputs
    dhidden: Tensor | None = None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dadapter_hidden: Tensor | None = None
    dadapter_weight: Tensor | None = None
    metrics: Tensor | None = None


@dataclass(frozen=True, eq=False)
class LogitsCall:
    """Rows on logits that the caller owns; they are never written."""

    logits: Tensor  # [N, V]
    rows: Rows
    needs_grad: bool
    wants_coefs: bool = False
    wants_gap: bool = False


@dataclass(frozen=True, eq=False)
class LogitsResult:
    """`dlogits` [N, V] in the logits' dtype, or None; to be multiplied by `unscale`.

    `unscale` is a power of two, 1 but for fp16.
    """

    loss: Tensor
    out: RowOutputs
    dlogits: Tensor | None = None
    unscale: float | Tensor = 1.0

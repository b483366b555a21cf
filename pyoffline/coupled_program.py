"""Run a program with coupled terms on whole units: loss, row coefficients and metrics.

Token-local terms of the same program take their weights here, masks their toll, and every
coefficient leaves with its weight in it: the row pass gets coefficients only. Not here: the
functions (`coupled_table.py`), which rows make a unit (`coupled_units.py`).
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyoffline.coupled import Coupled, CoupledLoss
from pyoffline.coupled_table import COUPLED_OF_CODE, MASKS
from pyoffline.objectives import ROW_OF_CODE
from pyoffline.program import CUSTOM_CODE, RowScalars, coupled_rows, evaluate

_MASK_CODES = frozenset(row.code for row in MASKS.values())
_GAP = frozenset(code for code, row in ROW_OF_CODE.items() if row.wrt == "gap")


def reads_gap(codes) -> bool:
    """Whether a term reads the label-smoothing gap."""
    return any(code in _GAP for code in codes[0::3])


def logp_only(codes) -> bool:
    """Whether every coefficient of this program but a = dL/dlogp is 0."""
    coupled = all(row.logp_only for row in coupled_rows(codes))
    local = (ROW_OF_CODE[c].wrt == "logp" for c in codes[0::3] if c in ROW_OF_CODE)
    return coupled and CUSTOM_CODE not in codes[0::3] and all(local)


def metric_names(codes) -> list[str]:
    """Names of the metrics of a program, in the order in which they come out."""
    return [name for row in coupled_rows(codes) for name in row.metrics]


@dataclass(frozen=True, eq=False)
class Evaluated:
    """fp64: `loss` 0-d, `coefs` [4, n] with the weights in, `metrics` [2, M] sums and counts."""

    loss: Tensor
    coefs: Tensor
    metrics: Tensor


@dataclass
class _Term:
    """The part of one term: `losses` [n] or [S] vectors, coefs [4, n]."""

    losses: list[Tensor]
    coefs: Tensor


class _Run:
    """One evaluation; terms are walked in order, a mask takes the terms behind it."""

    def __init__(self, codes, hyper: Tensor, c: Coupled, omega: dict[str, Tensor], gap):
        self.codes, self.hyper, self.c, self.omega = codes, hyper, c, omega
        self.params = hyper.tolist()
        self.scalars = RowScalars(c.logp, c.entropy, c.lse, gap, c.old, c.mu, c.ref, c.adv)
        self.metrics: list[Tensor] = []

    def walk(self, first: int, last: int) -> _Term:
        total = _Term([], torch.zeros(4, *self.c.logp.shape, dtype=torch.float64).to(self.c.logp))
        k = first
        while k < last:
            code, step = self.codes[3 * k], 1
            if code in _MASK_CODES:
                step += self.codes[3 * k + 2]
                part = self.masked(k, k + step)
            elif code in COUPLED_OF_CODE:
                part = self.coupled(k)
            else:
                part = self.local(k)
            total.losses += part.losses
            total.coefs = total.coefs + part.coefs
            k += step
        return total

    def row(self, k: int) -> tuple[CoupledLoss, float]:
        row = COUPLED_OF_CODE[self.codes[3 * k]]
        kind = "sequence" if row.weighs == "token" else row.weighs
        c = replace(self.c, params=tuple(self.params[k][1:]), omega=self.omega[kind])
        got = row.fn(c)
        for name in row.metrics:
            x = got.metrics[name].double()
            self.metrics.append(torch.stack([x.sum(), x.new_full((), x.numel())]))
        return got, self.params[k][0]

    def local(self, k: int) -> _Term:
        triple, hyper = self.codes[3 * k : 3 * k + 3], self.hyper[k : k + 1]
        loss, *coefs = evaluate(triple, hyper, self.scalars, self.c.extras)
        coefs = torch.stack(coefs)
        weighted = torch.where(coefs == 0, 0.0, coefs * self.c.weights)
        return _Term([self.c.weights * loss], weighted)

    def coupled(self, k: int) -> _Term:
        got, scale = self.row(k)
        zero = torch.zeros_like(self.c.logp)
        if scale == 0.0:
            return _Term([], torch.zeros_like(zero.expand(4, -1)))
        parts = (got.a, got.b, got.c)
        coefs = torch.stack([*(zero if x is None else scale * x for x in parts), zero])
        per_token = got.loss if got.loss.shape == zero.shape else self.c.spread(got.loss)
        # a NaN loss is never hidden by a branch that gave 0
        return _Term([scale * got.loss], torch.where(per_token.isnan(), torch.nan, coefs))

    def masked(self, k: int, last: int) -> _Term:
        """A mask's `loss` [n] is 1 where a token is kept, 0 where not, NaN where nobody knows; what
        is dropped is 0, unless it is NaN.
        """
        keep = self.row(k)[0].loss
        part = self.walk(k + 1, last)
        of_sequence = self.c.first(keep)

        def apply(x: Tensor) -> Tensor:
            mask = keep if x.shape[-1:] == keep.shape else of_sequence
            x = torch.where(mask.isnan(), torch.nan, x)
            return torch.where((mask == 0) & ~x.isnan(), 0.0, x)

        return _Term([apply(x) for x in part.losses], apply(part.coefs))


def evaluate_units(codes, hyper: Tensor, c: Coupled, omega, gap: Tensor | None) -> Evaluated:
    """All terms on whole units; `omega`: the shares [S] by kind of unit, as `Units.omega` gives."""
    run = _Run(codes, hyper, c, omega, gap)
    total = run.walk(0, len(codes) // 3)
    loss = c.logp.new_zeros(())
    for x in total.losses:
        loss = loss + x.sum()
    empty = c.logp.new_zeros(2, 0)
    metrics = torch.stack(run.metrics, 1) if run.metrics else empty
    return Evaluated(loss, total.coefs, metrics)

"""The check that comes before the clock: loss and gradients on a few rows against fp64 PyTorch.

Ours may be off by twice what PyTorch in the same dtype is off (gradients three times), elementwise
maximum and RMS. A loss that is one number may be exact by luck: it is held to PyTorch's mean error
on the rows that it averages, each by itself. Rows whose ratio is near a clip border are left out:
there a rounding decides the branch, for PyTorch too.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

import pyoffline as po
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.shapes import CLIP, Inputs

ROWS = 32
BORDER = 0.05  # distance of the ratio from 1 +- CLIP
LIMITS = {"output": 2.0, "dhidden": 3.0, "dweight": 3.0}


@dataclass(frozen=True)
class Check:
    """Error of ours over error of PyTorch in the same dtype; `chunks` of the checked run."""

    name: str
    chunks: int
    max_ratio: float
    rms_ratio: float
    limit: float
    backend: str = "auto"

    @property
    def passed(self) -> bool:
        """A NaN fails."""
        return self.max_ratio <= self.limit and self.rms_ratio <= self.limit

    def as_dict(self) -> dict:
        return {**vars(self), "passed": self.passed}


def pick_rows(inputs: Inputs, count: int = ROWS) -> Tensor:
    """Indices of rows away from the clip borders, from all over the batch."""
    ratio = inputs.noise_ratio()
    far = ((ratio - 1).abs() - CLIP).abs() > BORDER
    index = far.nonzero()[:, 0]
    step = max(1, index.numel() // count)
    return index[::step][:count]


def _results(case: Case, call, inputs: Inputs) -> dict[str, Tensor]:
    case.prepare(inputs)
    out = case.step(call, inputs)().detach()
    found = {"output": out}
    for name, x in (("dhidden", inputs.hidden), ("dweight", inputs.weight)):
        if x.grad is not None:
            found[name] = x.grad
    inputs.clear_grads()
    return found


def _widen(inputs: Inputs) -> Inputs:
    wide = {k: v.detach() for k, v in vars(inputs).items()}
    return Inputs(**{k: v.double() if v.is_floating_point() else v for k, v in wide.items()})


def _errors(found: Tensor, truth: Tensor) -> tuple[float, float]:
    difference = found.double().sub_(truth).abs_()
    return float(difference.max()), float(difference.square_().mean().sqrt())


def _row_error(case: Case, few: Inputs) -> float:
    """PyTorch's error on single rows, their mean."""
    total = 0.0
    for i in range(few.labels.numel()):
        one = few.take([i])
        wide = _widen(one)
        with torch.no_grad():
            got = case.torch(one.hidden, one.weight, one)
            total += _errors(got, case.torch(wide.hidden, wide.weight, wide))[0]
    return total / few.labels.numel()


def check(case: Case, inputs: Inputs, backend: str = "auto") -> list[Check]:
    """Checks of one chunk and of two, before any timing, by the backend in force."""
    few = inputs.take(pick_rows(inputs))
    truth = _results(case, case.torch, _widen(few))
    same = {k: _errors(v, truth[k]) for k, v in _results(case, case.torch, few).items()}
    if truth["output"].dim() == 0:
        same["output"] = (_row_error(case, few),) * 2
    rows = few.labels.numel()
    checks = []
    for chunks, height in ((1, rows), (2, (rows + 1) // 2)):
        with po.chunk_rows(height):
            ours = _results(case, case.ours, few)
        for name, want in truth.items():
            # one rounding of the truth itself: PyTorch may be exact by luck on a single number
            grain = torch.finfo(torch.float32).eps * float(want.abs().max())
            error = _errors(ours[name], want)
            ratios = [e / max(t, grain) for e, t in zip(error, same[name], strict=True)]
            checks.append(Check(name, chunks, *ratios, LIMITS[name], backend))
    return checks

"""The base class of every objective: `+`, `-`, `*`, and the flat program that kernels run.

Objectives are frozen dataclasses; their coefficients add per row. Not here: the rows
(`objectives.py`, `coupled_table.py`), the public objectives (`token_objectives.py`,
`sequence_objectives.py`), custom ones (`custom.py`).
"""

import math
from dataclasses import dataclass, fields

from pyoffline import checks
from pyoffline.coupled_table import COUPLED
from pyoffline.objectives import TABLE, Term, snake_case
from pyoffline.program import Program, compile_terms


class Objective:
    """Base of all that `+`, `-` and `*` compose; `terms(has_mu)` lists the rows it is made of."""

    def terms(self, has_mu: bool = False) -> tuple[Term, ...]:
        raise NotImplementedError

    def check(self) -> None:
        """Raise for a field outside its range."""

    def __post_init__(self):
        self.check()
        programs = (compile_terms(self.terms(False)), compile_terms(self.terms(True)))
        object.__setattr__(self, "_programs", programs)
        checks.read_lazily(self)

    def program(self, has_mu: bool) -> Program:
        """The flat form, built with the object: torch.compile then sees its floats as a tensor."""
        return self._programs[1 if has_mu else 0]  # a bool is no index to Dynamo before 2.12

    def __add__(self, other):
        return _Sum((self, other)) if isinstance(other, Objective) else NotImplemented

    def __sub__(self, other):
        return _Sum((self, -1.0 * other)) if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not abs(factor) < math.inf:
            raise ValueError(f"an objective can be scaled by a finite float only, got {factor}")
        return _Scaled(self, float(factor))

    __rmul__ = __mul__

    def __neg__(self):
        return _Scaled(self, -1.0)

    def weighted_by(self, name: str) -> "Objective":
        """Multiply this term, per token, by `tokens.extra[name]`."""
        return _Scaled(self, 1.0, checks.gate_name(name))


@dataclass(frozen=True)
class _Sum(Objective):
    parts: tuple[Objective, ...]

    def terms(self, has_mu=False):
        return tuple(t for part in self.parts for t in part.terms(has_mu))


@dataclass(frozen=True)
class _Scaled(Objective):
    inner: Objective
    factor: float
    gate: str | None = None

    def terms(self, has_mu=False):
        return tuple(self._scale(t) for t in self.inner.terms(has_mu))

    def _scale(self, t: Term) -> Term:
        if self.gate and t.gate:
            raise ValueError(
                f"a term can be weighted once: {t.row} by {t.gate!r} and {self.gate!r}"
            )
        gate = self.gate or t.gate
        return Term(t.row, t.scale * self.factor, t.params, t.anchor, gate, t.custom)


# Bounds, caps and thresholds, which may be switched off by infinity, and what divides a reward. Any
# other infinite parameter makes every loss inf or NaN.
MAY_BE_INFINITE = (
    *("clip", "clip_low", "clip_high", "dual_clip", "high", "cap", "behavior_cap"),
    *("delta", "delta_low", "delta_high", "tau"),
)


def check_floats(obj: Objective, skip=(), **bounds: tuple[float, float]) -> None:
    """Every float field (not in `skip`) is a number inside its (low, high); None stays None.
    Infinity is inside for MAY_BE_INFINITE only.
    """
    for f in fields(obj):
        if f.name in skip:
            continue
        value = getattr(obj, f.name)
        if value is None or (isinstance(value, str) and isinstance(f.default, str)):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{type(obj).__name__}({f.name}=...) expects a float, got {value!r}")
        low, high = bounds.get(f.name, (-math.inf, math.inf))
        if not low <= value <= high:  # false for NaN too
            raise ValueError(
                f"{type(obj).__name__}({f.name}={value}) is outside [{low:g}, {high:g}]"
            )
        if math.isinf(value) and f.name not in MAY_BE_INFINITE:
            raise ValueError(
                f"{type(obj).__name__}({f.name}={value}): expected a finite number; "
                f"{', '.join(MAY_BE_INFINITE)} may be infinite"
            )


class OneRow(Objective):
    """An objective that is one row of the table under its own snake_case name."""

    bounds: dict = {}
    table: dict = TABLE

    def check(self):
        check_floats(self, **self.bounds)

    def row_name(self, has_mu: bool) -> str:
        return snake_case(type(self).__name__)

    def terms(self, has_mu=False):
        row = self.row_name(has_mu)
        values = (getattr(self, name) for name in self.table[row].params)
        return (Term(row, 1.0, tuple(math.inf if v is None else float(v) for v in values)),)


class CoupledObjective(OneRow):
    """One row of the coupled table: whole sequences, pairs, groups or the batch come first.

    Its tokens' losses couple, so `weighted_by` raises; `+`, `-` and `*` work as for any other.
    """

    table = COUPLED

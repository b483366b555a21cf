"""The public divergences of `linear_distill_loss`, and how they compose, with objectives too.

`ForwardKL() + 0.1 * ReverseKL() + 0.5 * NLL()` is one loss: the divergences compare the whole row
with the teacher's, the objectives read the label. Not here: the maths (`divergence_math.py`), the
loss (`distill.py`).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyoffline import checks
from pyoffline.compose import Objective, check_floats
from pyoffline.divergence_math import DIVERGENCES
from pyoffline.objectives import Term, snake_case
from pyoffline.program import Program, compile_terms

MAX_DIVERGENCES = 8  # kMaxDivergences of csrc/distill.h
# A divergence alone: the row pass still wants a program, and a term of scale 0 is switched off.
_NO_OBJECTIVE = compile_terms((Term("nll", 0.0),))


@dataclass(frozen=True)
class DivergenceTerm:
    """One row of DIVERGENCES in use: `scale * extra[gate] * row(param)`."""

    row: str
    scale: float
    param: float
    gate: str | None = None


@dataclass(frozen=True, eq=False)
class DistillProgram:
    """Flat form: the objective's program (its `gates` hold the divergences' too), then (code, gate)
    pairs and (scale, param) rows of the divergences.
    """

    objective: Program
    codes: tuple[int, ...]
    hyper: Tensor  # [K, 2] fp64 on the CPU
    names: tuple[str, ...]


class Divergence:
    """Base of what `linear_distill_loss` minimises; `+`, `-` and `*` compose it with divergences
    and with token-local objectives.
    """

    def parts(self) -> tuple[tuple[DivergenceTerm, ...], Objective | None]:
        """The divergences, and the objective that is added to them."""
        value = getattr(self, "alpha", getattr(self, "beta", 0.0))
        return (DivergenceTerm(snake_case(type(self).__name__), 1.0, float(value)),), None

    def check(self) -> None:
        """Raise for a field outside its range."""

    def __post_init__(self):
        self.check()
        terms, objective = self.parts()
        if len(terms) > MAX_DIVERGENCES:
            raise ValueError(
                f"expected at most {MAX_DIVERGENCES} divergences in one loss, got {len(terms)}"
            )
        programs = tuple(_compile(terms, objective, has_mu) for has_mu in (False, True))
        object.__setattr__(self, "_programs", programs)
        checks.read_lazily(self)

    def program(self, has_mu: bool) -> DistillProgram:
        """The flat form, built with the object: torch.compile then sees its floats as a tensor."""
        return self._programs[1 if has_mu else 0]  # a bool is no index to Dynamo before 2.12

    def __add__(self, other):
        terms, objective = self.parts()
        if isinstance(other, Divergence):
            more, added = other.parts()
            both = [x for x in (objective, added) if x is not None]
            return _Mixed(terms + more, sum(both[1:], both[0]) if both else None)
        if isinstance(other, Objective):
            return _Mixed(terms, other if objective is None else objective + other)
        return NotImplemented

    def __radd__(self, other):
        return self + other if isinstance(other, Objective) else NotImplemented

    def __sub__(self, other):
        return self + -1.0 * other if isinstance(other, (Divergence, Objective)) else NotImplemented

    def __rsub__(self, other):
        return -1.0 * self + other if isinstance(other, Objective) else NotImplemented

    def __mul__(self, factor):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)):
            return NotImplemented
        if not abs(factor) < math.inf:
            raise ValueError(f"a divergence can be scaled by a finite float only, got {factor}")
        terms, objective = self.parts()
        scaled = tuple(replace(t, scale=t.scale * float(factor)) for t in terms)
        return _Mixed(scaled, None if objective is None else factor * objective)

    __rmul__ = __mul__

    def __neg__(self):
        return self * -1.0

    def weighted_by(self, name: str) -> "Divergence":
        """Multiply, per token, by `tokens.extra[name]`."""
        checks.gate_name(name)
        terms, objective = self.parts()
        for twice in terms:
            if twice.gate:
                raise ValueError(
                    f"a term can be weighted once: {twice.row} by {twice.gate!r} and {name!r}"
                )
        gated = tuple(replace(t, gate=name) for t in terms)
        return _Mixed(gated, None if objective is None else objective.weighted_by(name))


@dataclass(frozen=True)
class _Mixed(Divergence):
    divergences: tuple[DivergenceTerm, ...]
    objective: Objective | None = None

    def parts(self):
        return self.divergences, self.objective


def _compile(terms, objective: Objective | None, has_mu: bool) -> DistillProgram:
    program = _NO_OBJECTIVE if objective is None else objective.program(has_mu)
    if program.coupled:
        raise ValueError(
            f"{objective} looks at whole sequences or groups; a divergence composes with "
            "token-local objectives. Add the losses of two calls: linear_distill_loss and "
            "linear_policy_loss"
        )
    gates = list(program.gates)
    gates += [g for g in dict.fromkeys(t.gate for t in terms) if g and g not in gates]
    codes: list[int] = []
    for t in terms:
        codes += [DIVERGENCES[t.row].code, gates.index(t.gate) if t.gate else -1]
    hyper = torch.tensor([[t.scale, t.param] for t in terms], dtype=torch.float64)
    names = tuple(t.row for t in terms)
    return DistillProgram(replace(program, gates=tuple(gates)), tuple(codes), hyper, names)


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """`KL(T||S) = (T * (T.log() - S.log())).sum(-1)`, dz = S - T (Hinton et al. 1503.02531).

    +inf where the teacher allows an entry that the student masks.
    """


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """`KL(S||T) = (S * (S.log() - T.log())).sum(-1)`, dz = S (log S - log T - KL).

    +inf where the student allows an entry that the teacher masks. (MiniLLM, 2306.08543)
    """


@dataclass(frozen=True)
class JSD(Divergence):
    """`beta KL(T||M) + (1-beta) KL(S||M)`, M = (1-beta) S + beta T, as TRL computes it.

    The generalised Jensen-Shannon divergence of GKD (2306.13649, eq. 1). JSD(0) is ForwardKL and
    JSD(1) ReverseKL by definition; the limits of JSD are 0 there (JSD/beta tends to KL(T||S),
    JSD/(1-beta) to KL(S||T)).
    """

    beta: float = 0.5

    def check(self):
        check_floats(self, beta=(0.0, 1.0))


@dataclass(frozen=True)
class TVD(Divergence):
    """`0.5 * (S - T).abs().sum(-1)`, g = 1/2 sign(S - T). (f-distill, 2307.15190)

    Kinks at S_v = T_v: the subgradient there is 0, and where the two are equal to rounding either
    side may be taken.
    """


@dataclass(frozen=True)
class RenyiDivergence(Divergence):
    """`D_alpha(T||S) = (T**alpha * S**(1-alpha)).sum(-1).log() / (alpha-1)`, alpha > 0.

    dz = S - q / sum q, q = T^alpha S^(1-alpha); alpha = 1 is ForwardKL. (Renyi 1961; 1206.2459)
    """

    alpha: float

    def check(self):
        check_floats(self, alpha=(math.ulp(0.0), 1e4))


@dataclass(frozen=True)
class AlphaDivergence(Divergence):
    """`((T**alpha * S**(1-alpha)).sum(-1) - 1) / (alpha * (alpha-1))`. (Amari 1985)

    alpha = 1 is ForwardKL, 0 ReverseKL, 1/2 four times the squared Hellinger distance
    1 - sum sqrt(S T). dz = (S sum q - q)/alpha, q = T^alpha S^(1-alpha).
    """

    alpha: float

    def check(self):
        check_floats(self, alpha=(-1e4, 1e4))

"""THE TABLE: every token-local objective and term, by number.

A row is a function of `objective_math` with a number; `csrc/objectives.h` has the same function
under the same number. `program.py` flattens a list of terms for the kernels; `compose.py` has the
public base class with `+`, `-`, `*`; `token_objectives.py` the public dataclasses. Not here: any
maths of its own.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass

from pyoffline import objective_math as om

ROW_INPUTS = ("logp", "entropy", "lse", "gap", "old", "mu", "ref", "adv", "anchor")
ANCHORS = {"ref": 1, "old": 2, "mu": 3}
MAX_PARAMS = 6


@dataclass(frozen=True)
class Row:
    """One row: the number shared with C++, the function, the scalar that its coef belongs to."""

    code: int
    fn: Callable
    wrt: str = "logp"

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(a for a in inspect.signature(self.fn).parameters if a in ROW_INPUTS)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(a for a in inspect.signature(self.fn).parameters if a not in ROW_INPUTS)


TABLE = {
    row.fn.__name__: row
    for row in (
        Row(1, om.nll),
        Row(2, om.weighted_nll),
        Row(3, om.dft),
        Row(4, om.prob_power),
        Row(5, om.luffy),
        Row(6, om.importance_weighted_sft),
        Row(7, om.proximal_sft),
        Row(8, om.importance_sampling),
        Row(9, om.power_is),
        Row(10, om.truncated_is),
        Row(11, om.ppo_clip),
        Row(12, om.decoupled_ppo),
        Row(13, om.cispo),
        Row(14, om.sapo),
        Row(15, om.dppo_tv),
        Row(16, om.dppo_kl),
        Row(17, om.dro),
        Row(18, om.asym_re),
        Row(19, om.topr_token),
        Row(20, om.distill_token),
        Row(21, om.distill_token_is),
        Row(22, om.kl_k1),
        Row(23, om.kl_k2),
        Row(24, om.kl_k3),
        Row(25, om.kl_k3_is),
        Row(26, om.entropy_term, wrt="entropy"),
        Row(27, om.z_loss, wrt="lse"),
        Row(28, om.smoothing, wrt="gap"),
    )
}
ROW_OF_CODE = {row.code: row for row in TABLE.values()}


@dataclass(frozen=True)
class Term:
    """One row in use: `scale * extra[gate] * row(params)`."""

    row: str
    scale: float
    params: tuple[float, ...] = ()
    anchor: int = 0
    gate: str | None = None
    custom: object = None


def snake_case(name: str) -> str:
    """PPOClip -> ppo_clip, WeightedNLL -> weighted_nll."""
    out = name[:1]  # no `re`: Dynamo of torch 2.6 does not trace it
    for i in range(1, len(name)):
        starts = not name[i - 1].isupper() or name[i + 1 : i + 2].islower()
        out += f"_{name[i]}" if name[i].isupper() and starts else name[i]
    return out.lower()


# Configuration names -> objective classes (or registered custom objectives).
REGISTRY: dict[str, Callable] = {}
# Traced custom terms of this process; a program names one by its index.
CUSTOM_TERMS: list = []


def from_name(name: str, **params) -> object:
    """The objective of a configuration file: `from_name("ppo_clip", clip_high=0.28)`."""
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"no objective {name!r}{hint} Known: {', '.join(sorted(REGISTRY))}")
    return REGISTRY[name](**params)

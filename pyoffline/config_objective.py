"""The objective of a configuration: `objective` plus `scale` times each of `terms`, by name.

    objective: {name: ppo_clip, clip_high: 0.28}
    objective: {name: wpo, objective: {name: dpo, beta: 0.1}}       # an objective inside another
    objective: {name: distill, divergence: jsd, beta: 0.5}          # a divergence from a teacher
    objective: {name: plackett_luce}                                # a reward model, alone
    terms: [{name: nll, scale: 0.5, weighted_by: positive}]

Not here: the rest of the file (config.py).
"""

import difflib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pyoffline  # noqa: F401  (fills the registry)
from pyoffline import divergences
from pyoffline.objectives import REGISTRY, from_name, snake_case
from pyoffline.reward_models import LINKS

DISTILL = "distill"
DIVERGENCES = {
    snake_case(cls.__name__): cls
    for cls in (
        divergences.ForwardKL,
        divergences.ReverseKL,
        divergences.JSD,
        divergences.TVD,
        divergences.RenyiDivergence,
        divergences.AlphaDivergence,
    )
}
AROUND = ("name", "scale", "weighted_by")  # keys of a term that are no parameters


class RewardObjective:
    """Base of what a classifier is trained on (reward_trainer.py): `scores` of each sequence, on
    `unit`s (units.UNITS), with these `columns`.
    """

    scores = 1
    unit = "pair"
    columns: frozenset[str] = frozenset()


@dataclass(frozen=True)
class BradleyTerry(RewardObjective):
    """`-log sigmoid(r_chosen - r_rejected - margin)`, the mean over pairs. `margin`: a number, or
    "rewards", the gap of the columns chosen_reward and rejected_reward.
    """

    margin: float | str = 0.0

    def __post_init__(self):
        number = isinstance(self.margin, int | float) and not isinstance(self.margin, bool)
        if self.margin != "rewards" and not number:
            raise ValueError(f"bradley_terry: margin={self.margin!r}: a number or 'rewards'")

    @property
    def columns(self) -> frozenset[str]:
        return frozenset({"reward"} if self.margin == "rewards" else ())


@dataclass(frozen=True)
class BradleyTerryVariance(RewardObjective):
    """`-log P(chosen beats rejected)` of scores with a spread of their own, the mean over pairs
    (`reward_models.bradley_terry_variance`). The two scores of a sequence are r and log V.
    """

    link: str = "logistic"
    scores = 2

    def __post_init__(self):
        if self.link not in LINKS:
            raise ValueError(
                f"bradley_terry_variance: link={self.link!r}: expected one of {', '.join(LINKS)}"
            )


@dataclass(frozen=True)
class PlackettLuce(RewardObjective):
    """`-sum_i (r_i - logsumexp of r over i and all ranked below i)`, the mean over groups; larger
    rewards rank higher, tied answers are not compared with each other.
    """

    unit = "group"
    columns = frozenset({"reward", "group"})


REWARD_MODELS = {
    snake_case(cls.__name__): cls for cls in (BradleyTerry, BradleyTerryVariance, PlackettLuce)
}


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` or an empty string."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def known_names() -> list[str]:
    """Every name that `objective` and `terms` may have now; registered ones of this process too."""
    return [*REGISTRY, DISTILL, *REWARD_MODELS]


def build_objective(config):
    """The composed objective of a RunConfig."""
    made = [make(term) for term in (config.objective, *config.terms)]
    total = made[0]
    for term in made[1:]:
        total = total + term
    return total


def make(spec: dict):
    """The object of one checked term."""
    params = {k: v for k, v in spec.items() if k not in AROUND}
    params = {k: make(v) if isinstance(v, dict) else v for k, v in params.items()}
    if spec["name"] in REWARD_MODELS:
        return REWARD_MODELS[spec["name"]](**params)
    if spec["name"] == DISTILL:
        made = DIVERGENCES[params.pop("divergence", "forward_kl")](**params)
    else:
        made = from_name(spec["name"], **params)
    if "weighted_by" in spec:
        made = made.weighted_by(spec["weighted_by"])
    return made * float(spec["scale"]) if "scale" in spec else made


def check_objective(top: dict, errors: list[str]) -> None:
    """Appends what is wrong with `objective` and `terms`; text that is a number becomes one."""
    objective, terms = top.get("objective", {"name": "nll"}), top.get("terms") or []
    if not isinstance(objective, dict) or not isinstance(terms, list):
        return
    specs = [("objective", objective), *((f"terms[{i}]", t) for i, t in enumerate(terms))]
    for where, spec in specs:
        _check_term(where, spec, errors)
    names = [spec.get("name") for _, spec in specs if isinstance(spec, dict)]
    reward = next((n for n in names if isinstance(n, str) and n in REWARD_MODELS), None)
    if reward and (len(specs) > 1 or objective.keys() & {"scale", "weighted_by"}):
        errors.append(f"objective: {reward} trains a reward model and stands alone, without terms")
    if top.get("loss") == "stock" and (objective != {"name": "nll"} or terms):
        errors.append(
            "loss: stock is the model's own cross entropy, so objective must be nll and terms empty"
        )


def _check_term(where: str, spec, errors: list[str]) -> None:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        errors.append(f"{where}: expected {{name: ..., parameter: ...}}, got {spec!r}")
        return
    before = len(errors)
    known = _parameters(where, spec, errors)
    named = len(errors) == before
    for key in spec:
        if named and key not in (*known, *AROUND):
            near, takes = nearest(key, [*known, *AROUND]), ", ".join(known) or "none"
            what = spec.get("divergence", "forward_kl") if spec["name"] == DISTILL else spec["name"]
            errors.append(f"{where}.{key}: {what} has no such parameter{near} (it takes: {takes})")
    if "objective" in known and isinstance(spec.get("objective"), str):
        spec["objective"] = {"name": spec["objective"]}
    for key, value in spec.items():
        if isinstance(value, dict) and key in known:
            _check_term(f"{where}.{key}", value, errors)
    if len(errors) > before:
        return
    spec.update({k: number(v) for k, v in spec.items()})
    scale = spec.get("scale", 1.0)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        errors.append(f"{where}.scale: expected a number, got {scale!r}")
        return
    try:
        make(spec)
    except (ValueError, TypeError, NotImplementedError) as error:
        errors.append(f"{where}: {error}")


def _parameters(where: str, spec: dict, errors: list[str]) -> list[str]:
    """What the named objective takes; an unknown name is an error and takes nothing."""
    name, made = spec["name"], None
    if name == DISTILL:
        chosen = spec.get("divergence", "forward_kl")
        made = DIVERGENCES.get(chosen) if isinstance(chosen, str) else None
        if made is None:
            errors.append(
                f"{where}.divergence: {chosen!r} is not one of {', '.join(DIVERGENCES)}"
                f"{nearest(chosen, DIVERGENCES)}"
            )
    elif name in REWARD_MODELS:
        made = REWARD_MODELS[name]
    elif name in REGISTRY:
        made = REGISTRY[name]
    elif name in DIVERGENCES:
        errors.append(
            f"{where}.name: {name!r} is a divergence: {{name: {DISTILL}, divergence: {name}}}"
        )
    else:
        hint = nearest(name, known_names()) or f"; known: {', '.join(known_names())}"
        errors.append(f"{where}.name: no objective {name!r}{hint}")
    return [] if made is None else _arguments(made, name)


def _arguments(made: Callable, name: str) -> list[str]:
    own = list(inspect.signature(made).parameters)
    return ["divergence", *own] if name == DISTILL else own


def number(value):
    """Text that is a number as one: YAML 1.1 reads 1e-5 as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value

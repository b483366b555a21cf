"""Advantages of a whole file, by name of `pyoffline.advantages` and `pyoffline.corrections`.

A specification is one stage or a list of them. A stage takes what the stage before it made as its
`rewards` (the first takes the column `reward`); a correction multiplies it. Not here: the formulas,
reading the file (data.py).
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

# Arguments that come from the data, and the column that each is read from; others are settings.
COLUMNS = {
    "rewards": "reward",
    "group_ids": "group",
    "greedy": "greedy_reward",
    "values": "values",
    "old_logps": "old_logps",
    "ref_logps": "ref_logps",
    "behavior_logps": "behavior_logps",
    "log_sum_p2": "log_sum_p2",
}
ARRAY_ARGUMENTS = (*COLUMNS, "mask", "lengths")
CORRECTIONS = ("truncate", "mask", "m2po")
ADVANTAGES = (
    "reward",
    "reward_to_go",
    "gae",
    "group_normalize",
    "leave_one_out",
    "reinforce_plus_plus",
    "remax",
    "opo",
    "rwr",
    "awr",
    "astar",
    "position",
    "kl_shaped",
    "optimal_token_baseline",
)
NAMES = (*ADVANTAGES, *CORRECTIONS)


def rewards_as_they_are(rewards):
    """A = R."""
    return rewards


def astar(rewards, group_ids, beta1=0.5):
    """A = R - V*, V* = beta1 log mean_g exp(R / beta1). (A*-PO, 2505.20686)"""
    from pyoffline import advantages

    return rewards - advantages.astar_value(rewards, group_ids, beta1)


def function(name: str) -> Callable:
    """The function behind a name of NAMES."""
    from pyoffline import advantages, corrections

    own = {"reward": rewards_as_they_are, "astar": astar}
    return own.get(name) or getattr(corrections if name in CORRECTIONS else advantages, name)


def stages(spec: dict | list | None) -> list[dict]:
    """A specification as a list of stages."""
    return [] if spec is None else [spec] if isinstance(spec, dict) else spec


def settings_of(name: str) -> list[str]:
    """What a stage may be given beside its name."""
    return [p for p in inspect.signature(function(name)).parameters if p not in ARRAY_ARGUMENTS]


def columns_of(spec: dict | list | None) -> set[str]:
    """Columns of the file that a specification must have."""
    out: set[str] = set()
    for i, stage in enumerate(stages(spec)):
        needed = set(_arguments(stage)) & set(COLUMNS)
        if i > 0:
            needed.discard("rewards")
        out |= {COLUMNS[name] for name in needed}
    return out


def optional_columns(spec: dict | list | None) -> set[str]:
    """Columns that a specification reads where every row has them (`values` of awr)."""
    names = [inspect.signature(function(s["name"])).parameters for s in stages(spec)]
    return {COLUMNS[a] for p in names for a in p if a == "values"} - columns_of(spec)


def problems(spec) -> list[str]:
    """What is wrong with the order of the stages."""
    found = []
    for i, stage in enumerate(stages(spec)):
        takes = inspect.signature(function(stage["name"])).parameters
        if i > 0 and stage["name"] not in CORRECTIONS and "rewards" not in takes:
            found.append(f"{stage['name']} reads no rewards, so it can only be the first stage")
        if i == 0 and stage["name"] in CORRECTIONS:
            found.append(
                f"{stage['name']} multiplies advantages: put {{name: reward}} or another one first"
            )
    return found


def _arguments(stage: dict) -> list[str]:
    """Array arguments that a stage is called with; group_ids of a baseline only with it."""
    out = []
    for name, parameter in inspect.signature(function(stage["name"])).parameters.items():
        required = parameter.default is inspect.Parameter.empty
        grouped = name == "group_ids" and stage.get("baseline")
        if name in ARRAY_ARGUMENTS and (required or grouped or name == "lengths"):
            out.append(name)
    return out


def add_advantages(samples: list, spec: dict | list) -> None:
    """The column `advantages` of every sample: a float, or one entry a completion token.

    ValueError: the columns do not fit a stage.
    """
    made = None
    for stage in stages(spec):
        made = _stage(stage, samples, made)
    for sample, value in zip(samples, made.tolist(), strict=True):
        n = sample.n_completion
        sample.columns["advantages"] = value[:n] if isinstance(value, list) else value


def _stage(stage: dict, samples: list, made: Tensor | None) -> Tensor:
    fn, name = function(stage["name"]), stage["name"]
    arrays = {a: array(a, samples) for a in _arguments(stage)}
    takes = inspect.signature(fn).parameters
    if made is not None and "rewards" in arrays:
        arrays["rewards"] = made
    if "values" in takes and "values" not in arrays and has(samples, "values"):
        arrays["values"] = array("values", samples)
    tokens = "rewards" in arrays and arrays["rewards"].dim() == 2
    if tokens and "mask" in takes:
        arrays["mask"] = array("mask", samples)
    try:
        out = fn(**arrays, **{k: v for k, v in stage.items() if k != "name"})
    except (ValueError, TypeError) as error:
        raise ValueError(f"advantage {name}: {error}") from None
    if name not in CORRECTIONS:
        return out
    return (made if made.dim() == out.dim() else made[:, None]) * out


def has(samples: list, column: str) -> bool:
    return all(column in s.columns for s in samples)


def array(name: str, samples: list) -> Tensor:
    """One argument from the columns: [B], or [B, T] padded with 0 where a column is a list."""
    if name == "lengths":
        return torch.tensor([float(s.n_completion) for s in samples])
    width = max(s.n_completion for s in samples)
    if name == "mask":
        return torch.arange(width) < torch.tensor([[s.n_completion] for s in samples])
    values = [s.columns[COLUMNS[name]] for s in samples]
    if name == "group_ids":
        return torch.tensor(values)
    if not isinstance(values[0], list):
        return torch.tensor([float(v) for v in values], dtype=torch.float64)
    return torch.tensor([v + [0.0] * (width - len(v)) for v in values], dtype=torch.float64)

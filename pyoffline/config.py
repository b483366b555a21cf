"""A run as a YAML file: `load_config` checks every key and value and reports all errors at once.

    model: path/or/name
    data: {train: samples.jsonl, eval: heldout.jsonl}
    objective: {name: ppo_clip, clip_high: 0.28}
    terms: [{name: kl, kind: k3, scale: 0.04}, {name: entropy, scale: -0.001}]
    advantage: {name: group_normalize}
    ref_model: path/or/name  # for the kl term, where the file has no ref_logps
    trainer: {output_dir: runs/ppo, learning_rate: 1e-5, eval_strategy: epoch}

`teacher_model` goes with a divergence (`objective: {name: distill}`). `advantage` may be a list of
stages: `[{name: kl_shaped, beta: 0.05}, {name: gae}, {name: truncate}]`. `trainer` takes every
field of OfflineConfig (transformers.TrainingArguments). Not here: reading YAML (config_file.py),
the data file's contents (data.py), building the trainer (trainer.py).
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pyoffline.config_file import read_yaml
from pyoffline.config_objective import (
    RewardObjective,
    build_objective,
    check_objective,
    nearest,
    number,
)
from pyoffline.divergences import Divergence

DTYPES = ("float32", "bfloat16", "float16", "float64")
LOSSES = ("fused", "stock")
TOO_LONG = ("error", "truncate", "drop")
FIXED_MODELS = ("ref_model", "teacher_model")
STRATEGIES = ("eval_strategy", "save_strategy", "logging_strategy")  # "no" turns each off
SHORT = ("model", *FIXED_MODELS, "objective", "advantage")  # sections that text may stand for


class ConfigError(ValueError):
    """Every error of a configuration; `errors` is the list, `str()` shows them one a line."""

    def __init__(self, source: str, errors: list[str]):
        self.errors = errors
        count = f"{len(errors)} error" + ("s" if len(errors) > 1 else "")
        super().__init__("\n  ".join([f"{source}: {count}, nothing was started", *errors]))


@dataclass(frozen=True)
class ModelConfig:
    """The causal LM: a local folder or a Hub name, whose own code runs only if asked."""

    path: str
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DataConfig:
    """The samples, JSONL or Parquet; `too_long` is what rows of over `max_length` tokens are."""

    train: str
    eval: str | None = None
    max_length: int = 2048
    too_long: str = "error"
    append_eos: bool = True
    packing: bool = False
    skip_bad: bool = False


@dataclass(frozen=True)
class RunConfig:
    """A whole run, checked. `objective`, `terms` and `advantage` stay as written: `build_objective`
    makes the object. `ref_model` gives the reference log-probs that the file has no column for,
    `teacher_model` the distribution that `distill` compares with; neither is trained.
    """

    model: ModelConfig
    data: DataConfig
    objective: dict = field(default_factory=lambda: {"name": "nll"})
    terms: list = field(default_factory=list)
    advantage: dict | list | None = None
    loss: str = "fused"
    trainer: dict = field(default_factory=dict)
    ref_model: ModelConfig | None = None
    teacher_model: ModelConfig | None = None

    @property
    def models(self) -> frozenset[str]:
        """Which of FIXED_MODELS are named."""
        return frozenset(name for name in FIXED_MODELS if getattr(self, name) is not None)


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a YAML file and `key=value` overrides (`trainer.learning_rate=1e-4`).

    ConfigError names every mistake.
    """
    path = Path(path)
    try:
        raw = read_yaml(path)
    except ValueError as error:
        raise ConfigError(str(path), [str(error)]) from None
    errors: list[str] = []
    for text in overrides:
        _override(raw, text, errors)
    config = parse_config(raw, errors)
    if errors:
        raise ConfigError(str(path), errors)
    return config


def parse_config(raw: dict, errors: list[str]) -> RunConfig | None:
    """A RunConfig from plain values; appends what is wrong to `errors`."""
    raw = dict(raw)
    for key in ("model", *FIXED_MODELS):
        if isinstance(raw.get(key), str):
            raw[key] = {"path": raw[key]}
    if isinstance(raw.get("objective"), str):
        raw["objective"] = {"name": raw["objective"]}
    if isinstance(raw.get("advantage"), str):
        raw["advantage"] = {"name": raw["advantage"]}
    if isinstance(raw.get("advantage"), list):
        raw["advantage"] = [{"name": s} if isinstance(s, str) else s for s in raw["advantage"]]
    top = _read_fields(RunConfig, raw, "", errors, skip=("model", "data", "trainer", *FIXED_MODELS))
    for key in ("model", "data", *FIXED_MODELS):
        _read_section(key, raw, top, errors)
    _check_choices(top, errors)
    top["trainer"] = _trainer(raw.get("trainer"), errors)
    check_objective(top, errors)
    _check_advantage(top.get("advantage"), errors)
    if errors:
        return None
    for key in FIXED_MODELS:
        if key in top:
            top[key] = ModelConfig(**{"dtype": top["model"].get("dtype", "float32")} | top[key])
    top["model"], top["data"] = ModelConfig(**top["model"]), DataConfig(**top["data"])
    config = RunConfig(**top)
    _check_trainer(config, errors)
    _check_fit(config, errors)
    return None if errors else config


def _read_section(key: str, raw: dict, top: dict, errors: list[str]) -> None:
    """A model or the data into `top`, as values by field."""
    value, kind = raw.get(key), DataConfig if key == "data" else ModelConfig
    if value is None:
        if key not in FIXED_MODELS:
            errors.append(f"{key}: missing")
    elif not isinstance(value, dict):
        errors.append(f"{key}: expected a mapping, got {value!r}")
    elif "trust_remote_code" in value:
        errors.append(
            f"{key}.trust_remote_code: a file cannot turn it on; pass --trust-remote-code"
        )
    else:
        top[key] = _read_fields(kind, value, f"{key}.", errors)


def _check_trainer(config: RunConfig, errors: list[str]) -> None:
    """What the trainer would not use, or cannot with this data."""
    strategy = str(config.trainer.get("eval_strategy", "no"))
    evaluates = strategy != "no" or config.trainer.get("eval_on_start")
    if config.data.eval is not None and not evaluates:
        errors.append(
            "data.eval: never evaluated; set trainer.eval_strategy (epoch or steps), or leave it "
            "out"
        )
    if config.trainer.get("train_sampling_strategy") == "group_by_length":
        errors.append(
            "trainer.train_sampling_strategy: group_by_length reads datasets of dictionaries only; "
            "data.packing: true leaves no padding"
        )
    if config.data.eval is None and evaluates:
        errors.append("trainer.eval_strategy: there is nothing to evaluate; name a file: data.eval")


def _check_fit(config: RunConfig, errors: list[str]) -> None:
    """What no key shows alone: what nothing reads, terms that exclude each other."""
    from pyoffline.data_advantages import columns_of
    from pyoffline.units import program_of, reads_reference, refuse_mixed_weights, unit_of

    try:
        objective = build_objective(config)
        if isinstance(objective, RewardObjective):
            errors += _beside_reward(config)
            return
        unit_of(objective)
        refuse_mixed_weights(objective, config.trainer.get("aggregation", "auto"))
    except (ValueError, TypeError) as error:
        errors.append(f"objective: {error}")
        return
    own = config.trainer.get("aggregation", "auto")
    if config.loss == "stock" and own != "auto":
        errors.append(f"trainer.aggregation: loss stock has its own mean, not {own}; leave it out")
    if config.teacher_model is not None and not isinstance(objective, Divergence):
        errors.append(
            f"teacher_model: {config.objective['name']} compares with no teacher's distribution; "
            "leave it out, or take {name: distill, divergence: ...} (distill_token reads sampled "
            "tokens only: name its teacher as ref_model)"
        )
    if config.ref_model is not None and not reads_reference(objective):
        errors.append(
            f"ref_model: {config.objective['name']} reads no reference log-probs; leave it out"
        )
    if config.ref_model is not None and "ref_logps" in columns_of(config.advantage):
        errors.append(
            "ref_model: the advantage reads the column ref_logps before training; leave ref_model "
            "out and add the column with `pyoffline score --column ref_logps`"
        )
    if config.advantage is not None and "adv" not in program_of(objective).reads:
        errors.append(
            f"advantage: {config.objective['name']} reads no advantages; leave it out, or take an "
            "objective that does (weighted_nll, ppo_clip, ...)"
        )


def _beside_reward(config: RunConfig) -> list[str]:
    """What a reward model does not read."""
    given = {name: getattr(config, name) for name in ("advantage", *FIXED_MODELS)}
    given |= {"data.packing": config.data.packing or None}
    own = config.trainer.get("aggregation", "auto")
    given |= {"trainer.aggregation": None if own == "auto" else own}
    name = config.objective["name"]
    return [f"{k}: {name} reads none; leave it out" for k, v in given.items() if v is not None]


def _override(raw: dict, text: str, errors: list[str]) -> None:
    key, equals, value = text.partition("=")
    if not equals or not key:
        errors.append(f"{text!r}: expected key=value, for example trainer.learning_rate=1e-5")
        return
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        errors.append(f"{text!r}: the value is not YAML: {error}")
        return
    *parents, last = key.split(".")
    for name in parents:
        if isinstance(raw.get(name), str) and name in SHORT:
            raw[name] = {"path" if name.endswith("model") else "name": raw[name]}
        raw = raw.setdefault(name, {})
        if not isinstance(raw, dict):
            errors.append(f"{text!r}: {name} is not a mapping, so it has no {last}")
            return
    raw[last] = parsed


def _read_fields(kind, values: dict, prefix: str, errors: list[str], skip=()) -> dict:
    """The values of a dataclass's fields, converted; what is wrong with others to `errors`."""
    hints = typing.get_type_hints(kind)
    known = {f.name: f for f in dataclasses.fields(kind)}
    out = {}
    for key, value in values.items():
        if key not in known:
            errors.append(f"{prefix}{key}: unknown key{nearest(key, known)}")
        elif key not in skip:
            out[key] = _convert(value, hints[key], f"{prefix}{key}", errors)
    for key, f in known.items():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and key not in values and key not in skip:
            errors.append(
                f"{prefix}{key}: missing{nearest(key, [k for k in values if k not in known])}"
            )
    return out


def _convert(value, hint, where: str, errors: list[str]):
    """`value` as the annotated type; numbers may be text, since YAML 1.1 reads 1e-5 as text."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    plain = {typing.get_origin(o) or o for o in options}
    if not plain <= {str, int, float, bool, dict, list, type(None)}:
        return value
    if value is None and type(None) in plain:
        return None
    if type(value) in plain:
        if isinstance(value, float) and not math.isfinite(value):
            errors.append(f"{where}: expected a finite number, got {value}")
        return value
    if float in plain and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError):
            pass
    if int in plain and isinstance(value, float) and value.is_integer():
        return int(value)
    names = " or ".join(sorted("null" if o is type(None) else o.__name__ for o in plain))
    errors.append(f"{where}: expected {names}, got {type(value).__name__} {value!r}")
    return value


def _check_choices(top: dict, errors: list[str]) -> None:
    data, model = top.get("data") or {}, top.get("model") or {}
    choices = (
        ("loss", top.get("loss"), LOSSES),
        ("model.dtype", model.get("dtype"), DTYPES),
        *((f"{m}.dtype", (top.get(m) or {}).get("dtype"), DTYPES) for m in FIXED_MODELS),
        ("data.too_long", data.get("too_long"), TOO_LONG),
    )
    for where, value, allowed in choices:
        if isinstance(value, str) and value not in allowed:
            hint = nearest(value, allowed)
            errors.append(f"{where}: {value!r} is not one of {', '.join(allowed)}{hint}")
    length = data.get("max_length")
    if isinstance(length, int) and length < 2:
        errors.append(f"data.max_length: expected at least 2 tokens, got {length}")


def _trainer(values, errors: list[str]) -> dict:
    """The `trainer` section against OfflineConfig's fields."""
    from pyoffline.trainer_config import OfflineConfig

    if values is None:
        values = {}
    if not isinstance(values, dict):
        errors.append(f"trainer: expected a mapping, got {values!r}")
        return {}
    if not values.get("output_dir"):
        errors.append("trainer.output_dir: missing; where checkpoints and metrics.jsonl go")
    # YAML 1.1 reads a bare `no` as false
    off = {k: "no" for k in STRATEGIES if values.get(k) is False}
    before = len(errors)
    out = _read_fields(OfflineConfig, values | off, "trainer.", errors)
    if len(errors) == before:
        try:
            OfflineConfig(**out)
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            errors.append(f"trainer: {error}")
    return out


def _check_advantage(spec, errors: list[str]) -> None:
    from pyoffline import data_advantages

    if not isinstance(spec, dict | list):
        return
    if not spec:
        errors.append(f"advantage: expected {{name: ...}} or a list of such stages, got {spec!r}")
    before = len(errors)
    for i, stage in enumerate(data_advantages.stages(spec)):
        where = f"advantage[{i}]" if isinstance(spec, list) else "advantage"
        _check_stage(where, stage, errors)
    if len(errors) == before:
        errors += [f"advantage: {problem}" for problem in data_advantages.problems(spec)]


def _check_stage(where: str, stage, errors: list[str]) -> None:
    from pyoffline.data_advantages import NAMES, settings_of

    if not isinstance(stage, dict) or not isinstance(stage.get("name"), str):
        errors.append(f"{where}: expected {{name: ..., parameter: ...}}, got {stage!r}")
        return
    if stage["name"] not in NAMES:
        hint = nearest(stage["name"], NAMES) or ";"
        errors.append(
            f"{where}.name: no advantage {stage['name']!r}{hint} known: {', '.join(NAMES)}"
        )
        return
    known = settings_of(stage["name"])
    for key in stage:
        if key != "name" and key not in known:
            takes = ", ".join(known) or "none"
            errors.append(
                f"{where}.{key}: no such parameter{nearest(key, known)} (it takes: {takes})"
            )
    stage.update({k: number(v) for k, v in stage.items() if k != "name"})

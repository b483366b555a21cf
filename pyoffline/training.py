"""One run from a configuration: what is behind `pyoffline train`.

Not here: reading the configuration (config.py), the command line (cli.py).
"""

import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tqdm.auto import tqdm

from pyoffline import run_folder, run_identity
from pyoffline.config import ConfigError, ModelConfig, RunConfig, build_objective
from pyoffline.config_objective import REWARD_MODELS
from pyoffline.data import DataError, Needs, SampleSet, load_samples
from pyoffline.fixed_models import outside_model


@dataclass(frozen=True)
class RunResult:
    """Where things are. `stopped_by`: the signal that ended the run early, or None."""

    output_dir: Path
    model_dir: Path
    metrics: Path
    steps: int
    stopped_by: int | None = None


def run_training(
    config: RunConfig, resume: bool = False, check_only: bool = False
) -> RunResult | None:
    """Train; with `check_only` load and check everything, stop before the first step, return None.

    ConfigError, DataError: nothing was started. NonFiniteGradientError: stopped before the
    optimiser step.
    """
    import torch
    import transformers

    from pyoffline.trainer_config import OfflineConfig

    transformers.utils.logging.disable_progress_bar()
    pin = {"dataloader_pin_memory": torch.cuda.is_available()}  # torch warns where there is no GPU
    args = OfflineConfig(**(pin | config.trainer | {"disable_tqdm": True}))
    run = Path(args.output_dir)
    sole = run_folder.sole_run(run) if args.should_save and not check_only else nullcontext()
    with sole:
        start = _checkpoint(run, resume, not check_only)
        tokenizer = load_tokenizer(config.model)
        same_tokens(config, tokenizer)
        data = load_data(config, tokenizer)
        if resume and (note := run_identity.compare(run, config)):
            sys.stderr.write(f"{note}\n")
        transformers.set_seed(args.seed)
        reward = REWARD_MODELS.get(config.objective["name"])
        lm = load_model(config.model, scores=reward.scores if reward else 0)
        trainer, stop = build_trainer(config, args, lm, tokenizer, data)
        if check_only:
            return None
        if start is None and args.should_save:
            run_identity.record(run, config)
        return _train(trainer, stop, start)


def _train(trainer, stop, start) -> RunResult:
    from pyoffline.callbacks import StoppedInEvaluation, close_bars

    try:
        trainer.train(resume_from_checkpoint=start)
    except StoppedInEvaluation:
        trainer.save_checkpoint()
    finally:
        close_bars(trainer)
        stop.restore()
    run, step = Path(trainer.args.output_dir), trainer.state.global_step
    folder = run / "final" if stop.stopped_by is None else run / f"checkpoint-{step}"
    if stop.stopped_by is None:
        trainer.save_whole(folder)
    elif run_folder.newest(run) != folder:  # the signal came after the last step
        trainer.save_checkpoint()
    return RunResult(run, folder, run / "metrics.jsonl", step, stop.stopped_by)


def same_tokens(config: RunConfig, tokenizer) -> None:
    """ConfigError where a fixed model's tokenizer gives ids another meaning than the policy's."""
    own, problems = tokenizer.get_vocab(), []
    for name in sorted(config.models):
        path = getattr(config, name).path
        other = load_tokenizer(getattr(config, name), f"{name}.path").get_vocab()
        odd = sorted(k for k in own.keys() | other.keys() if own.get(k) != other.get(k))
        if odd:
            ids = f"id {own.get(odd[0], 'none')} in the model's, {other.get(odd[0], 'none')} there"
            problems.append(
                f"{name} {path}: another vocabulary: {len(odd)} tokens differ, first {odd[0]!r} "
                f"({ids}); log-probs of the two cannot be compared"
            )
    if problems:
        raise ConfigError(f"model.path {config.model.path}", problems)


def load_tokenizer(model: ModelConfig, key: str = "model.path"):
    """The model's tokenizer; ConfigError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError) as error:
        problem = f"no tokenizer could be loaded: {error}"
        raise ConfigError(f"{key} {model.path}", [problem]) from None


def load_model(model: ModelConfig, key: str = "model.path", scores: int = 0):
    """The causal LM (with `scores`: a classifier of so many, new on one), from safetensors.

    ConfigError where there is none.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    options = {"trust_remote_code": model.trust_remote_code, "use_safetensors": True}
    if model.attn_implementation:
        options["attn_implementation"] = model.attn_implementation
    made = AutoModelForCausalLM
    if scores:
        made, options = AutoModelForSequenceClassification, options | {"num_labels": scores}
    try:
        return made.from_pretrained(model.path, dtype=getattr(torch, model.dtype), **options)
    except (OSError, ValueError, ImportError, RuntimeError) as error:  # RuntimeError: sizes differ
        problem = f"no model could be loaded: {error}"
        if scores:
            problem += f" (expected a causal LM, or a classifier of num_labels={scores})"
        raise ConfigError(f"{key} {model.path}", [problem]) from None


def load_data(config: RunConfig, tokenizer) -> tuple[SampleSet, SampleSet | None, Needs]:
    """Both sets and what batches carry. Says on stderr what was left out."""
    objective = build_objective(config)
    needs = Needs.of(objective, config.advantage, config.models)
    if config.trainer.get("aggregation") in ("prompt-mean", "prompt_mean"):
        needs = replace(needs, columns=needs.columns | {"group"}, keep=needs.keep | {"group"})
    sets = []
    for name, path in (("train", config.data.train), ("eval", config.data.eval)):
        if path is None:
            sets.append(None)
            continue
        data = load_samples(
            path, tokenizer, config.data, needs, config.advantage, _bar(f"read {name}")
        )
        data.say_left_out(path, sys.stderr)
        if data.truncated:
            sys.stderr.write(
                f"{path}: cut {data.truncated} rows to {config.data.max_length} tokens\n"
            )
        sets.append(data)
    return sets[0], sets[1], needs


def build_trainer(config: RunConfig, args, model, tokenizer, data):
    """The trainer with its callbacks: OfflineTrainer, or transformers' own for `loss: stock`."""
    import transformers

    from pyoffline.callbacks import JsonlCallback, ProgressBar, StopCallback
    from pyoffline.collate import Collator
    from pyoffline.reward_trainer import RewardTrainer
    from pyoffline.trainer import OfflineTrainer

    check_ids(config, data, model)
    check_trains(config, model)
    train, evaluation, needs = data
    pad = (
        tokenizer.pad_token_id
        if tokenizer.pad_token_id is not None
        else tokenizer.eos_token_id or 0
    )
    stop = StopCallback()
    label = f"{config.objective['name']}, {'pyoffline' if config.loss == 'fused' else 'stock loss'}"
    common = {
        "model": model,
        "args": args,
        "train_dataset": train,
        "eval_dataset": evaluation,
        "data_collator": Collator(pad, needs.keep, config.data.packing, needs.unit),
        "processing_class": tokenizer,
        "callbacks": [
            JsonlCallback(Path(args.output_dir) / "metrics.jsonl"),
            ProgressBar(label),
            stop,
        ],
    }
    if config.loss == "stock":
        made = stock_trainer()
    elif config.objective["name"] in REWARD_MODELS:
        model.config.pad_token_id = pad  # its forward scores the last token before these
        made = partial(RewardTrainer, objective=build_objective(config))
    else:
        fixed = {n: load_model(getattr(config, n), f"{n}.path") for n in sorted(config.models)}
        made = partial(OfflineTrainer, objective=build_objective(config), **fixed)
    try:
        trainer = made(**common)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError("the run", [str(error)]) from None
    trainer.remove_callback(transformers.PrinterCallback)
    _keep_workers(trainer, stop)
    return trainer, stop


def _keep_workers(trainer, stop) -> None:
    """The trainer's loaders keep their workers through a SIGTERM of the whole group."""
    for name in ("get_train_dataloader", "get_eval_dataloader"):
        made = getattr(trainer, name)
        setattr(trainer, name, partial(_kept, stop, made))


def _kept(stop, made, *args, **kwargs):
    return stop.keep_workers(made(*args, **kwargs))


def check_ids(config: RunConfig, data, model) -> None:
    """DataError for ids that the model has no embedding for, more tokens than it has positions, and
    ids of a cached teacher that its head does not have.
    """
    from pyoffline import teacher_columns
    from pyoffline.fixed_models import vocabulary

    problems, rows = [], 0
    size = vocabulary(model) if teacher_columns.IDS in data[2].columns else None
    for samples, path in ((data[0], config.data.train), (data[1], config.data.eval)):
        if samples is None:
            continue
        rows += len(samples.samples)
        found = outside_model(samples.samples, model)
        if size is not None:
            found += teacher_columns.outside(samples.samples, size)
        problems += [f"{path}:{line}: {name}: {why}" for line, name, why in found]
    if problems:
        raise DataError(problems, rows)


def check_trains(config: RunConfig, model) -> None:
    """ConfigError where every parameter is frozen, as transformers loads the folder of an
    adapter.
    """
    if not any(p.requires_grad for p in model.parameters()):
        problem = (
            "no parameter of it trains (the folder of a PEFT adapter is loaded frozen): merge the "
            "adapter and save the whole model, or give a PEFT model to po.OfflineTrainer in Python"
        )
        raise ConfigError(f"model.path {config.model.path}", [problem])


def stock_trainer() -> type:
    """transformers.Trainer with the model's own forward and loss; only its checkpoints are ours."""
    import transformers

    from pyoffline.checkpoint import SafeCheckpoints

    return type("StockTrainer", (SafeCheckpoints, transformers.Trainer), {})


def _bar(label: str):
    return lambda rows: tqdm(
        rows, desc=label, unit="row", file=sys.stderr, mininterval=0.5, dynamic_ncols=True
    )


def _checkpoint(run: Path, resume: bool, write: bool) -> str | None:
    """Where to start: the newest complete checkpoint, or None for a run from the beginning."""
    if resume and write:
        run_folder.recover(run)
    found = run_folder.newest(run)
    for folder, wrong in run_folder.unusable(run).items() if resume else ():
        sys.stderr.write(f"{folder} is not used: {'; '.join(wrong)}\n")
    if resume and found is None:
        raise ConfigError(str(run), ["--resume: no complete checkpoint in trainer.output_dir"])
    if not resume and found is not None and write:
        problem = (
            f"trainer.output_dir has {found.name} of an earlier run: pass --resume to go on from "
            "it, choose another folder, or delete that one"
        )
        raise ConfigError(str(run), [problem])
    if not resume and write and (run / "final").exists():
        problem = (
            "trainer.output_dir has the model of an earlier run (final): choose another folder, or "
            "delete that one"
        )
        raise ConfigError(str(run), [problem])
    return str(found) if resume else None


def with_flags(config: RunConfig, skip_bad: bool, trust_remote_code: bool) -> RunConfig:
    """The configuration with the command line's flags applied."""
    data = replace(config.data, skip_bad=config.data.skip_bad or skip_bad)
    names = ("model", *config.models)
    trusted = {
        name: replace(
            getattr(config, name),
            trust_remote_code=getattr(config, name).trust_remote_code or trust_remote_code,
        )
        for name in names
    }
    return replace(config, data=data, **trusted)

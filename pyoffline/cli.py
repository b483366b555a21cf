"""The command line: `pyoffline train | score | demo | doctor | explain | bench`.

Heavy imports happen inside the commands, so that `--help` is instant. Exit codes are in `pyoffline
--help`. Not here: what the commands do (training.py, demo/, benchmarks/).
"""

import argparse
import importlib
import os
import sys
import traceback

EXIT_OK, EXIT_FAILED, EXIT_INPUT, EXIT_NON_FINITE = 0, 1, 2, 3

EPILOG = """\
exit codes:
  0    done
  1    failed while running; the message says where
  2    the configuration, the data or the command line is wrong; nothing was started
  3    stopped by a NaN or infinite gradient, before the optimiser step
  130  Ctrl-C (143: SIGTERM); training finishes its step and writes a checkpoint first

`pyoffline COMMAND --help` shows a command's options and examples.
"""

TRAIN = """\
Fine-tunes a Hugging Face causal LM from a file of offline samples. Logits are never built.

examples:
  pyoffline train sft.yaml
  pyoffline train ppo.yaml trainer.learning_rate=1e-5 objective.clip_high=0.28
  pyoffline train ppo.yaml --check            check configuration, data and model, train nothing
  pyoffline train ppo.yaml --resume           go on from the newest checkpoint

a configuration:
  model: Qwen/Qwen2.5-0.5B                    # or a local folder
  data: {train: samples.jsonl, eval: heldout.jsonl, max_length: 2048}
  objective: {name: ppo_clip, clip_high: 0.28}
  terms: [{name: kl, kind: k3, scale: 0.04}, {name: entropy, scale: -0.001}]
  advantage: {name: group_normalize}          # from the columns reward and group
  trainer: {output_dir: runs/ppo, learning_rate: 1e-6, per_device_train_batch_size: 8,
            gradient_accumulation_steps: 4, aggregation: token-mean, eval_strategy: epoch,
            report_to: tensorboard}

a row of the data (JSONL or Parquet):
  {"prompt": "2+2=", "completion": "4", "reward": 1.0, "group": "q17", "old_logps": [-0.1, -0.02]}
  or "messages": [...], or "text": "..."; completion_ids beside old_logps make the tokens exact.
  for dpo and its kin: {"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ref_chosen_logps and
  ref_rejected_logps (`pyoffline score --column ref_logps`); for kto: "label": true or false.
  The batch size counts rows; pairs for preference, prompts for group objectives (renyi_rwr).

families of `objective`, by name (docs/training.md has a configuration of each):
  per token      nll, weighted_nll, dft, power_is, ppo_clip, cispo, sapo, dro, asym_re, ...
  per sequence   gspo, luspo, gmpo, vespo, topr, a_star_po, sequence_power_is, opsm, ...
  per group      renyi_rwr, alpha_elbo, list_dpo, rrhf            columns reward and group
  preference     dpo, cpo, sim_po, alpha_po, orpo, tpo, wpo, kto  ref_model: path, or columns
  distillation   {name: distill, divergence: jsd, beta: 0.5}      teacher_model: path, or columns
                 (`pyoffline score --teacher-topk 64`); distill_token on sampled tokens
  reward model   bradley_terry, bradley_terry_variance            columns chosen and rejected
                 plackett_luce                                    columns reward and group
"""

SCORE = """\
Adds the log-probs of every completion token under a model to a file of samples, as a new file.
Training reads them as old_logps (the policy that is improved), behavior_logps (the one that wrote
the data) or ref_logps (a reference to stay near).

examples:
  pyoffline score samples.jsonl --model Qwen/Qwen2.5-0.5B --output scored.jsonl
  pyoffline score scored.jsonl --model runs/sft/final --column ref_logps --output both.jsonl
  pyoffline score pairs.jsonl --model runs/sft/final --column ref_logps --output pairs-ref.jsonl
  pyoffline score samples.jsonl --model big/teacher --teacher-topk 64 --output teacher.jsonl
"""

DEMO = """\
Two parts, no network, no GPU, under ten minutes on two cores.

numbers   A small Llama learns the source of Python's standard library twice, with the stock loss
          and with pyoffline, from the same weights on the same batches: both loss curves, their
          difference, time and memory; then how much context fits into a memory limit.
learning  A model taught addition with mistakes answers 512 prompts; its answers, rewards and
          log-probs are one fixed file. Eleven methods learn from it, three seeds each:
          held-out accuracy against KL from the behaviour policy.

examples:
  pyoffline demo
  pyoffline demo --part learning --out /tmp/demo
  pyoffline demo --part numbers --steps 20 --limit-mib 4096 --figure figures/
"""

EXPLAIN = """\
Predicts peak memory, chunk plan and the cost of the matrix products for a loss of this size,
before running anything.

examples:
  pyoffline explain 8192 4096 151936
  pyoffline explain 4096 896 151936 --dtype float32
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each sets `run` to its function of the parsed arguments."""
    parser = argparse.ArgumentParser(
        prog="pyoffline",
        description="Losses for post-training language models from offline samples, no logits.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_train(commands)
    _add_score(commands)
    _add_demo(commands)
    command = _command(
        commands, "doctor", "what is installed, and which backend serves each operation", run_doctor
    )
    command.description = (
        "Versions, devices, the table of backends, and a check of one loss against plain PyTorch."
    )
    _add_explain(commands)
    _add_bench(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. Known errors are one message, others a traceback."""
    args = parse(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except Exception as error:
        if args.debug or not _is_known(error):
            traceback.print_exc()
        else:
            sys.stderr.write(f"pyoffline: {error}\n")
        return _exit_code(error)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; `key=value` may also stand after options, which argparse alone refuses."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    values = [a for a in rest if "=" in a and not a.startswith("-")]
    if len(values) < len(rest) or (values and not hasattr(args, "overrides")):
        unknown = [a for a in rest if a not in values] or rest
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if values:
        args.overrides = [*args.overrides, *values]
    return args


def _is_known(error: Exception) -> bool:
    return isinstance(
        error,
        ValueError | OSError | ImportError | RuntimeError | FloatingPointError,
    )


def _exit_code(error: Exception) -> int:
    from pyoffline.config import ConfigError
    from pyoffline.data import DataError
    from pyoffline.rows import UnreadableFileError
    from pyoffline.run_folder import DamagedCheckpointError, FolderInUseError, OtherRunError

    nothing_started = ConfigError | DataError | UnreadableFileError | UsageError
    nothing_started |= DamagedCheckpointError | FolderInUseError | OtherRunError
    if isinstance(error, nothing_started):
        return EXIT_INPUT
    return EXIT_NON_FINITE if isinstance(error, FloatingPointError) else EXIT_FAILED


class UsageError(ValueError):
    """An argument that argparse cannot check."""


def _command(commands, name: str, text: str, run, description: str | None = None):
    command = commands.add_parser(
        name,
        help=text,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_train(commands) -> None:
    command = _command(
        commands, "train", "fine-tune a model from a file of samples", run_train, TRAIN
    )
    command.add_argument("config", metavar="CONFIG.yaml")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="replace a value, a.b=c nests"
    )
    command.add_argument("--check", action="store_true", help="check everything, train nothing")
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in trainer.output_dir",
    )
    command.add_argument(
        "--skip-bad", action="store_true", help="leave bad rows out; they are counted and logged"
    )
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the model"
    )
    command.add_argument("--quiet", action="store_true", help="no summary at the end")


def _add_score(commands) -> None:
    command = _command(commands, "score", "add log-probs to a file of samples", run_score, SCORE)
    command.add_argument("samples", metavar="SAMPLES", help="JSONL or Parquet")
    command.add_argument("--model", required=True, help="a local folder or a Hub name")
    command.add_argument("--output", required=True, help="a new .jsonl file")
    command.add_argument(
        "--column",
        default=None,
        help="old_logps (the default without --teacher-topk), behavior_logps or ref_logps",
    )
    command.add_argument(
        "--log-sum-p2",
        action="store_true",
        help="add this column too, for `advantage: optimal_token_baseline`",
    )
    command.add_argument(
        "--teacher-topk",
        type=int,
        metavar="K",
        help="add the K most probable tokens of each position, for `objective: {name: distill}`",
    )
    command.add_argument("--batch", type=int, default=8, help="rows at once (default: %(default)s)")
    command.add_argument(
        "--max-length",
        type=int,
        default=2048,
        help="tokens of a row at most (default: %(default)s)",
    )
    command.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    command.add_argument("--skip-bad", action="store_true", help="leave bad rows out")
    command.add_argument(
        "--trust-remote-code", action="store_true", help="run the model's own Python code"
    )


def _add_demo(commands) -> None:
    command = _command(
        commands,
        "demo",
        "same numbers in less memory, and learning from offline samples: two figures",
        run_demo,
        DEMO,
    )
    command.add_argument(
        "--part",
        choices=("numbers", "learning", "all"),
        default="all",
        help="default: %(default)s",
    )
    command.add_argument(
        "--out",
        "--output",
        dest="output",
        default="demo-output",
        help="folder for everything (default: %(default)s)",
    )
    command.add_argument(
        "--figure",
        default=None,
        help="folder for numbers.png and learning.png (default: beside their data)",
    )
    numbers = command.add_argument_group("numbers")
    for name, default, text in (
        ("--steps", 24, "optimiser steps of each run"),
        ("--batch", 8, "sequences a step"),
        ("--length", 512, "tokens a sequence"),
        ("--limit-mib", 2048, "memory of a process where contexts are tried"),
        ("--seed", 0, "of weights and order"),
    ):
        numbers.add_argument(name, type=int, default=default, help=f"{text} (default: {default})")
    learning = command.add_argument_group("learning")
    learning.add_argument(
        "--seeds", type=int, default=3, help="runs of each method (default: %(default)s)"
    )


def _add_explain(commands) -> None:
    command = _command(
        commands, "explain", "predict memory and cost of a loss", run_explain, EXPLAIN
    )
    for name, text in (
        ("tokens", "rows of hidden states"),
        ("hidden", "hidden size"),
        ("vocab", "vocabulary"),
    ):
        command.add_argument(name, type=int, help=text)
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")


def _add_bench(commands) -> None:
    try:
        bench = importlib.import_module("pyoffline.benchmarks.cli")
    except ModuleNotFoundError:
        return  # an installation without the benchmarks has no such command
    command = _command(
        commands, "bench", "time the losses against PyTorch and the bare matrix products", bench.run
    )
    bench.add_arguments(command)


def run_train(args) -> int:
    from pyoffline.config import load_config
    from pyoffline.training import run_training, with_flags

    config = load_config(args.config, args.overrides)
    config = with_flags(config, args.skip_bad, args.trust_remote_code)
    result = run_training(config, resume=args.resume, check_only=args.check)
    if result is None:
        print("configuration, data and model are fine; nothing was trained")
        return EXIT_OK
    if not args.quiet and os.environ.get("RANK", "0") == "0":  # torchrun: once, not once a rank
        what = "model" if result.stopped_by is None else "checkpoint"
        print(f"{result.steps} steps\n{what:11}{result.model_dir}\nmetrics    {result.metrics}")
    return EXIT_OK if result.stopped_by is None else 128 + result.stopped_by


def run_score(args) -> int:
    from pathlib import Path

    from pyoffline.config import ModelConfig
    from pyoffline.score import ScoreSettings, run_score

    for name, least in (("batch", 1), ("teacher_topk", 1), ("max_length", 2)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: expected at least {least}, got {value}")
    column = args.column or (None if args.teacher_topk else "old_logps")
    settings = ScoreSettings(
        samples=Path(args.samples),
        output=Path(args.output),
        model=ModelConfig(args.model, args.dtype, trust_remote_code=args.trust_remote_code),
        column=column,
        batch=args.batch,
        max_length=args.max_length,
        skip_bad=args.skip_bad,
        log_sum_p2=args.log_sum_p2,
        teacher_topk=args.teacher_topk,
    )
    top = f"the top {args.teacher_topk} of the teacher" if args.teacher_topk else None
    what = " and ".join(x for x in (column, top) if x)
    print(f"{run_score(settings)} rows with {what}\n{args.output}")
    return EXIT_OK


def run_demo(args) -> int:
    from pathlib import Path

    from pyoffline.demo.run import DemoSettings, LearningSettings, NumbersSettings, run_demo

    for name, least in (("steps", 2), ("batch", 2), ("length", 2), ("limit_mib", 1), ("seeds", 1)):
        if getattr(args, name) < least:
            flag = name.replace("_", "-")
            raise UsageError(f"--{flag}: expected at least {least}, got {getattr(args, name)}")
    figures = Path(args.figure) if args.figure else None
    if figures is not None and (figures.suffix or figures.is_file()):
        raise UsageError(f"--figure: expected a folder, got {figures}; there are two figures")
    names = ("steps", "batch", "length", "limit_mib", "seed")
    numbers = NumbersSettings(**{name: getattr(args, name) for name in names})
    learning = LearningSettings(seeds=tuple(range(args.seeds)))
    run_demo(DemoSettings(Path(args.output), figures, args.part, numbers, learning))
    return EXIT_OK


def run_doctor(args) -> int:
    from pyoffline.doctor import report

    text, healthy = report()
    print(text)
    return EXIT_OK if healthy else EXIT_FAILED


def run_explain(args) -> int:
    import torch

    import pyoffline as po

    for name in ("tokens", "hidden", "vocab"):
        if getattr(args, name) < 1:
            raise UsageError(f"{name}: expected at least 1, got {getattr(args, name)}")
    print(po.explain(args.tokens, args.hidden, args.vocab, getattr(torch, args.dtype)))
    return EXIT_OK

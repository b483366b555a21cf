"""The demo's first part: the stock loss and pyoffline give the same numbers, in less memory.

Two trainings of one model on real text, then how much context fits. Each training is `pyoffline
train CONFIG.yaml` in a process of its own, so its peak memory is its own. Both start from the same
weights and see the same batches in the same order. Not here: the figure (figure.py), the text
(corpus.py), memory over the context length (context.py).
"""

import functools
import itertools
import json
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from tqdm.auto import tqdm

from pyoffline.benchmarks.memory import supported
from pyoffline.demo import context, corpus, figure

TOKENIZER_BYTES = 6_000_000  # of source text: 32,000 entries in about 10 seconds
KINDS = (("stock", "stock"), ("pyoffline", "fused"))


@dataclass(frozen=True)
class NumbersSettings:
    """The size of this part. The head is most of the model: 8.2 M of 11.6 M parameters."""

    output: Path = Path("demo-output/numbers")
    figure: Path | None = None  # None: numbers.png in `output`
    steps: int = 24
    batch: int = 8
    length: int = 512
    hidden: int = 256
    layers: int = 4
    vocab: int = corpus.VOCAB
    seed: int = 0
    budget_mib: int = 128
    contexts: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)  # one sequence a step
    limit_mib: int = 2048


def run_numbers(settings: NumbersSettings) -> Path:
    """Run everything and return the figure's path. RuntimeError when one of the trainings fails."""
    start = time.perf_counter()
    settings = replace(settings, output=settings.output.resolve())
    settings.output.mkdir(parents=True, exist_ok=True)
    say = functools.partial(print, flush=True)  # between the output of the child processes
    say(f"[1/5] text and tokenizer ({settings.vocab:,} entries) from Python's standard library")
    texts, tokenizer = prepare_data(settings)
    say("[2/5] a small Llama with random weights")
    n_parameters = prepare_model(settings)
    for number, (name, loss) in enumerate(KINDS, 3):
        kind = "the stock loss" if loss == "stock" else "pyoffline"
        say(f"[{number}/5] {settings.steps} steps with {kind}")
        train(settings, name, loss)
    points = measure_memory(settings, texts, tokenizer, say)
    runs = [figure.Run.read(settings.output / name / "metrics.jsonl") for name, _ in KINDS]
    path = settings.figure or settings.output / "numbers.png"
    figure.draw(*runs, subtitle(settings, n_parameters), path, (points, settings.limit_mib))
    numbers = figure.summary(*runs)
    report = settings.output / "numbers.json"
    settings_text = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    numbers |= {"contexts": context.as_rows(points), "settings": settings_text}
    report.write_text(json.dumps(numbers, indent=1), encoding="utf-8")
    _say(numbers, settings, path, report, time.perf_counter() - start)
    _say_contexts(points, settings.limit_mib)
    return path


def measure_memory(settings: NumbersSettings, texts, tokenizer, say) -> list[context.Point]:
    """Peak memory of both losses over the context length; empty, and said so, off Linux."""
    limit = f"{settings.limit_mib:,} MiB"
    if not settings.contexts or not supported():
        say("[5/5] memory over the context length: not run (it needs Linux's /proc)")
        return []
    say(f"[5/5] peak memory over the context length, each process limited to {limit}")
    for length in settings.contexts:
        rows = list(itertools.islice(corpus.long_pieces(texts, tokenizer, length), 2))
        corpus.write_samples(settings.output / f"context-{length}.jsonl", rows)

    def config(name: str, length: int) -> Path:
        return write_config(
            replace(settings, length=length, batch=1, steps=2),
            f"context-{name}-{length}",
            dict(KINDS)[name],
            f"context-{length}.jsonl",
        )

    def bar(pairs):
        return tqdm(pairs, desc="context length", unit="process", file=sys.stderr)

    names = [name for name, _ in KINDS]
    return context.measure_contexts(names, settings.contexts, config, settings.limit_mib, bar)


def prepare_data(settings: NumbersSettings) -> tuple[list[str], object]:
    """train.jsonl in the output folder, rows `length` tokens long, drawn by the seed; returns the
    texts and the tokenizer.
    """
    import random

    texts = corpus.read_texts(corpus.source_files(), TOKENIZER_BYTES)
    random.Random(settings.seed).shuffle(texts)  # noqa: S311 (an order, not a secret)
    tokenizer = corpus.train_tokenizer(texts, settings.output / "model", settings.vocab)
    wanted = settings.steps * settings.batch
    rows = []
    for piece in corpus.pieces(texts, tokenizer, settings.length):
        rows.append(piece)
        if len(rows) == wanted:
            break
    if len(rows) < wanted:
        raise ValueError(
            f"{len(rows)} pieces of text, {wanted} are needed; fewer steps, or a smaller batch"
        )
    corpus.write_samples(settings.output / "train.jsonl", rows)
    return texts, tokenizer


def prepare_model(settings: NumbersSettings) -> int:
    """A Llama with random weights beside its tokenizer; returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(settings.hidden // 64, 1),
        num_key_value_heads=max(settings.hidden // 64, 1),
        max_position_embeddings=max(settings.length, *settings.contexts, 0),
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(settings.output / "model")
    return sum(p.numel() for p in model.parameters())


def write_config(
    settings: NumbersSettings, name: str, loss: str, data: str = "train.jsonl"
) -> Path:
    """CONFIG.yaml of one run; a pair differs in `loss` and in the output folder, made anew."""
    shutil.rmtree(settings.output / name, ignore_errors=True)
    config = {
        "model": str(settings.output / "model"),
        "data": {
            "train": str(settings.output / data),
            "max_length": settings.length,
            "too_long": "truncate",
            "append_eos": False,
        },
        "objective": {"name": "nll"},
        "loss": loss,
        "trainer": {
            "output_dir": str(settings.output / name),
            "per_device_train_batch_size": settings.batch,
            "max_steps": settings.steps,
            "learning_rate": 1e-3,
            "warmup_steps": max(settings.steps // 10, 1),
            "lr_scheduler_type": "cosine",
            "logging_steps": 1,
            "save_strategy": "no",
            "dataloader_pin_memory": False,
            "seed": settings.seed,
            "memory_budget_mib": settings.budget_mib,
            "use_cpu": True,
        },
    }
    path = settings.output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def train(settings: NumbersSettings, name: str, loss: str) -> None:
    """`pyoffline train` in a fresh process; its progress bar goes to this terminal."""
    path = write_config(settings, name, loss)
    command = [sys.executable, "-m", "pyoffline", "train", str(path), "--quiet"]
    # our own interpreter and module
    code = subprocess.run(command, check=False).returncode  # noqa: S603
    if code != 0:
        raise RuntimeError(f"the {name} run ended with exit code {code}: {' '.join(command)}")


def subtitle(settings: NumbersSettings, n_parameters: int) -> str:
    tokens = settings.batch * settings.length
    return (
        f"Llama, {n_parameters / 1e6:.1f} M random parameters, vocabulary {settings.vocab:,}; "
        f"{tokens:,} tokens of Python source a step; CPU, fp32; same seed, same batches"
    )


def _say(
    numbers: dict, settings: NumbersSettings, path: Path, report: Path, seconds: float
) -> None:
    rows = (
        ("loss, first step", numbers["first_loss_stock"], numbers["first_loss_pyoffline"], ".6f"),
        ("loss, last step", numbers["final_loss_stock"], numbers["final_loss_pyoffline"], ".6f"),
        (
            "step time (s, median)",
            numbers["step_time_stock_s"],
            numbers["step_time_pyoffline_s"],
            ".2f",
        ),
        (
            "  processor time / threads",
            numbers["step_cpu_stock_s"],
            numbers["step_cpu_pyoffline_s"],
            ".2f",
        ),
        ("peak memory (MiB)", numbers["peak_stock_mib"], numbers["peak_pyoffline_mib"], ",.0f"),
        (
            "  of which added by steps",
            numbers["step_memory_stock_mib"],
            numbers["step_memory_pyoffline_mib"],
            ",.0f",
        ),
    )
    print(f"\n{'':28}{'stock':>14}{'pyoffline':>14}")
    for label, stock, ours, form in rows:
        print(f"{label:28}{format(stock, form):>14}{format(ours, form):>14}")
    if numbers["busy"]:
        print(
            "other programs were busy on this machine: wall clocks say little, so the figure shows"
        )
        print("processor time over threads")
    print(f"largest difference of the two losses at one step: {numbers['max_difference']:.1e}\n")
    print(figure.title(numbers))
    print(f"figure       {path}\nnumbers      {report}")
    for name, _ in KINDS:
        print(f"metrics      {settings.output / name / 'metrics.jsonl'}")
        print(f"checkpoint   {settings.output / name / 'final'}")
    print(f"took {seconds:.0f} s")


def _say_contexts(points: list[context.Point], limit_mib: int) -> None:
    if not points:
        return
    print(f"\npeak memory (MiB), one sequence a step, limit {limit_mib:,} MiB")
    print(f"{'context':>10}" + "".join(f"{name:>16}" for name, _ in KINDS))
    found = {(p.loss, p.length): p for p in points}
    for length in sorted({p.length for p in points}):
        cells = []
        for name, _ in KINDS:
            point = found.get((name, length))
            text = "-" if point is None else "does not fit"
            cells.append(f"{point.peak_mib:,.0f}" if point and point.fits else text)
        print(f"{length:>10,}" + "".join(f"{cell:>16}" for cell in cells))

"""The behaviour policy of the learning demo, and the file of samples that everything learns from.

A small Llama with random weights is taught by `pyoffline train`; it then answers each prompt a few
times and writes down its own log-probs (`behavior_logps`); `pyoffline score` adds `old_logps` from
the saved model, which confirms them. After that the file is fixed. Not here: learning from it.
"""

import hashlib
import json
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from pyoffline.demo import arithmetic, policy


@dataclass(frozen=True)
class LearningSettings:
    """The size of the learning demo. Batches count answers, steps are optimiser steps."""

    output: Path = Path("demo-output/learning")
    figure: Path | None = None  # None: learning.png in `output`
    seeds: tuple[int, ...] = (0, 1, 2)
    forget: float = 0.6
    hidden: int = 128
    layers: int = 2
    taught_per_problem: int = 3
    teach_steps: int = 500
    teach_batch: int = 256
    n_sampled: int = 512
    n_held_out: int = 512
    answers: int = 8
    steps: int = 64
    batch: int = 128
    learning_rate: float = 3e-4

    def resolved(self) -> "LearningSettings":
        return replace(self, output=self.output.resolve())


@dataclass(frozen=True)
class Behaviour:
    """What `make_behaviour` leaves: folders, the fixed file and what is known about it."""

    model: Path
    samples: Path
    split: arithmetic.Split
    sha256: str
    reward: float  # mean reward of the file
    difference: float  # largest |sampler's log-prob - scored log-prob|, nats


def make_behaviour(settings: LearningSettings, train) -> Behaviour:
    """Teach, sample, score. `train(config)` runs a configuration and returns the model's folder."""
    split = arithmetic.Split.draw(settings.n_sampled, settings.n_held_out, seed=0)
    make_model(settings)
    write_taught(settings, split)
    folder = train(teaching_config(settings))
    drawn = settings.output / "drawn.jsonl"
    samples = settings.output / "samples.jsonl"
    rewards = write_samples(settings, split, folder, drawn)
    difference = add_scores(folder, drawn, samples)
    digest = hashlib.sha256(samples.read_bytes()).hexdigest()
    return Behaviour(folder, samples, split, digest, sum(rewards) / len(rewards), difference)


def make_model(settings: LearningSettings) -> None:
    """A Llama with random weights and its tokenizer in start/ of the output folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = settings.output / "start"
    tokenizer = arithmetic.make_tokenizer(folder)
    torch.manual_seed(0)
    heads = max(settings.hidden // 32, 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden,
        intermediate_size=3 * settings.hidden,
        num_hidden_layers=settings.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_taught(settings: LearningSettings, split: arithmetic.Split) -> None:
    """taught.jsonl: the teacher's answers, mistakes drawn anew each time."""
    rng = random.Random(0)  # noqa: S311 (mistakes, not secrets)
    rows = [
        {"prompt": p.prompt, "completion": arithmetic.taught_answer(p, settings.forget, rng)}
        for p in split.taught
        for _ in range(settings.taught_per_problem)
    ]
    write_jsonl(settings.output / "taught.jsonl", rows)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def teaching_config(settings: LearningSettings) -> dict:
    """SFT of the random model on taught.jsonl."""
    return {
        "model": str(settings.output / "start"),
        "data": {"train": str(settings.output / "taught.jsonl"), "max_length": 16},
        "objective": {"name": "nll"},
        "trainer": {
            "output_dir": str(settings.output / "behaviour"),
            "per_device_train_batch_size": settings.teach_batch,
            "max_steps": settings.teach_steps,
            "learning_rate": 2e-3,
            "warmup_steps": min(50, settings.teach_steps // 2),
            "lr_scheduler_type": "linear",
            **common_trainer(seed=0),
        },
    }


def common_trainer(seed: int) -> dict:
    """What every run of the learning demo has."""
    return {
        "adam_beta2": 0.99,
        "logging_steps": 20,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "seed": seed,
        "use_cpu": True,
    }


def write_config(path: Path, config: dict) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


def write_samples(settings, split, folder: Path, path: Path) -> list[float]:
    """Answers of the policy in `folder` with rewards and its own log-probs; returns the rewards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    problems = [p for p in split.sampled for _ in range(settings.answers)]
    generator = torch.Generator().manual_seed(0)
    prompts = prompt_ids(tokenizer, problems)
    drawn = policy.sample(model, prompts, arithmetic.MAX_ANSWER, tokenizer.eos_token_id, generator)
    rows = []
    for problem, (ids, logps) in zip(problems, drawn.rows(), strict=True):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ended = ids[-1] == tokenizer.eos_token_id
        rows.append(
            {
                "prompt": problem.prompt,
                "completion": text,
                "completion_ids": ids,
                "reward": arithmetic.check(problem, text) if ended else 0.0,
                "group": problem.prompt,
                "behavior_logps": logps,
            }
        )
    write_jsonl(path, rows)
    return [row["reward"] for row in rows]


def prompt_ids(tokenizer, problems) -> torch.Tensor:
    """[B, P] token ids of the prompts, all of one length."""
    return torch.tensor(tokenizer([p.prompt for p in problems])["input_ids"])


def add_scores(folder: Path, drawn: Path, samples: Path) -> float:
    """`pyoffline score` in this process: `samples` is `drawn` with `old_logps`. Returns the largest
    difference from the sampler's own log-probs.
    """
    from pyoffline.config import ModelConfig
    from pyoffline.score import ScoreSettings, run_score

    samples.unlink(missing_ok=True)
    run_score(ScoreSettings(drawn, samples, ModelConfig(str(folder)), batch=512, max_length=16))
    differences = (
        abs(a - b)
        for line in samples.read_text(encoding="utf-8").splitlines()
        for row in (json.loads(line),)
        for a, b in zip(row["behavior_logps"], row["old_logps"], strict=True)
    )
    return max(differences)

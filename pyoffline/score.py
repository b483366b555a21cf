"""`pyoffline score`: log-probs of a file's completions under a model, as a column of a new file.

The rows come back with `prompt_ids` and `completion_ids`, so that training reads exactly the tokens
that were scored. No logits are stored. Not here: reading and checking rows (data.py), the log-probs
(logps.py).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from pyoffline.config import ConfigError, DataConfig, ModelConfig
from pyoffline.data import Sample, load_samples
from pyoffline.row_checks import LOGPS
from pyoffline.rows import read_rows


@dataclass(frozen=True)
class ScoreSettings:
    """`samples` is read, `output` is written whole or not at all. `column` is one of LOGPS."""

    samples: Path
    output: Path
    model: ModelConfig
    column: str = "old_logps"
    batch: int = 8
    max_length: int = 2048
    skip_bad: bool = False


def run_score(settings: ScoreSettings) -> int:
    """Score a file; returns the number of rows written. ConfigError, DataError: nothing was."""
    from pyoffline.training import load_model, load_tokenizer

    problems = []
    if settings.column not in LOGPS:
        problems.append(f"--column: {settings.column!r} is not one of {', '.join(LOGPS)}")
    if settings.output.suffix != ".jsonl":
        problems.append(
            f"--output: expected a name that ends in .jsonl, got {settings.output.name}"
        )
    if settings.output.exists():
        problems.append(f"--output: {settings.output} exists; remove it or choose another name")
    if problems:
        raise ConfigError("pyoffline score", problems)
    tokenizer = load_tokenizer(settings.model)
    config = DataConfig(
        str(settings.samples), max_length=settings.max_length, skip_bad=settings.skip_bad
    )
    data = load_samples(settings.samples, tokenizer, config)
    if data.skipped:
        sys.stderr.write(f"{settings.samples}: left out {sum(data.skipped.values())} rows\n")
    logps = score_samples(load_model(settings.model), data.samples, settings.batch)
    return _write(settings, data.samples, logps)


def score_samples(model, samples: list[Sample], batch: int) -> list[list[float]]:
    """log p of each completion token, in nats; longest samples first: memory shows at once."""
    import torch

    from pyoffline.collate import Collator
    from pyoffline.head import Head, backbone
    from pyoffline.logps import linear_token_logps
    from pyoffline.step_weights import aligned_labels

    model.eval()
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))
    out: list[list[float]] = [[] for _ in samples]
    bar = tqdm(total=len(samples), desc="score", unit="row", file=sys.stderr, mininterval=0.5)
    with torch.no_grad(), bar:
        for start in range(0, len(order), batch):
            picked = order[start : start + batch]
            inputs = Collator()([samples[i] for i in picked])
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            labels = aligned_labels(inputs)
            hidden = backbone(model)(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                use_cache=False,
            ).last_hidden_state
            logps = linear_token_logps(hidden, Head.of(model), labels).logps.cpu()
            for row, i in enumerate(picked):
                first = samples[i].n_prompt - 1
                out[i] = logps[row, first : len(samples[i].ids) - 1].tolist()
            bar.update(len(picked))
    return out


def _write(settings: ScoreSettings, samples: list[Sample], logps: list[list[float]]) -> int:
    """The scored rows in file order, beside their place first, then renamed."""
    scored = {s.line: (s, values) for s, values in zip(samples, logps, strict=True)}
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = settings.output.with_name(settings.output.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for line, row, _ in read_rows(settings.samples):
            if line not in scored:
                continue
            sample, values = scored[line]
            row = {k: v for k, v in row.items() if k != "text"}
            row["prompt_ids"] = sample.ids[: sample.n_prompt]
            row["completion_ids"] = sample.ids[sample.n_prompt :]
            row[settings.column] = values
            file.write(json.dumps(row) + "\n")
    temporary.replace(settings.output)
    return len(scored)

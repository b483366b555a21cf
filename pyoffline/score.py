"""`pyoffline score`: log-probs of a file's completions under a model, as a column of a new file.

The rows come back with `prompt_ids` and `completion_ids`, so that training reads exactly the tokens
that were scored. Preference rows get `ref_chosen_logps` and `ref_rejected_logps`. No logits are
stored. Not here: reading and checking rows (data.py), the log-probs
(logps.py).
"""

import base64
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from pyoffline.config import ConfigError, DataConfig, ModelConfig
from pyoffline.data import DataError, Needs, Sample, load_samples
from pyoffline.pairs import SIDES
from pyoffline.row_checks import LOGPS
from pyoffline.rows import read_rows
from pyoffline.teacher_columns import COLUMNS, IDS
from pyoffline.teacher_columns import LOGPS as LOGPS_OF_TOP_K
from pyoffline.top_k import linear_top_k


@dataclass(frozen=True)
class ScoreSettings:
    """`samples` is read, `output` is written whole or not at all. `column` is one of LOGPS; with
    `log_sum_p2` the column of that name is added, which `advantage: optimal_token_baseline` reads;
    with `teacher_topk` the k most probable entries of each position, which `distill` reads.
    `column` None adds no log-probs of the labels.
    """

    samples: Path
    output: Path
    model: ModelConfig
    column: str | None = "old_logps"
    batch: int = 8
    max_length: int = 2048
    skip_bad: bool = False
    log_sum_p2: bool = False
    teacher_topk: int | None = None


def run_score(settings: ScoreSettings) -> int:
    """Score a file; returns the number of rows written. ConfigError, DataError: nothing was."""
    from pyoffline.fixed_models import outside_model, vocabulary
    from pyoffline.training import load_model, load_tokenizer

    problems = []
    if settings.column not in (*LOGPS, None):
        problems.append(f"--column: {settings.column!r} is not one of {', '.join(LOGPS)}")
    if settings.output.suffix != ".jsonl":
        problems.append(
            f"--output: expected a name that ends in .jsonl, got {settings.output.name}"
        )
    if settings.output.exists():
        problems.append(f"--output: {settings.output} exists; remove it or choose another name")
    paired = settings.samples.is_file() and _is_paired(settings.samples)
    other = settings.column != "ref_logps" or settings.log_sum_p2 or settings.teacher_topk
    if paired and other:
        problems.append("--column: rows with chosen and rejected take ref_logps only")
    problems += [] if problems else _unwritable(settings.output)
    if problems:
        raise ConfigError("pyoffline score", problems)
    tokenizer = load_tokenizer(settings.model)
    config = DataConfig(
        str(settings.samples), max_length=settings.max_length, skip_bad=settings.skip_bad
    )
    needs = Needs(unit="pair" if paired else "row")
    data = load_samples(settings.samples, tokenizer, config, needs)
    data.say_left_out(settings.samples, sys.stderr)
    model = load_model(settings.model)
    size = vocabulary(model)
    if settings.teacher_topk and settings.teacher_topk > size:
        problem = f"--teacher-topk: expected at most {size}, the model's vocabulary"
        raise ConfigError("pyoffline score", [f"{problem}, got {settings.teacher_topk}"])
    outside = outside_model(data.samples, model)
    if outside:
        problems = [f"{settings.samples}:{line}: {where}: {why}" for line, where, why in outside]
        raise DataError(problems, len(data.samples))
    scores = score_statistics(model, data.samples, settings.batch, settings.teacher_topk)
    return _write(settings, data.samples, scores)


def _unwritable(output: Path) -> list[str]:
    """Found before the model runs, not after."""
    temporary = _beside(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        return [f"--output: {output} cannot be written: {error.strerror or error}"]
    return []


def _beside(output: Path) -> Path:
    return output.with_name(output.name + ".tmp")


def _is_paired(path: Path) -> bool:
    row = next((row for _, row, _ in read_rows(path) if row), {})
    return any(row.get(f"{side}{end}") is not None for side in SIDES for end in ("", "_ids"))


def score_samples(model, samples: list[Sample], batch: int) -> list[list[float]]:
    """log p of each completion token, in nats."""
    return [x["logps"] for x in score_statistics(model, samples, batch)]


def score_statistics(
    model, samples: list[Sample], batch: int, teacher_topk: int | None = None
) -> list[dict[str, list]]:
    """`logps` and `log_sum_p2` of each completion token, in nats, and with `teacher_topk` the
    columns of a teacher's top-k; longest samples first: memory shows at once.
    """
    import torch

    from pyoffline.collate import Collator
    from pyoffline.fixed_models import last_hidden
    from pyoffline.head import Head
    from pyoffline.logps import linear_token_logps
    from pyoffline.step_weights import aligned_labels

    model.eval()
    order = sorted(range(len(samples)), key=lambda i: -len(samples[i].ids))
    out: list[dict[str, list[float]]] = [{} for _ in samples]
    bar = tqdm(total=len(samples), desc="score", unit="row", file=sys.stderr, mininterval=0.5)
    with torch.no_grad(), bar:
        for start in range(0, len(order), batch):
            picked = order[start : start + batch]
            inputs = Collator()([samples[i] for i in picked])
            inputs = {name: x.to(model.device) for name, x in inputs.items()}
            labels = aligned_labels(inputs)
            hidden = last_hidden(model, inputs)
            stats = linear_token_logps(hidden, Head.of(model), labels)
            for row, i in enumerate(picked):
                span = slice(samples[i].n_prompt - 1, len(samples[i].ids) - 1)
                for name in ("logps", "log_sum_p2"):
                    out[i][name] = getattr(stats, name)[row, span].tolist()
                if teacher_topk:
                    top = linear_top_k(hidden[row, span], Head.of(model), teacher_topk)
                    out[i] |= {IDS: top.ids.tolist(), LOGPS_OF_TOP_K: top.logps.tolist()}
            bar.update(len(picked))
    return out


def _write(settings: ScoreSettings, samples: list[Sample], scores: list[dict]) -> int:
    """The scored rows in file order, beside their place first, then renamed."""
    scored: dict[int, list] = {}
    for sample, values in zip(samples, scores, strict=True):
        scored.setdefault(sample.line, []).append((sample, values))
    temporary = _beside(settings.output)
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for line, row, _ in read_rows(settings.samples):
                if line in scored:
                    row = _scored_row(settings, row, scored[line])
                    file.write(json.dumps(row, default=_as_json) + "\n")
        temporary.replace(settings.output)
    except OSError as error:
        why = error.strerror or error
        raise OSError(f"{settings.output} could not be written, nothing is left: {why}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return len(scored)


def _as_json(value):
    """What JSON has not, in a column that is passed on: bytes as base64, dates as text."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


def _scored_row(settings: ScoreSettings, row: dict, parts: list) -> dict:
    row = {k: v for k, v in row.items() if k != "text"}
    names = ("completion",) if len(parts) == 1 else SIDES
    for name, (sample, values) in zip(names, parts, strict=True):
        row["prompt_ids"] = sample.ids[: sample.n_prompt]
        row[f"{name}_ids"] = sample.ids[sample.n_prompt :]
        column = settings.column if len(parts) == 1 else f"ref_{name}_logps"
        row |= {column: values["logps"]} if column else {}
        row |= {k: values[k] for k in COLUMNS if k in values}
        if settings.log_sum_p2:
            row["log_sum_p2"] = values["log_sum_p2"]
    return row

"""Offline samples: a JSONL or Parquet file in, tokenised and checked samples out, before the first
step.

A row has `prompt` and `completion`, or `messages` (the last one is the completion), or `text`; and
what the objective reads: `reward`, `group` (rows of one prompt), `advantages`, `old_logps`,
`behavior_logps`, `ref_logps` (lists, one entry per completion token), or columns that `weighted_by`
names. `completion_ids` and `prompt_ids` replace the text exactly. Every bad row is found and named
`file:line: field: why`. Not here: padding and packing (collate.py), reading files (rows.py).
"""

import inspect
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.utils.data import Dataset

from pyoffline.config import DataConfig
from pyoffline.row_checks import LOGPS, check_row, check_sample
from pyoffline.rows import read_rows

COLUMN_OF = {"old": "old_logps", "mu": "behavior_logps", "ref": "ref_logps", "adv": "advantages"}
# Arguments of `pyoffline.advantages` that come from the data; the others are settings.
ARRAY_ARGUMENTS = ("rewards", "group_ids", "mask", "old_logps", "ref_logps", "lengths", "values")
DATA_ADVANTAGES = (
    "reward_to_go",
    "group_normalize",
    "leave_one_out",
    "reinforce_plus_plus",
    "opo",
    "rwr",
    "awr",
    "position",
    "kl_shaped",
)
SHOWN = 20
CHUNK = 256  # rows tokenised in one call


class DataError(ValueError):
    """Every problem of a data file; `problems` is the list of `file:line: field: why`."""

    def __init__(self, problems: list[str], n_rows: int):
        self.problems = problems
        shown = problems[:SHOWN]
        if len(problems) > SHOWN:
            shown.append(f"... and {len(problems) - SHOWN} more")
        hint = (
            "correct the rows, or pass --skip-bad to leave them out (they are counted and logged)"
        )
        head = f"{len(problems)} problems in {n_rows} rows, nothing was started; {hint}"
        super().__init__("\n  ".join([head, *shown]))


@dataclass(slots=True)
class Sample:
    """One sequence: `ids[:n_prompt]` is context, the rest is trained on. A column is a float, or a
    list aligned with `ids[n_prompt:]`.
    """

    ids: list[int]
    n_prompt: int
    line: int
    columns: dict = field(default_factory=dict)

    @property
    def n_completion(self) -> int:
        return len(self.ids) - self.n_prompt


@dataclass(frozen=True)
class Needs:
    """What the objective reads, as columns of the file."""

    columns: frozenset[str] = frozenset()
    extras: tuple[str, ...] = ()

    @staticmethod
    def of(objective, advantage: dict | None) -> "Needs":
        """From a composed objective; `advantages` are computed from `reward` when the configuration
        names a function.
        """
        reads = objective.program(False).reads
        columns = {COLUMN_OF[name] for name in reads}
        if "adv" in reads and not objective.program(False).needs_adv:
            columns.discard("advantages")
        if advantage is not None:
            columns.discard("advantages")
            columns |= _advantage_columns(advantage["name"])
        return Needs(frozenset(columns), objective.program(False).gates)


class SampleSet(Dataset):
    """Samples in file order, with what was left out: `skipped` counts reasons, `truncated` counts
    cut rows.
    """

    def __init__(self, samples: list[Sample], skipped: Counter, truncated: int = 0):
        self.samples, self.skipped, self.truncated = samples, skipped, truncated

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, i):
        return self.samples[i]


def advantage_names() -> list[str]:
    return ["reward", *DATA_ADVANTAGES]


def advantage_function(name: str) -> Callable:
    """A function of `pyoffline.advantages` that the columns of a file can feed; "reward" takes
    rewards as they are.
    """
    if name == "reward":
        return lambda rewards: rewards
    from pyoffline import advantages

    return getattr(advantages, name)


def _advantage_columns(name: str) -> set[str]:
    arguments = inspect.signature(advantage_function(name)).parameters
    needed = {a for a, p in arguments.items() if p.default is inspect.Parameter.empty}
    columns = {"rewards": "reward", "group_ids": "group"}
    return {
        columns.get(a, a) for a in needed if a in ARRAY_ARGUMENTS and a not in ("mask", "lengths")
    }


def load_samples(
    path: str | Path,
    tokenizer,
    settings: DataConfig,
    needs: Needs | None = None,
    advantage: dict | None = None,
    progress: Callable = iter,
) -> SampleSet:
    """Read, check and tokenise a file, and compute advantages. DataError lists every problem of the
    whole file.

    `progress` wraps the iterable of rows (a progress bar). With `settings.skip_bad` bad rows are
    left out and counted.
    """
    needs = Needs() if needs is None else needs
    samples: list[Sample] = []
    problems: list[tuple[int, str, str]] = []
    n_rows, truncated, pending = 0, 0, []
    for line, row, error in progress(read_rows(Path(path))):
        n_rows += 1
        found = [("row", error)] if error else check_row(row, needs)
        if found:
            problems += [(line, *f) for f in found]
            continue
        pending.append((line, row))
        if len(pending) == CHUNK:
            truncated += _finish_rows(pending, tokenizer, settings, needs, samples, problems)
            pending = []
    truncated += _finish_rows(pending, tokenizer, settings, needs, samples, problems)
    texts = [f"{path}:{line}: {where}: {why}" for line, where, why in problems]
    if texts and not settings.skip_bad:
        raise DataError(texts, n_rows)
    if not samples:
        raise DataError([*texts, f"{path}: no usable row"], n_rows)
    for sample, group in zip(samples, dense_groups(samples), strict=True):
        sample.columns["group"] = group
    if advantage is not None:
        add_advantages(samples, advantage)
    return SampleSet(samples, Counter(f"{where}: {why}" for _, where, why in problems), truncated)


def _finish_rows(pending, tokenizer, settings, needs, samples, problems) -> int:
    """Tokenise checked rows, check lengths; appends to `samples` and `problems`, returns how many
    were truncated.
    """
    if not pending:
        return 0
    truncated = 0
    pairs = [_texts(row, tokenizer) for _, row in pending]
    prompts = iter(_encode(tokenizer, [p for p, _, special in pairs if special], True))
    plain = iter(_encode(tokenizer, [p for p, _, special in pairs if not special], False))
    endings = _encode(tokenizer, [c for _, c, _ in pairs], False)
    for (line, row), (_, text, special), ending in zip(pending, pairs, endings, strict=True):
        prompt = next(prompts) if special else next(plain)
        prompt = row["prompt_ids"] if row.get("prompt_ids") is not None else prompt
        if row.get("completion_ids") is not None:
            ending = row["completion_ids"]
        elif settings.append_eos and tokenizer.eos_token_id is not None and text:
            ending = [*ending, tokenizer.eos_token_id]
        if row.get("text") is not None:
            prompt, ending = prompt[:1], prompt[1:] + ending + _eos(tokenizer, settings)
        columns = {
            k: row[k]
            for k in (*LOGPS, "advantages", "reward", "group", *needs.extras)
            if row.get(k) is not None
        }
        sample = Sample([*prompt, *ending], len(prompt), line, columns)
        found = check_sample(sample, settings.max_length, len(tokenizer), settings.too_long)
        if found:
            problems += [(line, *f) for f in found]
            continue
        if len(sample.ids) > settings.max_length:
            if settings.too_long == "drop":
                problems.append((line, "max_length", "dropped: too long"))
                continue
            truncated += 1
            _truncate(sample, settings.max_length)
        samples.append(sample)
    return truncated


def _eos(tokenizer, settings) -> list[int]:
    return (
        [tokenizer.eos_token_id]
        if settings.append_eos and tokenizer.eos_token_id is not None
        else []
    )


def _texts(row: dict, tokenizer) -> tuple[str, str, bool]:
    """Prompt text, completion text, and whether the tokenizer adds its special tokens to the
    prompt.
    """
    if row.get("text") is not None:
        return row["text"], "", True
    if row.get("messages") is not None:
        messages = row["messages"]
        before = tokenizer.apply_chat_template(
            messages[:-1], tokenize=False, add_generation_prompt=True
        )
        return before, messages[-1]["content"], False
    return row.get("prompt") or "", row.get("completion") or "", True


def _encode(tokenizer, texts: list[str], special: bool) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special)["input_ids"] if texts else []


def _truncate(sample: Sample, length: int) -> None:
    sample.ids = sample.ids[:length]
    n = sample.n_completion
    sample.columns = {k: v[:n] if isinstance(v, list) else v for k, v in sample.columns.items()}


def add_advantages(samples: list[Sample], spec: dict) -> None:
    """`spec["name"]` of pyoffline.advantages over the whole file: a float per sample, or a list per
    completion token.
    """
    fn = advantage_function(spec["name"])
    wanted = inspect.signature(fn).parameters
    arrays = {}
    for name, parameter in wanted.items():
        required = parameter.default is inspect.Parameter.empty
        if name in ARRAY_ARGUMENTS and (required or (name == "group_ids" and spec.get("baseline"))):
            arrays[name] = _array(name, samples)
    if "lengths" in wanted:
        arrays["lengths"] = torch.tensor([float(s.n_completion) for s in samples])
    out = fn(**arrays, **{k: v for k, v in spec.items() if k != "name"}).tolist()
    for sample, value in zip(samples, out, strict=True):
        sample.columns["advantages"] = (
            value[: sample.n_completion] if isinstance(value, list) else value
        )


def _array(name: str, samples: list[Sample]) -> torch.Tensor:
    if name == "rewards":
        return torch.tensor([float(s.columns["reward"]) for s in samples], dtype=torch.float64)
    if name == "group_ids":
        return torch.tensor([s.columns["group"] for s in samples])
    width = max(s.n_completion for s in samples)
    if name == "mask":
        return torch.arange(width) < torch.tensor([[s.n_completion] for s in samples])
    rows = [s.columns[name] + [0.0] * (width - s.n_completion) for s in samples]
    return torch.tensor(rows, dtype=torch.float64)


def dense_groups(samples: list[Sample]) -> list[int]:
    """Integers for the values of the column `group`, in order of appearance; a row without one is
    its own group.
    """
    seen: dict = {}
    keys = (s.columns.get("group", ("line", s.line)) for s in samples)
    return [seen.setdefault(key, len(seen)) for key in keys]

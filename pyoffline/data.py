"""Offline samples: a file in, tokenised and checked samples out, before the first step.

A row has `prompt` and `completion`, or `messages` (the last one is the completion), or `text`; or,
for a preference objective, `prompt`, `chosen` and `rejected`; and what the objective reads:
`reward`, `group` (rows of one prompt), `label`, `advantages`, `old_logps`, `behavior_logps`,
`ref_logps` (lists, one entry per completion token), or columns that `weighted_by` names.
`completion_ids` and `prompt_ids` replace the text exactly. Every bad row is found and named
`file:line: field: why`. Not here: padding and packing (collate.py), reading files (rows.py),
advantages (data_advantages.py).
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from pyoffline import data_advantages, pairs, teacher_columns
from pyoffline.config import DataConfig
from pyoffline.config_objective import RewardObjective
from pyoffline.divergences import Divergence
from pyoffline.records import TOKEN_FIELDS
from pyoffline.row_checks import OPTIONAL, check_row, check_sample
from pyoffline.rows import read_rows
from pyoffline.units import make_units, program_of, reads_reference, unit_of

COLUMN_OF = {name: field for field, name in TOKEN_FIELDS.items()}
SEQUENCE_COLUMNS = {"rewards": "reward", "group_ids": "group", "ref_sums": "ref_logps"}
SHOWN = 20
CHUNK = 256  # rows tokenised in one call
DROPPED = "dropped: more than data.max_length tokens"


class DataError(ValueError):
    """Every problem of a data file; `problems` is the list of `file:line: field: why`."""

    def __init__(self, problems: list[str], n_rows: int, skip_bad: bool = False):
        self.problems = problems
        alike = Counter(_what(p) for p in problems)
        first = {_what(p): p for p in reversed(problems)}
        shown = [
            p + (f" (and {_count(alike[what] - 1, 'more row')})" if alike[what] > 1 else "")
            for what, p in reversed(first.items())
        ]
        if len(shown) > SHOWN:
            shown[SHOWN:] = [f"... and {len(shown) - SHOWN} more kinds"]
        head = f"{_count(len(problems), 'problem')} in {_count(n_rows, 'row')}, nothing was started"
        if n_rows and not skip_bad:
            head += "; correct the rows, or pass --skip-bad to leave them out (they are counted"
            head += " and logged)"
        super().__init__("\n  ".join([head, *shown]))


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _what(problem: str) -> str:
    """`field: why` of `file:line: field: why`."""
    return problem.partition(": ")[2]


@dataclass(slots=True)
class Sample:
    """One sequence: `ids[:n_prompt]` is context, the rest is trained on. A column is a float, or a
    list (a teacher's top-k: a tensor [n, k]) aligned with `ids[n_prompt:]`.
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
    """What an objective reads of a file.

    `columns` must be there, `optional` ones are read where every row has them; `extras` are those
    that `weighted_by` names; `keep` go into the batch; `unit` (units.UNITS) lies in one
    micro-batch. `sums`: `ref_logps` may be one number a row, the sum over its tokens. `computed`:
    columns that a model of the configuration stands for, so that they must not be there.
    """

    columns: frozenset[str] = frozenset()
    extras: tuple[str, ...] = ()
    optional: frozenset[str] = frozenset()
    keep: frozenset[str] = frozenset()
    unit: str = "row"
    sums: bool = False
    computed: frozenset[str] = frozenset()

    @staticmethod
    def of(objective, advantage: dict | list | None, models: frozenset = frozenset()) -> "Needs":
        """From a composed objective; `advantages` are computed when the configuration names a
        function, and what the `models` that it names (config.FIXED_MODELS) give is not read.
        """
        if isinstance(objective, RewardObjective):
            read = objective.columns
            return Needs(read, keep=read, unit=objective.unit)
        program, unit = program_of(objective), unit_of(objective)
        either = {name for names in program.one_of for name in names}
        columns = {COLUMN_OF[name] for name in program.reads}
        targets = "target" if unit == "pair" else "label"
        of_sequence = SEQUENCE_COLUMNS | {"targets": targets}
        columns |= {of_sequence[name] for name in program.sequence_reads & set(of_sequence)}
        columns |= {"ref_logps"} if "ref_sums" in either else set()
        optional = {of_sequence[n] for n in program.optional if n in of_sequence}
        optional |= {COLUMN_OF[n] for n in program_of(objective, True).reads - program.reads}
        columns |= set(teacher_columns.COLUMNS) if isinstance(objective, Divergence) else set()
        computed = {"ref_logps"} if "ref_model" in models and reads_reference(objective) else set()
        computed |= columns & set(teacher_columns.COLUMNS) if "teacher_model" in models else set()
        columns -= computed
        keep = columns | optional | set(program.gates)
        if "adv" in program.reads and not program.needs_adv:
            columns.discard("advantages")
            optional.add("advantages")
        if unit == "group":
            columns.add("group")
        if advantage is not None:
            columns.discard("advantages")
            optional.discard("advantages")
            columns |= data_advantages.columns_of(advantage)
            optional |= data_advantages.optional_columns(advantage)
        return Needs(
            frozenset(columns),
            program.gates,
            frozenset(optional - columns),
            frozenset(keep),
            unit,
            "ref_sums" in either and "ref_logps" not in computed,
            frozenset(computed),
        )


class SampleSet(Dataset):
    """Items of a run: samples in file order, or tuples of samples that must stay together.

    `skipped` counts reasons why rows were left out, `truncated` those that were cut.
    """

    def __init__(self, samples: list[Sample], skipped: Counter, truncated: int = 0, unit="row"):
        self.samples, self.skipped, self.truncated = samples, skipped, truncated
        self.items = make_units(samples, unit)

    def say_left_out(self, path: str | Path, file) -> None:
        """How many rows were left out, and why."""
        if self.skipped:
            file.write(f"{path}: left out {_count(sum(self.skipped.values()), 'row')}\n")
        for reason, count in self.skipped.most_common(10):
            file.write(f"  {count:6d}  {reason}\n")

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def load_samples(
    path: str | Path,
    tokenizer,
    settings: DataConfig,
    needs: Needs | None = None,
    advantage: dict | list | None = None,
    progress: Callable = iter,
) -> SampleSet:
    """Read, check and tokenise a file, compute advantages. DataError lists all that is wrong.

    `progress` wraps the iterable of rows (a progress bar). With `settings.skip_bad` bad rows are
    left out and counted.
    """
    needs = Needs() if needs is None else needs
    samples: list[Sample] = []
    problems: list[tuple[int, str, str]] = []
    names = {*OPTIONAL, *needs.columns, *needs.optional, *needs.extras}
    n_rows, truncated, pending = 0, 0, []
    for line, row, error in progress(read_rows(Path(path))):
        n_rows += 1
        found, parts = ([("row", error)], []) if error else _parts(row, needs)
        problems += [(line, *f) for f in found]
        pending += [(line, side, _packed(part, names)) for side, part in parts if not found]
        if len(pending) >= CHUNK:
            truncated += _finish_rows(pending, tokenizer, settings, names, samples, problems)
            pending = []
    truncated += _finish_rows(pending, tokenizer, settings, names, samples, problems)
    problems += _uneven(samples, needs)
    texts = [f"{path}:{n}: {where}: {why}" for n, where, why in sorted(problems) if why != DROPPED]
    if texts and not settings.skip_bad:
        raise DataError(texts, n_rows)
    bad = {line for line, _, _ in problems}
    samples = [s for s in samples if s.line not in bad]
    if not samples:
        n_long = sum(why == DROPPED for _, _, why in problems)
        why = f": {n_long} of {n_rows} have more than data.max_length tokens" if n_long else ""
        raise DataError([*texts, f"{path}: no usable row{why}"], n_rows, settings.skip_bad)
    for sample, group in zip(samples, dense_groups(samples), strict=True):
        sample.columns["group"] = group
    if advantage is not None:
        try:
            data_advantages.add_advantages(samples, advantage)
        except ValueError as error:
            raise DataError([f"{path}: {error}"], n_rows) from None
    skipped = Counter(f"{where}: {why}" for _, where, why in problems)
    return SampleSet(samples, skipped, truncated, needs.unit)


def _parts(row: dict, needs: Needs) -> tuple[list, list]:
    """Problems of a row of the file, and its sides: one, or chosen and rejected."""
    if needs.unit != "pair":
        return check_row(row, needs), [(None, row)]
    problems, rows = pairs.split(row, needs.extras)
    parts = list(zip(pairs.SIDES, rows, strict=False))
    for side, part in parts:
        found = check_row(part, needs)
        problems += [(pairs.public_name(name, side, part), why) for name, why in found]
    return list(dict.fromkeys(problems)), parts


def _packed(row: dict, names: set[str]) -> dict:
    """A teacher's lists as tensors, where they are read."""
    return teacher_columns.pack(row) if teacher_columns.IDS in names else row


def _uneven(samples: list[Sample], needs: Needs) -> list[tuple[int, str, str]]:
    """Rows without an optional column that others have, or with a sum where others have a list."""
    found = []
    for name in sorted(needs.optional):
        lacking = [s.line for s in samples if name not in s.columns]
        if 0 < len(lacking) < len(samples):
            why = f"missing here, and {len(samples) - len(lacking)} other rows have it"
            found += [(line, name, why) for line in dict.fromkeys(lacking)]
    if teacher_columns.IDS in needs.columns:
        found += teacher_columns.uneven(samples)
    if needs.sums:
        lists = [isinstance(s.columns.get("ref_logps"), list) for s in samples]
        odd = [s.line for s, x in zip(samples, lists, strict=True) if x != lists[0]]
        why = "one number here and a list in other rows: give all as sums or all per token"
        found += [(line, "ref_logps", why) for line in dict.fromkeys(odd)]
    return found


def _finish_rows(pending, tokenizer, settings, names, samples, problems) -> int:
    """Tokenise checked rows and append to `samples` and `problems`; returns how many were cut."""
    if not pending:
        return 0
    truncated = 0
    pending, texts = _rendered(pending, tokenizer, problems)
    prompts = iter(_encode(tokenizer, [p for p, _, special in texts if special], True))
    plain = iter(_encode(tokenizer, [p for p, _, special in texts if not special], False))
    endings = _encode(tokenizer, [c for _, c, _ in texts], False)
    for (line, side, row), (_, text, special), ending in zip(pending, texts, endings, strict=True):
        prompt = next(prompts) if special else next(plain)
        prompt = row["prompt_ids"] if row.get("prompt_ids") is not None else prompt
        exact = row.get("completion_ids") is not None
        if exact:
            ending = row["completion_ids"]
        elif settings.append_eos and tokenizer.eos_token_id is not None and text:
            ending = [*ending, tokenizer.eos_token_id]
        if row.get("text") is not None:
            prompt, ending = prompt[:1], prompt[1:] + ending + _eos(tokenizer, settings)
        columns = {k: row[k] for k in names if row.get(k) is not None}
        sample = Sample([*prompt, *ending], len(prompt), line, columns)
        limits = (settings.max_length, len(tokenizer), settings.too_long)
        found = check_sample(sample, *limits, ended=settings.append_eos and not exact)
        if found:
            problems += [(line, pairs.public_name(name, side, row), why) for name, why in found]
        elif len(sample.ids) > settings.max_length and settings.too_long == "drop":
            problems.append((line, "max_length", DROPPED))
        else:
            truncated += len(sample.ids) > settings.max_length
            _truncate(sample, settings.max_length)
            samples.append(sample)
    return truncated


def _eos(tokenizer, settings) -> list[int]:
    return (
        [tokenizer.eos_token_id]
        if settings.append_eos and tokenizer.eos_token_id is not None
        else []
    )


def _rendered(pending, tokenizer, problems) -> tuple[list, list]:
    """(rows, their texts); what the chat template refuses is a problem of its row."""
    from jinja2 import TemplateError

    rows, texts = [], []
    for line, side, row in pending:
        try:
            texts.append(_texts(row, tokenizer))
        except (ValueError, TemplateError) as error:
            why = f"the tokenizer's chat template refuses it: {error}"
            if not tokenizer.chat_template:
                why = "the tokenizer has no chat template; give prompt and completion instead"
            problems.append((line, pairs.public_name("messages", side, row), why))
        else:
            rows.append((line, side, row))
    return rows, texts


def _texts(row: dict, tokenizer) -> tuple[str, str, bool]:
    """(prompt, completion, whether the tokenizer adds its special tokens to the prompt)."""
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
    if len(sample.ids) <= length:
        return
    sample.ids = sample.ids[:length]
    n = sample.n_completion
    per_token = list | Tensor
    sample.columns = {
        k: v[:n] if isinstance(v, per_token) else v for k, v in sample.columns.items()
    }


def dense_groups(samples: list[Sample]) -> list[int]:
    """Integers for the values of `group`, in order of appearance; without one a row is its own."""
    seen: dict = {}
    keys = (s.columns.get("group", ("line", s.line)) for s in samples)
    return [seen.setdefault(key, len(seen)) for key in keys]

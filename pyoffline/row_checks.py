"""What is wrong with one row of offline samples: every problem of the row, as (field, why).

Not here: reading files (rows.py), tokenising (data.py).
"""

import difflib
import math
from collections.abc import Iterable

from torch import Tensor

from pyoffline import teacher_columns
from pyoffline.config import nearest

LOGPS = ("old_logps", "behavior_logps", "ref_logps")
TEXTS = ("text", "prompt", "completion", "messages", "prompt_ids", "completion_ids")
OPTIONAL = (*LOGPS, "advantages", "reward", "group")  # always checked where they are given
MESSAGE = ("role", "content")
KNOWN = (*TEXTS, *OPTIONAL)
FLOAT32_MAX = 3.4028234663852886e38
TOLERANCE = 1e-3  # a log-prob computed in bf16 may round above 0 by this much


def check_row(row: dict, needs) -> list[tuple[str, str]]:
    """What is wrong with a row before it is tokenised: pairs of field and message."""
    found = _check_text(row)
    read = needs.columns | needs.optional | set(needs.extras)
    known = {*KNOWN, *read}
    present = {k for k, v in row.items() if v is not None}
    for name in sorted(needs.columns | set(needs.extras)):
        if name not in present:
            unknown = [k for k in present if k not in known]
            found.append((name, f"missing; {_why_needed(name)}{nearest(name, unknown)}"))
    for name in sorted(needs.computed & present):
        why = f"given here, and {MODEL_OF[name]} would compute it: leave one of the two out"
        found.append((name, why))
    missing = known - present
    for name in sorted(present - known):
        near = nearest(name, missing - needs.columns - set(needs.extras))
        if near and _close(name, missing):
            found.append((name, f"unknown column{near}"))
    for name in sorted(present & {"reward", "greedy_reward"} & {*OPTIONAL, *read}):
        found += _check_number(name, row[name])
    lists = {*LOGPS, "advantages", *needs.extras, *({"values", "log_sum_p2"} & read)}
    for name in sorted(present & lists):
        if name == "ref_logps" and needs.sums and not isinstance(row[name], list):
            found += _check_logp(name, row[name])
        else:
            found += _check_values(name, row[name], name in (*LOGPS, "log_sum_p2"))
    if read & set(teacher_columns.COLUMNS) and present.issuperset(teacher_columns.COLUMNS):
        found += teacher_columns.check(row)
    if "label" in present & read and row["label"] not in (0, 1):
        found.append(("label", f"expected true or false (1 or 0), got {row['label']!r}"))
    if "group" in present and not isinstance(row["group"], int | str):
        found.append(("group", f"expected a string or an integer, got {row['group']!r}"))
    return found


def check_sample(
    sample,
    max_length: int,
    vocab: int,
    too_long: str,
    ended: bool = True,
) -> list[tuple[str, str]]:
    """What is wrong with a tokenised Sample: nothing to train on, odd lists, too many tokens.

    `ended`: data.append_eos added a token to it.
    """
    found = []
    if sample.n_prompt == 0:
        why = "empty, and the tokenizer adds no first token, so nothing predicts the first one"
        found.append(("prompt", why))
    if sample.n_completion == 0:
        found.append(("completion", "no token to train on"))
    if sample.ids and max(sample.ids) >= vocab:
        why = f"token {max(sample.ids)} is outside the tokenizer's {vocab} entries"
        found.append(("completion_ids", why))
    for name, value in sample.columns.items():
        if isinstance(value, list | Tensor) and len(value) != sample.n_completion:
            why = f"{len(value)} values for {sample.n_completion} completion tokens"
            if ended and len(value) == sample.n_completion - 1:
                why += " (one is the end-of-sequence token that data.append_eos adds to a text)"
            found.append((name, why))
    cut = len(sample.ids) > max_length and too_long == "truncate"
    if cut and isinstance(sample.columns.get("ref_logps"), int | float):
        found.append(("ref_logps", "a sum over all tokens, but max_length cuts some: give a list"))
    if len(sample.ids) > max_length and too_long == "error":
        why = (
            f"{len(sample.ids)} tokens, the limit is {max_length}; raise it (data.max_length, "
            "score --max-length), or let data.too_long cut or drop"
        )
        found.append(("max_length", why))
    elif sample.n_prompt >= max_length and too_long == "truncate":
        found.append(("prompt", f"{sample.n_prompt} tokens fill max_length {max_length}{_LONGER}"))
    return found


_LONGER = "; raise it, or let data.too_long drop such rows"


def _close(name: str, known: Iterable[str]) -> bool:
    """A misspelling, not a column of the user's own: one or two letters off, or a plural."""
    return bool(difflib.get_close_matches(name, list(known), n=1, cutoff=0.8))


# A column that a model of the configuration stands for -> its key.
MODEL_OF = {"ref_logps": "ref_model"} | dict.fromkeys(teacher_columns.COLUMNS, "teacher_model")
_TEACHER = "; `pyoffline score --teacher-topk K` adds both, or name a `teacher_model`"
WHY = {
    teacher_columns.IDS: "distill reads the ids of the teacher's top-k" + _TEACHER,
    teacher_columns.LOGPS: "distill reads the log-probs of the teacher's top-k" + _TEACHER,
    "reward": "the rewards of rows are read",
    "group": "the rows of a group are compared, and stay together in a batch",
    "label": "the objective reads it: true for a good completion, false for a bad one",
    "greedy_reward": "`advantage` remax subtracts the reward of the prompt's greedy completion",
    "values": "`advantage` reads a critic's value, one per completion token",
    "log_sum_p2": "`advantage` reads log sum p^2; `pyoffline score --log-sum-p2` adds it",
}


def _why_needed(name: str) -> str:
    if name == "ref_logps":
        return "the objective reads it, one log-prob per completion token; or name a `ref_model`"
    if name in LOGPS:
        return "the objective reads it, one log-prob per completion token"
    if name == "advantages":
        made = "`advantage: {name: group_normalize}` makes it from reward"
        return f"the objective reads it; give the column, or {made}"
    return WHY.get(name, "the objective weights a term by it")


def _check_text(row: dict) -> list[tuple[str, str]]:
    found = []
    for name in ("prompt_ids", "completion_ids"):
        ids = row.get(name)
        if ids is not None and not (
            isinstance(ids, list) and all(type(i) is int and i >= 0 for i in ids)
        ):
            found.append((name, "expected a list of token ids"))
    for name in ("text", "prompt", "completion"):
        if row.get(name) is not None and not isinstance(row[name], str):
            found.append((name, f"expected a string, got {type(row[name]).__name__}"))
        else:
            found += _check_characters(name, row.get(name))
    if found:
        return found
    kinds = [
        k for k in ("text", "completion", "completion_ids", "messages") if row.get(k) is not None
    ]
    if "messages" in kinds:
        found += _check_messages(row["messages"])
    if not kinds:
        hint = nearest("completion", _unknown(row))
        found.append(
            (
                "completion",
                f"missing; a row needs completion, completion_ids, messages or text{hint}",
            )
        )
    elif "text" in kinds and len(kinds) > 1:
        found.append(("text", f"given beside {kinds[1]}; a row has one of them"))
    elif kinds[0] in ("completion", "completion_ids"):
        if row.get("prompt") is None and row.get("prompt_ids") is None:
            found.append(("prompt", f"missing{nearest('prompt', _unknown(row))}"))
        if not row[kinds[-1]]:
            found.append((kinds[-1], "empty; there is nothing to train on"))
    elif kinds[0] == "text" and not row["text"]:
        found.append(("text", "empty; there is nothing to train on"))
    return found


def _unknown(row: dict) -> list[str]:
    """Columns that a misspelt name may hide in."""
    return [k for k, v in row.items() if v is not None and k not in KNOWN]


def _check_messages(messages) -> list[tuple[str, str]]:
    good = isinstance(messages, list) and len(messages) >= 2
    good = good and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in messages
    )
    if not good:
        return [
            (
                "messages",
                "expected at least two {role: ..., content: ...}; the last one is trained on",
            )
        ]
    if messages[-1]["role"] != "assistant" or not messages[-1]["content"]:
        return [("messages", "the last message must be the assistant's, and not empty")]
    texts = [(f"messages[{i}].{k}", m[k]) for i, m in enumerate(messages) for k in MESSAGE]
    return [problem for where, text in texts for problem in _check_characters(where, text)]


def _check_characters(name: str, text: str | None) -> list[tuple[str, str]]:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"\\u{ord(text[error.start]):04x} at character {error.start + 1}"
        return [(name, f"{what} is half of a surrogate pair, no character: correct the text")]
    return []


def _check_number(name: str, value) -> list[tuple[str, str]]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return [(name, f"expected a number, got {value!r}")]
    if isinstance(value, float) and not math.isfinite(value):
        return [(name, f"{value} is not a finite number")]
    if abs(value) > FLOAT32_MAX:
        return [(name, f"beyond {FLOAT32_MAX:.1e}, the largest number that training can read")]
    return []


def _check_values(name: str, value, logps: bool) -> list[tuple[str, str]]:
    if not isinstance(value, list):
        if logps:
            return [(name, f"expected a list of log-probs, got {value!r}")]
        return _check_number(name, value)
    for i, x in enumerate(value):
        where = f"{name}[{i}]"
        bad = _check_logp(where, x) if logps else _check_number(where, x)
        if bad:
            return bad
    return []


def _check_logp(name: str, value) -> list[tuple[str, str]]:
    bad = _check_number(name, value)
    if not bad and value > TOLERANCE:
        return [(name, f"{value} is above 0, so it is not a log-prob")]
    return bad

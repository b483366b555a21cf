"""Preference rows: `prompt`, `chosen`, `rejected` in one row of a file become two rows of the usual
kind, with problems named by the columns of the file.

Not here: what a usual row must hold (row_checks.py), tokenising (data.py).
"""

from collections.abc import Iterable

from pyoffline.config import nearest

SIDES = ("chosen", "rejected")
# The column of a preference row for each side -> the column of the usual row.
SIDE_COLUMNS = {
    "{}": "completion",
    "{}_ids": "completion_ids",
    "ref_{}_logps": "ref_logps",
    "{}_reward": "reward",
}
POSITIVE = "positive"  # the gate of the chosen side: RPO's NLL
SHARED = ("prompt", "prompt_ids", "target")
KNOWN = (*SHARED, *(c.format(side) for side in SIDES for c in SIDE_COLUMNS))


def split(row: dict, gates: Iterable[str] = ()) -> tuple[list[tuple[str, str]], list[dict]]:
    """(problems, [the chosen row, the rejected row]); with problems there are no rows.

    A column of `gates` (that `weighted_by` names) holds for both sides, or is two, `chosen_<name>`
    and `rejected_<name>`. `positive` weighs the chosen side, 1 where it is not given, and is 0 on
    the rejected one.
    """
    problems = []
    for side in SIDES:
        if row.get(side) is None and row.get(f"{side}_ids") is None:
            known = [k for k in row if k not in KNOWN]
            hint = nearest(side, known)
            problems.append((side, f"missing; the objective compares chosen and rejected{hint}"))
    if not problems and all(
        row.get(f"{a}") == row.get(f"{b}") and row.get(f"{a}_ids") == row.get(f"{b}_ids")
        for a, b in [SIDES]
    ):
        problems.append(("rejected", "the same as chosen, so there is nothing to prefer"))
    target = row.get("target")
    good = isinstance(target, int | float) and not isinstance(target, bool) and 0 <= target <= 1
    if target is not None and not good:
        problems.append(("target", f"expected P(chosen beats rejected) in [0, 1], got {target!r}"))
    if problems:
        return problems, []
    others = {k: v for k, v in row.items() if k not in KNOWN}
    return [], [_side(row, side) | others | _gates(row, side, gates) for side in SIDES]


def _gates(row: dict, side: str, gates: Iterable[str]) -> dict:
    out = {}
    for name in gates:
        if row.get(f"{side}_{name}") is not None:
            out[name] = row[f"{side}_{name}"]
        elif name == POSITIVE:
            given = row.get(name) if row.get(name) is not None else 1.0
            out[name] = given if side == "chosen" else 0.0
    return out


def _side(row: dict, side: str) -> dict:
    out = {k: row[k] for k in SHARED if row.get(k) is not None}
    for column, name in SIDE_COLUMNS.items():
        value = row.get(column.format(side))
        if value is not None:
            out[name] = value
    turns = out.get("completion")
    if isinstance(turns, list):  # messages on both sides, with the prompt's in front or inside
        prompt = out.pop("prompt", [])
        del out["completion"]
        out["messages"] = (prompt if isinstance(prompt, list) else []) + turns
        if isinstance(prompt, str):
            out["messages"] = [{"role": "user", "content": prompt}, *turns]
    return out


def public_name(field: str, side: str | None, row: dict) -> str:
    """The name in the file of a column of one side: ref_logps[2] -> ref_chosen_logps[2]. `row` is
    that side's.
    """
    if side is None:
        return field
    if f"{side}_{field.partition('[')[0]}" in row:  # of weighted_by, one for each side
        return f"{side}_{field}"
    for column, name in SIDE_COLUMNS.items():
        if field == name or field.startswith(f"{name}["):
            return column.format(side) + field.removeprefix(name)
    return side if field == "messages" else field

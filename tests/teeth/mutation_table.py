"""What one mutation is: a bug put back by replacing text, and the tests that must see it.

Not here: the bugs (`mutations.py`: the historical ones, `more_mutations.py`: our own), the driver
(`run.py`).
"""

import ast
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutation:
    """Bug `number` of `file`: each `old` text occurs exactly once there and becomes its `new` one.

    `tests`: node ids, at least one of which must fail by assertion. `not_run`: why the bug cannot
    be put in here (then there are no edits). `note`: what stands in for the original, if that needs
    saying.
    """

    number: int
    name: str
    file: str = ""
    edits: tuple[tuple[str, str], ...] = ()
    tests: tuple[str, ...] = ()
    not_run: str = ""
    note: str = ""


def one(number, name, file, old, new, *tests) -> Mutation:
    """A mutation of one edit."""
    return Mutation(number, name, file, ((old, new),), tests)


def apply(mutation: Mutation, root: Path) -> str:
    """The text of the mutated file. ValueError: an old text is not there exactly once."""
    text = (root / mutation.file).read_text()
    for old, new in mutation.edits:
        if text.count(old) != 1:
            raise ValueError(
                f"mutation {mutation.number} ({mutation.name}): its text occurs "
                f"{text.count(old)} times in {mutation.file}, expected once; the code moved, so "
                f"move the mutation with it:\n{old}"
            )
        if old == new:
            raise ValueError(f"mutation {mutation.number}: an edit changes nothing")
        text = text.replace(old, new)
    return text


def test_functions(path: Path) -> set[str]:
    """Names of the test functions of a file."""
    tree = ast.parse(path.read_text(), str(path))
    return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name[:5] == "test_"}


def problems(mutation: Mutation, root: Path) -> list[str]:
    """What is rotten in a row of the table."""
    found = []
    if mutation.not_run:
        if mutation.edits or mutation.tests:
            found.append("is not run, but has edits or tests")
        return found
    try:
        text = apply(mutation, root)
        if mutation.file.endswith(".py"):
            ast.parse(text)
    except (OSError, ValueError, SyntaxError) as error:
        found.append(str(error))
    if not mutation.edits or not mutation.tests:
        found.append("has no edit or no test")
    for test in mutation.tests:
        file, _, name = test.partition("::")
        if not (root / file).is_file():
            found.append(f"{file} is not there")
        elif name.partition("[")[0] not in test_functions(root / file):
            found.append(f"{file} has no {name.partition('[')[0]}")
    return found

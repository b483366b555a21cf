"""The table of re-injected bugs cannot rot: each text is still there exactly once, each named test
exists. What the suite catches is measured by `make teeth` (tests/teeth/run.py), not here.
"""

import subprocess
import sys
from pathlib import Path

import pytest

TEETH = Path(__file__).parent / "teeth"
sys.path.insert(0, str(TEETH))
from kernel_mutations import KERNELS  # noqa: E402
from more_mutations import MORE  # noqa: E402
from mutation_table import ROOT, Mutation, problems  # noqa: E402
from mutations import HISTORICAL  # noqa: E402

sys.path.remove(str(TEETH))
FILE, TEST = "pyoffline/metrics.py", "tests/test_teeth.py::test_no_row_of_the_table_is_rotten"


@pytest.mark.parametrize("mutation", [*HISTORICAL, *MORE, *KERNELS], ids=lambda m: str(m.number))
def test_no_row_of_the_table_is_rotten(mutation):
    assert problems(mutation, ROOT) == []


def test_every_named_test_is_collected():
    """By its whole id: a fixture that gets parameters changes the ids of all that use it."""
    named = sorted({test for m in [*HISTORICAL, *MORE, *KERNELS] for test in m.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *named], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_is_the_list_of_the_thirty_and_at_least_fifteen_more():
    assert [m.number for m in HISTORICAL] == list(range(1, 31))
    own = [m.number for m in (*MORE, *KERNELS)]
    assert own == list(range(101, 101 + len(own))) and len(own) >= 15
    assert all(
        m.not_run.split(":")[0] in ("gpu", "vocab-parallel") for m in HISTORICAL if m.not_run
    )


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Mutation(1, "x", FILE, (("no such text", "y"),), (TEST,)), "occurs 0 times"),
        (Mutation(1, "x", FILE, (("import", "y"),), (TEST,)), "expected once"),
        (Mutation(1, "x", FILE, (("import torch\n", "import (\n"),), (TEST,)), "invalid syntax"),
        (Mutation(1, "x", FILE, (("import torch\n", "import torch\n"),), (TEST,)), "nothing"),
        (Mutation(1, "x", "gone.py", (("a", "b"),), (TEST,)), "gone.py"),
        (Mutation(1, "x", FILE, (), ()), "no edit"),
        (Mutation(1, "x", FILE, (("import torch\n", ""),), (TEST + "_not",)), "has no test_no_row"),
        (Mutation(1, "x", not_run="gpu", tests=(TEST,)), "is not run, but"),
    ],
)
def test_the_checker_itself_has_teeth(row, words):
    found = " ".join(problems(row, ROOT))
    assert words in found, found

"""The Triton kernels compile ahead of time for five chips; what the compiler made of them is kept.

tests/triton_table.json holds registers, shared memory and spills of every variant (`python
tests/triton_compile.py` writes it, with the Triton version it names). Here the table's own promises
are checked, and a few variants are compiled again and compared with it: all of them takes minutes.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="not run: triton is not installed"
)
TABLE = json.loads((Path(__file__).parent / "triton_table.json").read_text())
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942", "gfx950")
ENTRIES = [(n, t, f) for n, row in TABLE["kernels"].items() for t, f in row.items()]
# Compiled again on every run: the main kernel on each chip's family, and the small one.
AGAIN = [
    ("row_pass ppo+kl+entropy bf16", "sm_90"),
    ("row_pass ppo+kl+entropy bf16", "gfx942"),
    ("scale_by_upstream bf16", "sm_80"),
    ("scale_by_upstream bf16", "sm_100"),
]


def holds(name, target, facts):
    """No spill, no local memory, 16-byte accesses, 64-bit row offsets."""
    assert facts["spills"] == 0, (name, target)
    assert facts["registers"] <= (128 if target.startswith("sm") else 256)
    assert facts["wide_loads"] > 0, "no 16-byte load"
    if "statistics" not in name and "fp32 to bf16" not in name:  # that one stores 8 bytes
        assert facts["wide_stores"] > 0, "no 16-byte store"
    if target.startswith("sm"):
        assert facts["local"] == 0
        assert facts["wide_offsets"] > 0, "offsets of rows are not 64-bit"


def test_the_table_has_every_variant_for_every_chip():
    from triton_compile import variants

    assert set(TABLE["kernels"]) == set(variants())
    assert all(set(row) == set(TARGETS) for row in TABLE["kernels"].values())


@pytest.mark.parametrize("name, target, facts", ENTRIES, ids=[f"{n} {t}" for n, t, _ in ENTRIES])
def test_the_table_promises(name, target, facts):
    holds(name, target, facts)


@pytest.fixture(scope="module")
def again():
    """In a process of its own: the interpreter's tests patch what the compiler hashes."""
    names = [f"{name}|{target}" for name, target in AGAIN]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("triton_compile.py"), *names]
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(AGAIN, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name, target", AGAIN)
def test_compiled_again_it_is_what_the_table_says(name, target, again):
    """Another Triton may count differently: then only the promises are compared."""
    import triton

    facts = again[name, target]
    holds(name, target, facts)
    if triton.__version__ == TABLE["triton"]:
        assert facts == TABLE["kernels"][name][target]

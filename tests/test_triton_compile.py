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
# Shared memory of a program, in bytes, as the chips' manuals have it.
SHARED = {
    "sm_80": 163 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
}
# What the scoring product must be made of, for 16-bit inputs and for fp32 ones ("ieee": no matrix
# instruction that rounds its inputs).
MATRIX = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma", "gfx950": "mfma"}
# Compiled again on every run: the main kernel on each chip's family, and the small ones. All in one
# process, as a training step and its scoring are.
AGAIN = [
    ("row_pass ppo+kl+entropy bf16", "sm_90"),
    ("row_pass ppo+kl+entropy bf16", "gfx942"),
    ("scale_by_upstream bf16", "sm_80"),
    ("scale_by_upstream bf16", "sm_100"),
    ("score_tiles bf16", "sm_90"),
    ("score_tiles bf16", "gfx950"),
    ("score_tiles epilogue bf16", "sm_90"),
    ("score_finish ppo+kl+entropy", "sm_90"),
]


def holds(name, target, facts):
    """No spill, no local memory, 64-bit row offsets, what fits the chip; and the kernel's own."""
    assert facts["spills"] == 0, (name, target)
    assert facts["shared"] <= SHARED[target]
    if target.startswith("sm"):
        assert facts["local"] == 0
        assert facts["wide_offsets"] > 0, "offsets of rows are not 64-bit"
    if name.startswith("score_tiles"):
        holds_for_tiles(name, target, facts)
        return
    assert facts["registers"] <= (128 if target.startswith("sm") else 256)
    if name.startswith(("score_finish", "label_logits")):  # a few loads a row
        return
    assert facts["wide_loads"] > 0, "no 16-byte load"
    if "statistics" not in name and "fp32 to bf16" not in name:  # that one stores 8 bytes
        assert facts["wide_stores"] > 0, "no 16-byte store"


def holds_for_tiles(name, target, facts):
    """Matrix instructions where they keep the inputs, tiles by descriptor or in 16 bytes."""
    is_nvidia, is_fp32 = target.startswith("sm"), name.endswith(" fp32")
    assert facts["registers"] <= (255 if is_nvidia else 256)
    if "epilogue" in name and "unaligned" not in name:
        assert facts["wide_stores"] > 0, "no 16-byte store"
    matrix = {k for k in ("wgmma", "tcgen05", "mma", "mfma") if facts.get(k)}
    assert matrix == (set() if is_fp32 and is_nvidia else {MATRIX[target]})
    if "unaligned" in name:
        assert not facts.get("tma"), "rows that no descriptor takes"
    elif is_nvidia and target != "sm_80" and not is_fp32 and "tf32" not in name:
        assert facts["tma"] > 0, "no tile comes through a descriptor"
    else:
        assert facts.get("copies", 0) + facts["wide_loads"] > 0, "no 16-byte copy"


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

"""The Triton kernels compile ahead of time for five chips; what the compiler made of them is kept.

tests/triton_table.json holds registers, shared memory and spills of every variant, and a
fingerprint of what was compiled (`make triton-table` writes it, with the Triton version it names).
Here the table's promises are checked, that it is of the kernels as they are (every fingerprint is
formed again, which takes seconds), and a few variants are compiled again: all of them takes
minutes.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sass_loops import innermost_loops, spills_in_loops

from pyoffline.kernels.configs import ROW_WARPS

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="not run: triton is not installed"
)
ROOT = Path(__file__).parents[1]
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
# Registers of a thread: as many as let the programs that configs.py counts on be on a processor
# (NVIDIA: 65,536 of them; AMD: 131,072). A row pass with smoothing, a long program or split rows
# has half the threads; the tiles of scoring take what a thread may have.
THREADS = max(32 * warps * per_sm for _, warps, per_sm in ROW_WARPS)
HALVED = r"row_pass (table|smoothing|statistics with gap|.*unaligned|.*unlike)"
# Bytes of stack on sm_100 alone, where rows are masked at their ends: offsets that are formed once
# and read back a few times a row, never in a sweep ("looped_spills"). Half the groups a thread
# would leave none, and half the bytes in flight.
STACK = {
    "row_pass ppo+kl+entropy bf16 shifted": 136,
    "row_pass ppo+kl+entropy bf16 shifted all of the head": 24,
}
# Compiled again on every run: each kernel, each chip. All in one process, as a training step and
# its scoring are.
AGAIN = [
    ("row_pass ppo+kl+entropy bf16", "sm_90"),
    ("row_pass ppo+kl+entropy bf16", "gfx942"),
    ("row_pass statistics bf16", "sm_80"),
    ("row_pass smoothing bf16", "sm_100"),
    ("row_pass smoothing bf16 all of the head", "gfx950"),
    ("distill jsd bf16", "sm_100"),
    ("distill renyi_divergence bf16", "gfx942"),
    ("scale_by_upstream bf16", "sm_80"),
    ("scale_by_upstream bf16", "sm_100"),
    ("score_tiles bf16", "sm_90"),
    ("score_tiles bf16", "gfx950"),
    ("score_tiles epilogue bf16", "sm_90"),
    ("score_tiles epilogue again bf16", "sm_100"),
    ("score_finish table", "sm_90"),
    ("label_logits bf16", "gfx950"),
]


def holds(name, target, facts):
    """No spill but those named, no local memory, 64-bit row offsets, what fits the chip; and the
    kernel's own.
    """
    assert facts["spills"] <= (STACK.get(name, 0) if target == "sm_100" else 0), (name, target)
    assert facts.get("looped_spills", 0) == 0, (name, target)
    assert facts["shared"] <= SHARED[target]
    if target.startswith("sm"):
        assert facts["local"] == 0
        assert facts["wide_offsets"] > 0, "offsets of rows are not 64-bit"
    if name.startswith("score_tiles"):
        holds_for_tiles(name, target, facts)
        return
    threads = THREADS // (2 if re.match(HALVED, name) else 1)
    assert facts["registers"] <= ((64 if target.startswith("sm") else 128) << 10) // threads
    if name.startswith(("score_finish", "label_logits")):  # a few loads a row
        return
    if re.search("unaligned|unlike|of any size", name):  # element by element
        return
    assert facts["wide_loads"] > 0, "no 16-byte load"
    # rows that are stored, and that are not narrower than others of their tile (8 bytes)
    if not re.search("statistics|fp32 to |teacher", name):
        assert facts["wide_stores"] > 0, "no 16-byte store"


def holds_for_tiles(name, target, facts):
    """Matrix instructions where they keep the inputs, tiles by descriptor or in 16 bytes."""
    is_nvidia, kind = target.startswith("sm"), re.search("bf16|fp16|fp32|tf32", name)[0]
    assert facts["registers"] <= (255 if is_nvidia else 256)
    if "epilogue" in name and "unaligned" not in name:
        assert facts["wide_stores"] > 0, "no 16-byte store"
    matrix = {k for k in ("wgmma", "tcgen05", "mma", "mfma") if facts.get(k)}
    assert matrix == (set() if kind == "fp32" and is_nvidia else {MATRIX[target]})
    if "unaligned" in name:
        assert not facts.get("tma"), "rows that no descriptor takes"
    elif is_nvidia and target != "sm_80" and kind != "fp32":
        assert facts["tma"] > 0, "no tile comes through a descriptor"
    else:
        assert facts.get("copies", 0) + facts["wide_loads"] > 0, "no 16-byte copy"
    if matrix & {"wgmma", "tcgen05"}:
        assert not facts.get("copies"), "cp.async, which Triton 3.7.0 does not fence from these"


def run_script(*arguments):
    """In a process of its own: the interpreter's tests patch what the compiler hashes."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("triton_compile.py"), *arguments]
    done = subprocess.run(
        command,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_table_is_of_the_kernels_as_they_are():
    """A kernel, an objective, a launch or a variant that changed, and no `make triton-table`."""
    kept = {n: {t: f["fingerprint"] for t, f in row.items()} for n, row in TABLE["kernels"].items()}
    now = run_script("--fingerprints")
    stale = [n for n in sorted({*kept, *now}) if kept.get(n) != now.get(n)]
    assert not stale, f"run `make triton-table`: {len(stale)} of {len(now)} variants, {stale[:3]}"


def test_what_a_loop_spills_is_counted_apart():
    lines = ("STL [R1], R2", "LDL R3, [R1]", "@P0 BRA 0x010", "LDL R4, [R1]", "@!P1 BRA 0x000")
    text = "\n".join(f"        /*{16 * i:04x}*/   {line} ;" for i, line in enumerate(lines))
    assert innermost_loops(text) == [list(lines[1:3])] and spills_in_loops(text) == 1


def test_every_kernel_has_variants_for_every_chip():
    texts = (p.read_text() for p in (ROOT / "kernels").glob("*.py"))
    kernels = {name for text in texts for name in re.findall(r"^def (\w+)_kernel\(", text, re.M)}
    assert {(k, t) for k in kernels for t in TARGETS} == {(n.split()[0], t) for n, t, _ in ENTRIES}
    assert kernels == {name.split()[0] for name, _ in AGAIN}
    assert set(TARGETS) == {target for _, target in AGAIN}


@pytest.mark.parametrize("name, target, facts", ENTRIES, ids=[f"{n} {t}" for n, t, _ in ENTRIES])
def test_the_table_promises(name, target, facts):
    holds(name, target, facts)


@pytest.fixture(scope="module")
def again():
    found = run_script(*(f"{name}|{target}" for name, target in AGAIN))
    return dict(zip(AGAIN, found, strict=True))


@pytest.mark.parametrize("name, target", AGAIN)
def test_compiled_again_it_is_what_the_table_says(name, target, again):
    """Another Triton may count differently: then only the promises are compared."""
    import triton

    facts = again[name, target]
    holds(name, target, facts)
    if triton.__version__ == TABLE["triton"]:
        assert facts == TABLE["kernels"][name][target]

"""GPU tests on an emulated GPU: what Triton's compiler and nvcc make of the kernels runs here,
instruction by instruction (tests/emulator), not an interpreter's idea of it.

tests/emulated and a choice of tests/test_gpu_*.py, a process for each compute capability; `make
emulate` runs more of them, for hours. What the emulator cannot tell: time, the order in which
tensor cores add, AMD's chips, Blackwell's tensor memory.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.triton_driver import COMPILER

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not COMPILER or sys.platform != "linux",
    reason="not run: needs triton, Linux and a C compiler",
)
KERNELS = "n4 or n6 or (n10 and bfloat16) or masked"
# (compute capability, file, choice): small rows, each promise of the kernels once
CHOSEN = [
    (90, "emulated/test_products.py", ""),
    (80, "emulated/test_products.py", ""),
    (90, "emulated/test_row_pass.py", ""),
    (90, "emulated/test_score.py", ""),
    (80, "emulated/test_score.py", "tails"),
    (90, "test_gpu_numbers.py", KERNELS),
    (90, "test_gpu_distill.py", "half_precision and head and dtype0"),
]


@pytest.mark.parametrize("capability, file, chosen", CHOSEN)
def test_on_an_emulated_gpu(capability, file, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    if file.startswith("test_gpu"):
        command += ["-p", "emulator.plugin", "-m", "gpu"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYOFFLINE_EMULATE": str(capability), "PYTHONPATH": path}
    command.append(str(HERE / file))
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0

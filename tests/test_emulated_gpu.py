"""GPU tests on an emulated GPU: what Triton's compiler and nvcc make of the kernels runs here,
instruction by instruction (tests/emulator), not an interpreter's idea of it.

A choice of tests/test_gpu_*.py, each process a compute capability; `make emulate` runs all that can
run so (an hour). What the emulator cannot tell: time, tensor-core rounding order, AMD.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not shutil.which("cc") or sys.platform != "linux",
    reason="not run: needs triton, Linux and a C compiler",
)
# (capability, file, choice): small rows, both of 16 bits and fp32, each promise once
CHOSEN = [
    (90, "test_gpu_numbers.py", "n4 or n5 or n6 or (n10 and bfloat16) or masked or custom"),
    (
        80,
        "test_gpu_numbers.py",
        "(n1_heads and bfloat16) or (n2 and nan) or (within and (255 or 4096))",
    ),
    (90, "test_gpu_distill.py", "half_precision"),
]


@pytest.mark.parametrize("capability, file, chosen", CHOSEN)
def test_on_an_emulated_gpu(capability, file, chosen):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "emulator.plugin", "-p",
               "no:cacheprovider", "-m", "gpu", "-k", chosen, str(HERE / file)]  # fmt: skip
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYOFFLINE_EMULATE": str(capability), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0

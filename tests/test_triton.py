"""The Triton kernels in Triton's interpreter: each file of tests/interpreter in its own process,
with TRITON_INTERPRET=1 from the first import on. What fails there is printed here.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent / "interpreter"
MISSING = importlib.util.find_spec("triton") is None
pytestmark = pytest.mark.skipif(MISSING, reason="not run: triton is not installed")


@pytest.mark.parametrize("name", sorted(p.name for p in HERE.glob("test_*.py")))
def test_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / name)]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 0

"""Every Triton kernel is launched as on an H100, through Triton's own launcher, with a stand-in for
the driver (triton_launch.py, cpp/driver_stub.c): argument types, descriptors, what recompiles.

Not here: what the kernels compute (test_triton.py in the interpreter, test_gpu_*.py on a device).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from emulator.triton_driver import COMPILER, build_stub

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not COMPILER or sys.platform != "linux",
    reason="not run: needs triton, Linux and a C compiler",
)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """{case: launches, shape of the last one, variants of the row pass that it compiled}"""
    folder = tmp_path_factory.mktemp("driver")
    build_stub(folder)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(ROOT / "tests/triton_launch.py"), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# (launches, threads of the last one, its shared memory is more than a plain launch may have)
WANTED = {
    "row pass": (1, 512, False),
    "row pass, other values": (4, 512, False),
    "row pass, fp32 to bf16": (1, 512, False),
    "row pass, given coefficients": (1, 256, False),
    "row pass, the head's options": (1, 512, False),
    "scale": (1, 512, False),
    "score by descriptors": (2, 32, False),
    "score, rows of 140 bytes": (2, 32, False),
    "score fp32": (2, 32, False),
    "epilogue": (4, 128, True),
    "distill": (1, 256, False),
}


def test_each_kernel_is_launched(launched):
    got = {
        name: (found["launches"], found["shape"][1], found["shape"][2] > 48 << 10)
        for name, found in launched.items()
    }
    assert got == WANTED


def test_sizes_strides_ids_and_hyper_parameters_do_not_recompile(launched):
    """One row, 16 rows, an ignore_index of 1, another clip: values that Triton specialises on."""
    assert launched["row pass"]["compiled"] == 1
    assert launched["row pass, other values"]["compiled"] == 0

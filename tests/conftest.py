"""What every test run shares: GPU tests are left out by name where there is no GPU, and counted.

A test that this machine cannot run is reported as "not run", never as passed. With pytest-xdist the
workers collect and the controller reports.
"""

import gc
import os

import pytest
import torch

# The files that take minutes, started first so that no process is left with one at the end.
LONGEST = (
    "test_triton.py",
    "test_emulated_gpu.py",
    "test_packaging.py",
    "test_compile.py",
    "test_memory.py",
)
# A GPU, or one that is emulated (tests/emulator/plugin.py).
HAS_GPU = torch.cuda.is_available() or "PYOFFLINE_EMULATE" in os.environ
_not_run = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONGEST)
    if HAS_GPU:
        return
    _not_run[:] = [item for item in items if item.get_closest_marker("gpu")]
    if _not_run:
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=_not_run)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["not_run"] = [item.nodeid for item in _not_run]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    _not_run[:] = getattr(node, "workeroutput", {}).get("not_run", _not_run)


def pytest_terminal_summary(terminalreporter):
    if not HAS_GPU:
        terminalreporter.write_line(f"not run: {len(_not_run)} gpu tests (no GPU)")


@pytest.fixture
def one_thread():
    """Tiny shapes on one thread: on a busy machine a barrier costs more than the test."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def frozen_heap():
    """What is imported leaves the collector's sight: accelerate collects once a run, and that took
    more than half of a tiny one.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(params=["mkl", "tiles"])
def bf16_kernel(request):
    """What multiplies bf16 on the CPU backend: MKL, or oneDNN's tile kernel."""
    from pyoffline import _C

    if request.param == "tiles" and not _C.gemm_info()["tiles"]:
        pytest.skip("not run: no bf16 tile kernel (CPU without avx512_bf16, or another torch)")
    _C.set_tile_gemm(request.param == "tiles")
    yield request.param
    _C.set_tile_gemm(True)

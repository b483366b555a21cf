"""pytest plugin: the GPU tests (tests/test_gpu_*.py) on an emulated GPU.

    PYOFFLINE_EMULATE=90 python -m pytest -p emulator.plugin -m gpu tests/test_gpu_numbers.py -k n10

Their device is the CPU; of what the library launches, kernels alone are emulated, and products are
torch's. Tests that speak of streams, graphs, a second device or gigabytes cannot run so: choose.
Not here: the choice (test_emulated_gpu.py).
"""

import os
import shutil
import sys
import types

import pytest

CAPABILITY = int(os.environ["PYOFFLINE_EMULATE"])
FP64 = "computes in fp32 (emulated)"


def _why_not(name):
    import torch

    return lambda device, dtype: f"{name} {FP64}" if dtype == torch.float64 else None


class _Launched:
    """How often a kernel of either backend ran."""

    cuda = 0

    @classmethod
    def count(cls) -> int:
        from emulator.triton_driver import LAUNCHES

        return cls.cuda + len(LAUNCHES)


def serve_cpu_tensors():
    """The triton backend serves tensors of the CPU, and no other device is asked for."""
    from pyoffline import autograd

    backends = sys.modules["pyoffline.backends"]
    backends.interpreting = lambda: True
    backends._why_not_triton = _why_not("triton")
    autograd.is_read_by_host = lambda upstream, grad: False


def serve_cuda():
    """The cuda backend too, its kernels as nvcc makes them."""
    from emulator import cuda_library

    from pyoffline import _C, cuda_backend

    arch = {80: "sm_80", 90: "sm_90a"}[CAPABILITY]

    def row_pass(logits, labels, *, stream, **keywords):
        _Launched.cuda += 1
        cuda_library.row_pass(arch, logits, labels, **keywords)

    def scale(grad, upstream, *, stream):
        _Launched.cuda += 1
        cuda_library.scale_by_upstream(arch, grad, upstream)

    sys.modules["pyoffline.backends"]._why_not_cuda = _why_not("cuda")
    cuda_backend.stream_of = lambda device: 0
    _C.cuda_row_pass, _C.cuda_scale_by_upstream = row_pass, scale


def pytest_configure(config):
    from emulator.triton_driver import install

    install(CAPABILITY)
    import gpu_cases
    import torch
    from emulator import tiles

    from pyoffline.kernels import score_rows

    serve_cpu_tensors()
    if shutil.which("nvcc"):
        serve_cuda()
    tiles.put(CAPABILITY, score_rows)
    gpu_cases.DEVICE = "cpu"
    torch.Tensor.cuda = lambda self, *a, **k: self.clone()
    torch.cuda.current_stream = lambda device=None: types.SimpleNamespace(cuda_stream=0)


@pytest.fixture(autouse=True)
def _launches_are_counted():
    """A test in which no kernel ran has shown nothing here."""
    before = _Launched.count()
    yield
    assert _Launched.count() > before, "no kernel was launched"

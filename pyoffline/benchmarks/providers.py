"""Peers: other ways to compute the same loss, run where they are installed.

A provider says why it is not there, or hands out its call; each call takes (hidden, weight,
inputs). Not here: their timing and its limits (`runner.py`).
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MISSING = "not installed"


@dataclass(frozen=True)
class Provider:
    """`load` returns the call or raises ImportError. `compiles`: warm up at full size."""

    name: str
    load: Callable[[], Callable]
    compiles: bool = False
    logit_nbytes: int = 16  # bytes per logit at the peak, to skip what would not fit in memory
    note: str = ""
    kinds: tuple[str, ...] = ("cpu", "cuda")  # devices


def eager(call) -> Provider:
    """Plain PyTorch: the whole [N, V] logits, fp32 log-softmax, autograd."""
    return Provider("torch eager", lambda: call)


def torch_compiled(call) -> Provider:
    """torch.compile of the same text."""

    def load():
        torch.compiler.reset()
        return torch.compile(call, dynamic=False)

    return Provider("torch.compile", load, compiles=True)


def _torch_chunked():
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no F.linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()

    def call(hidden, weight, inputs):
        return F.linear_cross_entropy(hidden, weight, inputs.labels, options=options)

    return call


TORCH_CHUNKED = Provider("F.linear_cross_entropy, options", _torch_chunked, logit_nbytes=8)


def _cce_module():
    """cut-cross-entropy's torch_compile path; the rest of that package needs triton at import.

    Where triton is absent, that path's own file is loaded without the package's __init__.
    """
    name = "cut_cross_entropy"
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(MISSING)
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        package = types.ModuleType(name)
        package.__path__ = list(spec.submodule_search_locations)
        sys.modules[name] = package
    return importlib.import_module(f"{name}.torch_compile")


def _cut_cross_entropy():
    function = _cce_module().torch_compile_linear_cross_entropy

    def call(hidden, weight, inputs):
        return function(hidden, weight, inputs.labels)

    return call


CUT_CROSS_ENTROPY = Provider(
    "cut-cross-entropy, torch_compile",
    _cut_cross_entropy,
    compiles=True,
    note="without triton only this path's file is loaded: the package imports triton",
)


def _of_package(package: str, module: str, function: str, **options):
    """A peer's fused linear cross entropy, called (hidden, weight, labels, **options)."""

    def load():
        if importlib.util.find_spec(package) is None:
            raise ImportError(MISSING)
        fused = getattr(importlib.import_module(module), function)

        def call(hidden, weight, inputs):
            return fused(hidden, weight, inputs.labels, **options)

        return call

    return load


GPU_ONLY = ("cuda",)
CUT_CROSS_ENTROPY_TRITON = Provider(
    "cut-cross-entropy",
    _of_package("cut_cross_entropy", "cut_cross_entropy", "linear_cross_entropy", impl="cce"),
    logit_nbytes=1,
    kinds=GPU_ONLY,
)
LIGER = Provider(
    "liger",
    _of_package(
        "liger_kernel", "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"
    ),
    logit_nbytes=4,
    kinds=GPU_ONLY,
)
QUACK = Provider(
    "quack",
    _of_package("quack", "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
    logit_nbytes=4,
    kinds=GPU_ONLY,
)

"""The table of backends: which one serves which op, what is picked, and why not the others.

`use_backend("cpu")` overrides the choice for a block; asking for a backend that is not there
raises with the reason. Nothing falls back in silence: "auto" takes the first available backend of
the op's row. Not here: the backends.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass

import torch

from pyoffline.overrides import Override

DISTILL = "linear_distill_loss"
OPS = ("linear_policy_loss", "policy_loss", "linear_token_logps", "token_logps", DISTILL)
NAMES = ("reference", "cpu", "triton", "cuda")
MODULES = {
    "reference": "pyoffline.reference",
    "cpu": "pyoffline.cpu",
    "triton": "pyoffline.triton_backend",
    "cuda": "pyoffline.cuda_backend",
}
GPU_BACKENDS = ("cuda", "triton")
TRITON = (3, 6)  # what the kernels compile with; torch 2.10 has it, torch 2.6 has 3.2
# Ops that are modules of their own; a backend that is not in its row does not serve the op.
OP_MODULES = {
    DISTILL: {
        "reference": "pyoffline.reference_distill",
        "cpu": "pyoffline.cpu_distill",
        "triton": "pyoffline.triton_distill",
    }
}


@dataclass(frozen=True)
class Order:
    """The first available of `names` is picked, for the reason `why`."""

    names: tuple[str, ...]
    why: str


# The order of two backends of one device is set by a committed benchmark, which `why` names.
ORDER = {
    "cpu": Order(
        ("cpu", "reference"),
        "the reference is plain PyTorch, which bench/results/cpu has beside ours",
    ),
    "cuda": Order(
        (*GPU_BACKENDS, "reference"),
        "no GPU result is committed in bench/results yet: cuda before triton by arithmetic "
        "(csrc/cuda/README.md: one read and one write of a logit), not by measurement",
    ),
}

_choice = Override("backend", "auto")


def why_not(
    name: str, device: str, dtype: torch.dtype | None = None, op: str | None = None
) -> str | None:
    """None when the backend can serve tensors on this device, else the reason in words."""
    if name not in OP_MODULES.get(op, NAMES):
        return f"the {name} backend has no {op}"
    if name == "reference":
        return None
    if name == "triton":
        return _why_not_triton(device, dtype)
    if name == "cuda":
        return _why_not_cuda(device, dtype)
    if device != "cpu":
        return f"the cpu backend serves CPU tensors, these are on {device}"
    if dtype == torch.float64:
        return "the cpu backend computes in fp32; fp64 inputs run on the reference backend"
    return _why_no_extension()


def _why_no_extension() -> str | None:
    try:
        module = importlib.import_module("pyoffline._C")
    except ImportError as error:
        return f"pyoffline._C is not built ({error}); reinstall with a C++17 compiler"
    return (
        None if module.abi() == 1 else f"pyoffline._C has ABI {module.abi()}, expected 1: rebuild"
    )


def _why_not_cuda(device: str, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "the cuda backend computes in fp32; fp64 inputs run on the reference backend"
    if reason := _why_no_extension():
        return reason
    if device != "cuda":
        return f"the cuda backend serves GPU tensors, these are on {device}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _why_not_on_device(torch.cuda.current_device())


@functools.cache
def _why_not_on_device(index: int) -> str | None:
    """What the driver says: asked once, because it costs several calls."""
    return importlib.import_module("pyoffline._C").cuda_why_not(index) or None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors (tests)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(device: str, dtype: torch.dtype | None) -> str | None:
    if dtype == torch.float64:
        return "the triton backend computes in fp32; fp64 inputs run on the reference backend"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'pyoffline[triton]' (Linux)"
    if interpreting():
        return None if device == "cpu" else "TRITON_INTERPRET=1 is set: CPU tensors only"
    if device != "cuda":
        return f"the triton backend serves GPU tensors, these are on {device}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    if torch.version.hip is None and torch.cuda.get_device_capability() < (8, 0):
        return "the triton backend needs compute capability 8.0 (Ampere) or later"
    return why_not_triton_version(importlib.import_module("triton").__version__)


def why_not_triton_version(version: str) -> str | None:
    """What is wrong with this Triton, or None."""
    major, minor = (int(x) for x in version.split(".")[:2])
    if (major, minor) >= TRITON:
        return None
    wanted = ".".join(map(str, TRITON))
    return f"the triton backend needs triton {wanted} or later, this is {version}: update torch"


@contextlib.contextmanager
def use_backend(name: str):
    """Use this backend ("reference", "cpu", "triton", "cuda" or "auto") inside the block.

    Raises ValueError for an unknown name at once, RuntimeError with the reason for one that is not
    there.
    """
    if name not in (*NAMES, "auto"):
        raise ValueError(f"use_backend: expected one of {', '.join(NAMES)}, auto; got {name!r}")
    home = "cpu" if name == "cpu" or interpreting() else "cuda"
    if name in ("cpu", "triton", "cuda") and (reason := why_not(name, home)):
        raise RuntimeError(f"use_backend({name!r}): {reason}")
    with _choice.set(name):
        yield


def pick(device: str, dtype: torch.dtype, op: str | None = None) -> str:
    """The backend for tensors of this device and dtype (and this op).

    A compiled graph carries "auto" and picks when it runs, so that `use_backend` holds for it too
    and nothing has to be guarded on.
    """
    if torch.compiler.is_compiling():
        return "auto"
    name = _choice.get()
    if name != "auto":
        reason = why_not(name, device, dtype, op)
        if reason:
            raise RuntimeError(f"backend {name!r}: {reason}")
        return name
    names = ORDER[device].names if device in ORDER else ("reference",)
    return next(n for n in names if why_not(n, device, dtype, op) is None)


def scaling_backend(grad: torch.Tensor) -> str | None:
    """The GPU backend that multiplies this gradient by an upstream on the device, or None.

    Not `use_backend`'s: the product is the same whoever forms it.
    """
    kind = grad.device.type
    return next((n for n in GPU_BACKENDS if why_not(n, kind, grad.dtype) is None), None)


def load(name: str, x: torch.Tensor, op: str | None = None):
    """The module of a backend; of "auto" the one picked now, for `x`.

    It has `linear(LinearCall)` and `logits(LogitsCall)`, or for an op of OP_MODULES its function.
    """
    if name == "auto":
        name = pick(x.device.type, x.dtype, op)
    return importlib.import_module(OP_MODULES.get(op, MODULES)[name])


@dataclass(frozen=True)
class BackendTable:
    """Rows (op, device, picked, ((other, why not), ...)) and (device, Order) pairs; print it."""

    rows: tuple
    orders: tuple = ()

    def __str__(self) -> str:
        lines = [f"{'op':<20} {'device':<7} {'picked':<10} others"]
        for op, device, picked, others in self.rows:
            notes = "; ".join(f"{name}: {reason}" for name, reason in others)
            lines.append(f"{op:<20} {device:<7} {picked:<10} {notes}")
        for device, order in self.orders:
            lines.append(f"order on {device}: {', '.join(order.names)}; {order.why}")
        return "\n".join(lines)


def backends() -> BackendTable:
    """What is there, what is picked per op and device, why not the others; print it."""
    rows = []
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        for op in OPS:
            picked = pick(device, torch.float32, op)
            others = []
            for name in NAMES:
                if name == picked:
                    continue
                reason = why_not(name, device, op=op)
                if reason is None:
                    forced = f"use_backend({_choice.get()!r}) is in force"
                    slower = f"available, after {picked} in the order for {device}"
                    reason = slower if _choice.get() == "auto" else forced
                others.append((name, reason))
            rows.append((op, device, picked, tuple(others)))
    return BackendTable(tuple(rows), tuple(ORDER.items()))

"""Triton's driver of a GPU that is emulated: what Triton compiles for it runs, its PTX interpreted.

    install(90)                # before the first launch; CPU tensors are then the device's
    kernel[grid](tensor, ...)  # Triton's own specialisation, compiler, launcher
    LAUNCHES[-1].counts        # what it did

Binder, compiler and launcher are Triton's; its driver library is tests/cpp/driver_stub.c. A kernel
may touch the tensors among its arguments and nothing else. Not here: the emulator (`machine.py`).
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from emulator.machine import launch
from emulator.memory import GlobalMemory
from emulator.parse import Kernel, parse_module
from emulator.threads import Counts

TESTS = Path(__file__).parents[1]
COMPILER = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
ON_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_long,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)


@dataclass
class Launch:
    """One launch of a kernel: its shape and what it did."""

    name: str
    grid: tuple
    block: tuple
    counts: Counts
    kernel: Kernel


LAUNCHES: list[Launch] = []
_functions: list[Path] = []  # PTX of function 1, 2, ...
_tensors: list = []  # arguments of the launch that is under way
_errors: list[BaseException] = []


@functools.cache
def _kernel(path: Path):
    return next(iter(parse_module(path.read_text()).values()))


def build_stub(folder: Path) -> Path:
    """The stand-in for the driver library, as libcuda.so.1 and libcuda.so."""
    import triton

    include = Path(triton.__file__).parent / "backends/nvidia/include"
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wl,-soname,libcuda.so.1"]
    source = TESTS / "cpp/driver_stub.c"
    subprocess.run([COMPILER, *flags, f"-I{include}", str(source), "-o", str(library)], check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return library


def _spare_ptxas(folder: Path) -> None:
    """What runs here is PTX: ptxas would translate it for nothing (a third of a compilation)."""
    script = folder / "ptxas"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *--version*) echo "Cuda compilation tools, release 12.9, V12.9.0";;\n'
        '*) while [ $# -gt 0 ]; do [ "$1" = -o ] && : >"$2"; shift; done;; esac\n'
    )
    script.chmod(0o755)
    os.environ["TRITON_PTXAS_PATH"] = str(script)


def _run(function, sizes, shared_bytes, params):
    try:
        kernel = _kernel(_functions[function - 1])
        grid, block = tuple(sizes[0:3]), tuple(sizes[3:6])
        memory = GlobalMemory()
        for tensor in _tensors:
            memory.allow(tensor)
        values = [ctypes.string_at(params[i], size) for i, (_, size, _) in enumerate(kernel.params)]
        counts = launch(
            kernel, grid=grid, block=block, params=values, memory=memory, shared_bytes=shared_bytes
        )
        LAUNCHES.append(Launch(kernel.name, grid, block, counts, kernel))
        return 0
    except BaseException as error:  # ctypes would swallow it: raised by the caller of the launch
        _errors.append(error)
        return 1


def _collect(value):
    if isinstance(value, torch.Tensor):
        _tensors.append(value)
    elif isinstance(value, (tuple, list)):
        for each in value:
            _collect(each)
    elif isinstance(getattr(value, "base", None), torch.Tensor):  # a tensor descriptor
        _tensors.append(value.base)


def install(capability: int) -> None:
    """Make this process's Triton launch on an emulated GPU of compute capability 80 or 90."""
    folder = Path(tempfile.mkdtemp(prefix="pyoffline-emulator-"))
    stub = ctypes.CDLL(str(build_stub(folder)), ctypes.RTLD_GLOBAL)
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "cache"))
    _spare_ptxas(folder)
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    install.callback = ON_LAUNCH(_run)  # kept: C holds it
    stub.stub_on_launch(install.callback)
    found = CudaDriver()
    found.get_device_capability = lambda device=0: divmod(capability, 10)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device=0: 0
    driver.set_active(found)

    def note(module, function, name, group, key):
        _functions.append(next(Path(p) for p in group.values() if p.endswith(".ptx")))

    knobs.runtime.kernel_load_start_hook = note
    plain = JITFunction.run

    @functools.wraps(plain)
    def run(self, *args, **options):
        _tensors.clear()
        _collect(args)
        _collect(list(options.values()))
        try:
            return plain(self, *args, **options)
        except RuntimeError:
            if _errors:
                raise _errors.pop() from None
            raise

    JITFunction.run = run

"""The compiled CUDA kernels on CPU tensors: csrc/cuda/*.cu as nvcc makes them, host half and PTX,
on a stand-in for the CUDA runtime (cuda_runtime.c) whose launches the emulator executes.

`row_pass(arch, logits, labels, **keywords)` takes the keywords of `_C.row_pass` (but `threads`),
`bad_label` and `device_scale`; `scale_by_upstream(arch, grad, upstream)`. What a kernel touches
must lie in a tensor of its call. One nvcc run a session. Not here: what a PTX instruction does
(machine.py), machine code, occupancy, timing.
"""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from emulator.machine import launch
from emulator.memory import GlobalMemory
from emulator.parse import parse_module
from host_cluster import DTYPES, RowArgs, RowTask, task_of

HERE = Path(__file__).parent
KERNELS = HERE.parents[1] / "csrc/cuda"
SOURCES = ("row_pass.cu", "scale_by_upstream.cu")
NVCC = shutil.which("nvcc")
# arch: (virtual architecture, 10 * capability, shared memory of a block that a kernel may opt in)
CHIPS = {"sm_80": ("compute_80", 80, 166912), "sm_90a": ("compute_90a", 90, 232448)}
FAR = 1 << 26  # bytes from row to row beyond which the gap is no memory of the call
LAUNCH_FAILURE = 719  # cudaErrorLaunchFailure
_p, _u32 = ctypes.c_void_p, ctypes.c_uint32


class _Launch(ctypes.Structure):
    """cuda_runtime.c, struct Launch."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("device", ctypes.c_int),
        ("grid", _u32 * 3),
        ("block", _u32 * 3),
        ("cluster", _u32),
        ("shared_bytes", ctypes.c_size_t),
        ("args", ctypes.POINTER(_p)),
    ]


class _CudaLaunch(ctypes.Structure):
    """csrc/cuda/launch.h, CudaLaunch."""

    _fields_ = [("device", ctypes.c_int), ("stream", _p), ("scale", _p), ("bad_label", _p)]


@dataclass(frozen=True)
class Launch:
    """A launch as the runtime got it. params: the bytes of each kernel parameter."""

    name: str
    grid: tuple
    block: tuple
    cluster: int
    shared_bytes: int
    params: tuple
    counts: object


_OnLaunch = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launch))


class _Library:
    """nvcc's objects, linked with the stand-in; the PTX; the call that is being made."""

    def __init__(self):
        folder = Path(tempfile.mkdtemp(prefix="pyoffline-emulated-"))
        targets = [f"-gencode=arch={c[0]},code={c[0]}" for c in CHIPS.values()]
        flags = ["-O3", "-std=c++17", "-shared", "-cudart=none", "-Xcompiler=-fPIC"]
        # -Bsymbolic: the stand-in, also where another library brought the real runtime along
        flags += ["-Xlinker=-Bsymbolic", "--threads=2", "--keep", f"--keep-dir={folder}"]
        sources = [*(KERNELS / s for s in SOURCES), HERE / "cuda_shim.cpp", HERE / "cuda_runtime.c"]
        path = folder / "emulated.so"
        command = [NVCC, *flags, *targets, *map(str, sources), "-o", str(path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        self.ptx = {
            arch: [(folder / f"{Path(s).stem}.{chip[0]}.ptx").read_text() for s in SOURCES]
            for arch, chip in CHIPS.items()
        }
        self.lib = ctypes.CDLL(str(path))
        shutil.rmtree(folder)
        sizes = (ctypes.c_int64 * 3)()
        self.lib.shim_sizes(sizes)
        assert tuple(sizes) == tuple(map(ctypes.sizeof, (RowArgs, RowTask, _CudaLaunch)))
        self.devices = []  # (arch, shared bytes): a device each, for limits are asked for once
        self.parsed, self.memory, self.error, self.launches = {}, GlobalMemory(), None, []
        self.callback = _OnLaunch(self.on_launch)
        self.lib.stand_in_on_launch(self.callback)

    def device(self, arch, shared_bytes=None) -> int:
        """Index of the device with these limits."""
        limits = (arch, shared_bytes or CHIPS[arch][2])
        if limits not in self.devices:
            self.devices.append(limits)
            index = self.devices.index(limits)
            assert self.lib.stand_in_device(index, CHIPS[arch][1], limits[1]) == 0
        return self.devices.index(limits)

    def kernels(self, arch) -> dict:
        """{mangled name: kernel} of an architecture."""
        if arch not in self.parsed:
            modules = map(parse_module, self.ptx[arch])
            self.parsed[arch] = {k: v for each in modules for k, v in each.items()}
        return self.parsed[arch]

    def on_launch(self, pointer) -> int:
        """Execute; what is raised here is raised again by `call`, for ctypes would drop it."""
        try:
            self._execute(pointer.contents)
        except BaseException as error:  # KeyboardInterrupt too
            self.error = error
            return LAUNCH_FAILURE
        return 0

    def _execute(self, given):
        name = given.name.decode()
        kernel = self.kernels(self.devices[given.device][0])[name]
        params = [
            ctypes.string_at(given.args[i], size) for i, (_, size, _) in enumerate(kernel.params)
        ]
        shape = {"grid": tuple(given.grid), "block": tuple(given.block), "cluster": given.cluster}
        shape["shared_bytes"] = given.shared_bytes
        counts = launch(kernel, params=params, memory=self.memory, **shape)
        self.launches.append(Launch(name, params=tuple(params), counts=counts, **shape))

    def refusal(self, device, name, blocks, threads, cluster, shared_bytes) -> int:
        """The cudaError_t of a launch that must not be made."""
        shape = [(_u32 * 3)(n, 1, 1) for n in (blocks, threads, cluster)]
        assert self.lib.cudaSetDevice(device) == 0
        bytes_ = ctypes.c_size_t(shared_bytes)
        return self.lib.stand_in_launch(name.encode(), *shape, bytes_)

    def call(self, name, *arguments, tensors=()):
        """One function of the shim, whose kernels may touch `tensors`; its message if it throws."""
        message = ctypes.create_string_buffer(512)
        self.memory, self.error = GlobalMemory(), None
        self.launches.clear()
        for each in tensors:
            _allow(self.memory, each)
        code = getattr(self.lib, name)(*arguments, message)
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        if code:
            raise RuntimeError(message.value.decode())
        return message.value.decode()


def _allow(memory, x):
    """The storage, or of rows that lie far apart each row with its 16-byte surroundings."""
    if x.dim() != 2 or x.stride(0) * x.element_size() < FAR:
        return memory.allow(x)
    for row in x:
        start, end = row.data_ptr(), row.data_ptr() + row.numel() * row.element_size()
        memory.allow_bytes(start // 16 * 16, -(-end // 16) * 16 - start // 16 * 16, "a far row")
    return None


@functools.cache
def library() -> _Library:
    """Compiled once a session."""
    return _Library()


def last_launch() -> Launch:
    """The last launch of the last call."""
    return library().launches[-1]


def last_counts():
    """What the emulator counted in the last launch."""
    return last_launch().counts


def _address(x):
    return None if x is None else x.data_ptr()


def row_pass(
    arch, logits, labels, *, bad_label=None, device_scale=None, shared_bytes=None, **given
):
    """`_C.cuda_row_pass` on CPU tensors. shared_bytes: of a lesser device."""
    lib = library()
    flags = {"bad_label": bad_label, "device_scale": device_scale}
    task, terms, extras = task_of(logits, labels, given | flags)
    task.args.terms, task.args.extras = ctypes.addressof(terms), ctypes.addressof(extras)
    device = lib.device(arch, shared_bytes)
    to = _CudaLaunch(device, None, _address(device_scale), _address(bad_label))
    every = [logits, labels, *given.get("extras", ()), *flags.values(), *given.values()]
    program = {id(given.get("hyper"))}  # travels by value
    tensors = [x for x in every if isinstance(x, torch.Tensor) and id(x) not in program]
    lib.call("shim_row_pass", ctypes.byref(task.args), ctypes.byref(to), tensors=tensors)


def scale_by_upstream(arch, grad, upstream):
    """`_C.cuda_scale_by_upstream` on CPU tensors."""
    lib = library()
    to = _CudaLaunch(lib.device(arch), None, None, None)
    size = ctypes.c_int64(grad.numel())
    arguments = (_p(grad.data_ptr()), DTYPES[grad.dtype], size, _p(upstream.data_ptr()))
    lib.call("shim_scale", *arguments, ctypes.byref(to), tensors=[grad, upstream])


def why_not(device) -> str:
    """`cuda_why_not` of a device index of the stand-in."""
    return library().call("shim_why_not", device)

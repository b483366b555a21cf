"""The floor: the bare matrix products of a loss head at full N, with the fastest vendor call known.

    logits  [N, V] = hidden [N, D] @ weight^T     dhidden [N, D] = dlogits [N, V] @ weight
    dweight [V, D] = dlogits^T @ hidden

Each is 2NDV FLOP. Outputs are preallocated, operands random. Candidates per product: torch.mm in
the dtype, MKL's mixed GEMM (fp32 result) on whole matrices by ctypes, and the calls of
`pyoffline._C` (panels on MKL, or oneDNN's tile kernel), which round to the dtype while a panel or a
strip is in cache; on a GPU torch.mm in the dtype and with an fp32 result. A short warm-up picks one
per product and the choice is reported. Not here: row passes, chunks.
"""

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pyoffline import _C
from pyoffline.benchmarks.device import stopwatch
from pyoffline.benchmarks.shapes import Inputs, Shape
from pyoffline.gpu_gemm import wide_mm

GEMMS = ("logits", "dhidden", "dweight")
WARM_ROWS = 256
# A candidate this much slower than the best at WARM_ROWS is not tried at full N.
HOPELESS = 1.6

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112


class CblasGemm:
    """MKL's `cblas_gemm_bf16bf16f32` (or f16f16f32) in libtorch_cpu: c fp32 = op(a) @ op(b)."""

    NAMES = {torch.bfloat16: "cblas_gemm_bf16bf16f32", torch.float16: "cblas_gemm_f16f16f32"}

    def __init__(self, function):
        self.function = function
        number, matrix = ctypes.c_int, ctypes.c_void_p
        sizes = [number] * 6
        tail = [matrix, number, matrix, number, ctypes.c_float, matrix, number]
        function.argtypes = [*sizes, ctypes.c_float, *tail]
        function.restype = None

    @classmethod
    def find(cls, dtype: torch.dtype) -> "CblasGemm | None":
        """None where libtorch does not export it."""
        path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
        try:
            return cls(getattr(ctypes.CDLL(str(path)), cls.NAMES[dtype]))
        except (OSError, AttributeError, KeyError):
            return None

    def __call__(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        """out = a @ b; a and b may be transposed views of row-major matrices."""
        (m, k), n = a.shape, b.shape[1]
        flags, strides = [], []
        for x in (a, b):
            plain = x.stride(1) == 1
            flags.append(PLAIN if plain else TRANSPOSED)
            strides.append(x.stride(0) if plain else x.stride(1))
        head = (ROW_MAJOR, *flags, m, n, k, 1.0)
        operands = (a.data_ptr(), strides[0], b.data_ptr(), strides[1])
        self.function(*head, *operands, 0.0, out.data_ptr(), out.stride(0))


class Floor:
    """The three products of one shape; `choose()` once, then `run(name)`."""

    def __init__(self, shape: Shape, dtype: torch.dtype, inputs: Inputs):
        self.shape, self.dtype = shape, dtype
        self.hidden, self.weight = inputs.hidden.detach(), inputs.weight.detach()
        self.kind = inputs.hidden.device.type
        self.cblas = CblasGemm.find(dtype) if self.kind == "cpu" else None
        self.buffers: dict[str, Tensor] = {}
        self.chosen: dict[str, str] = {}
        self.seconds: dict[str, dict[str, float]] = {}
        # Random values for the other two products; the logits GEMM writes the same again.
        (_panels_logits if self.kind == "cpu" else _torch_logits)(self, shape.n)()

    def buffer(self, name: str, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
        """A preallocated output, on a CPU on huge pages where they are allowed."""
        if name not in self.buffers:
            out = torch.empty(rows, cols, dtype=dtype, device=self.hidden.device)
            if not out.is_cuda:
                _C.advise_hugepages(out)
            out.fill_(float("nan"))  # the page faults are taken here
            self.buffers[name] = out
        return self.buffers[name]

    def logits(self) -> Tensor:
        """[N, V] in the dtype: written by the first product, read by the others."""
        return self.buffer("logits", self.shape.n, self.shape.v, self.dtype)

    def candidates(self, gemm: str) -> dict[str, Callable[[int], Callable[[], None]]]:
        """Name -> function of the number of rows that returns the call."""
        found = {"torch.mm": TORCH[gemm]}
        if self.kind != "cpu":
            if self.dtype != torch.float32:
                found["torch.mm, fp32 out"] = WIDE[gemm]
            return found
        if self.dtype == torch.float32 or _C.gemm_info()[_short(self.dtype)]:
            found[own_name(self.dtype)] = PANELS[gemm]
        if self.cblas is not None:
            found["MKL whole, fp32 out"] = WHOLE[gemm]
        return found

    def choose(self, wanted=GEMMS, progress: Callable[[str], None] | None = None) -> None:
        """Time the candidates, first on few rows, then those that may win on all of them."""
        for gemm in wanted:
            table = self.candidates(gemm)
            few = min(self.shape.n, WARM_ROWS)
            quick = self._best_of({name: make(self, few) for name, make in table.items()}, 2)
            limit = HOPELESS * min(quick.values())
            full = self._best_of(
                {
                    name: table[name](self, self.shape.n)
                    for name, seconds in quick.items()
                    if seconds <= limit
                },
                3,
            )
            self.chosen[gemm] = min(full, key=full.get)
            self.seconds[gemm] = full
            self.buffers = {k: v for k, v in self.buffers.items() if self._still_used(k)}
            if progress is not None:
                progress(f"floor {gemm}: {self.chosen[gemm]}, {full[self.chosen[gemm]]:.3f} s")

    def _best_of(self, calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
        """Seconds of each; in turns, so that a busy minute of the machine chooses none."""
        best = dict.fromkeys(calls, float("inf"))
        for _ in range(rounds):
            for name, call in calls.items():
                best[name] = min(best[name], stopwatch(self.kind)(call))
        return best

    def _still_used(self, buffer: str) -> bool:
        whole = [g for g, name in self.chosen.items() if name.endswith("fp32 out")]
        return buffer != "logits32" or "logits" in whole

    def run(self, gemm: str) -> None:
        """One product with the chosen call."""
        self.candidates(gemm)[self.chosen[gemm]](self, self.shape.n)()

    def describe(self) -> dict:
        """For the record: what was chosen, GFLOP/s of each candidate that ran at full N."""
        rate = self.shape.gemm_flop / 1e9
        return {
            gemm: {
                "chosen": name,
                "gflop_s": {k: rate / s for k, s in self.seconds[gemm].items()},
            }
            for gemm, name in self.chosen.items()
        }


def own_name(dtype: torch.dtype) -> str:
    """What the products of `pyoffline._C` run on."""
    tiles = dtype == torch.bfloat16 and _C.gemm_info()["tiles"]
    return "pyoffline._C tiles" if tiles else "pyoffline._C panels"


def _short(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def _torch_logits(floor: Floor, rows: int):
    x, out = floor.hidden[:rows], floor.logits()[:rows]
    return lambda: torch.mm(x, floor.weight.t(), out=out)


def _torch_dhidden(floor: Floor, rows: int):
    out = floor.buffer("dhidden", *floor.hidden.shape, floor.dtype)[:rows]
    return lambda: torch.mm(floor.logits()[:rows], floor.weight, out=out)


def _torch_dweight(floor: Floor, rows: int):
    out = floor.buffer("dweight", *floor.weight.shape, floor.dtype)
    return lambda: torch.mm(floor.logits()[:rows].t(), floor.hidden[:rows], out=out)


def _panels_logits(floor: Floor, rows: int):
    x, out = floor.hidden[:rows], floor.logits()[:rows]
    if floor.dtype != torch.float32 and not _C.gemm_info()[_short(floor.dtype)]:
        return _torch_logits(floor, rows)
    return lambda: _C.gemm_logits(x, floor.weight, out, threads=torch.get_num_threads())


def _panels_dhidden(floor: Floor, rows: int):
    out = floor.buffer("dhidden32", *floor.hidden.shape, torch.float32)[:rows]
    threads = torch.get_num_threads()
    return lambda: _C.gemm_dhidden(floor.logits()[:rows], floor.weight, out, threads=threads)


def _panels_dweight(floor: Floor, rows: int):
    out = floor.buffer("dweight", *floor.weight.shape, floor.dtype)
    dlogits, x = floor.logits()[:rows], floor.hidden[:rows]
    threads = torch.get_num_threads()
    if floor.dtype == torch.float32:
        return lambda: _C.gemm_dweight(dlogits, x, out, beta=0.0, threads=threads)
    return lambda: _C.gemm_dweight(dlogits, x, None, beta=0.0, out=out, threads=threads)


def _whole_logits(floor: Floor, rows: int):
    out = floor.buffer("logits32", floor.shape.n, floor.shape.v, torch.float32)[:rows]
    return lambda: floor.cblas(floor.hidden[:rows], floor.weight.t(), out)


def _whole_dhidden(floor: Floor, rows: int):
    out = floor.buffer("dhidden32", *floor.hidden.shape, torch.float32)[:rows]
    return lambda: floor.cblas(floor.logits()[:rows], floor.weight, out)


def _whole_dweight(floor: Floor, rows: int):
    out = floor.buffer("dweight32", *floor.weight.shape, torch.float32)
    return lambda: floor.cblas(floor.logits()[:rows].t(), floor.hidden[:rows], out)


def _wide_logits(floor: Floor, rows: int):
    out = floor.buffer("logits32", floor.shape.n, floor.shape.v, torch.float32)[:rows]
    return lambda: wide_mm(floor.hidden[:rows], floor.weight.t(), out)


def _wide_dhidden(floor: Floor, rows: int):
    out = floor.buffer("dhidden32", *floor.hidden.shape, torch.float32)[:rows]
    return lambda: wide_mm(floor.logits()[:rows], floor.weight, out)


def _wide_dweight(floor: Floor, rows: int):
    out = floor.buffer("dweight32", *floor.weight.shape, torch.float32)
    return lambda: wide_mm(floor.logits()[:rows].t(), floor.hidden[:rows], out)


TORCH = dict(zip(GEMMS, (_torch_logits, _torch_dhidden, _torch_dweight), strict=True))
PANELS = dict(zip(GEMMS, (_panels_logits, _panels_dhidden, _panels_dweight), strict=True))
WHOLE = dict(zip(GEMMS, (_whole_logits, _whole_dhidden, _whole_dweight), strict=True))
WIDE = dict(zip(GEMMS, (_wide_logits, _wide_dhidden, _wide_dweight), strict=True))
# A teacher's logits are one more product of the first kind.
for _table in (TORCH, PANELS, WHOLE, WIDE):
    _table["teacher"] = _table["logits"]

"""The device that is measured, "cpu" or "cuda": how time passes there, what memory is free, which
backends of ours run. Not here: what is measured.
"""

import time
from collections.abc import Callable

import torch

from pyoffline.backends import GPU_BACKENDS, why_not
from pyoffline.benchmarks import memory

KINDS = ("cpu", "cuda")
HEAD_START = 4_000_000  # cycles of the device, about 2 ms
Stopwatch = Callable[[Callable[[], object]], float]


def require(kind: str) -> None:
    """ValueError with the reason where nothing can be measured there."""
    if kind == "cpu":
        return
    if not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; expected --device cpu")
    if not ours(kind):
        reasons = "; ".join(f"{name}: {why_not(name, kind)}" for name in GPU_BACKENDS)
        raise ValueError(f"--device cuda: no GPU backend of ours is there ({reasons})")


def place(kind: str) -> torch.device:
    """Where the inputs go."""
    return torch.device(kind)


def ours(kind: str, op: str | None = None) -> tuple[str, ...]:
    """The backends that are measured: on a GPU each one that is there, side by side; "auto" where
    none has this op.
    """
    if kind == "cpu":
        return ("auto",)
    there = tuple(name for name in GPU_BACKENDS if why_not(name, kind, op=op) is None)
    return there or (() if op is None else ("auto",))


def by_events(run: Callable[[], object]) -> float:
    """Seconds on the device between two events of the current stream. The device waits first, so
    that the host's launches are ahead of it: a gap between kernels shows only where the host is
    slower than the device for longer than that, or waits for it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def by_clock(clock: Callable[[], float] = time.perf_counter) -> Stopwatch:
    """Seconds of the host."""

    def measure(run: Callable[[], object]) -> float:
        start = clock()
        run()
        return clock() - start

    return measure


def stopwatch(kind: str) -> Stopwatch:
    """How a run is timed there."""
    return by_clock() if kind == "cpu" else by_events


def free_nbytes(kind: str) -> int:
    """What can be allocated without swapping (CPU) or failing (GPU: free, and cached by torch)."""
    if kind == "cpu":
        return memory.available_nbytes()
    free, _ = torch.cuda.mem_get_info()
    return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

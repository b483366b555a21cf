"""How much context fits: two training steps at each length, under a fixed limit of memory.

The limit is real. Before the model is loaded, RLIMIT_DATA is set so that resident memory and all
private memory still to come stay within it; where a step does not fit, the allocation itself fails.
Peaks are VmHWM, reset through /proc/self/clear_refs after the imports. Linux only. Run as `python
-m pyoffline.demo.context CONFIG.yaml LIMIT_MIB`: it prints one line of JSON. Not here: the figure.
"""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

MIB = 2**20
NO_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc")


@dataclass(frozen=True)
class Point:
    """One process. `peak_mib` is None where the steps did not fit."""

    loss: str  # "stock" or "pyoffline"
    length: int
    peak_mib: float | None
    error: str | None = None

    @property
    def fits(self) -> bool:
        return self.peak_mib is not None


def limit_memory(limit_mib: int) -> None:
    """From here on, this process fails to allocate what would take it above `limit_mib`.

    ValueError when it is there already. RLIMIT_DATA counts private writable memory, reserved or
    resident: the limit is what is counted now plus what is left to `limit_mib` of resident memory.
    """
    import resource

    from pyoffline.benchmarks.memory import status_nbytes

    left = limit_mib * MIB - status_nbytes("VmRSS")
    if left <= 0:
        raise ValueError(
            f"the limit is {limit_mib} MiB and {limit_mib - left // MIB} MiB are resident before "
            "the model is loaded; give a higher limit"
        )
    allowed = status_nbytes("VmData") + left
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def ran_out(error: BaseException) -> bool:
    """Whether an exception says that memory could not be had."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or any(words in text for words in NO_MEMORY)


def run_limited(config_path: str, limit_mib: int) -> dict:
    """In this process: {"peak_mib": ...} or {"error": ...}. Other errors are raised."""
    import torch

    import pyoffline.trainer  # noqa: F401  (imported now, so that its pages are there before)
    from pyoffline.benchmarks.memory import reset_peak, status_nbytes
    from pyoffline.config import load_config
    from pyoffline.training import run_training

    config = load_config(config_path)
    torch.ones(256, 256) @ torch.ones(256, 256)  # the threads and their stacks
    reset_peak()
    limit_memory(limit_mib)
    try:
        run_training(config)
    except (MemoryError, RuntimeError) as error:
        if not ran_out(error):
            raise
        return {"error": str(error).splitlines()[0]}
    return {"peak_mib": status_nbytes("VmHWM") / MIB}


def measure_point(loss: str, length: int, config_path: Path, limit_mib: int) -> Point:
    """`run_limited` in a new process. RuntimeError with its last words where it ended otherwise."""
    command = [sys.executable, "-m", "pyoffline.demo.context", str(config_path), str(limit_mib)]
    # our own interpreter and module
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode != 0:
        words = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise RuntimeError(
            f"{loss} at {length} tokens ended with exit code {done.returncode}:\n{words}"
        )
    return Point(loss, length, **{"peak_mib": None} | json.loads(done.stdout.splitlines()[-1]))


def measure_contexts(losses, lengths, write_config, limit_mib: int, progress=iter) -> list[Point]:
    """Every length in order for each loss, until one does not fit; `write_config(loss, length)`
    returns the path of a configuration, `progress` wraps the (loss, length) pairs.
    """
    points, full = [], set()
    for loss, length in progress([(loss, n) for n in lengths for loss in losses]):
        if loss in full:
            continue
        points.append(measure_point(loss, length, write_config(loss, length), limit_mib))
        if not points[-1].fits:
            full.add(loss)
    return points


def largest(points: list[Point], loss: str) -> int:
    """The longest context that fitted, 0 when none did."""
    return max((p.length for p in points if p.loss == loss and p.fits), default=0)


def as_rows(points: list[Point]) -> list[dict]:
    return [asdict(p) for p in points]


if __name__ == "__main__":
    print(json.dumps(run_limited(sys.argv[1], int(sys.argv[2]))))

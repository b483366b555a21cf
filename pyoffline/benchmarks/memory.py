"""Peak memory of one run beyond its inputs and gradients; on a CPU in a fresh process per variant.

A small call first (thread pools, MKL buffers, code pages), then the high-water mark VmHWM is reset
through /proc/self/clear_refs, then one run. Extra = VmHWM - resident size before - bytes of the
gradients. Linux only. On a GPU the same of torch's allocator, in this process. Run as
`python -m pyoffline.benchmarks.memory JSON`; it prints one line of JSON.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

import pyoffline as po

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TIMEOUT_S = 400
SMALL_ROWS = 16


def status_nbytes(field: str) -> int:
    """A field of /proc/self/status such as VmRSS, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {field}")


def reset_peak() -> int:
    """Return freed memory to the system, set VmHWM to the resident size, return it in bytes."""
    gc.collect()
    po.release_scratch()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    CLEAR_REFS.write_text("5")
    return status_nbytes("VmRSS")


def available_nbytes() -> int:
    """What the system can hand out without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def supported() -> bool:
    """Whether the peak can be reset here."""
    try:
        reset_peak()
    except OSError:
        return False
    return True


def _ran(job: dict):
    """(inputs, run): warmed up, gradients dropped, ready for the one run."""
    from pyoffline.benchmarks import device
    from pyoffline.benchmarks.ops import CASES
    from pyoffline.benchmarks.shapes import DTYPES, Shape, make_inputs

    case, shape, dtype = CASES[job["op"]], Shape.parse(job["shape"]), DTYPES[job["dtype"]]
    peer = next((p for p in case.peers if p.name == job["provider"]), None)
    call = case.ours if peer is None else peer.load()
    inputs = make_inputs(
        shape, dtype, exact_old=False, device=device.place(job.get("device", "cpu"))
    )
    small = inputs.take(slice(0, SMALL_ROWS))
    warm = inputs if peer is not None and peer.compiles else small
    case.prepare(warm)
    case.step(call, warm)()
    case.prepare(inputs)
    small.clear_grads()
    return inputs, case.step(call, inputs)


def measure(job: dict) -> dict:
    """In this process: job = {op, provider ("ours" or a peer), shape, dtype, budget, and where they
    are not the CPU's: device, backend}.
    """
    import torch

    from pyoffline.benchmarks.runner import budget_of

    on_cpu = job.get("device", "cpu") == "cpu"
    with budget_of(job["budget"]), po.use_backend(job.get("backend", "auto")):
        inputs, run = _ran(job)
        baseline = reset_peak() if on_cpu else reset_device_peak()
        run()
        peak = status_nbytes("VmHWM") if on_cpu else torch.cuda.max_memory_allocated()
    grads = sum(
        x.grad.numel() * x.grad.element_size()
        for x in (inputs.hidden, inputs.weight)
        if x.grad is not None
    )
    return {
        "baseline_nbytes": baseline,
        "peak_nbytes": peak,
        "gradient_nbytes": grads,
        "extra_nbytes": peak - baseline - grads,
        "threads": torch.get_num_threads(),
    }


def reset_device_peak() -> int:
    """Set the peak of torch's allocator to what is allocated on the GPU, return that in bytes."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def measure_or_say_why(job: dict) -> dict:
    """`measure` in this process (a GPU's allocator tells variants apart); {"skipped": reason} when
    it fails.
    """
    try:
        return measure(job)
    # Any failure of a peer's own is its reason.
    except Exception as error:
        words = str(error).strip().splitlines() or [type(error).__name__]
        return {"skipped": words[0][:200]}


def measure_fresh(job: dict, timeout_s: float = TIMEOUT_S) -> dict:
    """`measure` in a new process; {"skipped": reason} when that fails."""
    command = [sys.executable, "-m", "pyoffline.benchmarks.memory", json.dumps(job)]
    try:
        # The interpreter that runs this, on this module.
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {"skipped": f"took more than {timeout_s:.0f} s"}
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"skipped": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))

"""Where a number comes from: date, processor, versions, threads. A number without these is not
committed."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path

PEERS = ("cut-cross-entropy",)
GPU_PACKAGES = ("triton", "liger-kernel", "quack-kernels")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni", "amx_bf16", "amx_tile")


def cpu() -> dict:
    """Model, cores and the instruction sets that matter, from /proc/cpuinfo where there is one."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    have = set(flags.group(1).split()) if flags else set()
    return {
        "model": model.group(1).strip() if model else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "flags": {name: name in have for name in FLAGS},
    }


def gpu() -> dict:
    """The current GPU: model, multiprocessors, memory, compute capability, driver; `cores` and
    `flags` as of a CPU.
    """
    import torch

    found = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "kind": "gpu",
        "model": found.name,
        "cores": found.multi_processor_count,
        "flags": {f"sm_{found.major}{found.minor}": True},
        "memory_nbytes": found.total_memory,
        "driver": driver(),
    }


def driver() -> str | None:
    """The version of the GPU's driver, where its own tool tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        # a fixed command of the driver's own package
        done = subprocess.run(query, capture_output=True, text=True, check=True)  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]


def git_hash() -> str | None:
    """The commit of the checkout that runs, "+" when it has changes. Outside a checkout what
    PYOFFLINE_COMMIT says, or None.
    """
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return os.environ.get("PYOFFLINE_COMMIT")

    def git(*args):
        # a fixed command on our own checkout
        done = subprocess.run(  # noqa: S603
            ["git", "-C", str(root), *args],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "pyoffline", "csrc")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def versions(kind: str = "cpu") -> dict:
    """Versions of what the numbers depend on."""
    import numpy
    import torch

    import pyoffline

    mkl = re.search(r"Math Kernel Library Version (\S+)", torch.__config__.show())
    found = {
        "torch": torch.__version__,
        "mkl": mkl.group(1) if mkl else None,
        "numpy": numpy.__version__,
        "pyoffline": pyoffline.__version__,
        "pyoffline_git": git_hash(),
        "python": platform.python_version(),
    }
    for name in PEERS if kind == "cpu" else (*PEERS, *GPU_PACKAGES):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    if kind != "cpu":
        found["cuda"] = torch.version.cuda
    return found


def provenance(kind: str = "cpu") -> dict:
    """The keys that every record carries."""
    import torch

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": cpu() if kind == "cpu" else {**gpu(), "host": cpu()["model"]},
        "versions": versions(kind),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }

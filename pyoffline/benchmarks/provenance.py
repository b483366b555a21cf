"""Where a number comes from: date, processor, versions, threads. A number without these is not
committed."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

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


def git_hash() -> str | None:
    """The commit of the checkout that runs, "+" when it has changes; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

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


def versions() -> dict:
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
    try:
        found["cut-cross-entropy"] = importlib.metadata.version("cut-cross-entropy")
    except importlib.metadata.PackageNotFoundError:
        found["cut-cross-entropy"] = None
    return found


def provenance() -> dict:
    """The keys that every record carries."""
    import torch

    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": cpu(),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }

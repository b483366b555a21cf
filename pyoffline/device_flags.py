"""Errors that a GPU kernel finds: a label outside [0, V). No host sync: the kernel writes the flag.

The flag of a device is two int64 in pinned host memory, which the kernel writes and the host reads
without waiting: (set, value * 2^32 + row). The second is written in one piece and is never 0 when
set, so the host asks it alone. The next call on that device that comes after the kernel has run
raises, or `check()`, which waits for it. Not here: who launches.
"""

import torch

_flags: dict[torch.device, torch.Tensor] = {}


def flag_of(device: torch.device) -> torch.Tensor:
    """int64 [2] that a kernel on this device can write."""
    if device not in _flags:
        # host memory whatever the default device is; one made in inference mode could not be reset
        with torch.inference_mode(False):
            flag = torch.zeros(2, dtype=torch.int64, device="cpu", pin_memory=device.type != "cpu")
        _flags.setdefault(device, flag)
    return _flags[device]


def raise_pending(device: torch.device) -> None:
    """Raise IndexError if a kernel on this device has reported a label. Does not wait for it."""
    flag = _flags.get(device)
    packed = 0 if flag is None else int(flag[1])
    if packed == 0:
        return
    flag.zero_()
    value, row = packed >> 32, packed & 0xFFFFFFFF
    raise IndexError(
        f"labels: an earlier call on {device} met label {value} (row {row} of its chunk of rows "
        "that count), outside [0, V) and not ignore_index; that row's results are NaN. Call "
        "po.check() after a step to have this raised at its own step"
    )


def check() -> None:
    """Wait for every device that ran our kernels; IndexError if one met a label outside [0, V)."""
    for device in list(_flags):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        raise_pending(device)

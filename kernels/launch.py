"""What every launch needs: the tensor's device, alignment, the number of programs."""

import contextlib

import torch

from pyoffline.kernels.configs import RowConfig, device_limits, programs_in_flight


def device_of(x: torch.Tensor):
    """Context manager: launches go to the tensor's device (Triton takes the current one)."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def warp_size(device: torch.device) -> int:
    """Threads of a warp; 32 in the interpreter."""
    return device_limits(device.index)[2] if device.type == "cuda" else 32


def alignment(*tensors) -> int:
    """Largest power of two up to 16 that divides every row stride, in elements; 1 where a tensor
    does not start at a multiple of 16 bytes.
    """
    given = [x for x in tensors if x is not None]
    if any(x.data_ptr() % 16 for x in given):
        return 1
    return next(u for u in (16, 8, 4, 2, 1) if not any(x.stride(0) % u for x in given))


def shifts(group: int, *tensors) -> bool:
    """Whether rows start off multiples of `group` elements (16 bytes), all in the same way: then
    groups are cut at those multiples, and not at the rows' starts.
    """
    given = [x for x in tensors if x is not None]
    aligned = not any(x.data_ptr() % 16 for x in given)
    alike = len({(x.stride(0), x.element_size()) for x in given}) == 1
    return aligned and alike and given[0].stride(0) % group != 0 and given[0].shape[0] > 1


def row_programs(logits: torch.Tensor, config: RowConfig) -> int:
    """Programs for these rows: as many as L2 keeps; in the interpreter one per row."""
    rows, vocab = logits.shape
    if logits.device.type == "cpu":
        return rows
    sms, l2, _ = device_limits(logits.device.index)
    return min(rows, programs_in_flight(vocab * logits.element_size(), config, sms, l2))

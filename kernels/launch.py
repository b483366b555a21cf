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


def cuts(group: int, *rows) -> int:
    """How groups of `group` elements at a row's end are read (`row_sums.places`): 0: none is cut,
    1: whole, since each is aligned to its size, 2: entry by entry.
    """
    if rows[0].shape[1] % group == 0:
        return 0
    aligned = not any(x.data_ptr() % (group * x.element_size()) for x in rows)
    return 1 if aligned and not any(x.stride(0) % group for x in rows) else 2


def row_programs(config: RowConfig, *matrices, reads_again: bool = True) -> int:
    """Programs for the rows of these [C, V]: as many as L2 keeps, where a program reads its rows
    again; in the interpreter one per row.
    """
    rows, vocab = matrices[0].shape
    if matrices[0].device.type == "cpu":
        return rows
    sms, l2, _ = device_limits(matrices[0].device.index)
    row_nbytes = vocab * sum(x.element_size() for x in matrices) if reads_again else 0
    return min(rows, programs_in_flight(row_nbytes, config, sms, l2))

"""grad *= upstream in place, where upstream is one number on the device.

Reads the number there and returns at once when it is 1 (a plain `loss.backward()`): then nothing
but 4 bytes is read. Otherwise one read and one write of the gradient; fp32 product, one rounding.
Not here: the cast to the parameter's dtype.
"""

import triton
import triton.language as tl

from pyoffline.kernels.configs import FMA
from pyoffline.kernels.launch import device_of, warp_size

LANES, WARPS = 1024, 16  # two 16-byte groups a thread; not measured yet


@triton.jit(do_not_specialize=["size"])
def scale_by_upstream_kernel(
    grad_ptr, upstream_ptr, size, LANES: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """GROUP divides size, so a group is one access, inside or outside as a whole."""
    factor = tl.load(upstream_ptr).to(tl.float32)
    if factor == 1.0:
        return
    lanes = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES)[:, None]
    offs = lanes * GROUP + tl.arange(0, GROUP)[None, :]
    inside = lanes * GROUP < size
    value = tl.load(grad_ptr + offs, mask=inside).to(tl.float32)
    tl.store(grad_ptr + offs, (value * factor).to(grad_ptr.dtype.element_ty), mask=inside)


def scale_by_upstream(grad, upstream):
    """In place; grad any contiguous bf16, fp16 or fp32 tensor, upstream one float on its device."""
    if grad.numel() == 0:
        return grad
    with device_of(grad):
        group = 16 // grad.element_size()
        group = 1 if grad.numel() % group else group
        grid = (triton.cdiv(grad.numel(), LANES * group),)
        scale_by_upstream_kernel[grid](
            grad, upstream, grad.numel(), LANES=LANES, GROUP=group,
            num_warps=WARPS * 32 // warp_size(grad.device), **FMA,
        )  # fmt: skip
    return grad

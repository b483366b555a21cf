"""grad *= upstream in place, where upstream is one number on the device.

Reads the number there and returns at once when it is 1 (a plain `loss.backward()`): then nothing
but 4 bytes is read. Otherwise one read and one write of the gradient; fp32 product, one rounding.
Not here: the cast to the parameter's dtype.
"""

import triton
import triton.language as tl

from pyoffline.kernels.launch import device_of

BLOCK = 4096  # 8 bf16 or fp32 values a thread at 16 warps; not measured yet
WARPS = 16


@triton.jit(do_not_specialize=["size"])
def scale_by_upstream_kernel(grad_ptr, upstream_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(upstream_ptr).to(tl.float32)
    if factor == 1.0:
        return
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    value = tl.load(grad_ptr + offs, mask=inside).to(tl.float32)
    tl.store(grad_ptr + offs, (value * factor).to(grad_ptr.dtype.element_ty), mask=inside)


def scale_by_upstream(grad, upstream):
    """In place; grad any contiguous bf16, fp16 or fp32 tensor, upstream one float on its device."""
    if grad.numel() == 0:
        return grad
    with device_of(grad):
        grid = (triton.cdiv(grad.numel(), BLOCK),)
        scale_by_upstream_kernel[grid](grad, upstream, grad.numel(), BLOCK=BLOCK, num_warps=WARPS)
    return grad

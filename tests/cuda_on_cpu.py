"""The CUDA backend on CPU tensors: everything above the kernel runs as on a GPU, and the kernels
are their host texts (tests/cuda_host), which the same C++ templates make.

`emulate(monkeypatch)` puts them in. Every call of the row pass is first made with `_C.row_pass` on
copies: its binding checks dtype, shape, strides and names of the same arguments.
"""

import sys

import torch
from host_cluster import host_scale, row_pass

from pyoffline import _C, autograd, cuda_backend

FP64 = "the cuda backend computes in fp32 (emulated)"


def _reason(device, dtype):
    return FP64 if dtype == torch.float64 else None


def _checked_by_the_binding(logits, labels, keywords):
    """ValueError or TypeError for what the binding refuses; labels are the kernel's to judge."""
    copies = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in keywords.items()}
    try:
        _C.row_pass(logits.clone(), labels, **copies, threads=1)
    except IndexError:
        assert ((labels < 0) | (labels >= logits.shape[1])).any()


class Emulation:
    """Stand-ins for the two CUDA functions of `_C`; `calls` counts launches, `scales` keeps the
    factors on the device that came with them.
    """

    def __init__(self, blocks=2, threads=4):
        self.blocks, self.threads = blocks, threads
        self.calls, self.scaled, self.scales = 0, 0, []

    def row_pass(self, logits, labels, *, stream, bad_label, device_scale, **keywords):
        assert stream == 0 and bad_label.dtype == torch.int64 and bad_label.shape == (2,)
        if device_scale is not None:
            assert device_scale.dtype == torch.float32 and device_scale.shape == (1,)
            self.scales.append(device_scale)
        self.calls += 1
        _checked_by_the_binding(logits, labels, keywords)
        how = {"blocks": self.blocks, "threads": self.threads}
        flags = {"bad_label": bad_label, "device_scale": device_scale}
        row_pass(logits, labels, **flags, **how, **keywords)

    def scale(self, grad, upstream, *, stream):
        assert stream == 0 and grad.dim() == 1 and grad.is_contiguous()
        assert upstream.dtype == torch.float32 and upstream.shape == (1,)
        self.scaled += 1
        if float(upstream) != 1.0:  # the kernel returns
            host_scale(grad, float(upstream))


def emulate(monkeypatch) -> Emulation:
    """Let `use_backend("cuda")` serve CPU tensors until the test ends."""
    stand_in = Emulation()
    monkeypatch.setattr(sys.modules["pyoffline.backends"], "_why_not_cuda", _reason)
    monkeypatch.setattr(autograd, "is_read_by_host", lambda upstream, grad: False)
    monkeypatch.setattr(cuda_backend, "stream_of", lambda device: 0)
    monkeypatch.setattr(_C, "cuda_row_pass", stand_in.row_pass)
    monkeypatch.setattr(_C, "cuda_scale_by_upstream", stand_in.scale)
    return stand_in

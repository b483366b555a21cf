"""What the GPU tests share: the two GPU backends, batches on the device, results on the host."""

import batches
import pytest
import row_cases
import torch

from pyoffline.backends import GPU_BACKENDS, why_not

DEVICE = "cuda"
each_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)


@pytest.fixture(autouse=True)
def served(request):
    """A backend that is not there is reported as not run (bench/gpu_check.sh wants both)."""
    name = getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend")
    if name and (reason := why_not(name, "cuda")):
        pytest.skip(f"not run: {reason}")


def move(x, device=None):
    """Tensors in dicts and sequences to the device; fp64 parameters of an op stay on the host."""
    if isinstance(x, dict):
        return {k: move(v, device) for k, v in x.items()}
    if hasattr(x, "_fields"):
        return type(x)(*(move(v, device) for v in x))
    if isinstance(x, list | tuple):
        return type(x)(move(v, device) for v in x)
    if not isinstance(x, torch.Tensor):
        return x
    moved = x.detach().to(device or DEVICE)
    return moved.requires_grad_(x.requires_grad)


def on_gpu(x):
    """Every tensor of a batch on the GPU."""
    if isinstance(x, dict):
        return {k: on_gpu(v) for k, v in x.items()}
    return x.cuda() if isinstance(x, torch.Tensor) else x


def on_cpu(x):
    """Results on the host."""
    return move(x, "cpu")


def run(batch, objective, backend, upstream=1.0, **head):
    """`batches.run` on the device."""
    return on_cpu(batches.run(move(batch), objective, backend, upstream, **head))


def run_logits(logits, batch, objective, backend, upstream=1.0):
    """`batches.run_logits` on the device."""
    return on_cpu(batches.run_logits(move(logits), move(batch), objective, backend, upstream))


def compare(batch, objective, backend, chunk=None, upstream=1.0, **head):
    """`row_cases.compare` on the device."""
    return row_cases.compare(batch, objective, backend, chunk, upstream, run, **head)

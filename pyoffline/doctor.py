"""`pyoffline doctor`: versions, devices, the table of backends, one known answer; seconds.

Not here: benchmarks.
"""

import importlib.metadata
import os
import platform

PACKAGES = (
    "torch",
    "numpy",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
    "tensorboard",
    "matplotlib",
    "triton",
)
LIMIT = 1e-5  # of the loss and, relative to its largest entry, of the gradient, in fp32


def report() -> tuple[str, bool]:
    """The text, and whether the known answer came out."""
    import torch

    from pyoffline.backends import backends

    lines = [
        f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    ]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        lines.append(f"{name:13}{version}")
    lines.append(f"threads      torch {torch.get_num_threads()}, processors {os.cpu_count()}")
    lines.append(f"bf16 on CPU  {_bf16_products()}")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines.append(f"GPU          {', '.join(gpus) or 'none that torch can use'}")
    lines += ["", str(backends()), ""]
    healthy = True
    for device, backend in _places():
        loss_error, gradient_error = known_answer(device, backend)
        good = max(loss_error, gradient_error) <= LIMIT
        healthy &= good
        verdict = "ok" if good else "WRONG: please report this with the lines above"
        where = "" if device == "cpu" else f" on {device} by {backend}"
        lines.append(
            f"known answer {verdict}{where} (PPO-clip against fp64 PyTorch: loss off by "
            f"{loss_error:.1e}, gradient by {gradient_error:.1e}; the limit is {LIMIT:.0e})"
        )
    return "\n".join(lines), healthy


def _bf16_products() -> str:
    """Which library multiplies bf16 matrices for the CPU backend."""
    try:
        from pyoffline import _C
    except ImportError as error:
        return f"pyoffline._C is missing ({error})"
    info = _C.gemm_info()
    if info["tiles"]:
        return "oneDNN's tile kernel (this CPU multiplies bf16)"
    if info["bf16"]:
        return "MKL's gemm_bf16bf16f32"
    return f"torch, panels widened to fp32: {info['missing']}"


def _places() -> list[tuple[str, str]]:
    """(device, backend) of every known answer: what is picked on the CPU, each GPU backend."""
    from pyoffline.backends import GPU_BACKENDS, why_not

    there = [name for name in GPU_BACKENDS if why_not(name, "cuda") is None]
    return [("cpu", "auto"), *(("cuda", name) for name in there)]


def known_answer(device: str = "cpu", backend: str = "auto") -> tuple[float, float]:
    """Errors of loss and dhidden of a small fp32 PPO-clip against fp64 plain PyTorch."""
    import torch

    from pyoffline.backends import use_backend
    from pyoffline.head import Head
    from pyoffline.policy_loss import linear_policy_loss
    from pyoffline.records import TokenBatch
    from pyoffline.token_objectives import PPOClip

    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(64, 32, generator=random), torch.randn(1000, 32, generator=random)
    labels = torch.randint(1000, (64,), generator=random)
    old = torch.log_softmax(hidden @ weight.T, -1).gather(-1, labels[:, None])[:, 0]
    old = old + 0.1 * torch.randn(64, generator=random)
    advantages = torch.randn(64, generator=random)
    x = hidden.to(device, copy=True).requires_grad_()
    rows = [t.to(device) for t in (labels, advantages, old)]
    with use_backend(backend):
        out = linear_policy_loss(x, Head(weight.to(device)), TokenBatch(*rows), PPOClip())
        out.loss.backward()
    y = hidden.double().requires_grad_()
    logps = torch.log_softmax(y @ weight.double().T, -1).gather(-1, labels[:, None])[:, 0]
    ratio, adv = (logps - old.double()).exp(), advantages.double()
    loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
    loss.backward()
    gradient = (x.grad.cpu().double() - y.grad).abs().max() / y.grad.abs().max()
    return abs(float(out.loss.detach()) - float(loss.detach())), float(gradient)

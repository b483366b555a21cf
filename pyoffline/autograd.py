"""Autograd formulas of the custom ops.

A scalar loss has its gradients formed in the forward; the backward applies the upstream gradient
to them, in place and once, and gives them away. A second backward (retain_graph) recomputes. Token
log-probs recompute the logits in their backward, from the row coefficients that arrive. Double
backward raises and names the op. Also here: the ops of the token log-probs, which are one of
`ops.py` without an objective. Not here: the other ops (`ops.py`, `token_losses.py`, ...).
"""

import sys

import torch
from torch import Tensor
from torch._C._functorch import (
    get_unwrapped,
    is_batchedtensor,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    is_legacy_batchedtensor,
)
from torch.autograd import forward_ad

from pyoffline import ops
from pyoffline.backends import load, pick, scaling_backend
from pyoffline.ops import DTYPES, Ints

# References to a formed gradient that nobody outside holds: the tuple of them, the argument of
# `apply_upstream`, that of getrefcount. Who calls an op directly (opcheck) keeps its outputs.
PRIVATE = 3
_INSTEAD = "not implemented; use loss.backward() or torch.autograd.grad"
FORWARD_AD = f"jvp and forward AD are {_INSTEAD}"
VMAP = "vmap is not implemented; a batch of any shape is one call"
FUNC_GRAD = f"torch.func.grad, vjp and hessian are {_INSTEAD}"


def _eager(x: Tensor) -> bool:
    """A real tensor in eager mode, whose memory may be written (fake ones are subclasses)."""
    return type(x) is Tensor and not torch.compiler.is_compiling()


def is_read_by_host(upstream: Tensor, grad: Tensor) -> bool:
    """Whether the upstream gradient is a number that the host has; else a kernel reads it."""
    return upstream.device.type == "cpu" and pick("cpu", grad.dtype) != "triton"


def apply_upstream(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * upstream, cast once; in place where it is ours, untouched where upstream is 1."""
    if is_functorch_wrapped_tensor(upstream) or is_legacy_batchedtensor(upstream):
        # is_grads_batched: several upstreams at once
        wide = torch.promote_types(grad.dtype, torch.float32)
        return (grad.to(wide) * upstream.to(wide)).to(dtype)
    if not _eager(grad):
        return ops.scale_by_upstream(grad, upstream, DTYPES.index(dtype))
    if not is_read_by_host(upstream, grad):
        shared = sys.getrefcount(grad) > PRIVATE or not grad.is_contiguous()
        backend = None if shared else scaling_backend(grad)
        if backend is None:
            return ops.scale_by_upstream(grad, upstream, DTYPES.index(dtype))
        return load(backend, grad).scale_by_upstream(grad, upstream).to(dtype)
    factor = upstream.item()
    if factor != 1.0:
        grad = grad.mul_(factor) if sys.getrefcount(grad) <= PRIVATE else grad * factor
    return grad.to(dtype)


class _FormedOnce(torch.autograd.Function):
    """Identity on gradients, hung below the op's inputs so that a derivative of them comes here."""

    @staticmethod
    def forward(ctx, name, count, *grads_then_inputs):
        ctx.name = name
        return tuple(g.view_as(g) for g in grads_then_inputs[:count])

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            f"pyoffline::{ctx.name}: double backward is not implemented; gradients are formed once"
        )


def once(grads: list, name: str, inputs) -> list:
    """Under create_graph, make a derivative of these gradients an error that names the op."""
    live = [g for g in grads if g is not None]
    if not torch.is_grad_enabled() or not live:
        return grads
    wrapped = iter(_FormedOnce.apply(name, len(live), *live, *inputs))
    return [None if g is None else next(wrapped) for g in grads]


def _transform_of(x: Tensor) -> str | None:
    """Why what torch.func or forward AD does with this tensor is refused."""
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        return FORWARD_AD
    while is_functorch_wrapped_tensor(x):
        if is_gradtrackingtensor(x) and x.requires_grad:
            return FUNC_GRAD
        if is_batchedtensor(x):
            return VMAP
        x = get_unwrapped(x)
    return None


def apply(op, *args):
    """`op(*args)`, refusing derivatives that torch would drop in silence (forward AD gives tangent
    0 for a custom op) or refuse without a name (torch.func.grad), and vmap, which it would run as a
    loop or refuse, by what the op returns.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:  # torch.func.grad fails by itself there
            raise RuntimeError(f"{op._qualname}: {FORWARD_AD}")
    elif forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active():
        for x in args:
            reason = _transform_of(x) if isinstance(x, Tensor) else None
            if reason:
                raise RuntimeError(f"{op._qualname}: {reason}")
    return op(*args)


def _linear_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.extras = inputs[12]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.grads = output[7:]


def restore(ctx) -> list:
    """The arguments of the forward, the saved tensors in their places."""
    args = list(ctx.args)
    for i, x in zip(ctx.places, ctx.saved_tensors, strict=True):
        args[i] = x
    return args


def _linear_backward(ctx, g_loss, *_):
    grads = [None] * 23
    grads[12] = [None] * len(ctx.extras)
    args = restore(ctx)
    if g_loss is None:
        return tuple(grads)
    formed = ctx.grads
    ctx.grads = None
    if formed is None:
        with torch.no_grad():
            formed = ops.linear_policy(*args)[7:]
    needs = args[20]
    live = [
        apply_upstream(formed[i], g_loss, args[i].dtype) if needs & (1 << i) else None
        for i in range(5)
    ]
    grads[:5] = once(live, "linear_policy", args[:5])
    return tuple(grads)


ops.linear_policy.register_autograd(_linear_backward, setup_context=_linear_setup)


def _logits_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.extras = inputs[8]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.grads = output[7:]


def _logits_backward(ctx, g_loss, *_):
    grads = [None] * 16
    grads[8] = [None] * len(ctx.extras)
    args = restore(ctx)
    if g_loss is None:
        return tuple(grads)
    formed = ctx.grads
    ctx.grads = None
    if formed is None:
        with torch.no_grad():
            formed = ops.logits_policy(*args)[7:]
    live = [apply_upstream(formed[0], g_loss * formed[1], args[0].dtype)]
    grads[:1] = once(live, "logits_policy", args[:1])
    return tuple(grads)


ops.logits_policy.register_autograd(_logits_backward, setup_context=_logits_setup)


@torch.library.custom_op("pyoffline::linear_logps", mutates_args=())
def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    head: Tensor,
    ignore_index: int,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, log_sum_p2, is_top1: one GEMM; the backward recomputes the logits."""
    vectors = (None, None, None, None, None, temperature)
    linear = (hidden, weight, bias, adapter_hidden, adapter_weight)
    rest = ([], "", ignore_index, logits_dtype, 0, backend, plan)
    out = ops.linear_policy(*linear, labels, *vectors, [], None, _NO_TERMS, head, *rest)
    return out[2:7]


_NO_TERMS = torch.zeros(0, 8, dtype=torch.float64, device="cpu")


@linear_logps.register_fake
def _(hidden, *rest):
    return ops.fake_rows(hidden)[2:]


def _logps_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _coefs(g_logps, g_entropy, g_lse) -> Tensor:
    return torch.stack([g_logps, g_entropy, g_lse, torch.zeros_like(g_logps)])


def _logps_backward(ctx, g_logps, g_entropy, g_lse, *_):
    args = restore(ctx)
    coefs = _coefs(g_logps, g_entropy, g_lse)
    linear, (labels, temperature, head), rest = args[:5], args[5:8], args[8:]
    with torch.no_grad():
        formed = ops.linear_coefs(*linear, labels, temperature, None, coefs, head, *rest)
    needs = args[10]
    live = [formed[i].to(linear[i].dtype) if needs & (1 << i) else None for i in range(5)]
    return (*once(live, "linear_logps", linear), *[None] * 8)


linear_logps.register_autograd(_logps_backward, setup_context=_logps_setup)


@torch.library.custom_op("pyoffline::logits_logps", mutates_args=())
def logits_logps(
    logits: Tensor, labels: Tensor, temperature: Tensor | None, ignore_index: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logps, entropy, lse, log_sum_p2, is_top1 of given logits."""
    vectors = (None, None, None, None, None, temperature)
    tail = ([], "", ignore_index, False, backend)
    return ops.logits_policy(logits, labels, *vectors, [], None, _NO_TERMS, *tail)[2:7]


@logits_logps.register_fake
def _(logits, *rest):
    return ops.fake_rows(logits)[2:]


def _logits_logps_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[3:])
    logits, labels, temperature, ctx.ignore_index, ctx.backend = inputs
    ctx.save_for_backward(logits, labels, temperature)


def _logits_logps_backward(ctx, g_logps, g_entropy, g_lse, *_):
    logits, labels, temperature = ctx.saved_tensors
    coefs = _coefs(g_logps, g_entropy, g_lse)
    with torch.no_grad():
        dlogits = ops.logits_coefs(
            logits, labels, temperature, None, coefs, ctx.ignore_index, ctx.backend
        )
    return (*once([dlogits], "logits_logps", [logits]), None, None, None, None)


logits_logps.register_autograd(_logits_logps_backward, setup_context=_logits_logps_setup)

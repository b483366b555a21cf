"""Ops with one loss per token, for an upstream gradient per token (`reduction="none"`).

The forward keeps the row coefficients; the backward multiplies them by the upstream gradient and
recomputes the logits. Not here: the scalar losses, which form their gradient in the forward
(`ops.py`).
"""

import torch
from torch import Tensor

from pyoffline import ops
from pyoffline.autograd import once
from pyoffline.backends import load
from pyoffline.calls import LinearCall, LogitsCall, Needs, stats_dtype
from pyoffline.ops import DTYPES, Ints, Tensors
from pyoffline.plan import settings_of


@torch.library.custom_op("pyoffline::linear_losses", mutates_args=())
def linear_losses(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,
    labels: Tensor,
    extras: Tensors,
    class_weight: Tensor | None,
    hyper: Tensor,
    head: Tensor,
    codes: Ints,
    gates: str,
    ignore_index: int,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
) -> tuple[Tensor, Tensor]:
    """loss_t [N] and its coefficients [4, N]."""
    shared = (bias, class_weight)
    rows = ops.op_rows(labels, [None] * 6, extras, gates, shared, codes, hyper, head, ignore_index)
    settings = settings_of(plan)
    call = LinearCall(
        hidden, weight, rows, Needs(), settings, DTYPES[logits_dtype], wants_coefs=True
    )
    out = load(backend, hidden).linear(call).out
    return out.loss, out.coefs


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    n, total = x.shape[0], stats_dtype(x.dtype)
    return x.new_empty(n, dtype=total), x.new_empty((4, n), dtype=total)


@linear_losses.register_fake
def _(hidden, *rest):
    return _fake(hidden)


def _linear_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    hidden, weight, bias, labels, _, class_weight, _, head = inputs[:8]
    ctx.static = inputs[10:]
    ctx.n_extras = len(inputs[4])
    ctx.save_for_backward(hidden, weight, bias, labels, class_weight, head, output[1])


def _linear_backward(ctx, g_loss, _):
    hidden, weight, bias, labels, class_weight, head, coefs = ctx.saved_tensors
    linear = (hidden, weight, bias, None, None)
    with torch.no_grad():
        scaled = torch.where(coefs == 0, 0.0, coefs * g_loss)
        formed = ops.linear_coefs(*linear, labels, None, class_weight, scaled, head, *ctx.static)
    needs = ctx.static[2]
    live = [formed[i].to(linear[i].dtype) if needs & (1 << i) else None for i in range(3)]
    return (*once(live, "linear_losses", linear), None, [None] * ctx.n_extras, *[None] * 10)


linear_losses.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("pyoffline::logits_losses", mutates_args=())
def logits_losses(
    logits: Tensor,  # [N, V]
    labels: Tensor,
    extras: Tensors,
    class_weight: Tensor | None,
    hyper: Tensor,
    codes: Ints,
    gates: str,
    ignore_index: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """loss_t [N] and its coefficients [4, N]."""
    shared = (None, class_weight)
    head = ops.PLAIN_HEAD
    rows = ops.op_rows(labels, [None] * 6, extras, gates, shared, codes, hyper, head, ignore_index)
    out = load(backend, logits).logits(LogitsCall(logits, rows, False, True)).out
    return out.loss, out.coefs


@logits_losses.register_fake
def _(logits, *rest):
    return _fake(logits)


def _logits_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.n_extras = len(inputs[2])
    ctx.static = inputs[7:]
    ctx.save_for_backward(inputs[0], inputs[1], inputs[3], output[1])


def _logits_backward(ctx, g_loss, _):
    logits, labels, class_weight, coefs = ctx.saved_tensors
    with torch.no_grad():
        scaled = torch.where(coefs == 0, 0.0, coefs * g_loss)
        dlogits = ops.logits_coefs(logits, labels, None, class_weight, scaled, *ctx.static)
    grads = once([dlogits], "logits_losses", [logits])
    return (*grads, None, [None] * ctx.n_extras, *[None] * 6)


logits_losses.register_autograd(_logits_backward, setup_context=_logits_setup)

"""Token log-probs and row statistics: what adapters of other trainers use.

`linear_token_logps` needs one GEMM without gradients and recomputes the logits in its backward.
Not here: losses.
"""

import torch
from torch import Tensor

from pyoffline import autograd, checks
from pyoffline.backends import pick
from pyoffline.calls import stats_dtype
from pyoffline.flatten import flatten_head, vector
from pyoffline.head import Head
from pyoffline.plan import plan_list
from pyoffline.records import TokenStats


def linear_token_logps(
    hidden: Tensor,  # [..., D] any float
    head: Head,
    labels: Tensor,  # [...] integer
    temperature: Tensor | None = None,  # [...] per token, replaces the head's
    ignore_index: int = -100,
) -> TokenStats:
    """`head(hidden).float().log_softmax(-1).gather(-1, labels[..., None])[..., 0]`, and more.

    Returns TokenStats(logps, entropy, lse, log_sum_p2, is_top1), fp32 (fp64 for fp64), of the
    labels' shape, 0 where `labels == ignore_index`; logps, entropy and lse are differentiable in
    hidden and the head. Memory: one chunk of logits; the backward recomputes them (four GEMMs in
    all), with an fp32 [V, D] accumulator where a trainable head takes several chunks. Errors as
    `linear_policy_loss`.
    """
    if not isinstance(head, Head):
        raise TypeError(
            f"head: expected a po.Head, got {type(head).__name__}; use po.Head.of(model)"
        )
    x = flatten_head(hidden, head.tensors())
    shape, device = hidden.shape[:-1], hidden.device
    flat = checks.labels(labels, shape, device).reshape(-1).contiguous()
    dtype = stats_dtype(x.hidden.dtype)
    stats = autograd.apply(
        autograd.linear_logps,
        *x.linear,
        flat,
        _temperature(temperature, flat, shape, dtype, ignore_index),
        x.scalars,
        ignore_index,
        x.logits_dtype,
        x.needs,
        pick(device.type, x.arithmetic),
        plan_list(),
    )
    return TokenStats(*(s.reshape(shape) for s in stats))


def _temperature(x, labels: Tensor, shape, dtype, ignore_index) -> Tensor | None:
    """Per-token temperatures as a checked [N] vector."""
    checks.integer("ignore_index", ignore_index)
    flat = vector("temperature", x, shape, labels.device, dtype)
    if flat is not None:
        checks.temperatures("temperature", flat, labels != ignore_index)
    return flat


def token_logps(
    logits: Tensor,  # [..., V] any float
    labels: Tensor,  # [...] integer
    temperature: Tensor | float | None = None,  # [...] per token, or one float
    ignore_index: int = -100,
) -> TokenStats:
    """`linear_token_logps` on logits [..., V], `(logits / temperature).float().log_softmax(-1)`.

    Never writes them, and saves nothing else of their size; the backward allocates the gradient.
    """
    checks.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got {tuple(logits.shape)}")
    shape, device = logits.shape[:-1], logits.device
    flat = checks.labels(labels, shape, device).reshape(-1).contiguous()
    if isinstance(temperature, (int, float)):
        temperature = torch.full(shape, float(temperature), device=device)
    stats = autograd.apply(
        autograd.logits_logps,
        logits.reshape(-1, logits.shape[-1]),
        flat,
        _temperature(temperature, flat, shape, stats_dtype(logits.dtype), ignore_index),
        ignore_index,
        pick(device.type, logits.dtype),
    )
    return TokenStats(*(s.reshape(shape) for s in stats))

"""The custom op of `linear_distill_loss` and its autograd formula.

`linear_distill` takes the arguments of `linear_policy`, then the teacher's tensors and the
divergences; gradients are formed in the forward, the backward applies the upstream gradient, a
second one recomputes, a double backward raises (`autograd.py`). The teacher has no gradient.
`soft_losses` is the same against given logits with one loss per token: its backward recomputes
with the upstream gradient as weights. Not here: shapes of the public API (`teachers.py`,
`flatten.py`).
"""

import torch
from torch import Tensor

from pyoffline import autograd, ops
from pyoffline.backends import DISTILL, load
from pyoffline.calls import HeadScalars, LinearCall, stats_dtype
from pyoffline.distill_loop import DistillCall, DivergenceUse, Teacher
from pyoffline.ops import Ints, Tensors
from pyoffline.plan import settings_of

EXTRAS, NEEDS, ARGUMENTS = 12, 20, 35  # places among the op's arguments, and their number
GRADS = 10  # place of the first gradient among the op's results

Fifteen = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]  # fmt: skip


def _teacher(tensors, head: Tensor, logits_dtype: int) -> Teacher:
    return Teacher(HeadScalars(*head.tolist()), ops.DTYPES[logits_dtype], *tensors)


def _uses(codes: list[int], hyper: Tensor) -> tuple[DivergenceUse, ...]:
    pairs = zip(codes[0::2], codes[1::2], hyper.tolist(), strict=True)
    return tuple(DivergenceUse(code, gate, *numbers) for code, gate, numbers in pairs)


@torch.library.custom_op("pyoffline::linear_distill", mutates_args=())
def linear_distill(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    adapter_hidden: Tensor | None,  # [N, r]
    adapter_weight: Tensor | None,  # [V, r]
    labels: Tensor,  # [N] int64
    weights: Tensor | None,  # [N] fp32, as all row vectors
    old: Tensor | None,
    mu: Tensor | None,
    ref: Tensor | None,
    adv: Tensor | None,
    temperature: Tensor | None,
    extras: Tensors,
    class_weight: Tensor | None,  # always None: the place of linear_policy's
    hyper: Tensor,  # [K, 8] fp64 cpu
    head: Tensor,  # [3] fp64 cpu: softcap, logit_scale, temperature
    codes: Ints,
    gates: str,
    ignore_index: int,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
    teacher_hidden: Tensor | None,  # [N, D']
    teacher_weight: Tensor | None,  # [V, D']
    teacher_bias: Tensor | None,  # [V]
    teacher_adapter_hidden: Tensor | None,
    teacher_adapter_weight: Tensor | None,
    teacher_logits: Tensor | None,  # [N, V]
    teacher_ids: Tensor | None,  # [N, k] int64
    teacher_logps: Tensor | None,  # [N, k]
    teacher_head: Tensor,  # [3] fp64 cpu
    teacher_dtype: int,
    divergences: Ints,  # (code, gate) pairs
    divergence_hyper: Tensor,  # [M, 2] fp64 cpu: scale, parameter
) -> Fifteen:
    """loss, loss_t, logps, entropy, lse, log_sum_p2, is_top1, divergences [M, N], teacher_entropy,
    top1_agreement, dhidden, dweight, dbias and the adapter's two.
    """
    rows = ops.op_rows(
        labels,
        (weights, old, mu, ref, adv, temperature),
        extras,
        gates,
        (bias, class_weight),
        codes,
        hyper,
        head,
        ignore_index,
    )
    linear = LinearCall(
        hidden,
        weight,
        rows,
        ops.needs_record(needs),
        settings_of(plan),
        ops.DTYPES[logits_dtype],
        adapter_hidden,
        adapter_weight,
    )
    tensors = (
        *(teacher_hidden, teacher_weight, teacher_bias),
        *(teacher_adapter_hidden, teacher_adapter_weight),
        *(teacher_logits, teacher_ids, teacher_logps),
    )
    teacher = _teacher(tensors, teacher_head, teacher_dtype)
    call = DistillCall(linear, teacher, _uses(divergences, divergence_hyper))
    result, more = load(backend, hidden, DISTILL).distill(call)
    flat = ops.flat_result(result)
    return (*flat[:7], more.values, more.teacher_entropy, more.top1_agreement, *flat[7:])


@linear_distill.register_fake
def _(hidden, weight, bias, adapter_hidden, adapter_weight, *rest):
    n, total = hidden.shape[0], stats_dtype(hidden.dtype)
    more = (
        hidden.new_empty(len(rest[-2]) // 2, n, dtype=total),
        hidden.new_empty(n, dtype=total),
        hidden.new_empty(n, dtype=torch.bool),
    )
    needs = rest[NEEDS - 5]
    grads = ops.fake_grads(hidden, weight, adapter_hidden, adapter_weight, needs)
    return (*ops.fake_rows(hidden), *more, *grads)


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.grads = output[GRADS:]


def _backward(ctx, g_loss, *_):
    grads = [None] * ARGUMENTS
    args = autograd.restore(ctx)
    grads[EXTRAS] = [None] * len(args[EXTRAS])
    if g_loss is None:
        return tuple(grads)
    formed = ctx.grads
    ctx.grads = None
    if formed is None:
        with torch.no_grad():
            formed = linear_distill(*args)[GRADS:]
    live = [
        autograd.apply_upstream(formed[i], g_loss, args[i].dtype)
        if args[NEEDS] & (1 << i)
        else None
        for i in range(5)
    ]
    grads[:5] = autograd.once(live, "linear_distill", args[:5])
    return tuple(grads)


linear_distill.register_autograd(_backward, setup_context=_setup)


@torch.library.custom_op("pyoffline::soft_losses", mutates_args=())
def soft_losses(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    labels: Tensor,  # [N] int64, of rows that all count
    extras: Tensors,
    hyper: Tensor,
    head: Tensor,
    codes: Ints,
    gates: str,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
    teacher_logits: Tensor,  # [N, V]
    teacher_head: Tensor,  # [3] fp64 cpu
    divergences: Ints,
    divergence_hyper: Tensor,
) -> tuple[Tensor, Tensor]:
    """loss_t [N] and the teacher's entropy [N]."""
    args = (hidden, weight, bias, labels, extras, hyper, head, codes, gates, logits_dtype)
    tail = (backend, plan, teacher_logits, teacher_head, divergences, divergence_hyper)
    out = linear_distill(*soft_args(None, *args, 0, *tail))
    return out[1], out[8]


def soft_args(weights: Tensor | None, *args) -> tuple:
    """Arguments of `linear_distill` for those of `soft_losses` and weights per row."""
    hidden, weight, bias, labels, extras, hyper, head, codes, gates, *more = args
    logits_dtype, needs, backend, plan, teacher, teacher_head, *divergences = more
    vectors = (weights, None, None, None, None, None)
    fixed = (hyper, head, codes, gates, -100, logits_dtype, needs, backend, plan)
    given = (*[None] * 5, teacher, None, None, teacher_head, ops.DTYPES.index(teacher.dtype))
    linear = (hidden, weight, bias, None, None)
    return (*linear, labels, *vectors, extras, None, *fixed, *given, *divergences)


@soft_losses.register_fake
def _(hidden, *rest):
    n, total = hidden.shape[0], stats_dtype(hidden.dtype)
    return hidden.new_empty(n, dtype=total), hidden.new_empty(n, dtype=total)


def _soft_setup(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))


def _soft_backward(ctx, g_loss, _):
    args = autograd.restore(ctx)
    needs = args[10]
    with torch.no_grad():
        formed = linear_distill(*soft_args(g_loss.contiguous(), *args))[GRADS:]
    live = [formed[i].to(args[i].dtype) if needs & (1 << i) else None for i in range(3)]
    rest = [None, [None] * len(args[4]), *[None] * 12]
    return (*autograd.once(live, "soft_losses", args[:3]), *rest)


soft_losses.register_autograd(_soft_backward, setup_context=_soft_setup)

"""The custom op of `linear_distill_loss` and its autograd formula.

`linear_distill` takes the arguments of `linear_policy`, then the teacher's tensors and the
divergences; gradients are formed in the forward, the backward applies the upstream gradient, a
second one recomputes, a double backward raises (`autograd.py`). The teacher has no gradient. Not
here: shapes of the public API (`teachers.py`, `flatten.py`).
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

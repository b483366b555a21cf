"""The custom ops, flat tensors in and out: for torch.compile, fake tensors and opcheck.

Five ops: `linear_policy` and `logits_policy` give loss, row statistics and, where wanted,
gradients formed in the forward; `linear_coefs` and `logits_coefs` turn given row coefficients into
gradients (backward of the token log-probs); `scale_by_upstream` applies the upstream gradient.
Their autograd formulas are in `autograd.py`. Flags say which gradients are wanted: grad mode is
off inside an op, so they are computed outside.
"""

from typing import List  # noqa: UP035

import torch
from torch import Tensor

from pyoffline.backends import load
from pyoffline.calls import (
    HeadScalars,
    LinearCall,
    LogitsCall,
    Needs,
    Rows,
    stats_dtype,
)
from pyoffline.chunk_loop import grad_dtype, is_one
from pyoffline.plan import settings_of

# Bits of the `needs` integer.
HIDDEN, WEIGHT, BIAS, ADAPTER_HIDDEN, ADAPTER_WEIGHT = (1 << i for i in range(5))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def needs_record(bits: int) -> Needs:
    """Bit field -> record."""
    return Needs(*(bool(bits & (1 << i)) for i in range(5)))


def op_rows(labels, vectors, extras, gates, shared, codes, hyper, head, ignore_index, coefs=None):
    """calls.Rows of an op's flat arguments; fp64 statistics where a vector is fp64."""
    weights, old, mu, ref, adv, temperature = vectors
    bias, class_weight = shared
    total = stats_dtype(labels.dtype)
    for x in (weights, old, mu, ref, adv, temperature, coefs):
        total = torch.float64 if x is not None and x.dtype == torch.float64 else total
    names = [g for g in gates.split(",") if g]
    softcap, logit_scale, uniform = head.tolist()
    return Rows(
        labels=labels,
        weights=weights,
        old=old,
        mu=mu,
        ref=ref,
        adv=adv,
        temperature=temperature,
        extras=dict(zip(names, extras, strict=True)),
        coefs=coefs,
        codes=tuple(codes),
        hyper=hyper,
        head=HeadScalars(softcap, logit_scale, uniform),
        bias=bias,
        class_weight=class_weight,
        ignore_index=ignore_index,
    )


def flat_result(result) -> tuple[Tensor, ...]:
    """What an op returns of a LinearResult; an empty tensor for a gradient that is not there."""
    out = result.out
    grads = (
        result.dhidden,
        result.dweight,
        result.dbias,
        result.dadapter_hidden,
        result.dadapter_weight,
    )
    return (
        result.loss,
        out.loss,
        out.logps,
        out.entropy,
        out.lse,
        out.log_sum_p2,
        out.is_top1,
        *(result.loss.new_empty(0) if g is None else g for g in grads),
    )


# A custom op takes no `list[...]` before torch 2.7.
Tensors = List[Tensor]  # noqa: UP006
Ints = List[int]  # noqa: UP006
Twelve = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor
]
Five = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("pyoffline::linear_policy", mutates_args=())
def linear_policy(
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
    class_weight: Tensor | None,  # [V]
    hyper: Tensor,  # [K, 8] fp64 cpu
    head: Tensor,  # [3] fp64 cpu: softcap, logit_scale, temperature
    codes: Ints,
    gates: str,
    ignore_index: int,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
) -> Twelve:
    """(loss, loss_t, logps, entropy, lse, log_sum_p2, is_top1, five gradients as `Needs`)."""
    rows = op_rows(
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
    call = LinearCall(
        hidden,
        weight,
        rows,
        needs_record(needs),
        settings_of(plan),
        DTYPES[logits_dtype],
        adapter_hidden,
        adapter_weight,
    )
    return flat_result(load(backend, hidden).linear(call))


def fake_rows(hidden: Tensor) -> tuple[Tensor, ...]:
    """Empty loss, loss_t and row statistics, for a fake implementation."""
    n, total = hidden.shape[0], stats_dtype(hidden.dtype)
    floats = [hidden.new_empty(n, dtype=total) for _ in range(5)]
    return (
        hidden.new_empty((), dtype=total),
        *floats,
        hidden.new_empty(n, dtype=torch.bool),
    )


def fake_grads(hidden, weight, adapter_hidden, adapter_weight, needs) -> tuple[Tensor, ...]:
    """Empty gradients, for a fake implementation: of no entries where `needs` has not the bit."""
    total = stats_dtype(hidden.dtype)

    def like(x, bit, dtype=None):
        if not needs & bit:
            return hidden.new_empty(0, dtype=total)
        return x.new_empty(x.shape, dtype=dtype or grad_dtype(x.dtype))

    return (
        like(hidden, HIDDEN),
        like(weight, WEIGHT),
        like(weight[:, 0], BIAS, total),
        like(adapter_hidden, ADAPTER_HIDDEN),
        like(adapter_weight, ADAPTER_WEIGHT),
    )


@linear_policy.register_fake
def _(hidden, weight, bias, adapter_hidden, adapter_weight, *rest):
    needs = rest[-3]
    grads = fake_grads(hidden, weight, adapter_hidden, adapter_weight, needs)
    return (*fake_rows(hidden), *grads)


@torch.library.custom_op("pyoffline::linear_coefs", mutates_args=())
def linear_coefs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    adapter_hidden: Tensor | None,
    adapter_weight: Tensor | None,
    labels: Tensor,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    coefs: Tensor,  # [4, N] a, b, c, e
    head: Tensor,
    ignore_index: int,
    logits_dtype: int,
    needs: int,
    backend: str,
    plan: Ints,
) -> Five:
    """The five gradients from given row coefficients; recomputes the logits."""
    vectors = (None, None, None, None, None, temperature)
    shared = (bias, class_weight)
    rows = op_rows(labels, vectors, [], "", shared, (), None, head, ignore_index, coefs)
    call = LinearCall(
        hidden,
        weight,
        rows,
        needs_record(needs),
        settings_of(plan),
        DTYPES[logits_dtype],
        adapter_hidden,
        adapter_weight,
    )
    return flat_result(load(backend, hidden).linear(call))[7:]


@linear_coefs.register_fake
def _(hidden, weight, bias, adapter_hidden, adapter_weight, *rest):
    return fake_grads(hidden, weight, adapter_hidden, adapter_weight, rest[-3])


@torch.library.custom_op("pyoffline::logits_policy", mutates_args=())
def logits_policy(
    logits: Tensor,  # [N, V]
    labels: Tensor,
    weights: Tensor | None,
    old: Tensor | None,
    mu: Tensor | None,
    ref: Tensor | None,
    adv: Tensor | None,
    temperature: Tensor | None,
    extras: Tensors,
    class_weight: Tensor | None,
    hyper: Tensor,
    codes: Ints,
    gates: str,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """loss, loss_t, logps, entropy, lse, log_sum_p2, is_top1, dlogits, unscale."""
    rows = op_rows(
        labels,
        (weights, old, mu, ref, adv, temperature),
        extras,
        gates,
        (None, class_weight),
        codes,
        hyper,
        PLAIN_HEAD,
        ignore_index,
    )
    result = load(backend, logits).logits(LogitsCall(logits, rows, needs_grad))
    out, loss = result.out, result.loss
    dlogits = logits.new_empty(0) if result.dlogits is None else result.dlogits
    unscale = loss.new_empty(()).fill_(result.unscale)  # a number of the host: no copy, no sync
    stats = (out.loss, out.logps, out.entropy, out.lse, out.log_sum_p2, out.is_top1)
    return (loss, *stats, dlogits, unscale)


PLAIN_HEAD = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64, device="cpu")


@logits_policy.register_fake
def _(logits, *rest):
    needs_grad = rest[-2]
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    return (*fake_rows(logits), dlogits, logits.new_empty((), dtype=stats_dtype(logits.dtype)))


@torch.library.custom_op("pyoffline::logits_coefs", mutates_args=())
def logits_coefs(
    logits: Tensor,
    labels: Tensor,
    temperature: Tensor | None,
    class_weight: Tensor | None,
    coefs: Tensor,  # [4, N]
    ignore_index: int,
    backend: str,
) -> Tensor:
    """dlogits [N, V] from given row coefficients."""
    vectors = (None, None, None, None, None, temperature)
    shared = (None, class_weight)
    rows = op_rows(labels, vectors, [], "", shared, (), None, PLAIN_HEAD, ignore_index, coefs)
    result = load(backend, logits).logits(LogitsCall(logits, rows, True))
    return result.dlogits if is_one(result.unscale) else result.dlogits * result.unscale


@logits_coefs.register_fake
def _(logits, *rest):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("pyoffline::scale_by_upstream", mutates_args=())
def scale_by_upstream(grad: Tensor, upstream: Tensor, dtype: int) -> Tensor:
    """`(grad * upstream).to(dtype)` with one rounding; the compiled path of the backward."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    return (grad.to(wide) * upstream.to(wide)).to(DTYPES[dtype], copy=True)


@scale_by_upstream.register_fake
def _(grad, upstream, dtype):
    return grad.new_empty(grad.shape, dtype=DTYPES[dtype])

"""The custom ops of coupled objectives, `linear_coupled` and `logits_coupled`, and their autograd.

As `linear_policy` and `logits_policy`: gradients are formed in the forward, the backward applies
the upstream gradient, a second one recomputes. Flat tensors in and out; the sequences arrive as
per-token ids and [S] tensors, and are sorted inside, where data-dependent shapes are no concern of
torch.compile. Not here: the loop (`coupled_loop.py`).
"""

from dataclasses import replace

import torch
from torch import Tensor

from pyoffline import ops
from pyoffline.autograd import apply_upstream, once, restore
from pyoffline.backends import load
from pyoffline.calls import LinearCall, LogitsCall, RowOutputs
from pyoffline.coupled_loop import mean_metrics, run_coupled
from pyoffline.coupled_program import Evaluated, evaluate_units, metric_names, reads_gap
from pyoffline.coupled_units import CoupledInputs, Units
from pyoffline.ops import DTYPES, Ints, Tensors, Twelve
from pyoffline.plan import settings_of

_LINEAR_ARGS, _LOGITS_ARGS = 28, 21
Nine = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _inputs(sequence_ids, sequences, codes, hyper) -> CoupledInputs:
    return CoupledInputs(sequence_ids, tuple(codes), hyper, *sequences)


def _evaluate_all(units: Units, out: RowOutputs) -> Evaluated:
    """Every unit at once, from the statistics of the whole call."""
    if reads_gap(units.inputs.codes) and out.gap is None:
        raise RuntimeError("this backend does not give the gap that label smoothing reads")
    stats = out.map(lambda x: x.index_select(-1, units.layout.order))
    everything = slice(0, units.layout.members.numel())
    c = units.coupled(slice(0, units.count), everything, stats)
    gap = None if stats.gap is None else stats.gap.double()
    return evaluate_units(units.inputs.codes, units.inputs.hyper, c, units.omega, gap)


def _nothing(units: Units, like: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and metrics where no token counts."""
    names = metric_names(units.inputs.codes)
    return like.new_zeros(()), torch.zeros(len(names), dtype=torch.float64, device=like.device)


def _flat(result, metrics: Tensor) -> tuple[Tensor, ...]:
    loss, _, *rest = ops.flat_result(result)
    return (loss, *rest[:5], metrics, *rest[5:])


def _score(backend, call: LinearCall, inputs: CoupledInputs) -> tuple[Tensor, ...]:
    """No gradient is wanted: the backend's scoring path, then the units at once."""
    result = backend.linear(call)
    units = Units(call.rows, inputs)
    loss, metrics = _nothing(units, result.out.logps)
    if units.count:
        got = _evaluate_all(units, result.out)
        loss, metrics = got.loss.to(loss.dtype), mean_metrics(got.metrics)
    return _flat(replace(result, loss=loss), metrics)


@torch.library.custom_op("pyoffline::linear_coupled", mutates_args=())
def linear_coupled(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V]
    adapter_hidden: Tensor | None,  # [N, r]
    adapter_weight: Tensor | None,  # [V, r]
    labels: Tensor,  # [N] int64
    weights: Tensor | None,  # [N]; None: the defaults of each term's unit
    old: Tensor | None,
    mu: Tensor | None,
    ref: Tensor | None,
    adv: Tensor | None,
    temperature: Tensor | None,
    extras: Tensors,
    sequence_ids: Tensor,  # [N] int64
    rewards: Tensor | None,  # [S]
    group_ids: Tensor | None,
    targets: Tensor | None,
    ref_sums: Tensor | None,
    omega: Tensor | None,
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
    """(loss, logps, entropy, lse, log_sum_p2, is_top1, metrics [M], five gradients as `Needs`)."""
    vectors = (weights, old, mu, ref, adv, temperature)
    rows = ops.op_rows(labels, vectors, extras, gates, (bias, None), (), None, head, ignore_index)
    wanted, settings, kind = ops.needs_record(needs), settings_of(plan), DTYPES[logits_dtype]
    adapter = (adapter_hidden, adapter_weight)
    call = LinearCall(hidden, weight, rows, wanted, settings, kind, *adapter)
    sequences = (rewards, group_ids, targets, ref_sums, omega)
    inputs = _inputs(sequence_ids, sequences, codes, hyper)
    served = load(backend, hidden)
    if not wanted.any and not reads_gap(codes):
        return _score(served, call, inputs)
    call = replace(call, loop=lambda k, call: run_coupled(k, call, inputs))
    result = served.linear(call)
    if result.metrics is None:
        raise RuntimeError(f"backend {served.__name__} does not run coupled objectives")
    return _flat(result, result.metrics)


def _fake_rows(x: Tensor, codes) -> tuple[Tensor, ...]:
    loss, _, *stats = ops.fake_rows(x)
    return (loss, *stats, x.new_empty(len(metric_names(codes)), dtype=torch.float64))


@linear_coupled.register_fake
def _(hidden, weight, bias, adapter_hidden, adapter_weight, *rest):
    codes, needs = rest[16], rest[20]
    grads = ops.fake_grads(hidden, weight, adapter_hidden, adapter_weight, needs)
    return (*_fake_rows(hidden, codes), *grads)


@torch.library.custom_op("pyoffline::logits_coupled", mutates_args=())
def logits_coupled(
    logits: Tensor,  # [N, V]
    labels: Tensor,
    weights: Tensor | None,
    old: Tensor | None,
    mu: Tensor | None,
    ref: Tensor | None,
    adv: Tensor | None,
    temperature: Tensor | None,
    extras: Tensors,
    sequence_ids: Tensor,
    rewards: Tensor | None,
    group_ids: Tensor | None,
    targets: Tensor | None,
    ref_sums: Tensor | None,
    omega: Tensor | None,
    hyper: Tensor,
    codes: Ints,
    gates: str,
    ignore_index: int,
    needs_grad: bool,
    backend: str,
) -> Nine:
    """(loss, logps, entropy, lse, log_sum_p2, is_top1, metrics [M], dlogits, unscale).

    Two reads of the logits (statistics, then the gradient) and one write.
    """
    vectors = (weights, old, mu, ref, adv, temperature)
    plain = (ops.PLAIN_HEAD, ignore_index)
    rows = ops.op_rows(labels, vectors, extras, gates, (None, None), (), None, *plain)
    sequences = (rewards, group_ids, targets, ref_sums, omega)
    units = Units(rows, _inputs(sequence_ids, sequences, codes, hyper))
    served = load(backend, logits)
    out = served.logits(LogitsCall(logits, rows, False, wants_gap=reads_gap(codes))).out
    loss, metrics = _nothing(units, out.logps)
    coefs = out.logps.new_zeros(4, logits.shape[0])
    if units.count:
        got = _evaluate_all(units, out)
        loss, metrics = got.loss.to(loss.dtype), mean_metrics(got.metrics)
        coefs.index_copy_(1, units.layout.order, got.coefs.to(coefs.dtype))
    stats = (out.logps, out.entropy, out.lse, out.log_sum_p2, out.is_top1)
    if not needs_grad:
        return (loss, *stats, metrics, logits.new_empty(0), loss.new_ones(()))
    given = replace(rows, weights=None, extras={}, coefs=coefs)
    result = served.logits(LogitsCall(logits, given, True))
    return (loss, *stats, metrics, result.dlogits, loss.new_full((), result.unscale))


@logits_coupled.register_fake
def _(logits, *rest):
    codes, needs_grad = rest[15], rest[18]
    dlogits = logits.new_empty(logits.shape if needs_grad else (0,))
    loss, *stats = _fake_rows(logits, codes)
    return (loss, *stats, dlogits, loss.new_empty(()))


def _setup(ctx, inputs, output):
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.args = [x if not isinstance(x, Tensor) else None for x in inputs]
    ctx.places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*(inputs[i] for i in ctx.places))
    ctx.grads = output[7:]


def _formed(ctx, op, args):
    """The gradients of the forward, once; recomputed for a second backward."""
    formed, ctx.grads = ctx.grads, None
    if formed is None:
        with torch.no_grad():
            formed = op(*args)[7:]
    return formed


def _linear_backward(ctx, g_loss, *_):
    grads = [None] * _LINEAR_ARGS
    args = restore(ctx)
    grads[12] = [None] * len(args[12])
    if g_loss is None:
        return tuple(grads)
    formed = _formed(ctx, linear_coupled, args)
    live = [
        apply_upstream(formed[i], g_loss, args[i].dtype) if args[25] & (1 << i) else None
        for i in range(5)
    ]
    grads[:5] = once(live, "linear_coupled", args[:5])
    return tuple(grads)


linear_coupled.register_autograd(_linear_backward, setup_context=_setup)


def _logits_backward(ctx, g_loss, *_):
    grads = [None] * _LOGITS_ARGS
    args = restore(ctx)
    grads[8] = [None] * len(args[8])
    if g_loss is None:
        return tuple(grads)
    formed = _formed(ctx, logits_coupled, args)
    live = [apply_upstream(formed[0], g_loss * formed[1], args[0].dtype)]
    grads[:1] = once(live, "logits_coupled", args[:1])
    return tuple(grads)


logits_coupled.register_autograd(_logits_backward, setup_context=_setup)

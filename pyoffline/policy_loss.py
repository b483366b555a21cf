"""The main entry: any objective on hidden states and a head, or on logits that the caller has.

Chunks of the logits form the loss, the row statistics and the gradients: in one pass for
token-local objectives, unit by unit for coupled ones. Not here: the loops (`chunk_loop.py`,
`coupled_loop.py`), the objectives (`token_objectives.py`, `sequence_objectives.py`), aggregation
(`aggregate.py`: the caller's weights).
"""

import torch
from torch import Tensor

from pyoffline import autograd, checks, coupled_ops, ops
from pyoffline.backends import pick
from pyoffline.calls import stats_dtype
from pyoffline.compose import Objective
from pyoffline.coupled_program import metric_names
from pyoffline.flatten import flatten_head, flatten_tokens, objective_program
from pyoffline.flatten_coupled import flatten_sequences
from pyoffline.head import Head
from pyoffline.metrics import token_metrics
from pyoffline.plan import plan_list
from pyoffline.records import LossOutput, TokenBatch, TokenStats
from pyoffline.reference_head import with_reference


def _output(flat, program, loss, stats, shape, more=()) -> LossOutput:
    detached = [x.detach() for x in stats]
    more = dict(more)
    clips = None if "clip_ratio/region_mean" in more else program  # a sequence's clip goes first
    metrics = {**token_metrics(flat, clips, *detached), **more}
    return LossOutput(loss, TokenStats(*(x.reshape(shape) for x in detached)), metrics)


def _coupled_output(flat, program, result, shape) -> LossOutput:
    loss, *stats = result[:6]
    names, values = metric_names(program.codes), result[6].detach().to(stats[0].dtype)
    more = ((name, values[i]) for i, name in enumerate(names))
    return _output(flat, program, loss, stats, shape, more)


def linear_policy_loss(
    hidden: Tensor,  # [..., D] any float
    head: Head,
    tokens: TokenBatch,
    objective: Objective,
) -> LossOutput:
    """`(weights * objective(log_softmax(head(hidden))[labels])).sum()` and its gradient, in chunks.

    Equivalent PyTorch for `po.WeightedNLL()`, with z = head(hidden) as `Head` defines it:

        counted = labels != ignore_index
        logps = z[counted].float().log_softmax(-1).gather(-1, labels[counted, None])[:, 0]
        loss = (weights[counted] * -advantages[counted] * logps).sum()

    Shapes: hidden [..., D], the tensors of `tokens` [...]; hidden and weight share a dtype (bf16,
    fp16, fp32, fp64). Statistics and loss are fp32 (fp64 for fp64). Memory: one chunk of logits
    (448 MiB on a CPU, 1 GiB on a GPU; `po.memory_budget`) and an fp32 [V, D] accumulator when a
    trainable head takes several chunks; beyond that a few numbers per token, and a copy of the
    hidden rows that count where some do not.

    Returns LossOutput(loss, stats, metrics). Gradients reach hidden, the head's weight, bias and
    LoRA factors, as each requires it. Advantages and log-probs in `tokens` are constants; with
    `ref_logps=po.TeacherHead(ref_hidden, ref_head)` the reference is scored first (one GEMM more).

    Raises:
        IndexError: a label outside [0, V) that is not ignore_index (names row and value).
        ValueError: a shape or device that does not fit, a tensor that the objective lacks or does
            not read.
        TypeError: a dtype or object of the wrong kind.

    On a GPU a bad label makes its row NaN, and a later call or `po.check()` raises.
    """
    program = objective_program(objective, tokens)
    if not isinstance(head, Head):
        raise TypeError(
            f"head: expected a po.Head, got {type(head).__name__}; use po.Head.of(model)"
        )
    x = flatten_head(hidden, head.tensors())
    tokens = with_reference(tokens, x.weight.shape[0])
    shape, device = hidden.shape[:-1], hidden.device
    flat = flatten_tokens(tokens, shape, device, stats_dtype(x.hidden.dtype), program)
    if program.coupled:
        more = flatten_sequences(tokens, shape, device, stats_dtype(x.hidden.dtype), objective)
        result = autograd.apply(
            coupled_ops.linear_coupled,
            *x.linear,
            *_coupled_args(flat, tokens, more),
            program.hyper,
            x.scalars,
            program.codes,
            flat.gates,
            flat.ignore_index,
            x.logits_dtype,
            x.needs,
            pick(device.type, x.arithmetic),
            plan_list(),
        )
        return _coupled_output(flat, program, result, shape)
    result = autograd.apply(
        ops.linear_policy,
        *x.linear,
        flat.labels,
        flat.weights,
        flat.old,
        flat.mu,
        flat.ref,
        flat.adv,
        flat.temperature,
        flat.extras,
        None,
        program.hyper,
        x.scalars,
        program.codes,
        flat.gates,
        flat.ignore_index,
        x.logits_dtype,
        x.needs,
        pick(device.type, x.arithmetic),
        plan_list(tokens.n_valid),
    )
    return _output(flat, program, result[0], result[2:7], shape)


def _coupled_args(flat, tokens: TokenBatch, sequences) -> tuple:
    """Arguments of the coupled ops from labels to omega; no weights mean each unit's default."""
    weights = None if tokens.weights is None else flat.weights
    given = (flat.old, flat.mu, flat.ref, flat.adv, flat.temperature, flat.extras)
    return (flat.labels, weights, *given, *sequences.args)


def policy_loss(
    logits: Tensor,  # [..., V] any float
    tokens: TokenBatch,
    objective: Objective,
) -> LossOutput:
    """`linear_policy_loss` on logits [..., V] that the caller already has; they are never written.

    Allocates one tensor of the logits' size when they require a gradient (the gradient), nothing
    of that size otherwise. `tokens.temperature` divides the logits. Errors as `linear_policy_loss`.
    """
    program = objective_program(objective, tokens)
    checks.floating("logits", logits)
    if logits.dim() < 1 or logits.shape[-1] == 0:
        raise ValueError(f"logits: expected [..., V] with V > 0, got {tuple(logits.shape)}")
    tokens = with_reference(tokens, logits.shape[-1])
    shape, device = logits.shape[:-1], logits.device
    flat = flatten_tokens(tokens, shape, device, stats_dtype(logits.dtype), program)
    rows = logits.reshape(-1, logits.shape[-1])
    if program.coupled:
        more = flatten_sequences(tokens, shape, device, stats_dtype(logits.dtype), objective)
        result = autograd.apply(
            coupled_ops.logits_coupled,
            rows,
            *_coupled_args(flat, tokens, more),
            program.hyper,
            program.codes,
            flat.gates,
            flat.ignore_index,
            wants_grad(logits),
            pick(device.type, logits.dtype),
        )
        return _coupled_output(flat, program, result, shape)
    result = autograd.apply(
        ops.logits_policy,
        rows,
        flat.labels,
        flat.weights,
        flat.old,
        flat.mu,
        flat.ref,
        flat.adv,
        flat.temperature,
        flat.extras,
        None,
        program.hyper,
        program.codes,
        flat.gates,
        flat.ignore_index,
        wants_grad(logits),
        pick(device.type, logits.dtype),
    )
    return _output(flat, program, result[0], result[2:7], shape)


def wants_grad(x: Tensor) -> bool:
    """Whether autograd will ask for this tensor's gradient."""
    return torch.is_grad_enabled() and x.requires_grad

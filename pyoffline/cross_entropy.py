"""Drop-ins for `F.cross_entropy` and `F.linear_cross_entropy`: the same names, order and meaning.

The loss is fp32 whatever the input (torch returns bf16 for bf16, off by up to 0.07 nat), the
logits of the linear form are never whole. One documented difference: when every target is ignored
the mean is 0, not NaN. Not here: class probabilities as targets (they raise).
"""

import torch
from torch import Tensor

from pyoffline import checks, ops
from pyoffline.autograd import apply
from pyoffline.backends import pick
from pyoffline.calls import stats_dtype
from pyoffline.flatten import flatten_head
from pyoffline.head import Head
from pyoffline.objectives import Term
from pyoffline.plan import plan_list
from pyoffline.policy_loss import wants_grad
from pyoffline.program import Program, compile_terms
from pyoffline.token_losses import linear_losses, logits_losses

_GATE = "class_weight"


def _terms(label_smoothing: float, z_loss: float, weighted: bool) -> Program:
    for name, value, top in (("label_smoothing", label_smoothing, 1.0), ("z_loss", z_loss, None)):
        if not 0.0 <= value or (top is not None and value > top):
            raise ValueError(f"{name}: expected a float in [0, {top or 'inf'}], got {value}")
    eps = float(label_smoothing)
    terms = [Term("nll", 1.0 - eps, gate=_GATE if weighted else None)]
    if eps:
        terms.append(Term("smoothing", eps))
    if z_loss:
        terms.append(Term("z_loss", float(z_loss)))
    return compile_terms(tuple(terms))


def _targets(target: Tensor, shape, device, classes: int) -> Tensor:
    if isinstance(target, Tensor) and target.is_floating_point():
        raise NotImplementedError(
            "class probabilities as targets are not implemented; pass class indices [...], or use "
            "linear_distill_loss for a full distribution"
        )
    checks.tensor("target", target)
    if target.dtype not in checks.INTEGERS:
        raise TypeError(f"target: expected int64 class indices, got {target.dtype}")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(
            f"target: expected shape {tuple(shape)} for {classes} classes, "
            f"got {tuple(target.shape)}"
        )
    checks.same_device("target", target, device)
    return target.reshape(-1).long().contiguous()


def _class_weight(weight, classes: int, device, dtype) -> Tensor | None:
    if weight is None:
        return None
    checks.floating("weight", weight)
    if tuple(weight.shape) != (classes,):
        raise ValueError(f"weight: expected shape ({classes},), got {tuple(weight.shape)}")
    checks.same_device("weight", weight, device)
    return weight.detach().to(dtype).contiguous()


def _reduction(reduction, size_average, reduce) -> str:
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
    return reduction


def _normaliser(labels, of_label, ignore_index, reduction, dtype) -> Tensor:
    """Per-token weights: 1 for a sum, 1 / sum of the class weights of the labels for a mean."""
    counted = (labels != ignore_index).to(dtype)
    if reduction == "sum":
        return counted
    total = (counted if of_label is None else counted * of_label).sum()
    # an inf total would divide to 0 and hide itself
    total = torch.where(total.isfinite(), total, torch.nan)
    return torch.where((total != 0) & (counted != 0), counted / total, torch.zeros_like(counted))


def _of_label(class_weight, labels, ignore_index) -> list[Tensor]:
    """The class weight of each label; a label out of range is left to the op, which names it."""
    if class_weight is None:
        return []
    safe = labels.clamp(0, class_weight.shape[0] - 1)
    return [torch.where(labels == ignore_index, 0.0, class_weight[safe])]


def cross_entropy(
    input: Tensor,  # [N, C], [C] or [N, C, d1, ...]
    target: Tensor,  # class indices: [N], [] or [N, d1, ...]
    weight: Tensor | None = None,  # [C]
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(softcap * tanh(input / softcap), target, ...) + z_loss * mean(lse**2)`.

    The loss is fp32 (fp64 for fp64). Both means divide by the same sum: of the class weights of the
    targets that count. Never writes `input`. Allocates its gradient, formed in the forward
    (recomputed for reduction="none"); with a softcap autograd keeps the capped logits too. All
    targets ignored: 0 (torch gives NaN). Class probabilities as targets raise NotImplementedError,
    a target outside [0, C) IndexError, wrong shapes ValueError. (z_loss: PaLM, 2204.02311, sec. 5)
    """
    checks.floating("input", input)
    if input.dim() == 0:
        raise ValueError("input: expected at least one dimension, got a 0-d tensor")
    reduction = _reduction(reduction, size_average, reduce)
    checks.integer("ignore_index", ignore_index)
    last = input.movedim(1, -1) if input.dim() > 2 else input
    classes, shape = last.shape[-1], last.shape[:-1]
    if softcap is not None:
        if not 0.0 < softcap < float("inf"):
            raise ValueError(f"softcap: expected None or a finite float > 0, got {softcap}")
        last = softcap * torch.tanh(last / softcap)
    labels = _targets(target, shape, input.device, classes)
    dtype = stats_dtype(input.dtype)
    u = _class_weight(weight, classes, input.device, dtype)
    program = _terms(label_smoothing, z_loss, u is not None)
    flat = last.reshape(-1, classes)
    extras = _of_label(u, labels, ignore_index)
    gates, backend = ",".join(program.gates), pick(input.device.type, input.dtype)
    if reduction == "none":
        tail = (program.hyper, program.codes, gates, ignore_index, backend)
        loss, _ = apply(logits_losses, flat, labels, extras, u, *tail)
        return loss.reshape(shape)
    weights = _normaliser(labels, extras[0] if extras else None, ignore_index, reduction, dtype)
    vectors = (weights, None, None, None, None, None)
    tail = (program.codes, gates, ignore_index, wants_grad(flat), backend)
    return apply(ops.logits_policy, flat, labels, *vectors, extras, u, program.hyper, *tail)[0]


def linear_cross_entropy(
    input: Tensor,  # [..., D]
    linear_weight: Tensor,  # [C, D]
    target: Tensor,  # [...] class indices
    *,
    linear_bias: Tensor | None = None,  # [C]
    weight: Tensor | None = None,  # [C]
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options=None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> Tensor:
    """`F.cross_entropy(F.linear(input, linear_weight, linear_bias), target, ...)` in chunks.

    No [N, C] logits exist. The loss is fp32 (fp64 for fp64); softcap and z_loss as in
    `cross_entropy`. Three GEMMs and one chunk of logits for "mean" and "sum" (and an fp32 [C, D]
    accumulator where a trained weight takes several chunks); "none" recomputes in the backward
    (four GEMMs). All targets ignored: 0. `options` (torch's chunking) must be None: chunks are
    planned by `po.memory_budget`. Errors as `cross_entropy`.
    """
    if options is not None:
        raise ValueError(
            "options: expected None; chunks are planned from po.memory_budget(nbytes) or "
            "po.chunk_rows(n)"
        )
    reduction = _reduction(reduction, None, None)
    ignore_index = -100 if ignore_index is None else checks.integer("ignore_index", ignore_index)
    x = flatten_head(input, Head(linear_weight, linear_bias, softcap=softcap).tensors())
    shape, classes, device = input.shape[:-1], linear_weight.shape[0], input.device
    labels = _targets(target, shape, device, classes)
    dtype = stats_dtype(x.hidden.dtype)
    u = _class_weight(weight, classes, device, dtype)
    program = _terms(label_smoothing, z_loss, u is not None)
    extras = _of_label(u, labels, ignore_index)
    gates, backend = ",".join(program.gates), pick(device.type, x.hidden.dtype)
    tail = (gates, ignore_index, x.logits_dtype, x.needs, backend, plan_list())
    program_args = (program.hyper, x.scalars, program.codes)
    if reduction == "none":
        linear = (x.hidden, x.weight, x.bias)
        loss, _ = apply(linear_losses, *linear, labels, extras, u, *program_args, *tail)
        return loss.reshape(shape)
    weights = _normaliser(labels, extras[0] if extras else None, ignore_index, reduction, dtype)
    vectors = (weights, None, None, None, None, None)
    args = (*x.linear, labels, *vectors, extras, u, *program_args, *tail)
    return apply(ops.linear_policy, *args)[0]

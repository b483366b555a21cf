"""Drop-ins for `F.cross_entropy` and `F.linear_cross_entropy`: the same names, order and meaning.

The loss is fp32 whatever the input (torch returns bf16 for bf16, off by up to 0.07 nat), the
logits of the linear form are never whole. One documented difference: when every target is ignored
the mean is 0, not NaN. Not here: the loss of class probabilities (`soft_targets.py`).
"""

import math

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
from pyoffline.soft_targets import check_soft, linear_soft_loss, soft_loss_on_logits
from pyoffline.token_losses import linear_losses, logits_losses

_GATE = "class_weight"
_NO_IGNORE = "ignore_index: expected none with class probabilities as targets"


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


def _is_soft(target) -> bool:
    """Class probabilities rather than class indices."""
    return isinstance(target, Tensor) and target.is_floating_point()


def _targets(target: Tensor, shape, device, classes: int) -> Tensor:
    checks.tensor("target", target)
    if target.dtype not in checks.INTEGERS:
        raise TypeError(f"target: expected int64 class indices, got {target.dtype}; call .long()")
    if tuple(target.shape) != tuple(shape):
        raise ValueError(
            f"target: expected class indices of shape {tuple(shape)} for {classes} classes, got "
            f"{tuple(target.shape)}; class probabilities have the logits' shape and a float dtype"
        )
    checks.same_device("target", target, device)
    return target.reshape(-1).long().contiguous()


def _class_weight(weight, classes: int, device, dtype) -> Tensor | None:
    if weight is None:
        return None
    checks.floating("weight", weight)
    if tuple(weight.shape) != (classes,):
        raise ValueError(
            f"weight: expected shape ({classes},), one number per class, got {tuple(weight.shape)}"
        )
    checks.same_device("weight", weight, device)
    _constant("weight", weight)
    return weight.detach().to(dtype).contiguous()


def _constant(name: str, x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: requires a gradient, and none is formed here; pass .detach()")


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
    targets ignored: 0 (torch gives NaN). A float target of the input's shape holds class
    probabilities; they go through torch's log-softmax, whole, in fp32. A target outside [0, C) is
    an IndexError, wrong shapes a ValueError. (z_loss: PaLM, 2204.02311, sec. 5)
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
    dtype = stats_dtype(input.dtype)
    u = _class_weight(weight, classes, input.device, dtype)
    program = _terms(label_smoothing, z_loss, u is not None)
    flat = last.reshape(-1, classes)
    if _is_soft(target):
        soft = check_soft(target, input.shape, input.device)
        if ignore_index >= 0:
            raise ValueError(f"{_NO_IGNORE}, got ignore_index={ignore_index}; leave it -100")
        soft = (soft.movedim(1, -1) if soft.dim() > 2 else soft).reshape(-1, classes)
        loss = soft_loss_on_logits(flat, soft, u, float(label_smoothing), float(z_loss))
        if reduction == "none":
            return loss.reshape(shape)
        return loss.sum() / (max(loss.numel(), 1) if reduction == "mean" else 1)
    labels = _targets(target, shape, input.device, classes)
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


def _rows_of(options, n: int, width: int, classes: int, dtype) -> int:
    """Rows per chunk that a `torch.nn.LinearCrossEntropyOptions` asks for; 0: by the budget.

    Its `acc_policy` and `allow_retain_graph` need no answer: sums are fp32 (fp64), and a second
    backward always works.
    """
    if options is None:
        return 0
    names = ("batch_chunk_size", "chunking_method", "acc_dtype")
    if not all(hasattr(options, name) for name in names):
        raise TypeError(
            "options: expected None or a torch.nn.LinearCrossEntropyOptions, got "
            f"{type(options).__name__}; po.memory_budget(nbytes) plans chunks too"
        )
    size, method, wide = (getattr(options, name) for name in names)
    if wide == torch.float64 != dtype:
        raise ValueError("options.acc_dtype: float64 sums need float64 inputs; expected float32")
    if method in (None, "auto"):
        return size or 0
    factor = int((method.partition(":")[2]) or 1)
    share = math.ceil(n / math.ceil(classes / width))  # rows of logits as large as the input
    rows = max(1, min((1 << max(share - 1, 0).bit_length()) // factor, n))
    if size not in (None, rows):
        raise ValueError(
            f"options: batch_chunk_size={size} and chunking_method={method!r} ({rows} rows) "
            "disagree; pass one of them"
        )
    return rows


def _positions(linear_weight, linear_bias, input) -> tuple[list[Tensor], list]:
    """[C, D] and [C] for each output position of a K-dimensional weight [C, d1, ..., D]."""
    if not isinstance(linear_weight, Tensor) or linear_weight.dim() <= 2:
        return [linear_weight], [linear_bias]
    inner = linear_weight.shape[1:-1]
    if input.dim() != 2:
        raise ValueError(
            f"input: expected [N, D] with a K-dimensional linear_weight "
            f"{tuple(linear_weight.shape)}, got {tuple(input.shape)}"
        )
    weights = linear_weight.flatten(1, -2).unbind(1)
    if linear_bias is None:
        return list(weights), [None] * len(weights)
    if tuple(linear_bias.shape) != tuple(linear_weight.shape[:-1]):
        raise ValueError(
            f"linear_bias: expected shape {tuple(linear_weight.shape[:-1])} to fit linear_weight "
            f"[C, {', '.join(map(str, inner))}, D], got {tuple(linear_bias.shape)}"
        )
    return list(weights), list(linear_bias.flatten(1).unbind(1))


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
    (four GEMMs). A weight [C, d1, ..., D] has one head per output position, one after the other,
    and targets [N, d1, ...]. A float target of the logits' shape holds class probabilities (a
    constant; one fp32 tensor of its size beside it). All targets ignored: 0. `options` (torch's)
    sets the rows of a chunk; None plans them by `po.memory_budget`. Errors as `cross_entropy`.
    """
    reduction = _reduction(reduction, None, None)
    weights, biases = _positions(linear_weight, linear_bias, input)
    heads = [Head(w, b, softcap=softcap) for w, b in zip(weights, biases, strict=True)]
    xs = [flatten_head(input, head.tensors()) for head in heads]
    shape, inner = input.shape[:-1], linear_weight.shape[1:-1]
    classes, n, dtype = linear_weight.shape[0], xs[0].hidden.shape[0], xs[0].hidden.dtype
    plan = plan_list(rows=_rows_of(options, n, input.shape[-1], classes, dtype))
    u = _class_weight(weight, classes, input.device, stats_dtype(dtype))
    program = _terms(label_smoothing, z_loss, u is not None)
    if _is_soft(target):
        if ignore_index is not None:
            raise ValueError(f"{_NO_IGNORE}, got ignore_index={ignore_index}; leave it None")
        check_soft(target, (*shape, classes, *inner), input.device)
        _constant("target", target)
        soft = target.reshape(n, classes, len(xs)).unbind(2)
        each = {"mean": 1.0 / max(n * len(xs), 1), "sum": 1.0, "none": None}[reduction]
        mixing = (float(label_smoothing), float(z_loss))
        pairs = zip(xs, soft, strict=True)
        losses = [linear_soft_loss(x, t, u, mixing, each, plan) for x, t in pairs]
    else:
        ignored = -100 if ignore_index is None else checks.integer("ignore_index", ignore_index)
        labels = _targets(target, (*shape, *inner), input.device, classes)
        losses = _linear_losses(xs, labels, u, program, (ignored, reduction, plan))
    if reduction == "none":
        return losses[0].reshape(shape) if not inner else torch.stack(losses, 1).reshape(n, *inner)
    return losses[0] if not inner else torch.stack(losses).sum()


def _linear_losses(xs, labels, u, program: Program, how) -> list[Tensor]:
    """The loss of each head in `xs`, whose labels are a column of `labels` [N * len(xs)]: a sum
    over its rows with weights that all heads share, or [N] for reduction="none".
    """
    ignore_index, reduction, plan = how
    of_label = _of_label(u, labels, ignore_index)
    columns = [a.reshape(-1, len(xs)).unbind(1) for a in (labels, *of_label)]
    columns = [[a.contiguous() for a in column] for column in columns]
    gates, backend = ",".join(program.gates), pick(labels.device.type, xs[0].hidden.dtype)
    weights = [None] * len(xs)
    if reduction != "none":
        dtype, of_label = stats_dtype(xs[0].hidden.dtype), of_label[0] if of_label else None
        every = _normaliser(labels, of_label, ignore_index, reduction, dtype)
        weights = [w.contiguous() for w in every.reshape(-1, len(xs)).unbind(1)]
    losses = []
    for i, x in enumerate(xs):
        own, *extras = (column[i] for column in columns)
        tail = (gates, ignore_index, x.logits_dtype, x.needs, backend, plan)
        args = (program.hyper, x.scalars, program.codes)
        if reduction == "none":
            linear = (x.hidden, x.weight, x.bias, own, extras, u)
            losses.append(apply(linear_losses, *linear, *args, *tail)[0])
        else:
            vectors = (weights[i], None, None, None, None, None)
            linear = (*x.linear, own, *vectors, extras, u)
            losses.append(apply(ops.linear_policy, *linear, *args, *tail)[0])
    return losses

"""Class probabilities as targets of `cross_entropy` and `linear_cross_entropy`.

With c = u ((1 - eps) t + eps/C) (t the target, u the class weights), the loss of a row is
`-sum_v c_v logp_v = s (KL(c/s || p) + H(c/s))`, s = sum c. The linear form runs the first part as a
forward KL from a teacher whose logits are log c, in the chunks of `linear_distill_loss`. On logits
that the caller has, torch's own log-softmax does it: target and input are whole there. Not here:
class indices (`cross_entropy.py`).
"""

import torch
from torch import Tensor

from pyoffline import checks
from pyoffline.autograd import apply
from pyoffline.backends import DISTILL, pick
from pyoffline.calls import stats_dtype
from pyoffline.distill_ops import linear_distill, soft_args, soft_losses
from pyoffline.divergences import ForwardKL
from pyoffline.flatten import FlatHead
from pyoffline.token_objectives import NLL, ZLoss

_GATE = "class_mass"


def check_soft(target: Tensor, shape, device) -> Tensor:
    """Class probabilities of this shape on this device."""
    checks.floating("target", target)
    if tuple(target.shape) != tuple(shape):
        raise ValueError(
            f"target: {target.dtype} means class probabilities, expected the logits' shape "
            f"{tuple(shape)}, got {tuple(target.shape)}; class indices are int64"
        )
    checks.same_device("target", target, device)
    return target


def _mixed(target: Tensor, class_weight: Tensor | None, eps: float, dtype) -> Tensor:
    """c [N, C]: the target with label smoothing and class weights."""
    c = target.to(dtype)
    if eps:
        c = c * (1.0 - eps) + eps / c.shape[-1]
    return c if class_weight is None else c * class_weight


def soft_loss_on_logits(
    logits: Tensor,  # [N, C]
    target: Tensor,  # [N, C]
    class_weight: Tensor | None,  # [C]
    eps: float,
    z_loss: float,
) -> Tensor:
    """Loss of each row [N] in fp32 (fp64); differentiable in the target too, as torch's.

    Allocates the log-probs and one product, both [N, C] in fp32.
    """
    dtype = stats_dtype(logits.dtype)
    z = logits.to(dtype)
    logp, c = z.log_softmax(-1), _mixed(target, class_weight, eps, dtype)
    masked = (c == 0) & (logp == -torch.inf)  # torch has 0 * inf = NaN there
    loss = -torch.where(masked, 0.0, c * logp).sum(-1)
    return loss + z_loss * z.logsumexp(-1) ** 2 if z_loss else loss


def _check_not_negative(c: Tensor) -> None:
    """On a CPU; elsewhere the row becomes NaN."""
    if c.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = c < 0
    if bool(bad.any()):
        row, entry = bad.nonzero()[0].tolist()
        raise ValueError(
            "target: expected class probabilities (times class weights) >= 0, got "
            f"{float(c[row, entry])} for class {entry} in row {row}"
        )


def linear_soft_loss(
    x: FlatHead,
    target: Tensor,  # [N, C]
    class_weight: Tensor | None,  # [C]
    mixing: tuple[float, float],  # label_smoothing, z_loss
    weight: float | None,  # of each row in a 0-d sum; None: the losses of the rows
    plan: list[int],
) -> Tensor:
    """`sum(weight * loss_t)`, or the losses [N], without the logits.

    Allocates log c, [N, C] in fp32 (fp64), beside one chunk of logits and one of it.
    """
    eps, z_loss = mixing
    dtype, n = stats_dtype(x.hidden.dtype), x.hidden.shape[0]
    c = _mixed(target.detach(), class_weight, eps, dtype)
    _check_not_negative(c)
    mass = c.sum(-1)
    divergence = ForwardKL().weighted_by(_GATE) + (ZLoss() * z_loss if z_loss else 0.0 * NLL())
    p = divergence.program(False)
    labels = torch.zeros(n, dtype=torch.int64, device=c.device)
    head = (p.objective.hyper, x.scalars, p.objective.codes, ",".join(p.objective.gates))
    backend = pick(c.device.type, x.arithmetic, DISTILL)
    plain = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    tail = (x.logits_dtype, x.needs, backend, plan, c.log(), plain, p.codes, p.hyper)
    args = (x.hidden, x.weight, x.bias, labels, [mass], *head, *tail)
    if weight is None:
        loss, entropy = apply(soft_losses, *args)
        return loss + torch.where(mass == 0, 0.0, mass * entropy)
    out = apply(linear_distill, *soft_args(mass.new_full((n,), weight), *args))
    return out[0] + weight * torch.where(mass == 0, 0.0, mass * out[8]).sum()

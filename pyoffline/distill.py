"""Distillation from a teacher's whole distribution, and the cosine distance of hidden states.

Student and teacher go through the same chunks: per chunk two logits GEMMs, one row pass over both
rows, and the student's gradient GEMMs; no [N, V] tensor of either exists. The maths is in
`divergence_math.py`. Not here: sampled-token distillation (the objective `DistillToken`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline import autograd, checks
from pyoffline.backends import DISTILL, pick
from pyoffline.calls import stats_dtype
from pyoffline.distill_ops import linear_distill
from pyoffline.divergences import DistillProgram, Divergence
from pyoffline.flatten import check_all_read, flatten_head, flatten_tokens
from pyoffline.head import Head
from pyoffline.metrics import token_metrics
from pyoffline.plan import plan_list
from pyoffline.records import LossOutput, TokenBatch, TokenStats
from pyoffline.reference_head import with_reference
from pyoffline.teachers import TeacherHead, TeacherLogits, TeacherTopK, flatten_teacher


def linear_distill_loss(
    hidden: Tensor,  # [..., D] any float
    head: Head,
    teacher: TeacherHead | TeacherLogits | TeacherTopK,
    tokens: TokenBatch,
    divergence: Divergence,
) -> LossOutput:
    """`(weights * divergence(student's log-probs, teacher's)).sum()` and its gradient, in chunks.

    Equivalent PyTorch for `po.ForwardKL()` and `po.TeacherHead(teacher_hidden, teacher_head)`:

        s = head(hidden).float().log_softmax(-1)
        t = teacher_head(teacher_hidden).float().log_softmax(-1)
        loss = (weights * (t.exp() * (t - s)).sum(-1))[labels != ignore_index].sum()

    Shapes: hidden [..., D], teacher hidden [..., D'], the tensors of `tokens` [...]. Per row with
    student S and teacher T, every divergence has `dz_v = S_v (g_v - sum_u S_u g_u)`, g = dD/dS:

        ForwardKL        S - T
        ReverseKL        S (log S - log T - KL)
        JSD(beta)        (1-beta) S (log(S/M) - KL(S||M)), M = (1-beta) S + beta T
        TVD              g = sign(S - T)/2
        RenyiDivergence  S - q / sum q, q = T^alpha S^(1-alpha)
        AlphaDivergence  (S sum q - q)/alpha, the same q

    An entry masked on either side (logit -inf) takes part as probability 0; a divergence that is
    infinite there is +inf, visibly. `divergence` composes with token-local objectives:
    `po.JSD(0.5) + 0.5 * po.NLL()`.

    Temperature, softcap, scale and bias are each head's own (`tokens.temperature` replaces the
    student's); no factor T^2 is applied. Weights default to 1/number of labels that are not
    `ignore_index`. Gradients reach hidden and the student's head; the teacher has none. GEMMs:
    three for the student (two with a frozen head), one for a TeacherHead. Memory: both chunks
    within one chunk budget, and an fp32 [V, D] accumulator as in `linear_policy_loss`.

    Metrics: `divergence` (as it enters the loss), each divergence by its own name, unscaled,
    `entropy`, `teacher_entropy` (of the k + 1 buckets for TeacherTopK), `top1_agreement`, and those
    of `linear_policy_loss`.

    Raises:
        IndexError: a label or a top-k id outside [0, V).
        ValueError: a shape, device or vocabulary that does not fit, a top-k that is no
            distribution, a tensor that nothing reads.
        TypeError: a dtype or object of the wrong kind.

    Sources: Hinton et al. 1503.02531; GKD 2306.13649 (JSD); MiniLLM 2306.08543 (reverse KL).
    """
    program = _program(divergence, tokens)
    if not isinstance(head, Head):
        raise TypeError(
            f"head: expected a po.Head, got {type(head).__name__}; use po.Head.of(model)"
        )
    x = flatten_head(hidden, head.tensors())
    tokens = with_reference(tokens, x.weight.shape[0])
    shape, device, dtype = hidden.shape[:-1], hidden.device, x.hidden.dtype
    flat = flatten_tokens(tokens, shape, device, stats_dtype(dtype), program.objective)
    result = autograd.apply(
        linear_distill,
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
        program.objective.hyper,
        x.scalars,
        program.objective.codes,
        flat.gates,
        flat.ignore_index,
        x.logits_dtype,
        x.needs,
        pick(device.type, x.arithmetic, DISTILL),
        plan_list(),
        *flatten_teacher(teacher, shape, device, x.weight.shape[0], dtype),
        program.codes,
        program.hyper,
    )
    loss, _, *rest = result[:10]
    rest = [r.detach() for r in rest]
    metrics = token_metrics(flat, program.objective, *rest[:5])
    metrics.update(_metrics(flat, program, *rest[5:]))
    return LossOutput(loss, TokenStats(*(r.reshape(shape) for r in rest[:5])), metrics)


def _program(divergence, tokens) -> DistillProgram:
    if not isinstance(divergence, Divergence):
        raise TypeError(
            "divergence: expected one such as po.ForwardKL() or po.JSD(0.5) + 0.5 * po.NLL(), got "
            f"{type(divergence).__name__}"
        )
    if not isinstance(tokens, TokenBatch):
        raise TypeError(f"tokens: expected a po.TokenBatch, got {type(tokens).__name__}")
    program = divergence.program(tokens.behavior_logps is not None)
    check_all_read(tokens, program.objective, divergence)
    return program


def _metrics(flat, program: DistillProgram, values, teacher_entropy, agreement) -> dict:
    """Means over the positions that count."""
    valid = flat.valid
    count = valid.sum().to(teacher_entropy.dtype).clamp(min=1.0)

    def mean(x):
        return torch.where(valid, x, 0.0).sum() / count

    total = torch.zeros_like(teacher_entropy)
    hyper = program.hyper.to(total.device, total.dtype)
    out = {}
    for k, name in enumerate(program.names):
        gate = program.codes[2 * k + 1]
        factor = hyper[k, 0] if gate < 0 else hyper[k, 0] * flat.extras[gate]
        total = total + torch.where(factor == 0, 0.0, factor * values[k])
        # two of a kind (JSD(0.1) + JSD(0.9)) are told apart by their place
        others = program.names[:k] + program.names[k + 1 :]
        out[f"{name}/{k}" if name in others else name] = mean(values[k])
    return {
        "divergence": mean(total),
        **out,
        "teacher_entropy": mean(teacher_entropy),
        "top1_agreement": mean(agreement.to(total.dtype)),
    }


def cosine_distill_loss(
    hidden: Tensor,  # [..., D] any float
    teacher_hidden: Tensor,  # [..., D]
    weights: Tensor | None = None,  # [...]; default 1 / number of positions
) -> Tensor:
    """`(weights * (1 - F.cosine_similarity(hidden, teacher_hidden, dim=-1))).sum()`, no logits.

    A 0-d loss in fp32 (fp64 for fp64), differentiable in `hidden`, on hidden states of one width
    (DistilBERT, 1910.01108). A position of weight 0 contributes exactly 0 whatever it
    holds; norms below 1e-8 count as 1e-8. Allocates a few fp32 copies of hidden. Raises ValueError
    for shapes that differ: project a teacher of another width first.
    """
    checks.floating("hidden", hidden)
    checks.floating("teacher_hidden", teacher_hidden)
    checks.same_device("teacher_hidden", teacher_hidden, hidden.device)
    if hidden.dim() < 1 or hidden.shape != teacher_hidden.shape:
        raise ValueError(
            f"teacher_hidden: expected hidden's shape {tuple(hidden.shape)}, got "
            f"{tuple(teacher_hidden.shape)}; project a teacher of another width first"
        )
    shape, wide = hidden.shape[:-1], stats_dtype(hidden.dtype)
    if weights is None:
        weights = hidden.new_full(shape, 1.0 / max(shape.numel(), 1), dtype=wide)
    checks.floating("weights", weights)
    if weights.shape != shape:
        raise ValueError(f"weights: expected shape {tuple(shape)}, got {tuple(weights.shape)}")
    counted = (weights != 0)[..., None]
    s = torch.where(counted, hidden, 1.0).to(wide)
    t = torch.where(counted, teacher_hidden.detach(), 1.0).to(wide)
    distance = 1.0 - F.cosine_similarity(s, t, dim=-1)
    return torch.where(counted[..., 0], weights.detach().to(wide) * distance, 0.0).sum()

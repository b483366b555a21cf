"""`linear_distill_loss` with JSD(0.5) from a teacher's head, forward and backward, student trained.

FLOP: 8NDV (logits of both, dhidden, dweight). Bytes beyond the products, per logit of s bytes: the
row pass reads 2s and writes s; per extra chunk the fp32 dweight accumulator is read and written,
8VD. The limit is the floor of four products. The teacher has the student's weight and hidden
states of its own (each token's columns reversed), so that no second [V, D] is drawn.
"""

import torch
import torch.nn.functional as F

import pyoffline as po
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.providers import Provider

BETA = 0.5
PEER_ROWS = 256


def ours(hidden, weight, inputs):
    """The fused loss."""
    teacher = po.TeacherHead(hidden.detach().flip(-1), po.Head(weight.detach()))
    tokens = po.TokenBatch(inputs.labels)
    return po.linear_distill_loss(hidden, po.Head(weight), teacher, tokens, po.JSD(BETA)).loss


def _log_probs(hidden, weight):
    logits = F.linear(hidden, weight)
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)


def plain(hidden, weight, inputs):
    """The same with whole logits and autograd; fp64 stays fp64."""
    s = _log_probs(hidden, weight)
    with torch.no_grad():
        t = _log_probs(hidden.detach().flip(-1), weight.detach())
    mixed = torch.stack([s, t]).logsumexp(0) - torch.tensor(2.0).log().item()
    return BETA * ((t.exp() * (t - mixed)).sum(-1) + (s.exp() * (s - mixed)).sum(-1)).mean()


def _chunked():
    """Gradients formed chunk by chunk in the forward, by autograd in each chunk; dweight adds up in
    the weight's dtype (the method of Liger's fused linear losses, without its [N, V] loss buffer).
    """

    def call(hidden, weight, inputs):
        n = hidden.shape[0]
        total = hidden.new_zeros((), dtype=torch.float32)
        for start in range(0, n, PEER_ROWS):
            cut = slice(start, start + PEER_ROWS)
            x = hidden[cut].detach().requires_grad_()
            part = plain(x, weight, inputs) * (x.shape[0] / n)
            part.backward()
            hidden.grad = torch.empty_like(hidden) if hidden.grad is None else hidden.grad
            hidden.grad[cut] = x.grad
            total += part.detach()
        return total

    return call


CHUNKED = Provider(
    f"torch, chunks of {PEER_ROWS}", _chunked, logit_nbytes=1, note="gradients in the forward"
)
CASES = (
    Case(
        "linear_distill_loss",
        ours,
        plain,
        lambda shape, dtype, kind: None,
        floor=("logits", "teacher", "dhidden", "dweight"),
        products=4,
        more_peers=(CHUNKED,),
    ),
)

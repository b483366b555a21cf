"""`linear_token_logps`: scoring without gradients, and forward and backward from a given upstream
gradient.

FLOP: scoring 2NDV; with gradients 8NDV, because the backward recomputes the logits (four products
against a floor of three: the bar is 1.40x). Bytes beyond the products, per logit of s bytes:
scoring writes s and reads s; with gradients the row pass reads s, then reads s and writes s. The
limit is the floor.
"""

import torch
import torch.nn.functional as F

import pyoffline as po
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.shapes import BARS

# DESIGN.md section 7.
SCORING_BARS = {"cpu": 1.15, "cuda": 1.08}
LOGPS_BARS = {"cpu": 1.40, "cuda": 1.40}


def _bf16(bars: dict[str, float]):
    def bar(shape, dtype, kind="cpu"):
        return bars[kind] if dtype == "bf16" and shape in BARS[kind] else None

    return bar


def score(hidden, weight, inputs):
    """Log-probs alone."""
    with torch.no_grad():
        return po.linear_token_logps(hidden, po.Head(weight), inputs.labels).logps


def ours(hidden, weight, inputs):
    """Log-probs with a backward through them."""
    logps = po.linear_token_logps(hidden, po.Head(weight), inputs.labels).logps
    return (logps * inputs.g_logps).mean()


def _plain_logps(hidden, weight, inputs):
    logits = F.linear(hidden, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, inputs.labels[:, None])[:, 0]


def plain_score(hidden, weight, inputs):
    """Whole logits, no gradients."""
    with torch.no_grad():
        return _plain_logps(hidden, weight, inputs)


def plain(hidden, weight, inputs):
    """Whole logits, autograd."""
    return (_plain_logps(hidden, weight, inputs) * inputs.g_logps).mean()


CASES = (
    Case(
        "scoring",
        score,
        plain_score,
        _bf16(SCORING_BARS),
        floor=("logits",),
        products=1,
        grads=(False, False),
    ),
    Case("linear_token_logps", ours, plain, _bf16(LOGPS_BARS), products=4),
)

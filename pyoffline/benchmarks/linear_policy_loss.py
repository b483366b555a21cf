"""`linear_policy_loss` with PPO-clip, forward and backward, with a trained and with a frozen head.

FLOP: 6NDV trained (logits, dhidden, dweight), 4NDV frozen. Bytes beyond the products, per logit of
s bytes: the row pass reads s and writes s; per extra chunk the fp32 dweight accumulator is read
and written, 8VD. The limit is the floor: the bare products of the same run; % of the limit = floor
time / time.
"""

import torch
import torch.nn.functional as F

import pyoffline as po
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.shapes import CLIP, fused_bar


def ours(hidden, weight, inputs):
    """The fused loss."""
    given = {"advantages": inputs.advantages, "old_logps": inputs.old}
    tokens = po.TokenBatch(inputs.labels, n_valid=inputs.labels.numel(), **given)
    return po.linear_policy_loss(hidden, po.Head(weight), tokens, po.PPOClip(CLIP, CLIP)).loss


def plain(hidden, weight, inputs):
    """The same with whole logits and autograd; fp64 stays fp64."""
    logits = F.linear(hidden, weight)
    if logits.dtype != torch.float64:
        logits = logits.float()
    logps = logits.log_softmax(-1).gather(-1, inputs.labels[:, None])[:, 0]
    ratio, adv = (logps - inputs.old).exp(), inputs.advantages
    return -torch.minimum(ratio * adv, ratio.clamp(1 - CLIP, 1 + CLIP) * adv).mean()


CASES = (
    Case("linear_policy_loss", ours, plain, fused_bar),
    Case(
        "frozen_head",
        ours,
        plain,
        fused_bar,
        floor=("logits", "dhidden"),
        products=2,
        grads=(True, False),
    ),
)

"""`linear_cross_entropy`, forward and backward.

FLOP: 6NDV. Bytes beyond the products, per logit of s bytes: the row pass reads s and writes s; per
extra chunk 8VD for the fp32 dweight accumulator. The limit is the floor; % of the limit = floor
time / time.
"""

import torch
import torch.nn.functional as F

import pyoffline as po
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.providers import (
    CUT_CROSS_ENTROPY,
    CUT_CROSS_ENTROPY_TRITON,
    LIGER,
    QUACK,
    TORCH_CHUNKED,
)
from pyoffline.benchmarks.shapes import fused_bar


def ours(hidden, weight, inputs):
    """The fused loss, mean over rows."""
    return po.linear_cross_entropy(hidden, weight, inputs.labels)


def plain(hidden, weight, inputs):
    """The same with whole logits; fp64 stays fp64."""
    logits = F.linear(hidden, weight)
    return F.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), inputs.labels
    )


CASES = (
    Case(
        "linear_cross_entropy",
        ours,
        plain,
        fused_bar,
        more_peers=(TORCH_CHUNKED, CUT_CROSS_ENTROPY, CUT_CROSS_ENTROPY_TRITON, LIGER, QUACK),
    ),
)

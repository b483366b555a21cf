"""A training chunk whose logits never exist: the GEMM's epilogue stores exp(z - offset).

`score_tiles_kernel` multiplies, folds each tile into its rows' sums and stores bf16
e_v = exp(z_v - offset) in place of z_v; `score_finish_kernel` ends the rows and leaves the factors
of their gradients (`row_factors.py`), which the two backward GEMMs take into their operands:
dhidden = F * (E W), dweight = E^T (F * hidden). 6 bytes per logit (written once, read twice) where
logits, row pass and GEMMs take 10.

The offset of a row is the logit of its label, known from one dot product, so e is right whatever
the row's maximum is, up to 40 nats away. Rows beyond (`late`) are written again from their maximum,
by a second launch of the product, whose programs return at once where no row of theirs is late: no
host sync.

bf16 hidden states and logits, whose exponent is fp32's; objectives through dL/dlogp and dL/dlse
only. Not here: entropy and smoothing terms, softcap, adapters (`serves`), the GEMMs.
"""

import torch
import triton
import triton.language as tl

from pyoffline.kernels.configs import FMA, ROW_UNIT
from pyoffline.kernels.launch import device_of
from pyoffline.kernels.row_finish import load_or, row_transform
from pyoffline.kernels.score_rows import Scoring
from pyoffline.objectives import TABLE
from pyoffline.program import CUSTOM_CODE

OFFSET_LANES = 1024
MOST_ENTRIES = (1 << 24) - ROW_UNIT  # of V: the 128 rows of a stored tile lie within 2^31 elements
# Terms that reach the logits otherwise than through logp and lse.
_OTHERS = {TABLE["entropy_term"].code, TABLE["smoothing"].code, CUSTOM_CODE}


LABEL_SIZES = ["stride_hidden", "stride_weight", "vocab", "dim", "ignore_index"]


@triton.jit(do_not_specialize=LABEL_SIZES)
def label_logits_kernel(
    hidden_ptr, weight_ptr, stride_hidden, stride_weight, vocab, dim, labels_ptr, ignore_index,
    weights_ptr, bias_ptr, temperature_ptr, head, offset_ptr, LANES: tl.constexpr,
):  # fmt: skip
    """offset [N] fp32: y of each row's label (of entry 0 where it is outside [0, V)), one program a
    row; +inf for a row that does not count, so that its exponentials are 0.
    """
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    counted = (label != ignore_index) & (load_or(weights_ptr, row, 1.0) != 0.0)
    label = tl.where((label < 0) | (label >= vocab), 0, label)
    x_ptr = hidden_ptr + tl.cast(row, tl.int64) * stride_hidden
    w_ptr = weight_ptr + label * stride_weight
    total = tl.zeros([LANES], tl.float32)
    for start in range(0, dim, LANES):
        offs = start + tl.arange(0, LANES)
        x = tl.load(x_ptr + offs, mask=offs < dim, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offs, mask=offs < dim, other=0.0).to(tl.float32)
        total += x * w
    sign, _, _ = row_transform(head, temperature_ptr, row, False)
    offset = (tl.sum(total, axis=0) + load_or(bias_ptr, label, 0.0)) * sign
    tl.store(offset_ptr + row, tl.where(counted, offset, float("inf")))


def serves(call) -> bool:
    """Whether this linear call can go this way: a `calls.LinearCall` that wants gradients."""
    rows = call.rows
    return (
        call.hidden.dtype == call.weight.dtype == call.logits_dtype == torch.bfloat16
        and not (call.plan.deterministic or call.needs.bias or rows.head.softcap)
        and call.adapter_weight is None
        and rows.coefs is None
        and not _OTHERS & set(rows.codes[0::3])
        and call.weight.shape[0] <= MOST_ENTRIES
    )


def epilogue_rows(hidden, weight, rows, outputs, flag, exps, config=None):
    """Fill exps [C, V] (rows padded to ROW_UNIT, and the padding) and outputs; returns F [C] fp32:
    dlogits = F[:, None] * exps. Arguments as for `score_rows.Scoring`.
    """
    count, dim = hidden.shape
    # one allocation each: their alignment, and so what is compiled, does not depend on `count`
    offset, factor, entry, late = (
        torch.empty(count, dtype=dtype, device=hidden.device)
        for dtype in (torch.float32, torch.float32, torch.float32, torch.int32)
    )
    with device_of(hidden):
        block = Scoring(hidden, weight, rows, outputs, flag, exps.dtype, config, stores=True)
        label_logits_kernel[(count,)](
            hidden, weight, hidden.stride(0), weight.stride(0), weight.shape[0], dim, rows.labels,
            rows.ignore_index, rows.weights, rows.bias, rows.temperature, block.scalars, offset,
            LANES=OFFSET_LANES, num_warps=4, **FMA,
        )  # fmt: skip
        stride = exps.stride(0) // ROW_UNIT
        block.multiply((exps, offset), stride)
        block.finish((offset, factor, entry, late))
        block.multiply((exps, offset, late), stride)
    labels = rows.labels.clamp(0, weight.shape[0] - 1)
    exps.scatter_(1, labels[:, None], entry.to(exps.dtype)[:, None])
    return factor

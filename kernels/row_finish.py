"""A row from its softmax sums to its outputs: transform of the head, label check, statistics,
objective. One program, scalars only; `row_pass.py` and `score_rows.py` end their rows here.

Not here: the sums (`row_sums.py`, `score_rows.py`), gradients, the formulas of the objectives.
"""

import triton
import triton.language as tl

from pyoffline.kernels.objective_functions import evaluate_program
from pyoffline.kernels.row_sums import LN_2
from pyoffline.kernels.scalar_ops import log1p


@triton.jit
def load_or(ptr, row, other):
    """A row input, or a constant where it is not given."""
    if ptr is None:
        value = other
    else:
        value = tl.load(ptr + row)
    return value


@triton.jit
def store_if(ptr, row, value):
    """A row output that may not be wanted."""
    if ptr is not None:
        tl.store(ptr + row, value)


@triton.jit
def row_transform(head, temperature_ptr, row, BENDS: tl.constexpr):
    """(sign, inner, slope) of `row_sums`: z = slope * y, y = sign * (x + bias) or sign * tanh(inner
    * (x + bias)), slope > 0. head: softcap, logit_scale, temperature; row: one row, or several.
    """
    softcap, scale, uniform = head
    temperature = load_or(temperature_ptr, row, uniform)
    sign = tl.where(scale / temperature < 0.0, -1.0, 1.0)
    inner = 0.0
    slope = tl.abs(scale / temperature)
    if BENDS:
        inner = tl.abs(scale) / softcap
        slope = softcap / tl.abs(temperature)
    return sign, inner, slope


@triton.jit
def checked_label(label, vocab, row, flag_ptr):
    """(an index that is safe to form, 0 or NaN); a label outside [0, V) sets the flag."""
    is_bad = (label < 0) | (label >= vocab)
    at = tl.where(is_bad, 0, label).to(tl.int32)
    poison = tl.where(is_bad, float("nan"), 0.0)
    if is_bad:
        low = tl.minimum(tl.maximum(label, -(1 << 31)), (1 << 31) - 1)
        tl.store(flag_ptr + 1, low * (1 << 32) + row)
        tl.store(flag_ptr, 1)
    return at, poison


@triton.jit
def statistics(sums, slope, y_label, vocab, sum_u):
    """(d, logp, entropy, lse, gap, log_sum_p2, is_top1, t_label, mean_t) of a row."""
    m, ones, tail, s, squares, ut = sums
    d = tl.where(m * 0.0 == 0.0, ones + tail, float("nan"))  # a logit of +inf has no softmax
    log_d = tl.where(d > 0.0, log1p(ones - 1.0 + tail), float("nan"))
    t_label = (y_label - m) * slope
    mean_t = s * LN_2 / d
    logp = t_label - log_d
    logp = tl.where(logp > 0.0, 0.0, logp)
    entropy = log_d - mean_t
    lse = m * slope + log_d
    gap = (log_d * sum_u - ut * slope) / vocab
    log_sum_p2 = log1p(ones - 1.0 + squares) - 2.0 * log_d
    is_top1 = (t_label >= 0.0) & (d == d)
    return d, logp, entropy, lse, gap, log_sum_p2, is_top1, t_label, mean_t


@triton.jit
def evaluate_row(row, scalars, poison, given_ptrs, gate_ptrs, hyper, CODES: tl.constexpr):
    """(loss, a, b, c, e) of a row's program; scalars: logp, entropy, lse, gap."""
    given = (
        load_or(given_ptrs[0], row, float("nan")) + poison,
        load_or(given_ptrs[1], row, float("nan")) + poison,
        load_or(given_ptrs[2], row, float("nan")) + poison,
        load_or(given_ptrs[3], row, 1.0) + poison,
    )
    gates = ()
    for k in tl.static_range(len(gate_ptrs)):
        gates = gates + (tl.load(gate_ptrs[k] + row),)
    logp, entropy, lse, gap = scalars
    scalars = (logp, entropy + poison, lse + poison, gap + poison)
    return evaluate_program(scalars, given, gates, hyper, CODES)


@triton.jit
def write_row(outputs, row, stride_coefs, stats, loss, coefs):
    """The row's outputs: loss, logps, entropy, lse, log_sum_p2, is_top1, gap, coefs [4, .]."""
    logp, entropy, lse, log_sum_p2, is_top1, gap = stats
    store_if(outputs[0], row, loss)
    store_if(outputs[1], row, logp)
    store_if(outputs[2], row, entropy)
    store_if(outputs[3], row, lse)
    store_if(outputs[4], row, log_sum_p2)
    store_if(outputs[5], row, is_top1)
    store_if(outputs[6], row, gap)
    if outputs[7] is not None:
        for i in tl.static_range(4):
            tl.store(outputs[7] + i * stride_coefs + row, coefs[i])

"""Distillation row pass: divergences of C rows of student and teacher logits, and dlogits in place.

The objective's part comes with given coefficients: `row_pass` runs first, for statistics. Per row:
sums of both rows (`row_sums`), log-probs tile by tile, sums of the divergences, then
dz = the objective's + sum_k factor_k dz_k, over the student's logits. Traffic per logit of s bytes:
one read of each row and one write from memory (3 s), s more for the statistics of `row_pass`; the
other sweeps (one for the sums, one for RenyiDivergence's maximum, one for the gradient) find both
rows in L2. Not here: the divergences (divergences.py), a top-k teacher (pyoffline/triton_top_k.py),
GEMMs.
"""

import triton
import triton.language as tl

from pyoffline.kernels.configs import pair_config
from pyoffline.kernels.divergences import (
    RENYI,
    dz_of,
    log_power,
    summands,
    term_numbers,
    value_and_mean,
)
from pyoffline.kernels.launch import alignment, cuts, device_of, row_programs, warp_size
from pyoffline.kernels.row_finish import load_or, row_transform
from pyoffline.kernels.row_pass import gradient_constants, load_coefs, zero_row
from pyoffline.kernels.row_sums import LN_2, LOG2_E, bent, load_y, places, sum_row
from pyoffline.kernels.scalar_ops import log1p


@triton.jit
def normaliser(sums):
    """(d, log d) of a row; NaN where it has no softmax."""
    m, ones, tail, s, squares, ut = sums
    d = tl.where(m * 0.0 == 0.0, ones + tail, float("nan"))
    return d, tl.where(d > 0.0, log1p(ones - 1.0 + tail), float("nan"))


@triton.jit
def load_pair(
    s_row, t_row, base, vocab, BENDS: tl.constexpr,
    BENDS_T: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(y of the student, y of the teacher, both rows compared) of one tile."""
    x_ptr, bias_ptr, sign, inner, slope, m, log_d, inverse_d = s_row
    xt_ptr, bias_t_ptr, sign_t, inner_t, slope_t, m_t, log_d_t, inverse_d_t = t_row
    y = load_y(
        x_ptr, base, 0, vocab, bias_ptr, sign, inner, BENDS, True, True, GROUP, CUT
    )  # fmt: skip
    y_t = load_y(
        xt_ptr, base, 0, vocab, bias_t_ptr, sign_t, inner_t, BENDS_T, True, True, GROUP, CUT
    )  # fmt: skip
    t, t_t = (y - m) * slope, (y_t - m_t) * slope_t
    p, p_t = tl.exp2(t * LOG2_E) * inverse_d, tl.exp2(t_t * LOG2_E) * inverse_d_t
    gap = (t_t - t) + (log_d - log_d_t)
    return y, y_t, (t - log_d, t_t - log_d_t, p, p_t, gap)


@triton.jit
def peak_of(
    q, s_row, t_row, vocab,
    BENDS: tl.constexpr, BENDS_T: tl.constexpr, LANES: tl.constexpr,
    GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """max log(T^a S^(1-a)) over the row; a NaN is no maximum, it shows in the sums."""
    top = tl.full([LANES, GROUP], float("-inf"), tl.float32)
    for start in range(0, vocab, LANES * GROUP):
        base = start + tl.arange(0, LANES)[:, None] * GROUP
        y, y_t, x = load_pair(
            s_row, t_row, base, vocab, BENDS, BENDS_T, GROUP, CUT
        )  # fmt: skip
        w, log_base, moved = log_power(x, q)
        top = tl.where(w > top, w, top)
    return tl.max(tl.max(top, axis=1), axis=0)


@triton.jit
def pair_sums(
    CODE: tl.constexpr, q, peak, s_row, t_row, vocab,
    BENDS: tl.constexpr, BENDS_T: tl.constexpr, LANES: tl.constexpr,
    GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """(first, second) of one divergence over the row."""
    first = tl.zeros([LANES], tl.float32)
    second = tl.zeros([LANES], tl.float32)
    for start in range(0, vocab, LANES * GROUP):
        base = start + tl.arange(0, LANES)[:, None] * GROUP
        y, y_t, x = load_pair(
            s_row, t_row, base, vocab, BENDS, BENDS_T, GROUP, CUT
        )  # fmt: skip
        one, two = summands(CODE, x, q, peak)
        offs, _, mask = places(base, 0, vocab, GROUP, CUT)
        first += tl.sum(tl.where(mask, one, 0.0), axis=1)
        second += tl.sum(tl.where(mask, two, 0.0), axis=1)
    return tl.sum(first, axis=0), tl.sum(second, axis=0)


@triton.jit
def teachers_top(
    t_row, vocab, BENDS_T: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """The first entry that has the teacher's maximum; vocab where there is none."""
    xt_ptr, bias_t_ptr, sign_t, inner_t, slope_t, m_t, log_d_t, inverse_d_t = t_row
    found = tl.full([LANES], 0, tl.int32) + vocab
    for start in range(0, vocab, LANES * GROUP):
        base = start + tl.arange(0, LANES)[:, None] * GROUP
        y = load_y(
            xt_ptr, base, 0, vocab, bias_t_ptr, sign_t, inner_t, BENDS_T, True, True, GROUP, CUT
        )  # fmt: skip
        offs, _, mask = places(base, 0, vocab, GROUP, CUT)
        here = tl.min(tl.where(mask & (y == m_t), offs, vocab), axis=1)
        found = tl.minimum(found, here.to(tl.int32))
    return tl.min(found, axis=0)


@triton.jit
def pair_gradient(
    g_ptr, label, constants, terms, s_row, t_row, vocab, CODES: tl.constexpr,
    BENDS: tl.constexpr, BENDS_T: tl.constexpr, NARROWS: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Write dlogits of the row. terms: (q, factor, mean, peak) of each divergence."""
    from_p, from_pt, from_u, at_label, at_zero = constants
    for start in range(0, vocab, LANES * GROUP):
        base = start + tl.arange(0, LANES)[:, None] * GROUP
        offs, _, mask = places(base, 0, vocab, GROUP, CUT)
        y, y_t, x = load_pair(
            s_row, t_row, base, vocab, BENDS, BENDS_T, GROUP, CUT
        )  # fmt: skip
        dy = y - s_row[5]
        e = tl.exp2(dy * s_row[4] * LOG2_E)
        own = tl.where(e == 0.0, at_zero, e * (from_p - tl.where(e == 0.0, 0.0, from_pt * dy)))
        own = own - from_u
        more = tl.zeros_like(own)
        for k in tl.static_range(len(CODES) // 2):
            q, factor, mean, peak = terms[k]
            dz = factor * dz_of(CODES[2 * k], x, q, mean, peak)
            more += tl.where(factor == 0.0, 0.0, dz)
        if BENDS:
            damp = 1.0 - y * y
            own = tl.where(damp == 0.0, tl.where(own == own, 0.0, own), own * damp)
            more = tl.where(damp == 0.0, tl.where(more == more, 0.0, more), more * damp)
        # at_label keeps 1 - p_y of the objective, and has its derivative of the softcap
        dlogits = (tl.where(offs == label, at_label, own) + more).to(g_ptr.dtype.element_ty)
        if NARROWS:  # the tile's gradient lies over logits of this tile: all are read before
            tl.debug_barrier()
        tl.store(g_ptr + offs, dlogits, mask=mask)


@triton.jit
def run_pair(
    x_ptr, xt_ptr, g_ptr, row, label, weight, coefs, vocab, gate_ptrs, temperature_ptr,
    bias_ptr, bias_t_ptr, grad_scale_ptr, head, head_t, numbers, outputs, stride_values,
    CODES: tl.constexpr, BENDS: tl.constexpr, BENDS_T: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """One row that counts."""
    loss_ptr, values_ptr, entropy_ptr, agreement_ptr = outputs
    temperature = load_or(temperature_ptr, row, head[2])
    sign, inner, slope = row_transform(head, temperature_ptr, row, BENDS)
    sign_t, inner_t, slope_t = row_transform(head_t, None, row, BENDS_T)
    is_bad = (label < 0) | (label >= vocab)
    at = tl.where(is_bad, 0, label).to(tl.int32)
    x_label, bias_label = tl.load(x_ptr + at).to(tl.float32), load_or(bias_ptr, at, 0.0)
    sums = sum_row(
        x_ptr, 0, vocab, bias_ptr, None, sign, inner, slope * LOG2_E, BENDS, True, False, False,
        LANES, GROUP, CUT, False,
    )  # fmt: skip
    sums_t = sum_row(
        xt_ptr, 0, vocab, bias_t_ptr, None, sign_t, inner_t, slope_t * LOG2_E, BENDS_T, True,
        False, False, LANES, GROUP, CUT, False,
    )  # fmt: skip
    d, log_d = normaliser(sums)
    d_t, log_d_t = normaliser(sums_t)
    s_row = (x_ptr, bias_ptr, sign, inner, slope, sums[0], log_d, 1.0 / d)
    t_row = (xt_ptr, bias_t_ptr, sign_t, inner_t, slope_t, sums_t[0], log_d_t, 1.0 / d_t)
    top = teachers_top(t_row, vocab, BENDS_T, LANES, GROUP, CUT)
    near = tl.where(top < vocab, top, 0)
    x_top, bias_top = tl.load(x_ptr + near).to(tl.float32), load_or(bias_ptr, near, 0.0)
    y_top = bent(x_top, bias_top, sign, inner, bias_ptr is not None, BENDS, True)
    tl.debug_barrier()  # another warp may overwrite that logit in the last sweep

    chain = weight * load_or(grad_scale_ptr, 0, 1.0) * head[1] / temperature
    loss = tl.load(loss_ptr + row)
    poison = chain * 0.0
    terms = ()
    for k in tl.static_range(len(CODES) // 2):
        q = (numbers[5 * k + 1], numbers[5 * k + 2], numbers[5 * k + 3], numbers[5 * k + 4])
        peak = 0.0
        if CODES[2 * k] == RENYI:
            peak = peak_of(
                q, s_row, t_row, vocab, BENDS, BENDS_T, LANES, GROUP, CUT
            )  # fmt: skip
        first, second = pair_sums(
            CODES[2 * k], q, peak, s_row, t_row, vocab, BENDS, BENDS_T, LANES, GROUP, CUT
        )  # fmt: skip
        value, mean, own = value_and_mean(CODES[2 * k], first, second, peak, q)
        tl.store(values_ptr + k * stride_values + row, value)
        factor = numbers[5 * k] + weight * 0.0
        if CODES[2 * k + 1] >= 0:
            gate = tl.load(gate_ptrs[CODES[2 * k + 1]] + row)
            factor = tl.where(factor == 0.0, 0.0, factor * gate)
        loss += tl.where(factor == 0.0, 0.0, factor * value)
        poison += tl.where(factor == 0.0, 0.0, (value + mean) * 0.0)
        terms = terms + ((q, tl.where(factor == 0.0, 0.0, factor * own * chain), mean, peak),)
    tl.store(loss_ptr + row, loss)
    tl.store(entropy_ptr + row, log_d_t - sums_t[3] * LN_2 / d_t)
    tl.store(agreement_ptr + row, (top < vocab) & (y_top == sums[0]))
    if g_ptr is not None:
        y_label = bent(x_label, bias_label, sign, inner, bias_ptr is not None, BENDS, True)
        t_label = (y_label - sums[0]) * slope
        logp = t_label - log_d
        damp_label = 1.0 - y_label * y_label if BENDS else 1.0
        from_p, from_pt, from_u, at_label = gradient_constants(
            coefs, (d, tl.where(logp > 0.0, 0.0, logp), t_label, sums[3] * LN_2 / d), chain, vocab,
            1.0, 1.0, damp_label,
        )  # fmt: skip
        poison += (from_p + from_pt + from_u) * 0.0
        at_zero = tl.where(poison == poison, 0.0, float("nan"))
        constants = (from_p, from_pt * slope, from_u, at_label + at_zero, at_zero)
        pair_gradient(
            g_ptr, at, constants, terms, s_row, t_row, vocab, CODES, BENDS, BENDS_T,
            g_ptr.dtype.element_ty.primitive_bitwidth < x_ptr.dtype.element_ty.primitive_bitwidth,
            LANES, GROUP, CUT,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_logits", "stride_teacher", "stride_dlogits", "n_rows", "vocab", "ignore_index",
        "stride_coefs", "stride_values",
    ]
)  # fmt: skip
def distill_kernel(
    logits_ptr, teacher_ptr, dlogits_ptr, stride_logits, stride_teacher, stride_dlogits,
    n_rows, vocab, labels_ptr, ignore_index, weights_ptr, coefs_ptr, stride_coefs, gate_ptrs,
    temperature_ptr, bias_ptr, bias_t_ptr, grad_scale_ptr, head, head_t, numbers, outputs,
    stride_values,
    CODES: tl.constexpr, BENDS: tl.constexpr, BENDS_T: tl.constexpr,
    UNIT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Row strides in units of UNIT elements. A row that does not count is never read: dlogits 0."""
    HAS_GRAD: tl.constexpr = dlogits_ptr is not None
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        label = tl.load(labels_ptr + row)
        weight = load_or(weights_ptr, row, 1.0)
        wide = tl.cast(row, tl.int64)
        if HAS_GRAD:
            g_ptr = dlogits_ptr + wide * stride_dlogits * UNIT
        if (label != ignore_index) & (weight != 0.0):
            run_pair(
                logits_ptr + wide * stride_logits * UNIT,
                teacher_ptr + wide * stride_teacher * UNIT, g_ptr if HAS_GRAD else None, row, label,
                weight,
                load_coefs(coefs_ptr, row, stride_coefs), vocab, gate_ptrs, temperature_ptr,
                bias_ptr, bias_t_ptr, grad_scale_ptr, head, head_t, numbers, outputs,
                stride_values, CODES, BENDS, BENDS_T, LANES, GROUP, CUT,
            )  # fmt: skip
        else:
            tl.store(outputs[0] + row, 0.0)
            tl.store(outputs[2] + row, 0.0)
            tl.store(outputs[3] + row, False)
            for k in tl.static_range(len(CODES) // 2):
                tl.store(outputs[1] + k * stride_values + row, 0.0)
            if HAS_GRAD:
                zero_row(g_ptr, 0, vocab, LANES, GROUP, CUT)


def distill_row_pass(logits, teacher, dlogits, rows, teacher_rows, terms, outputs, grad_scale=None):
    """Run the kernel.

    Args:
        logits, teacher: [C, V], unit stride in V.
        dlogits: [C, V] or None; may start where logits starts.
        rows: calls.Rows with `coefs` of the objective.
        teacher_rows: calls.Rows with the teacher's head and bias.
        terms: (code, gate, scale, param) of each divergence, resolved.
        outputs: (loss, which is added to; values [K, C]; teacher_entropy; top1_agreement uint8).
        grad_scale: fp32 scalar on the device, or None for 1.
    """
    count, vocab = logits.shape
    if count == 0:
        return
    unit = alignment(logits, teacher, dlogits)
    size = max(logits.element_size(), teacher.element_size())
    size = size if unit * size % 16 == 0 else 4  # entry by entry: no more of them than of fp32
    config = pair_config(vocab, size, warp_size(logits.device))
    head, head_t = rows.head, teacher_rows.head
    numbers = ()
    for code, _, scale, param in terms:
        numbers += (scale, *term_numbers(code, param))
    with device_of(logits):
        distill_kernel[(row_programs(config, logits, teacher),)](
            logits, teacher, dlogits, logits.stride(0) // unit, teacher.stride(0) // unit,
            0 if dlogits is None else dlogits.stride(0) // unit, count, vocab, rows.labels,
            rows.ignore_index, rows.weights, rows.coefs, rows.coefs.stride(0),
            tuple(rows.extras.values()), rows.temperature, rows.bias, teacher_rows.bias, grad_scale,
            (head.softcap, head.logit_scale, head.temperature),
            (head_t.softcap, head_t.logit_scale, head_t.temperature), numbers, outputs,
            outputs[1].stride(0),
            CODES=tuple(x for code, gate, *_ in terms for x in (code, gate)),
            BENDS=head.softcap != 0, BENDS_T=head_t.softcap != 0,
            UNIT=unit, LANES=config.lanes, GROUP=config.group,
            CUT=cuts(config.group, logits, teacher), **config.options,
        )  # fmt: skip

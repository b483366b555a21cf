"""Row pass: softmax statistics, the objective and the gradient of C rows of V logits, one kernel.

Per row: `row_sums` (first sweep), statistics, `evaluate_program` (or given coefficients), then
dlogits_v = damp_v (e_v (from_p - from_pw w_v) - from_u u_v) in a second sweep that finds the row in
L2; the label's entry is stored after it. dlogits may start where the row starts, also in a narrower
type. A program works through rows pid, pid + programs, ...; the number of programs keeps the rows
in flight within L2, and no result depends on it. Traffic, configurations: README.md, configs.py.
Not here: GEMMs, compaction, reductions over rows, fp64.

Hyper-parameters are runtime scalars. Row offsets are 64-bit. A row that does not count is never
read. A label outside [0, V) is never an address: its row becomes NaN and `flag` is set.
"""

import triton
import triton.language as tl

from pyoffline.kernels.configs import RowNeeds, row_config
from pyoffline.kernels.launch import (
    alignment,
    cuts,
    device_of,
    row_programs,
    shifts,
    warp_size,
)
from pyoffline.kernels.objective_functions import product
from pyoffline.kernels.row_finish import (
    checked_label,
    evaluate_row,
    load_or,
    row_transform,
    statistics,
    write_row,
)
from pyoffline.kernels.row_sums import (
    FLOOR,
    LIFTED,
    LN_2,
    LOG2_E,
    bent,
    end_of_full_tiles,
    load_u,
    load_y,
    places,
    sum_row,
)
from pyoffline.kernels.scalar_ops import exp, expm1
from pyoffline.objectives import TABLE


@triton.jit
def gradient_constants(coefs, stats, factor, vocab, mean_u, u_label, damp_label):
    """(from_p, from_pt, from_u, at_label): dz_v = e_v (from_p - from_pt t_v) - from_u u_v with t in
    nats, and the label's entry.
    """
    a, b, c, e = coefs
    d, logp, t_label, mean_t = stats
    common = c + product(e, mean_u) + product(b, tl.where(b == 0.0, 0.0, mean_t))
    from_p = factor * (common - a) / d
    from_pt = factor * b / d
    from_u = factor * e / vocab
    p = exp(logp)
    label = product(a, -expm1(logp)) + product(p, common)
    label -= tl.where(p == 0.0, 0.0, product(b, p * t_label))
    label -= product(e, u_label) / vocab
    return from_p, from_pt, from_u, product(factor * label, damp_label)


@triton.jit
def gradient_tile(
    x_ptr, g_ptr, base, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_PT: tl.constexpr, WANT_U: tl.constexpr,
    NARROWS: tl.constexpr, FINITE: tl.constexpr, MASKED: tl.constexpr, GROUP: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """Write one tile of dlogits, the label's entry like any other."""
    from_p, from_pw, from_u, at_zero = constants
    offs, _, _ = places(base, low, high, GROUP, CUT)
    y = load_y(
        x_ptr, base, low, high, bias_ptr, sign, inner, BENDS, SIGNED, MASKED, GROUP, CUT
    )  # fmt: skip
    w = (y - sums[0]) * slope2
    e = tl.exp2(w)
    dz = e * from_p
    if WANT_PT:
        dz = e * (from_p - from_pw * tl.maximum(w, FLOOR))
    if not FINITE:
        dz = tl.where(e == 0.0, at_zero, dz)
    if WANT_U:
        if class_weight_ptr is None:
            dz = dz - from_u
        else:
            u = load_u(class_weight_ptr, base, low, high, True, MASKED, GROUP, CUT)
            dz = dz - tl.where(u == 0.0, 0.0, from_u * u)
    if BENDS:
        damp = 1.0 - y * y
        dz = tl.where(damp == 0.0, tl.where(dz == dz, 0.0, dz), dz * damp)
    dz = dz.to(g_ptr.dtype.element_ty)
    if NARROWS:  # the tile's gradient lies over logits of this tile: all are read before
        tl.debug_barrier()
    if MASKED:
        store_groups(g_ptr, base, dz, low, high, GROUP, CUT)
    else:
        tl.store(g_ptr + offs, dz)


@triton.jit
def store_groups(g_ptr, base, values, low, high, GROUP: tl.constexpr, CUT: tl.constexpr):
    """Store what lies in the row: whole groups as 16 bytes, cut ones entry by entry."""
    offs, _, inside = places(base, low, high, GROUP, CUT)
    if CUT == 0:
        tl.store(g_ptr + offs, values, mask=inside)
    else:
        whole = (base >= low) & (base + GROUP <= high)
        tl.store(g_ptr + offs, values, mask=whole)
        tl.store(g_ptr + offs, values, mask=inside & (whole == 0))


@triton.jit
def gradient_row(
    x_ptr, g_ptr, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_PT: tl.constexpr, WANT_U: tl.constexpr,
    NARROWS: tl.constexpr, FINITE: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    CUT: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """Second sweep of a row, tiles in ascending order."""
    BLOCK: tl.constexpr = LANES * GROUP
    base = tl.arange(0, LANES)[:, None] * GROUP
    first = 0
    if SHIFTS:
        gradient_tile(
            x_ptr, g_ptr, base, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner,
            slope2, BENDS, SIGNED, WANT_PT, WANT_U, NARROWS, FINITE, True, GROUP, CUT,
        )  # fmt: skip
        first = BLOCK
    full = end_of_full_tiles(high, BLOCK, SHIFTS)
    for start in range(first, full, BLOCK):
        gradient_tile(
            x_ptr, g_ptr, start + base, constants, sums, low, high, bias_ptr, class_weight_ptr,
            sign, inner, slope2, BENDS, SIGNED, WANT_PT, WANT_U, NARROWS, FINITE, False, GROUP, CUT,
        )  # fmt: skip
    if full < high:
        gradient_tile(
            x_ptr, g_ptr, full + base, constants, sums, low, high, bias_ptr, class_weight_ptr, sign,
            inner, slope2, BENDS, SIGNED, WANT_PT, WANT_U, NARROWS, FINITE, True, GROUP, CUT,
        )  # fmt: skip


@triton.jit
def zero_row(
    g_ptr, low, high, LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr
):  # fmt: skip
    """An exact 0 over the row, whatever it held."""
    BLOCK: tl.constexpr = LANES * GROUP
    zero = tl.zeros([LANES, GROUP], g_ptr.dtype.element_ty)
    for start in range(0, high, BLOCK):
        base = start + tl.arange(0, LANES)[:, None] * GROUP
        store_groups(g_ptr, base, zero, low, high, GROUP, CUT)


@triton.jit
def load_coefs(coefs_ptr, row, stride_coefs):
    """Given (a, b, c, e) of a row."""
    if coefs_ptr is None:
        coefs = (0.0, 0.0, 0.0, 0.0)
    else:
        coefs = (
            tl.load(coefs_ptr + row),
            tl.load(coefs_ptr + stride_coefs + row),
            tl.load(coefs_ptr + 2 * stride_coefs + row),
            tl.load(coefs_ptr + 3 * stride_coefs + row),
        )
    return coefs


@triton.jit(
    do_not_specialize=[
        "stride_logits", "stride_dlogits", "n_rows", "vocab", "ignore_index", "stride_coefs",
    ]
)  # fmt: skip
def row_pass_kernel(
    logits_ptr, dlogits_ptr, stride_logits, stride_dlogits, n_rows, vocab,
    labels_ptr, ignore_index, weights_ptr, given_ptrs, gate_ptrs, coefs_ptr,
    temperature_ptr, bias_ptr, class_weight_ptr, sum_u_ptr, grad_scale_ptr, head, hyper,
    outputs, stride_coefs, flag_ptr,
    CODES: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr,
    WANT_PT: tl.constexpr, WANT_U: tl.constexpr, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr,
    UNIT: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
    SHIFTS: tl.constexpr,
):  # fmt: skip
    """Strides in units of UNIT elements, so that the compiler knows the alignment of every row.

    SHIFTS: rows start anywhere; they are read from the multiple of GROUP before.
    head: softcap, logit_scale, temperature.
    """
    HAS_GRAD: tl.constexpr = dlogits_ptr is not None
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        label = tl.load(labels_ptr + row)
        weight = load_or(weights_ptr, row, 1.0)
        coefs = load_coefs(coefs_ptr, row, stride_coefs)
        counted = (label != ignore_index) & (weight != 0.0)
        if coefs_ptr is not None:
            a, b, c, e = coefs
            counted = counted & ((a != 0.0) | (b != 0.0) | (c != 0.0) | (e != 0.0))
        start = tl.cast(row, tl.int64) * stride_logits * UNIT
        low = 0
        if SHIFTS:
            low = (start % GROUP).to(tl.int32)
            start = start // GROUP * GROUP
        x_ptr = logits_ptr + start
        if HAS_GRAD:
            start = tl.cast(row, tl.int64) * stride_dlogits * UNIT
            if SHIFTS:
                start = start // GROUP * GROUP
            g_ptr = dlogits_ptr + start
        if counted:
            run_row(
                x_ptr, g_ptr if HAS_GRAD else None, row, label, weight, coefs, low, vocab,
                given_ptrs, gate_ptrs, temperature_ptr, bias_ptr, class_weight_ptr, sum_u_ptr,
                grad_scale_ptr, head, hyper, outputs, stride_coefs, flag_ptr, coefs_ptr is not None,
                CODES, BENDS, SIGNED, WANT_PT, WANT_U, WANT_P2, WANT_GAP, LANES, GROUP, CUT,
                SHIFTS,
            )  # fmt: skip
        else:
            zeros = (0.0, 0.0, 0.0, 0.0)
            write_row(outputs, row, stride_coefs, (0.0, 0.0, 0.0, 0.0, False, 0.0), 0.0, zeros)
            if HAS_GRAD:
                zero_row(g_ptr, low, low + vocab, LANES, GROUP, CUT)


@triton.jit
def run_row(
    x_ptr, g_ptr, row, label, weight, coefs, low, vocab, given_ptrs, gate_ptrs, temperature_ptr,
    bias_ptr, class_weight_ptr, sum_u_ptr, grad_scale_ptr, head, hyper, outputs, stride_coefs,
    flag_ptr, GIVEN: tl.constexpr, CODES: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr,
    WANT_PT: tl.constexpr, WANT_U: tl.constexpr, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """One row that counts: entries low to low + vocab from x_ptr."""
    high = low + vocab
    sign, inner, slope = row_transform(head, temperature_ptr, row, BENDS)
    slope2 = slope * LOG2_E
    at, poison = checked_label(label, vocab, row, flag_ptr)

    # before the barriers of sum_row: another warp may overwrite this logit right after them
    x_label = tl.load(x_ptr + low + at).to(tl.float32)
    bias_label = load_or(bias_ptr, at, 0.0)
    sums = sum_row(
        x_ptr, low, high, bias_ptr, class_weight_ptr, sign, inner, slope2,
        BENDS, SIGNED, WANT_P2, WANT_GAP, LANES, GROUP, CUT, SHIFTS,
    )  # fmt: skip
    y_label = bent(x_label, bias_label, sign, inner, bias_ptr is not None, BENDS, SIGNED) + poison
    sum_u = load_or(sum_u_ptr, 0, vocab * 1.0)
    d, logp, entropy, lse, gap, log_sum_p2, is_top1, t_label, mean_t = statistics(
        sums, slope, y_label, vocab, sum_u
    )
    loss = 0.0
    if GIVEN:
        a, b, c, e = coefs
        a += poison
    else:
        scalars = (logp, entropy, lse, gap)
        loss, a, b, c, e = evaluate_row(
            row, scalars, poison, given_ptrs, gate_ptrs, hyper, CODES
        )  # fmt: skip
    stats = (logp, entropy + poison, lse + poison, log_sum_p2 + poison, is_top1, gap + poison)
    write_row(outputs, row, stride_coefs, stats, loss, (a, b, c, e))
    if g_ptr is not None:
        if (a == 0.0) & (b == 0.0) & (c == 0.0) & (e == 0.0):
            zero_row(g_ptr, low, high, LANES, GROUP, CUT)
        else:
            factor = weight * load_or(grad_scale_ptr, 0, 1.0) * head[1]
            factor = factor / load_or(temperature_ptr, row, head[2])
            u_label = load_or(class_weight_ptr, at, 1.0)
            damp_label = 1.0 - y_label * y_label if BENDS else 1.0
            from_p, from_pt, from_u, at_label = gradient_constants(
                (a, b, c, e), (d, logp, t_label, mean_t), factor, vocab, sum_u / vocab, u_label,
                damp_label,
            )  # fmt: skip
            from_pw = from_pt * LN_2
            constants = (from_p, from_pw, from_u, at_label)
            write_gradient(
                x_ptr, g_ptr, low + at, constants, sums, low, high, bias_ptr, class_weight_ptr,
                sign, inner, slope2, BENDS, SIGNED, WANT_PT, WANT_U, LANES, GROUP, CUT, SHIFTS,
            )  # fmt: skip


@triton.jit
def write_gradient(
    x_ptr, g_ptr, label, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner,
    slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_PT: tl.constexpr, WANT_U: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """The row's dlogits. An infinite constant takes a sweep that keeps entries of p = 0 out of it;
    a NaN reaches every entry.
    """
    from_p, from_pw, from_u, at_label = constants
    NARROWS: tl.constexpr = (
        g_ptr.dtype.element_ty.primitive_bitwidth < x_ptr.dtype.element_ty.primitive_bitwidth
    )
    is_nan = (from_p != from_p) | (from_pw != from_pw) | (from_u != from_u)
    at_zero = tl.where(is_nan, float("nan"), 0.0)
    constants = (from_p, from_pw, from_u, at_zero)
    largest = tl.abs(from_p) - FLOOR * tl.abs(from_pw)
    if largest == float("inf"):
        gradient_row(
            x_ptr, g_ptr, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner,
            slope2, BENDS, SIGNED, WANT_PT, WANT_U, NARROWS, False, LANES, GROUP, CUT, SHIFTS,
        )  # fmt: skip
    else:
        gradient_row(
            x_ptr, g_ptr, constants, sums, low, high, bias_ptr, class_weight_ptr, sign, inner,
            slope2, BENDS, SIGNED, WANT_PT, WANT_U, NARROWS, True, LANES, GROUP, CUT, SHIFTS,
        )  # fmt: skip
    tl.debug_barrier()
    tl.store(g_ptr + label, tl.where(is_nan, float("nan"), at_label))


def row_pass(
    logits, dlogits, rows, outputs, flag, grad_scale=None, config=None, *, is_lifted=False
):
    """Run the kernel.

    Args:
        logits: [C, V], unit stride in V.
        dlogits: [C, V] or None; may start where logits starts.
        rows: calls.Rows, fp32 and contiguous.
        outputs: (loss, logps, entropy, lse, log_sum_p2, is_top1 uint8, gap, coefs [4, C]), None
            where not wanted.
        flag: int64 [2], becomes (1, value * 2^32 + row) for a label outside [0, V).
        grad_scale: fp32 scalar on the device, or None for 1.
        config: a RowConfig in place of the table's (tests).
        is_lifted: entries of -inf are no entries of their row, also under a softcap; what dlogits
            are there means nothing.
    """
    count, vocab = logits.shape
    if count == 0:
        return
    size = logits.element_size()
    is_shifted = shifts(16 // size, logits, dlogits)
    terms = rows.codes[0::3]
    given = rows.coefs is not None
    reads_entropy, reads_gap = TABLE["entropy_term"].code in terms, TABLE["smoothing"].code in terms
    sum_u = None if rows.class_weight is None else rows.class_weight.sum().reshape(1)
    wants_gap = reads_gap or outputs[6] is not None
    unit = alignment(logits, dlogits)
    is_split = unit * size < 16 and not is_shifted
    head = rows.head
    beside = rows.bias is not None or rows.class_weight is not None
    is_wide = beside or head.softcap != 0
    needs = RowNeeds(is_shifted, is_split, is_wide, wants_gap, len(terms), dlogits is None)
    config = config or row_config(vocab, size, warp_size(logits.device), needs)
    coefs = rows.coefs if given else outputs[7]  # read or written, never both
    negative = rows.temperature is not None or head.logit_scale / head.temperature < 0
    with device_of(logits):
        row_pass_kernel[(row_programs(config, logits, reads_again=dlogits is not None),)](
            logits, dlogits, logits.stride(0) // unit,
            0 if dlogits is None else dlogits.stride(0) // unit, count, vocab,
            rows.labels, rows.ignore_index, rows.weights, (rows.old, rows.mu, rows.ref, rows.adv),
            tuple(rows.extras.values()), rows.coefs, rows.temperature, rows.bias, rows.class_weight,
            sum_u, grad_scale, (head.softcap, head.logit_scale, head.temperature),
            () if rows.hyper is None else tuple(rows.hyper.float().flatten().tolist()),
            outputs, 0 if coefs is None else coefs.stride(0), flag,
            CODES=tuple(rows.codes), BENDS=head.softcap != 0,
            SIGNED=LIFTED.value if is_lifted else negative,
            WANT_PT=given or reads_entropy, WANT_U=given or reads_gap,
            WANT_P2=outputs[4] is not None, WANT_GAP=wants_gap,
            UNIT=unit, LANES=config.lanes, GROUP=config.group,
            CUT=1 if is_shifted else cuts(config.group, logits), SHIFTS=is_shifted,
            **config.options,
        )  # fmt: skip

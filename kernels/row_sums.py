"""First sweep of a row: the softmax sums of V logits by one program, each logit read once.

A tile is [LANES, GROUP]: a lane's GROUP neighbours are one 16-byte load of one thread, so the
running maximum and the rescaling happen per group, inside a thread, with no barrier. Sums have
three levels (group, lane over tiles, lanes), so an error does not grow with V. The lane that holds
the maximum is summed again without it: log d = log1p(ones - 1 + tail) keeps every bit of a
confident row (csrc/row_pass.h has the same split).

Coordinates: y = sign * (x + bias), or sign * tanh(inner * (x + bias)) under a softcap, ordered as
z = slope * y with slope > 0; w = log2(e) slope (y - m), so that an entry's exponential is 2^w. Not
here: statistics, objectives, gradients.
"""

import triton
import triton.language as tl

from pyoffline.kernels.scalar_ops import tanh

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
# Below every logit that is not -inf, and finite: -inf minus this is -inf, not NaN.
LOWEST: tl.constexpr = tl.constexpr(-3.4028234663852886e38)
LIFTED: tl.constexpr = tl.constexpr(2)
# 2^w is 0 from here down in fp32, and 0 * w is 0: an entry of -inf then needs no branch. A maximum
# may drop a NaN; the exponential that it is multiplied with keeps it.
FLOOR: tl.constexpr = tl.constexpr(-150.0)
LANE_ROUND: tl.constexpr = tl.constexpr(32)  # groups of one lane read at a time


@triton.jit
def bent(x, bias, sign, inner, HAS_BIAS: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr):
    """y of fp32 logits. SIGNED: False, True, or LIFTED: a logit of -inf is then no entry of the
    row, whatever bias, softcap and sign would make of it.
    """
    y = x
    if HAS_BIAS:
        y = y + bias
    if BENDS:
        y = tanh(y * inner)
    if SIGNED:
        y = y * sign
    if SIGNED == LIFTED:
        y = tl.where(x == float("-inf"), x, y)
    return y


@triton.jit
def places(base, low, high, GROUP: tl.constexpr, CUT: tl.constexpr):
    """(offsets [R, GROUP], mask of what may be read, mask of entries) of the groups that start at
    base [R, 1], for a row from `low` to `high`. CUT, from `launch.cuts`: 0: all of a group is in
    the row or none. 1: a group may be cut by the row's end, and is read whole: it is aligned, so it
    lies where its entries' page lies. 2: a cut group is read entry by entry.
    """
    offs = base + tl.arange(0, GROUP)[None, :]
    readable = base < high
    inside = readable
    if CUT > 0:
        inside = (offs >= low) & (offs < high)
        readable = readable & (base + GROUP > low) if CUT == 1 else inside
    return offs, readable, inside


@triton.jit
def load_y(
    row_ptr, base, low, high, bias_ptr, sign, inner,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
    GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """y of the groups that start at base [R, 1], -inf outside the row."""
    offs, readable, inside = places(base, low, high, GROUP, CUT)
    bias = 0.0
    if MASKED:
        x = tl.load(row_ptr + offs, mask=readable, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs - low, mask=inside, other=0.0)
        y = bent(x, bias, sign, inner, bias_ptr is not None, BENDS, SIGNED)
        y = tl.where(inside, y, float("-inf"))
    else:
        x = tl.load(row_ptr + offs).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + offs - low)
        y = bent(x, bias, sign, inner, bias_ptr is not None, BENDS, SIGNED)
    return y


@triton.jit
def load_u(
    class_weight_ptr, base, low, high,
    WANTED: tl.constexpr, MASKED: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Class weights there, or 1; 0 outside the row, and where nobody wants them."""
    offs, _, inside = places(base, low, high, GROUP, CUT)
    if not WANTED:
        u = 0.0
    elif class_weight_ptr is not None:
        if MASKED:
            u = tl.load(class_weight_ptr + offs - low, mask=inside, other=0.0)
        else:
            u = tl.load(class_weight_ptr + offs - low)
    elif MASKED:
        u = tl.where((offs >= low) & (offs < high), 1.0, 0.0)
    else:
        u = tl.where(offs >= 0, 1.0, 0.0)
    return u


@triton.jit
def fold(y, u, state, slope2, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr):
    """Add a tile to the lanes' (m, d, s, q, ut, us): the maximum of y, sum e, sum e w, sum e^2, sum
    u (y - m), sum u.
    """
    m, d, s, q, ut, us = state
    top = tl.max(y, axis=1)
    m_new = tl.where(top > m, top, m)  # a NaN is no maximum; it shows in d
    step = m - m_new
    fall = tl.maximum(step * slope2, FLOOR)
    r = tl.exp2(fall)
    t = y - m_new[:, None]
    w = t * slope2
    e = tl.exp2(w)
    s = (s + d * fall) * r + tl.sum(e * tl.maximum(w, FLOOR), axis=1)
    d = d * r + tl.sum(e, axis=1)
    if WANT_P2:
        q = q * r * r + tl.sum(e * e, axis=1)
    if WANT_GAP:
        ut = ut + tl.where(us == 0.0, 0.0, us * step)
        ut = ut + tl.sum(tl.where(u == 0.0, 0.0, u * t), axis=1)
        # not the loaded values themselves: over those Triton's OptimizeThreadLocality asserts
        us = us + tl.sum(tl.where(u == 0.0, 0.0, u), axis=1)
    return m_new, d, s, q, ut, us


@triton.jit
def sum_lane(
    row_ptr, lane, low, high, m, bias_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, LANES: tl.constexpr, GROUP: tl.constexpr,
    CUT: tl.constexpr,
):  # fmt: skip
    """(ones, tail, tail of squares) of one lane of the row: entries equal to m, and the rest."""
    tiles = tl.arange(0, LANE_ROUND)[:, None]
    ones, tail, squares = 0.0, 0.0, 0.0
    for first in range(0, tl.cdiv(high, LANES * GROUP), LANE_ROUND):
        base = ((first + tiles) * LANES + lane) * GROUP
        y = load_y(
            row_ptr, base, low, high, bias_ptr, sign, inner, BENDS, SIGNED, True, GROUP, CUT
        )  # fmt: skip
        is_top = y == m
        e = tl.where(is_top, 0.0, tl.exp2((y - m) * slope2))
        ones += tl.sum(tl.sum(tl.where(is_top, 1.0, 0.0), axis=1), axis=0)
        tail += tl.sum(tl.sum(e, axis=1), axis=0)
        squares += tl.sum(tl.sum(e * e, axis=1), axis=0)
    return ones, tail, squares


@triton.jit
def fold_tile(
    row_ptr, base, low, high, state, bias_ptr, class_weight_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr,
    MASKED: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """Read a tile and add it."""
    y = load_y(
        row_ptr, base, low, high, bias_ptr, sign, inner, BENDS, SIGNED, MASKED, GROUP, CUT
    )  # fmt: skip
    u = load_u(class_weight_ptr, base, low, high, WANT_GAP, MASKED, GROUP, CUT)
    return fold(y, u, state, slope2, WANT_P2, WANT_GAP)


@triton.jit
def end_of_full_tiles(high, BLOCK: tl.constexpr, SHIFTS: tl.constexpr):
    """Where the tiles that lie in the row as a whole end; the first is not one under SHIFTS."""
    full = (high // BLOCK) * BLOCK
    if SHIFTS:
        full = tl.maximum(full, BLOCK)
    return full


@triton.jit
def sum_row(
    row_ptr, low, high, bias_ptr, class_weight_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr, SHIFTS: tl.constexpr,
):  # fmt: skip
    """(m, ones, tail, sum e w, tail of squares, sum u (y - m)) of a row, m and the last in units of
    y. The row is entries low to high from row_ptr, a multiple of 16 bytes; low is 0 unless SHIFTS.
    """
    BLOCK: tl.constexpr = LANES * GROUP
    base = tl.arange(0, LANES)[:, None] * GROUP
    zero = tl.zeros([LANES], tl.float32)
    state = (zero + LOWEST, zero, zero, zero, zero, zero)
    first = 0
    if SHIFTS:
        state = fold_tile(
            row_ptr, base, low, high, state, bias_ptr, class_weight_ptr, sign, inner, slope2,
            BENDS, SIGNED, WANT_P2, WANT_GAP, True, GROUP, CUT,
        )  # fmt: skip
        first = BLOCK
    full = end_of_full_tiles(high, BLOCK, SHIFTS)
    for start in range(first, full, BLOCK):
        state = fold_tile(
            row_ptr, start + base, low, high, state, bias_ptr, class_weight_ptr, sign, inner,
            slope2, BENDS, SIGNED, WANT_P2, WANT_GAP, False, GROUP, CUT,
        )  # fmt: skip
    if full < high:
        state = fold_tile(
            row_ptr, full + base, low, high, state, bias_ptr, class_weight_ptr, sign, inner,
            slope2, BENDS, SIGNED, WANT_P2, WANT_GAP, True, GROUP, CUT,
        )  # fmt: skip
    return join_lanes(
        row_ptr, low, high, state, bias_ptr, sign, inner, slope2, BENDS, SIGNED, WANT_P2, WANT_GAP,
        LANES, GROUP, CUT,
    )  # fmt: skip


@triton.jit
def join_lanes(
    row_ptr, low, high, state, bias_ptr, sign, inner, slope2,
    BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_P2: tl.constexpr, WANT_GAP: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """The lanes' sums as the row's; the lane of the maximum is read again."""
    m_lane, d, s, q, ut, us = state
    lanes = tl.arange(0, LANES)
    m = tl.max(m_lane, axis=0)
    best = tl.min(tl.where(m_lane == m, lanes, LANES), axis=0)
    step = m_lane - m
    fall = tl.maximum(step * slope2, FLOOR)
    r = tl.exp2(fall)
    ones, tail, squares = sum_lane(
        row_ptr, best, low, high, m, bias_ptr, sign, inner, slope2, BENDS, SIGNED, LANES, GROUP,
        CUT,
    )  # fmt: skip
    other = lanes != best
    tail += tl.sum(tl.where(other, d * r, 0.0), axis=0)
    s_row = tl.sum((s + d * fall) * r, axis=0)
    if WANT_P2:
        squares += tl.sum(tl.where(other, q * r * r, 0.0), axis=0)
    gap = 0.0
    if WANT_GAP:
        gap = tl.sum(ut + tl.where(us == 0.0, 0.0, us * step), axis=0)
    return m, ones, tail, s_row, squares, gap

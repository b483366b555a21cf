"""Sums of rows whose logits exist a tile at a time, in registers (`score_rows.py`): fold a tile,
find the labels' logits in it, join sums of parts of a row.

State of a program: (m, ones, tail, s, q, ut, us), each [BLOCK_N, LANES]: of the entries of a lane
so far the maximum of y, how many equal it, and of the others sum e, sum e w, sum e^2; of all sum u
(y - m), sum u. A lane takes two neighbours of every 2 * LANES columns: what one thread holds of a
product's row on tensor cores, so that threads join once a span and not once a tile. Coordinates y,
w, e: `row_sums.py`. Not here: products, statistics, what a span leaves in memory (`score_rows.py`).
"""

import triton
import triton.language as tl

from pyoffline.kernels.row_sums import FLOOR, LOWEST


@triton.jit
def lowered(m_part, m, ones, tail, s, q, slope2):
    """(ones, tail, s, q) of a part of a row whose maximum is m_part, in terms of m >= m_part."""
    d = ones + tail
    is_top = m_part == m
    fall = tl.maximum((m_part - m) * slope2, FLOOR)
    r = tl.exp2(fall)
    return (
        tl.where(is_top, ones, 0.0),
        tl.where(is_top, tail, d * r),
        (s + d * fall) * r,
        tl.where(is_top, q, (ones + q) * r * r),
    )


@triton.jit
def empty_state(BLOCK_N: tl.constexpr, LANES: tl.constexpr):
    """Of no entries."""
    zero = tl.zeros([BLOCK_N, LANES], tl.float32)
    return zero + LOWEST, zero, zero, zero, zero, zero, zero


@triton.jit
def of_lanes(x, LANES: tl.constexpr):
    """[R, C] as [R, LANES, C / LANES]: no value leaves its thread."""
    x = tl.reshape(x, [x.shape[0], x.shape[1] // (2 * LANES), LANES, 2])
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), [x.shape[0], LANES, x.shape[1] * 2])


@triton.jit
def fold_logits(y, u, state, slope2, WANT_GAP: tl.constexpr, LANES: tl.constexpr):
    """Add logits y [N, C] to the state; u: their class weights [C]."""
    m, ones, tail, s, q, ut, us = state
    y = of_lanes(y, LANES)
    top = tl.max(y, axis=2)
    m_new = tl.where(top > m, top, m)  # a NaN is no maximum; it shows in the tail
    ones, tail, s, q = lowered(m, m_new, ones, tail, s, q, slope2[:, None])
    t = y - m_new[:, :, None]
    w = t * slope2[:, None, None]
    is_top = y == m_new[:, :, None]
    e = tl.where(is_top, 0.0, tl.exp2(w))
    ones += tl.sum(tl.where(is_top, 1.0, 0.0), axis=2)
    tail += tl.sum(e, axis=2)
    s += tl.sum(e * tl.maximum(w, FLOOR), axis=2)
    q += tl.sum(e * e, axis=2)
    if WANT_GAP:
        u = of_lanes(u[None, :], LANES)
        ut += tl.where(us == 0.0, 0.0, us * (m - m_new))
        ut += tl.sum(tl.where(u == 0.0, 0.0, u * t), axis=2)
        us += tl.sum(u, axis=2)
    return m_new, ones, tail, s, q, ut, us


@triton.jit
def join_lanes(state, slope2, WANT_GAP: tl.constexpr):
    """The state of each row [N]: (m, ones, tail, s, q, ut, us)."""
    m_lane, ones, tail, s, q, ut, us = state
    m = tl.max(m_lane, axis=1)
    ones, tail, s, q = lowered(m_lane, m[:, None], ones, tail, s, q, slope2[:, None])
    if WANT_GAP:
        ut += tl.where(us == 0.0, 0.0, us * (m_lane - m[:, None]))
    return (
        m, tl.sum(ones, axis=1), tl.sum(tail, axis=1), tl.sum(s, axis=1), tl.sum(q, axis=1),
        tl.sum(ut, axis=1), tl.sum(us, axis=1),
    )  # fmt: skip


@triton.jit
def products_at(acc, column, PARTS: tl.constexpr):
    """Of each row of a tile [N, C] of products the one in its column [N]; 0 where that is outside.
    Most tiles hold the label of no row, most parts of one that does too.
    """
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_V: tl.constexpr = acc.shape[1]
    found = tl.zeros([BLOCK_N], tl.float32)
    is_here = (column >= 0) & (column < BLOCK_V)
    if tl.max(is_here.to(tl.int32), axis=0) > 0:
        if PARTS == 1:
            found = tl.sum(
                tl.where(tl.arange(0, BLOCK_V)[None, :] == column[:, None], acc, 0.0), axis=1
            )
        else:
            low, high = halves(acc)
            found = products_at(low, column, PARTS // 2)
            found += products_at(high, column - BLOCK_V // 2, PARTS // 2)
    return found


@triton.jit
def halves(acc):
    """The left and the right half of a tile's columns."""
    HALF: tl.constexpr = acc.shape[1] // 2
    return tl.split(tl.permute(tl.reshape(acc, [acc.shape[0], 2, HALF]), (0, 2, 1)))


@triton.jit
def join_spans(
    sums_ptr, n_spans, slope2, WANT_GAP: tl.constexpr, FIELDS: tl.constexpr, SPANS: tl.constexpr
):
    """The sums of a row, as `row_sums.sum_row` gives them, from its spans' in memory.

    Lane i takes the spans i, i + SPANS, ...; lanes join at the end.
    """
    lanes = tl.arange(0, SPANS)
    m_lane = tl.zeros([SPANS], tl.float32) + LOWEST
    for first in range(0, n_spans, SPANS):
        m_span = tl.load(
            sums_ptr + (first + lanes) * FIELDS, mask=first + lanes < n_spans, other=LOWEST
        )
        m_lane = tl.where(m_span > m_lane, m_span, m_lane)
    m = tl.max(m_lane, axis=0)
    zero = tl.zeros([SPANS], tl.float32)
    ones, tail, s, q, gap = zero, zero, zero, zero, zero
    for first in range(0, n_spans, SPANS):
        ptrs = sums_ptr + (first + lanes) * FIELDS
        mask = first + lanes < n_spans
        m_span = tl.load(ptrs, mask=mask, other=LOWEST)
        part = lowered(
            m_span, m, tl.load(ptrs + 1, mask=mask, other=0.0),
            tl.load(ptrs + 2, mask=mask, other=0.0), tl.load(ptrs + 3, mask=mask, other=0.0),
            tl.load(ptrs + 4, mask=mask, other=0.0), slope2,
        )  # fmt: skip
        ones += part[0]
        tail += part[1]
        s += part[2]
        q += part[3]
        if WANT_GAP:
            us = tl.load(ptrs + 7, mask=mask, other=0.0)
            gap += tl.load(ptrs + 6, mask=mask, other=0.0)
            gap += tl.where(us == 0.0, 0.0, us * (m_span - m))
    sums = (tl.sum(ones, axis=0), tl.sum(tail, axis=0), tl.sum(s, axis=0), tl.sum(q, axis=0))
    return m, sums[0], sums[1], sums[2], sums[3], tl.sum(gap, axis=0)

"""The divergences between a student's row S and a teacher's row T, per entry: what a sweep adds up,
the value that the sums make, and dz. `csrc/cpu/divergences.h` and `csrc/distill.h` have the same
under the same numbers; `pyoffline/divergence_math.py` is the table.

`x` is (log S, log T, S, T, log T - log S) of a tile; `q` the numbers of a term (`term_numbers`). A
product with a probability of 0 is 0 by selection, so that a masked entry (log-prob -inf, on either
side) makes no NaN. Not here: softmax, loops, weights.
"""

import triton
import triton.language as tl

from pyoffline.divergence_math import DIVERGENCES
from pyoffline.kernels.scalar_ops import expm1_near, log, log1p, log_normal

FORWARD_KL: tl.constexpr = tl.constexpr(DIVERGENCES["forward_kl"].code)
REVERSE_KL: tl.constexpr = tl.constexpr(DIVERGENCES["reverse_kl"].code)
JSD: tl.constexpr = tl.constexpr(DIVERGENCES["jsd"].code)
TVD: tl.constexpr = tl.constexpr(DIVERGENCES["tvd"].code)
RENYI: tl.constexpr = tl.constexpr(DIVERGENCES["renyi_divergence"].code)
ALPHA: tl.constexpr = tl.constexpr(DIVERGENCES["alpha_divergence"].code)
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
INF: tl.constexpr = tl.constexpr(float("inf"))


def term_numbers(code: int, param: float) -> tuple[float, float, float, float]:
    """Runtime numbers of one term, formed in fp64: JSD (beta, 1 - beta); the power family (c, 1 for
    the teacher as base, what the value is multiplied with, what the gradient is multiplied with).
    T^a S^(1-a) - base = base expm1(c (log T - log S)), base the nearer one of T and S.
    """
    if code == JSD.value:
        return param, 1.0 - param, 0.0, 0.0
    if code not in (RENYI.value, ALPHA.value):
        return 0.0, 0.0, 0.0, 0.0
    by_teacher = param >= 0.5
    c = param - 1.0 if by_teacher else param
    if code == RENYI.value:
        return c, float(by_teacher), 1.0 / (param - 1.0), 1.0
    return c, float(by_teacher), 1.0 / (param * (param - 1.0)), 1.0 / param


@triton.jit
def weighed(p, x):
    """p x, and 0 where p is 0."""
    return tl.where(p == 0.0, 0.0, p * x)


@triton.jit
def mixture_logs(gap, beta, rest):
    """(log(M/S), log(M/T)), M = rest S + beta T, relative to the larger of S and T."""
    ratio = tl.exp2(-tl.abs(gap) * LOG2E)
    above = gap > 0.0
    log_m = log_normal(tl.where(above, rest, beta) * ratio + tl.where(above, beta, rest))
    return tl.where(above, gap + log_m, log_m), tl.where(above, log_m, log_m - gap)


@triton.jit
def half_sign(s, t):
    """1/2 sign(S - T)."""
    return tl.where(s > t, 0.5, tl.where(t > s, -0.5, 0.0))


@triton.jit
def log_power(x, q):
    """(log(T^a S^(1-a)), log of its base, c (log T - log S)); -inf where the base is 0."""
    log_s, log_t, s, t, gap = x
    log_base = tl.where(q[1] != 0.0, log_t, log_s)
    moved = q[0] * gap
    w = tl.where(log_base == -INF, -INF, log_base + moved)
    return w, log_base, moved


@triton.jit
def beyond_base(x, q):
    """T^a S^(1-a) - base."""
    log_s, log_t, s, t, gap = x
    w, log_base, moved = log_power(x, q)
    base = tl.where(q[1] != 0.0, t, s)
    far = tl.exp2(w * LOG2E) - base
    near = base * expm1_near(moved)
    out = tl.where(tl.abs(moved) < 0.34, near, far)
    return tl.where(log_base == -INF, 0.0, out)


@triton.jit
def summands(CODE: tl.constexpr, x, q, peak):
    """What the sweep adds to (first, second)."""
    log_s, log_t, s, t, gap = x
    second = tl.zeros_like(s)
    if CODE == FORWARD_KL:
        first = weighed(t, gap)
    elif CODE == REVERSE_KL:
        first = -weighed(s, gap)
    elif CODE == JSD:
        to_s, to_t = mixture_logs(gap, q[0], q[1])
        first = -weighed(s, to_s)
        second = -weighed(t, to_t)
    elif CODE == TVD:
        first = 0.5 * tl.abs(s - t)
        second = s * half_sign(s, t)
    elif CODE == RENYI:
        w, log_base, moved = log_power(x, q)
        first = tl.exp2((w - peak) * LOG2E)
        second = beyond_base(x, q)
    else:
        tl.static_assert(CODE == ALPHA, "no such divergence")
        first = beyond_base(x, q)
    return first, second


@triton.jit
def value_and_mean(CODE: tl.constexpr, first, second, peak, q):
    """(value, what dz is centred with, factor of dz) of a row from its sums."""
    value, mean, factor = first, first, 1.0
    if CODE == JSD:
        value = q[0] * second + q[1] * first
        factor = q[1]
    elif CODE == TVD:
        mean = second
    elif CODE == RENYI:
        near = tl.abs(second) < 0.5
        log_sum = tl.where(near, log1p(tl.where(near, second, 0.0)), peak + log(first))
        # no overlap, or T > 0 where S = 0
        log_sum = tl.where((peak == INF) | (peak == -INF), peak, log_sum)
        value = tl.where(second != second, second, log_sum * q[2])
        mean = 1.0 / first
    elif CODE == ALPHA:
        value = first * q[2]
        factor = q[3]
    return value, mean, factor


@triton.jit
def dz_of(CODE: tl.constexpr, x, q, mean, peak):
    """The gradient in the student's z, before its factor."""
    log_s, log_t, s, t, gap = x
    if CODE == FORWARD_KL:
        dz = s - t
    elif CODE == REVERSE_KL:
        dz = weighed(s, -(gap + mean))
    elif CODE == JSD:
        to_s, to_t = mixture_logs(gap, q[0], q[1])
        dz = weighed(s, -(to_s + mean))
    elif CODE == TVD:
        dz = s * (half_sign(s, t) - mean)
    elif CODE == RENYI:
        w, log_base, moved = log_power(x, q)
        dz = s - tl.exp2((w - peak) * LOG2E) * mean
    else:
        base = tl.where(q[1] != 0.0, s - t, 0.0)
        dz = base + (weighed(s, mean) - beyond_base(x, q))
    return dz

"""Triton versions of `pyoffline.scalar_ops` (exp, expm1, log, where), and log1p and tanh.

Device functions on fp32, a few ulps from the true value over the whole range: overflow gives inf,
underflow goes through denormals to 0, NaN stays NaN. Built from multiplications, additions and
bit patterns only, so that every chip and the interpreter compute the same number (`tl.exp` is
`ex2.approx(x * log2 e)` on NVIDIA: relative error |x| 2^-24, too much for a ratio). They run a few
times a row; the sweeps over the vocabulary use `tl.exp2`, whose argument there is at most 0, so
that its error is large only where the result is small, and `expm1_near`, `log_normal`, which leave
out what an entry cannot be. Coefficients: Cephes expf, logf and tanhf, fdlibm log1pf. Not here:
fp64.
"""

import triton
import triton.language as tl

LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # 9 bits: n * LN2_HIGH is exact
LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
SQRT_HALF: tl.constexpr = tl.constexpr(0x3F3504F3)  # bits of sqrt(1/2)
SQRT2_BITS: tl.constexpr = tl.constexpr(0x3504F3)  # mantissa of sqrt(2)


@triton.jit
def where(condition, x, y):
    """tl.where under the name that objective functions use."""
    return tl.where(condition, x, y)


@triton.jit
def _power_of_two(n):
    """2^n for an integer-valued float in [-126, 127], exact."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def expm1_near(x):
    """e^x - 1 for |x| <= ln(2)/2, as `expm1` has it there."""
    p = 1.9875691500e-4 * x + 1.3981999507e-3
    p = p * x + 8.3334519073e-3
    p = p * x + 4.1665795894e-2
    p = p * x + 1.6666665459e-1
    p = p * x + 5.0000001201e-1
    return p * x * x + x


@triton.jit
def _reduce(x):
    """(n, q): e^x = 2^n (1 + q), |ln(1 + q)| <= ln(2)/2; x in [-110, 90]. NaN: n = 0, q = NaN."""
    n = tl.floor(x * LOG2_E + 0.5)
    n = tl.where(n == n, n, 0.0)
    return n, expm1_near(x - n * LN2_HIGH - n * LN2_LOW)


@triton.jit
def exp(x):
    """e^x."""
    n, q = _reduce(tl.where(x < -110.0, -110.0, tl.where(x > 90.0, 90.0, x)))
    half = tl.floor(0.5 * n)  # in two steps: 2^128 and denormals are no fp32 exponents
    return (1.0 + q) * _power_of_two(half) * _power_of_two(n - half)


@triton.jit
def expm1(x):
    """e^x - 1, relative accuracy near 0."""
    n, q = _reduce(tl.where(x < -30.0, -30.0, tl.where(x > 60.0, 60.0, x)))
    scale = _power_of_two(n)
    return tl.where(x > 60.0, exp(x), tl.where(x < -30.0, -1.0, scale * q + (scale - 1.0)))


@triton.jit
def _log_of(f, k, rest):
    """log(2^k (1 + f)) + rest for 1 + f in [sqrt(1/2), sqrt(2))."""
    s = f / (2.0 + f)
    z = s * s
    r = 1.4798198640e-1 * z + 1.5313838422e-1
    r = r * z + 1.8183572590e-1
    r = r * z + 2.2222198546e-1
    r = r * z + 2.8571429849e-1
    r = r * z + 4.0000000596e-1
    r = (r * z + 6.6666668653e-1) * z
    half = 0.5 * f * f
    small = k * 9.0580006145e-6 + rest
    return k * 6.9313812256e-1 - ((half - (s * (half + r) + small)) - f)


@triton.jit
def _mantissa(u):
    """(f, k): u = 2^k (1 + f) for a normal positive u."""
    bits = u.to(tl.int32, bitcast=True)
    fraction = bits & 0x7FFFFF
    up = fraction > SQRT2_BITS
    k = (bits >> 23) - 127 + tl.where(up, 1, 0)
    one = tl.where(up, 0x3F000000, 0x3F800000)
    return (fraction | one).to(tl.float32, bitcast=True) - 1.0, k.to(tl.float32)


@triton.jit
def log(x):
    """Natural logarithm; -inf at 0, NaN below."""
    tiny = x < 1.1754943508222875e-38
    f, k = _mantissa(tl.where(tiny, x * 33554432.0, x))
    out = _log_of(f, k - tl.where(tiny, 25.0, 0.0), 0.0)
    out = tl.where(x == 0.0, float("-inf"), out)
    out = tl.where(x == float("inf"), x, out)
    return tl.where((x < 0.0) | (x != x), float("nan"), out)


@triton.jit
def log_normal(x):
    """Natural logarithm for x in [2^-126, 2^126], without a division; NaN stays NaN."""
    k = (x.to(tl.int32, bitcast=True) - SQRT_HALF) >> 23
    f = x * ((127 - k) << 23).to(tl.float32, bitcast=True) - 1.0  # 1 + f in [sqrt(1/2), sqrt(2))
    p = 7.0376836292e-2 * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    z, n = f * f, k.to(tl.float32)
    return n * LN2_HIGH + (f + (z * (p * f - 0.5) + n * LN2_LOW))


@triton.jit
def log1p(x):
    """log(1 + x), relative accuracy near 0; -inf at -1, NaN below."""
    u = 1.0 + x
    f, k = _mantissa(tl.where(u > 0.0, u, 1.0))
    lost = tl.where(x < 1.0, x - (u - 1.0), 1.0 - (u - x)) / u
    near = (x > -0.29) & (x < 0.41)
    out = _log_of(tl.where(near, x, f), tl.where(near, 0.0, k), tl.where(near, 0.0, lost))
    out = tl.where(x == -1.0, float("-inf"), out)
    out = tl.where(x == float("inf"), x, out)
    return tl.where((x < -1.0) | (x != x), float("nan"), out)


@triton.jit
def tanh(x):
    """Hyperbolic tangent (softcap); runs over the vocabulary, so its exponential is tl.exp."""
    a = tl.abs(x)
    z = a * a
    p = -5.70498872745e-3 * z + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    low = p * z * x + x
    high = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a < 0.625, low, tl.where(x < 0.0, -high, high))

"""The gradient of a row as one factor: dlogits_v = F (e_v + [v = y] g), e_v = exp(z_v - offset).

With a = dL/dlogp and c = dL/dlse (and neither b nor e) the gradient of a row is
factor (a ([v = y] - p_v) + c p_v), and p_v = e_v / total: the factor F = factor (c - a) / total
goes into the operands of the backward GEMMs, and entry y of the row becomes g. One program a row,
scalars only. Not here: the exponentials, the GEMMs.
"""

import triton
import triton.language as tl

from pyoffline.kernels.objective_functions import product
from pyoffline.kernels.scalar_ops import exp, expm1

# In nats. Within this distance of the row's maximum an offset keeps e and F far from the ends of
# fp32's exponent, which bf16 shares; a row outside is late: it is written again from its maximum.
FAR: tl.constexpr = tl.constexpr(40.0)
# c - a is taken for at least this part of |a| + |c|, so that g exists: p_v moves by less than fp32
# shows beside a.
LEAST: tl.constexpr = tl.constexpr(9.0949470177292824e-13)  # 2^-40


@triton.jit
def write_factors(factors, row, a, c, m, slope, d, logp, factor):
    """factors: offset [N] in units of y (read; the maximum where the row is late), F [N], g [N],
    late [N] int32. m, slope, d, logp: `row_finish.statistics`; factor: dx_v = factor dz_v.
    """
    offset_ptr, factor_ptr, label_ptr, late_ptr = factors
    rise = (m - tl.load(offset_ptr + row)) * slope
    late = tl.where(tl.abs(rise) <= FAR, 0, 1)  # NaN is late too
    if late != 0:
        tl.store(offset_ptr + row, m)
    total = exp(tl.where(late != 0, 0.0, rise)) * d
    least = LEAST * (tl.abs(a) + tl.abs(c))
    k = c - a
    k = tl.where(tl.abs(k) < least, least, k)
    label = product(a, -expm1(logp)) + product(c, exp(logp))
    is_zero = (a == 0.0) & (c == 0.0)
    tl.store(factor_ptr + row, tl.where(is_zero, 0.0, factor * k / total))
    tl.store(label_ptr + row, tl.where(is_zero, 0.0, label / k * total))
    tl.store(late_ptr + row, late)


@triton.jit
def write_zero_factors(factors, row):
    """Of a row that does not count."""
    tl.store(factors[1] + row, 0.0)
    tl.store(factors[2] + row, 0.0)
    tl.store(factors[3] + row, 0)

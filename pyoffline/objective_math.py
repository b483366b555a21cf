"""One small function per token-local objective: `(loss, coef)` of one token, before its weight.

An argument called logp, entropy, lse, gap, old, mu, ref, adv or anchor is a row input; every other
argument is a hyper-parameter (None arrives as +inf). `coef` is the analytic derivative in the
scalar named by the row of `objectives.TABLE`. `csrc/objectives.h` holds the same functions in the
same order.

Rules that keep NaN where it belongs: ratios are formed in log space and exponentiated once; a
branch that is not taken is never multiplied; comparisons are written so that a NaN falls through
to a NaN loss, and the evaluator turns a NaN loss into a NaN coefficient. Not here: weights,
reductions, composition (`objectives.py`).
"""

from pyoffline import scalar_ops as ops


def product(x, y):
    """x * y where 0 times anything but NaN is 0: an infinite ratio at advantage 0 is 0."""
    zero = ((x == 0) | (y == 0)) & (x == x) & (y == y)
    return ops.where(zero, 0.0 * ops.where(zero, 0.0, x), x * y)


def clamp(x, low, high):
    """clamp that keeps NaN on every backend."""
    return ops.where(x < low, low, ops.where(x > high, high, x))


def nll(logp):
    """-l; coef -1."""
    return -logp, -1.0


def weighted_nll(logp, adv):
    """-A l (REINFORCE, RWR, AWR, RAFT)."""
    return product(-logp, adv), -adv


def dft(logp):
    """-sg(p) l (2508.05629)."""
    p = ops.exp(logp)
    return product(-logp, p), -p


def prob_power(logp, adv, alpha):
    """-A p^alpha (LUFFY `pow`)."""
    power = ops.exp(product(logp, alpha))
    return -product(power, adv), -product(alpha * power, adv)


def luffy(logp, adv, gamma):
    """-A p/(p+gamma) (2504.14945)."""
    p = ops.exp(logp)
    return -product(p / (p + gamma), adv), -product(gamma * p / ((p + gamma) * (p + gamma)), adv)


def importance_weighted_sft(logp, ref, low, high):
    """-sg(clamp(exp(l-ref), low, high)) l (iw-SFT, token mode)."""
    weight = clamp(ops.exp(logp - ref), low, high)
    return product(-logp, weight), -weight


def ppo_surrogate(ratio, adv, clip_low, clip_high, dual_clip, delta):
    """max(-min(r, delta) A, -clip(r) A), at most -c A for A < 0; borders count as unclipped."""
    capped = ops.where(ratio > delta, delta, ratio)
    clipped = clamp(ratio, 1.0 - clip_low, 1.0 + clip_high)
    up = adv > 0
    take = ops.where(up, capped <= clipped, capped >= clipped)
    value = ops.where(take, capped, clipped)
    unclipped = value == ratio
    over = (adv < 0) & (value > dual_clip)
    value = ops.where(over, dual_clip, value)
    value = ops.where(ratio == ratio, value, ratio)
    live = unclipped & (over == 0) & (adv != 0)
    return -product(value, adv), ops.where(live, -ratio * adv, 0.0)


def proximal_sft(logp, old, clip_low, clip_high):
    """PPO clip with A = 1 (2508.20784)."""
    ratio = ops.exp(logp - old)
    high = 1.0 + clip_high
    value = ops.where(ratio > high, high, ratio)
    return -value, ops.where(ratio > high, 0.0, -ratio)


def importance_sampling(logp, mu, adv):
    """-w A."""
    loss = -product(ops.exp(logp - mu), adv)
    return loss, loss


def power_is(logp, mu, adv, alpha):
    """-A (w^alpha - 1)/alpha; alpha = 0 is its limit -A (l - mu)."""
    log_w = logp - mu
    small = alpha == 0
    shaped = ops.where(small, log_w, ops.expm1(alpha * log_w) / ops.where(small, 1.0, alpha))
    return -product(shaped, adv), -product(ops.exp(product(log_w, alpha)), adv)


def truncated_is(logp, mu, adv, low, high):
    """-sg(clamp(w, low, high)) A l (TIS-PG)."""
    weight = clamp(ops.exp(logp - mu), low, high)
    return product(product(-logp, weight), adv), -product(weight, adv)


def ppo_clip(logp, old, adv, clip_low, clip_high, dual_clip, delta):
    """PPO clip (1707.06347) with optional dual clip and upper cap delta on the ratio."""
    return ppo_surrogate(ops.exp(logp - old), adv, clip_low, clip_high, dual_clip, delta)


def decoupled_ppo(logp, old, mu, adv, clip_low, clip_high, behavior_cap):
    """PPO clip on r, times sg(exp(old - mu)); a token above the cap gets 0 (2505.24298)."""
    behavior, ratio = ops.exp(old - mu), ops.exp(logp - old)
    up = adv > 0
    clipped = ops.where(up, ratio > 1.0 + clip_high, ratio < 1.0 - clip_low) & (adv != 0)
    bound = ops.where(up, 1.0 + clip_high, 1.0 - clip_low)
    # one exponential of both log-ratios: a factor that is 0 or inf alone would hide the other
    both = ops.exp((logp - old) + (old - mu))
    loss = -product(ops.where(clipped, product(bound, behavior), both), adv)
    kept = ops.where(loss == loss, 0.0, loss)
    drop = behavior > behavior_cap
    return ops.where(drop, kept, loss), ops.where(drop | clipped, 0.0, loss)


def cispo(logp, old, adv, low, high):
    """-sg(clamp(r, low, high)) A l, absolute bounds (2506.13585)."""
    weight = clamp(ops.exp(logp - old), low, high)
    return product(product(-logp, weight), adv), -product(weight, adv)


def sapo(logp, old, adv, tau_pos, tau_neg):
    """-A sigmoid(tau (r-1)) 4/tau (2511.20347); coef 0 by branch at r = inf."""
    ratio = ops.exp(logp - old)
    tau = ops.where(adv > 0, tau_pos, tau_neg)
    x = tau * (ratio - 1.0)
    tail = ops.exp(ops.where(x > 0, -x, x))
    gate = ops.where(x > 0, 1.0 / (1.0 + tail), tail / (1.0 + tail))
    slope = tail / ((1.0 + tail) * (1.0 + tail))
    steep = ops.where(slope == 0, 0.0, slope * ratio)
    return -product(gate * (4.0 / tau), adv), -product(4.0 * steep, adv)


def dppo_masked(logp, old, adv, cap, drop):
    """-sg(min(r, cap)) A l where kept, 0 where dropped."""
    ratio = ops.exp(logp - old)
    weight = ops.where(ratio > cap, cap, ratio)
    loss = product(product(-logp, weight), adv)
    zero = ops.where(loss == loss, 0.0, loss)
    return ops.where(drop, zero, loss), ops.where(drop, 0.0, -product(weight, adv))


def dppo_tv(logp, old, adv, delta_low, delta_high, cap):
    """DPPO with the total-variation mask (2602.04879)."""
    moved = ops.exp(logp) - ops.exp(old)
    return dppo_masked(
        logp, old, adv, cap, ops.where(adv > 0, moved > delta_high, moved < -delta_low)
    )


def dppo_kl(logp, old, adv, delta_low, delta_high, cap):
    """DPPO with the binary-KL mask (2602.04879)."""
    p = ops.exp(logp)
    p_old = ops.exp(old)
    rest_old = -ops.expm1(old)
    rest = -ops.expm1(logp)
    first = ops.where(p_old == 0, 0.0, p_old * (old - logp))
    kl = first + ops.where(rest_old == 0, 0.0, rest_old * ops.log(rest_old / rest))
    up = (kl > delta_high) & (p > p_old)
    down = (kl > delta_low) & (p < p_old)
    return dppo_masked(logp, old, adv, cap, ops.where(adv > 0, up, down))


def dro(logp, old, adv, beta):
    """-A l + beta/2 (l-old)^2 (2405.19107)."""
    moved = logp - old
    return product(-logp, adv) + 0.5 * beta * moved * moved, beta * moved - adv


def asym_re(logp, adv, baseline):
    """-(A - baseline) l (2506.20520)."""
    shifted = adv - baseline
    return product(-logp, shifted), -shifted


def topr_token(logp, mu, adv):
    """A >= 0: -A l; A < 0: -sg(clamp(w, 0, 1)) A l."""
    ratio = ops.exp(logp - mu)
    weight = ops.where((adv < 0) | (ratio != ratio), clamp(ratio, 0.0, 1.0), 1.0)
    return product(product(-logp, weight), adv), -product(weight, adv)


def distill_token(logp, ref, low, high):
    """-sg((ref - l) clamp(1, low, high)) l: distillation on sampled tokens, without mu."""
    weight = product(ref - logp, clamp(ops.exp(0.0 * ref), low, high))
    return product(-logp, weight), -weight


def distill_token_is(logp, mu, ref, low, high):
    """-sg((ref - l) clamp(w, low, high)) l."""
    weight = product(ref - logp, clamp(ops.exp(logp - mu), low, high))
    return product(-logp, weight), -weight


def kl_k1(logp, anchor):
    """D = l - anchor."""
    loss = logp - anchor
    return loss, 1.0


def kl_k2(logp, anchor):
    """D^2/2; coef D."""
    moved = logp - anchor
    return 0.5 * moved * moved, moved


def kl_k3(logp, anchor):
    """exp(-D) - 1 + D; coef 1 - exp(-D)."""
    moved = logp - anchor
    rise = ops.expm1(-moved)
    return rise + moved, -rise


def kl_k3_is(logp, old, anchor):
    """r k3 = exp(log r - D) - r + r D; coef r D."""
    moved = logp - anchor
    log_ratio = logp - old
    ratio = ops.exp(log_ratio)
    huge = ratio == float("inf")
    value = ops.exp(log_ratio - moved) - ratio + product(ratio, moved)
    value = ops.where(huge, ops.where(moved == 0, 0.0, product(moved * moved, ratio)), value)
    return value, product(ratio, moved)


def entropy_term(entropy):
    """H; its coef belongs to H."""
    return entropy, 1.0


def z_loss(lse):
    """lse^2; its coef belongs to lse."""
    return lse * lse, 2.0 * lse


def smoothing(gap):
    """mean_v u_v (lse - z_v), label smoothing's uniform cross entropy; its coef belongs to gap."""
    return gap, 1.0

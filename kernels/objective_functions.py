"""THE TABLE as device functions: the Python text of `pyoffline.objective_math` compiled by Triton.

The functions are the very ones that the PyTorch reference runs; only the name `ops` is rebound, to
`scalar_ops` of this folder, and the names that they call each other by. `evaluate_program` is
`pyoffline.program.evaluate` for one row. Not here: any formula.
"""

import inspect
import types

import triton
import triton.language as tl

from pyoffline import objective_math
from pyoffline.kernels import scalar_ops


def _device_functions() -> dict:
    # the interpreter wants triton.language in sight of every device function
    scope = {**vars(objective_math), "ops": scalar_ops, "tl": tl}
    own = {
        name: f
        for name, f in vars(objective_math).items()
        if inspect.isfunction(f) and f.__module__ == objective_math.__name__
    }
    for name, f in own.items():
        scope[name] = triton.jit(types.FunctionType(f.__code__, scope, name))
    return {name: scope[name] for name in own}


FUNCTIONS = _device_functions()
product = FUNCTIONS["product"]
nll = FUNCTIONS["nll"]
weighted_nll = FUNCTIONS["weighted_nll"]
dft = FUNCTIONS["dft"]
prob_power = FUNCTIONS["prob_power"]
luffy = FUNCTIONS["luffy"]
importance_weighted_sft = FUNCTIONS["importance_weighted_sft"]
proximal_sft = FUNCTIONS["proximal_sft"]
importance_sampling = FUNCTIONS["importance_sampling"]
power_is = FUNCTIONS["power_is"]
truncated_is = FUNCTIONS["truncated_is"]
ppo_clip = FUNCTIONS["ppo_clip"]
decoupled_ppo = FUNCTIONS["decoupled_ppo"]
cispo = FUNCTIONS["cispo"]
sapo = FUNCTIONS["sapo"]
dppo_tv = FUNCTIONS["dppo_tv"]
dppo_kl = FUNCTIONS["dppo_kl"]
dro = FUNCTIONS["dro"]
asym_re = FUNCTIONS["asym_re"]
topr_token = FUNCTIONS["topr_token"]
distill_token = FUNCTIONS["distill_token"]
distill_token_is = FUNCTIONS["distill_token_is"]
kl_k1 = FUNCTIONS["kl_k1"]
kl_k2 = FUNCTIONS["kl_k2"]
kl_k3 = FUNCTIONS["kl_k3"]
kl_k3_is = FUNCTIONS["kl_k3_is"]
entropy_term = FUNCTIONS["entropy_term"]
z_loss = FUNCTIONS["z_loss"]
smoothing = FUNCTIONS["smoothing"]

# What a coefficient differentiates: a, b, c, e of the row. By code; all others belong to logp.
ENTROPY_CODE: tl.constexpr = tl.constexpr(26)
LSE_CODE: tl.constexpr = tl.constexpr(27)
GAP_CODE: tl.constexpr = tl.constexpr(28)


@triton.jit
def objective_row(CODE: tl.constexpr, stats, given, anchor, p):
    """(loss, coef) of row CODE of the table. stats: logp, entropy, lse, gap; given: old, mu, ref,
    adv; p: the term's parameters in order.
    """
    logp, entropy, lse, gap = stats
    old, mu, ref, adv = given
    if CODE == 1:
        loss, coef = nll(logp)
    elif CODE == 2:
        loss, coef = weighted_nll(logp, adv)
    elif CODE == 3:
        loss, coef = dft(logp)
    elif CODE == 4:
        loss, coef = prob_power(logp, adv, p[0])
    elif CODE == 5:
        loss, coef = luffy(logp, adv, p[0])
    elif CODE == 6:
        loss, coef = importance_weighted_sft(logp, ref, p[0], p[1])
    elif CODE == 7:
        loss, coef = proximal_sft(logp, old, p[0], p[1])
    elif CODE == 8:
        loss, coef = importance_sampling(logp, mu, adv)
    elif CODE == 9:
        loss, coef = power_is(logp, mu, adv, p[0])
    elif CODE == 10:
        loss, coef = truncated_is(logp, mu, adv, p[0], p[1])
    elif CODE == 11:
        loss, coef = ppo_clip(logp, old, adv, p[0], p[1], p[2], p[3])
    elif CODE == 12:
        loss, coef = decoupled_ppo(logp, old, mu, adv, p[0], p[1], p[2])
    elif CODE == 13:
        loss, coef = cispo(logp, old, adv, p[0], p[1])
    elif CODE == 14:
        loss, coef = sapo(logp, old, adv, p[0], p[1])
    elif CODE == 15:
        loss, coef = dppo_tv(logp, old, adv, p[0], p[1], p[2])
    elif CODE == 16:
        loss, coef = dppo_kl(logp, old, adv, p[0], p[1], p[2])
    elif CODE == 17:
        loss, coef = dro(logp, old, adv, p[0])
    elif CODE == 18:
        loss, coef = asym_re(logp, adv, p[0])
    elif CODE == 19:
        loss, coef = topr_token(logp, mu, adv)
    elif CODE == 20:
        loss, coef = distill_token(logp, ref, p[0], p[1])
    elif CODE == 21:
        loss, coef = distill_token_is(logp, mu, ref, p[0], p[1])
    elif CODE == 22:
        loss, coef = kl_k1(logp, anchor)
    elif CODE == 23:
        loss, coef = kl_k2(logp, anchor)
    elif CODE == 24:
        loss, coef = kl_k3(logp, anchor)
    elif CODE == 25:
        loss, coef = kl_k3_is(logp, old, anchor)
    elif CODE == 26:
        loss, coef = entropy_term(entropy)
    elif CODE == 27:
        loss, coef = z_loss(lse)
    else:
        tl.static_assert(CODE == 28, "no such row of the table")
        loss, coef = smoothing(gap)
    return loss, coef


@triton.jit
def anchor_of(ANCHOR: tl.constexpr, given):
    """The log-probs that a KL term is against: 1 ref, 2 old, 3 mu (objectives.ANCHORS)."""
    old, mu, ref, adv = given
    if ANCHOR == 1:
        anchor = ref
    elif ANCHOR == 2:
        anchor = old
    else:
        anchor = mu
    return anchor


@triton.jit
def evaluate_program(stats, given, gates, hyper, CODES: tl.constexpr):
    """(loss, a, b, c, e) of one row: every term scaled, gated and added.

    CODES: flat (code, gate, anchor) triples; hyper: (scale, six parameters, spare) per term. A
    scale or gate of 0 switches a term off, whatever it holds; a NaN loss makes its coefficient NaN.
    """
    zero = stats[0] * 0.0
    zero = tl.where(zero == 0.0, zero, 0.0)
    loss, a, b, c, e = zero, zero, zero, zero, zero
    for k in tl.static_range(len(CODES) // 3):
        p = (hyper[8 * k + 1], hyper[8 * k + 2], hyper[8 * k + 3], hyper[8 * k + 4])
        anchor = anchor_of(CODES[3 * k + 2], given)
        value, coef = objective_row(CODES[3 * k], stats, given, anchor, p)
        coef = tl.where(value != value, value, coef)
        factor = hyper[8 * k] + zero
        if CODES[3 * k + 1] >= 0:
            factor = tl.where(factor == 0.0, 0.0, factor * gates[CODES[3 * k + 1]])
        off = factor == 0.0
        loss += tl.where(off, 0.0, factor * value)
        coef = tl.where(off, 0.0, factor * coef)
        if CODES[3 * k] == ENTROPY_CODE:
            b += coef
        elif CODES[3 * k] == LSE_CODE:
            c += coef
        elif CODES[3 * k] == GAP_CODE:
            e += coef
        else:
            a += coef
    return loss, a, b, c, e

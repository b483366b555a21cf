// One small function per token-local objective, (loss, coef) of one token, and the evaluator of a
// program of them.
//
// The same functions, in the same order, as pyoffline/objective_math.py: names, arguments and
// branches agree, and a test compares the two over a grid. Ratios are formed in log space and
// exponentiated once; a branch that is not taken is never multiplied; comparisons let a NaN fall
// through to a NaN loss, and evaluate_program turns a NaN loss into a NaN coef. fp32, host and
// device. Not here: token weights, reductions over tokens, the softmax.
#pragma once

#include <math.h>

#include "row_args.h"

#ifdef __CUDACC__
#define PYOFFLINE_HD __host__ __device__
#else
#define PYOFFLINE_HD
#endif

namespace pyoffline {

enum Code : int32_t {
  nll_code = 1,
  weighted_nll_code = 2,
  dft_code = 3,
  prob_power_code = 4,
  luffy_code = 5,
  importance_weighted_sft_code = 6,
  proximal_sft_code = 7,
  importance_sampling_code = 8,
  power_is_code = 9,
  truncated_is_code = 10,
  ppo_clip_code = 11,
  decoupled_ppo_code = 12,
  cispo_code = 13,
  sapo_code = 14,
  dppo_tv_code = 15,
  dppo_kl_code = 16,
  dro_code = 17,
  asym_re_code = 18,
  topr_token_code = 19,
  distill_token_code = 20,
  distill_token_is_code = 21,
  kl_k1_code = 22,
  kl_k2_code = 23,
  kl_k3_code = 24,
  kl_k3_is_code = 25,
  entropy_term_code = 26,
  z_loss_code = 27,
  smoothing_code = 28,
};

struct LossCoef {
  float loss, coef;
};

// x * y where 0 times anything but NaN is 0 (an infinite ratio at advantage 0 is 0, not NaN).
PYOFFLINE_HD inline float product(float x, float y) {
  const bool zero = (x == 0.0f || y == 0.0f) && x == x && y == y;
  return zero ? 0.0f : x * y;
}

// clamp that keeps NaN.
PYOFFLINE_HD inline float clamp(float x, float low, float high) {
  return x < low ? low : (x > high ? high : x);
}

// -l; coef -1.
PYOFFLINE_HD inline LossCoef nll(float logp) { return {-logp, -1.0f}; }

// -A l (REINFORCE, RWR, AWR, RAFT).
PYOFFLINE_HD inline LossCoef weighted_nll(float logp, float adv) {
  return {product(-logp, adv), -adv};
}

// -sg(p) l (2508.05629).
PYOFFLINE_HD inline LossCoef dft(float logp) {
  const float p = expf(logp);
  return {product(-logp, p), -p};
}

// -A p^alpha (LUFFY `pow`).
PYOFFLINE_HD inline LossCoef prob_power(float logp, float adv, float alpha) {
  const float power = expf(product(logp, alpha));
  return {-product(power, adv), -product(alpha * power, adv)};
}

// -A p/(p+gamma) (2504.14945).
PYOFFLINE_HD inline LossCoef luffy(float logp, float adv, float gamma) {
  const float p = expf(logp);
  return {-product(p / (p + gamma), adv), -product(gamma * p / ((p + gamma) * (p + gamma)), adv)};
}

// -sg(clamp(exp(l-ref), low, high)) l (iw-SFT, token mode).
PYOFFLINE_HD inline LossCoef importance_weighted_sft(float logp, float ref, float low, float high) {
  const float weight = clamp(expf(logp - ref), low, high);
  return {product(-logp, weight), -weight};
}

// max(-min(r, delta) A, -clip(r) A), dual-clipped at -c A for A < 0; borders count as unclipped.
PYOFFLINE_HD inline LossCoef ppo_surrogate(float ratio, float adv, float clip_low, float clip_high,
                                           float dual_clip, float delta) {
  const float capped = ratio > delta ? delta : ratio;
  const float clipped = clamp(ratio, 1.0f - clip_low, 1.0f + clip_high);
  const bool take = adv > 0.0f ? capped <= clipped : capped >= clipped;
  float value = take ? capped : clipped;
  const bool unclipped = value == ratio;
  const bool over = adv < 0.0f && value > dual_clip;
  if (over) value = dual_clip;
  if (ratio != ratio) value = ratio;
  const bool live = unclipped && !over && adv != 0.0f;
  return {-product(value, adv), live ? -ratio * adv : 0.0f};
}

// PPO clip with A = 1 (2508.20784).
PYOFFLINE_HD inline LossCoef proximal_sft(float logp, float old, float clip_low, float clip_high) {
  (void)clip_low;  // a token below the band is not clipped at A = 1
  const float ratio = expf(logp - old);
  const float high = 1.0f + clip_high;
  return {-(ratio > high ? high : ratio), ratio > high ? 0.0f : -ratio};
}

// -w A.
PYOFFLINE_HD inline LossCoef importance_sampling(float logp, float mu, float adv) {
  const float loss = -product(expf(logp - mu), adv);
  return {loss, loss};
}

// -A (w^alpha - 1)/alpha; alpha = 0 is its limit -A (l - mu).
PYOFFLINE_HD inline LossCoef power_is(float logp, float mu, float adv, float alpha) {
  const float log_w = logp - mu;
  const float shaped = alpha == 0.0f ? log_w : expm1f(alpha * log_w) / alpha;
  return {-product(shaped, adv), -product(expf(product(log_w, alpha)), adv)};
}

// -sg(clamp(w, low, high)) A l (TIS-PG).
PYOFFLINE_HD inline LossCoef truncated_is(float logp, float mu, float adv, float low, float high) {
  const float weight = clamp(expf(logp - mu), low, high);
  return {product(product(-logp, weight), adv), -product(weight, adv)};
}

// PPO clip (1707.06347) with optional dual clip and upper cap delta on the ratio.
PYOFFLINE_HD inline LossCoef ppo_clip(float logp, float old, float adv, float clip_low,
                                      float clip_high, float dual_clip, float delta) {
  return ppo_surrogate(expf(logp - old), adv, clip_low, clip_high, dual_clip, delta);
}

// PPO clip on r, times sg(exp(old - mu)); a token above the cap gets 0 (2505.24298).
PYOFFLINE_HD inline LossCoef decoupled_ppo(float logp, float old, float mu, float adv,
                                           float clip_low, float clip_high, float behavior_cap) {
  const float behavior = expf(old - mu), ratio = expf(logp - old);
  const bool up = adv > 0.0f;
  const bool clipped = (up ? ratio > 1.0f + clip_high : ratio < 1.0f - clip_low) && adv != 0.0f;
  const float bound = up ? 1.0f + clip_high : 1.0f - clip_low;
  // one exponential of both log-ratios: a factor that is 0 or inf alone would hide the other
  const float both = expf((logp - old) + (old - mu));
  const float loss = -product(clipped ? product(bound, behavior) : both, adv);
  if (behavior > behavior_cap) return {loss == loss ? 0.0f : loss, 0.0f};
  return {loss, clipped ? 0.0f : loss};
}

// -sg(clamp(r, low, high)) A l, absolute bounds (2506.13585).
PYOFFLINE_HD inline LossCoef cispo(float logp, float old, float adv, float low, float high) {
  const float weight = clamp(expf(logp - old), low, high);
  return {product(product(-logp, weight), adv), -product(weight, adv)};
}

// -A sigmoid(tau (r-1)) 4/tau (2511.20347); coef 0 by branch at r = inf.
PYOFFLINE_HD inline LossCoef sapo(float logp, float old, float adv, float tau_pos, float tau_neg) {
  const float ratio = expf(logp - old);
  const float tau = adv > 0.0f ? tau_pos : tau_neg;
  const float x = tau * (ratio - 1.0f);
  const float tail = expf(x > 0.0f ? -x : x);
  const float gate = x > 0.0f ? 1.0f / (1.0f + tail) : tail / (1.0f + tail);
  const float slope = tail / ((1.0f + tail) * (1.0f + tail));
  const float steep = slope == 0.0f ? 0.0f : slope * ratio;
  return {-product(gate * (4.0f / tau), adv), -product(4.0f * steep, adv)};
}

// -sg(min(r, cap)) A l where kept, 0 where dropped.
PYOFFLINE_HD inline LossCoef dppo_masked(float logp, float old, float adv, float cap, bool drop) {
  const float ratio = expf(logp - old);
  const float weight = ratio > cap ? cap : ratio;
  const float loss = product(product(-logp, weight), adv);
  if (drop) return {loss == loss ? 0.0f : loss, 0.0f};
  return {loss, -product(weight, adv)};
}

// DPPO with the total-variation mask (2602.04879).
PYOFFLINE_HD inline LossCoef dppo_tv(float logp, float old, float adv, float delta_low,
                                     float delta_high, float cap) {
  const float moved = expf(logp) - expf(old);
  return dppo_masked(logp, old, adv, cap, adv > 0.0f ? moved > delta_high : moved < -delta_low);
}

// DPPO with the binary-KL mask (2602.04879).
PYOFFLINE_HD inline LossCoef dppo_kl(float logp, float old, float adv, float delta_low,
                                     float delta_high, float cap) {
  const float p = expf(logp), p_old = expf(old);
  const float rest_old = -expm1f(old), rest = -expm1f(logp);
  const float first = p_old == 0.0f ? 0.0f : p_old * (old - logp);
  const float kl = first + (rest_old == 0.0f ? 0.0f : rest_old * logf(rest_old / rest));
  const bool up = kl > delta_high && p > p_old;
  const bool down = kl > delta_low && p < p_old;
  return dppo_masked(logp, old, adv, cap, adv > 0.0f ? up : down);
}

// -A l + beta/2 (l-old)^2 (2405.19107).
PYOFFLINE_HD inline LossCoef dro(float logp, float old, float adv, float beta) {
  const float moved = logp - old;
  return {product(-logp, adv) + 0.5f * beta * moved * moved, beta * moved - adv};
}

// -(A - baseline) l (2506.20520).
PYOFFLINE_HD inline LossCoef asym_re(float logp, float adv, float baseline) {
  const float shifted = adv - baseline;
  return {product(-logp, shifted), -shifted};
}

// A >= 0: -A l; A < 0: -sg(clamp(w, 0, 1)) A l.
PYOFFLINE_HD inline LossCoef topr_token(float logp, float mu, float adv) {
  const float ratio = expf(logp - mu);
  const float weight = adv < 0.0f || ratio != ratio ? clamp(ratio, 0.0f, 1.0f) : 1.0f;
  return {product(product(-logp, weight), adv), -product(weight, adv)};
}

// -sg((ref - l) clamp(1, low, high)) l: sampled-token distillation without behaviour log-probs.
PYOFFLINE_HD inline LossCoef distill_token(float logp, float ref, float low, float high) {
  const float weight = product(ref - logp, clamp(expf(0.0f * ref), low, high));
  return {product(-logp, weight), -weight};
}

// -sg((ref - l) clamp(w, low, high)) l.
PYOFFLINE_HD inline LossCoef distill_token_is(float logp, float mu, float ref, float low,
                                              float high) {
  const float weight = product(ref - logp, clamp(expf(logp - mu), low, high));
  return {product(-logp, weight), -weight};
}

// D = l - anchor.
PYOFFLINE_HD inline LossCoef kl_k1(float logp, float anchor) { return {logp - anchor, 1.0f}; }

// D^2/2; coef D.
PYOFFLINE_HD inline LossCoef kl_k2(float logp, float anchor) {
  const float moved = logp - anchor;
  return {0.5f * moved * moved, moved};
}

// exp(-D) - 1 + D; coef 1 - exp(-D).
PYOFFLINE_HD inline LossCoef kl_k3(float logp, float anchor) {
  const float moved = logp - anchor;
  const float rise = expm1f(-moved);
  return {rise + moved, -rise};
}

// r k3 = exp(log r - D) - r + r D; coef r D.
PYOFFLINE_HD inline LossCoef kl_k3_is(float logp, float old, float anchor) {
  const float moved = logp - anchor;
  const float log_ratio = logp - old;
  const float ratio = expf(log_ratio);
  float value = expf(log_ratio - moved) - ratio + product(ratio, moved);
  if (ratio == INFINITY) value = moved == 0.0f ? 0.0f : product(moved * moved, ratio);
  return {value, product(ratio, moved)};
}

// H; its coef belongs to H.
PYOFFLINE_HD inline LossCoef entropy_term(float entropy) { return {entropy, 1.0f}; }

// lse^2; its coef belongs to lse.
PYOFFLINE_HD inline LossCoef z_loss(float lse) { return {lse * lse, 2.0f * lse}; }

// mean_v u_v (lse - z_v), label smoothing's uniform cross entropy; its coef belongs to gap.
PYOFFLINE_HD inline LossCoef smoothing(float gap) { return {gap, 1.0f}; }

// What a term may read of one token; an input that is not there is NaN, but adv, which is 1.
struct TokenIn {
  float logp, entropy, lse, gap, old, mu, ref, adv;
};

// The sums of a program: the loss before the weight, and dL/d(logp, entropy, lse, gap).
struct Coefs {
  float loss, a, b, c, e;
};

PYOFFLINE_HD inline LossCoef evaluate_term(const Term& term, const TokenIn& x) {
  const float* h = term.params;
  const float anchor = term.anchor == 1 ? x.ref : term.anchor == 2 ? x.old : x.mu;
  switch (term.code) {  // clang-format off
    case nll_code: return nll(x.logp);
    case weighted_nll_code: return weighted_nll(x.logp, x.adv);
    case dft_code: return dft(x.logp);
    case prob_power_code: return prob_power(x.logp, x.adv, h[0]);
    case luffy_code: return luffy(x.logp, x.adv, h[0]);
    case importance_weighted_sft_code: return importance_weighted_sft(x.logp, x.ref, h[0], h[1]);
    case proximal_sft_code: return proximal_sft(x.logp, x.old, h[0], h[1]);
    case importance_sampling_code: return importance_sampling(x.logp, x.mu, x.adv);
    case power_is_code: return power_is(x.logp, x.mu, x.adv, h[0]);
    case truncated_is_code: return truncated_is(x.logp, x.mu, x.adv, h[0], h[1]);
    case ppo_clip_code: return ppo_clip(x.logp, x.old, x.adv, h[0], h[1], h[2], h[3]);
    case decoupled_ppo_code: return decoupled_ppo(x.logp, x.old, x.mu, x.adv, h[0], h[1], h[2]);
    case cispo_code: return cispo(x.logp, x.old, x.adv, h[0], h[1]);
    case sapo_code: return sapo(x.logp, x.old, x.adv, h[0], h[1]);
    case dppo_tv_code: return dppo_tv(x.logp, x.old, x.adv, h[0], h[1], h[2]);
    case dppo_kl_code: return dppo_kl(x.logp, x.old, x.adv, h[0], h[1], h[2]);
    case dro_code: return dro(x.logp, x.old, x.adv, h[0]);
    case asym_re_code: return asym_re(x.logp, x.adv, h[0]);
    case topr_token_code: return topr_token(x.logp, x.mu, x.adv);
    case distill_token_code: return distill_token(x.logp, x.ref, h[0], h[1]);
    case distill_token_is_code: return distill_token_is(x.logp, x.mu, x.ref, h[0], h[1]);
    case kl_k1_code: return kl_k1(x.logp, anchor);
    case kl_k2_code: return kl_k2(x.logp, anchor);
    case kl_k3_code: return kl_k3(x.logp, anchor);
    case kl_k3_is_code: return kl_k3_is(x.logp, x.old, anchor);
    case entropy_term_code: return entropy_term(x.entropy);
    case z_loss_code: return z_loss(x.lse);
    case smoothing_code: return smoothing(x.gap);
  }                   // clang-format on
  return {NAN, NAN};  // row_call.cpp rejects unknown codes
}

// Every term that is switched on, scaled, gated and added. A scale of 0 drops the term, a gate of 0
// drops it for this token, so that neither can turn an inf into a NaN.
PYOFFLINE_HD inline Coefs evaluate_program(const Term* terms, int32_t n_terms, const TokenIn& x,
                                           const float* const* extras, int64_t row) {
  Coefs sum = {0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  for (int32_t k = 0; k < n_terms; ++k) {
    const Term& term = terms[k];
    const float factor = term.gate < 0 ? term.scale : term.scale * extras[term.gate][row];
    if (term.scale == 0.0f || (term.gate >= 0 && extras[term.gate][row] == 0.0f)) continue;
    LossCoef part = evaluate_term(term, x);
    if (part.loss != part.loss) part.coef = part.loss;
    sum.loss += factor * part.loss;
    const float coef = factor * part.coef;
    if (term.code == entropy_term_code) {
      sum.b += coef;
    } else if (term.code == z_loss_code) {
      sum.c += coef;
    } else if (term.code == smoothing_code) {
      sum.e += coef;
    } else {
      sum.a += coef;
    }
  }
  return sum;
}

}  // namespace pyoffline

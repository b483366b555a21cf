"""Advantages at data time: stored rewards, values and log-probs in, numbers per token out.

Everywhere: `rewards` is [B] (one score a sequence) or, where it says so, [B, T] (one a token);
`mask` is bool, [B, T] padded or [B], and a [B] result given a [B, T] mask is spread over its
tokens; `group_ids` is [B], any integers in any order. A masked position comes out 0 and is never
read, whatever it holds; a sequence without a valid token is in no statistic. Discounts and
positions count valid tokens only. NaN or inf at a valid place stays visible in its row (its group,
for group statistics). Formed in float64 (a few tensors of the result's shape), float64 out for
float64 in, else float32; detached; no host sync unless said. Wrong shapes raise ValueError, wrong
kinds TypeError. Not here: log-probs under the live policy.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyoffline.arrays import (
    Groups,
    as_mask,
    clean,
    compact,
    dense_ids,
    discounted_suffix,
    expand,
    places,
    result_dtype,
)


class Pairs(NamedTuple):
    """Row indices of preference pairs, and how much better the chosen one scored."""

    chosen: Tensor  # [P] int64
    rejected: Tensor  # [P] int64
    gap: Tensor  # [P] reward of chosen minus rejected, > 0; `gap.sigmoid()` is a soft label


def reward_to_go(rewards, mask, gamma=1.0):
    """R_t = sum_{k>=t} gamma^(k-t) r_k over the valid tokens; [B, T]. (REINFORCE, Williams 1992)

    rewards [B, T], or [B]: then the score sits on the last valid token.
    `rewards.flip(-1).cumsum(-1).flip(-1)` at gamma=1.
    """
    mask = _token_mask(mask)
    return _returns(rewards, mask, gamma).to(result_dtype(rewards))


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t = sum_{k>=t} (gamma lam)^(k-t) d_k, d_k = r_k + gamma V_{k+1} - V_k; [B, T].

    V = 0 after the last token. rewards [B, T] or [B] (on the last valid token), values [B, T]. The
    critic's target is A + values. (1506.02438, eq. 16)
    """
    mask = _token_mask(mask)
    decay = _unit(gamma, "gamma") * _unit(lam, "lam")
    place = places(mask)
    value = compact(clean(values, mask, "values"), place)
    following = torch.cat([value[:, 1:], torch.zeros_like(value[:, :1])], 1)
    delta = compact(_token_rewards(rewards, mask), place) + gamma * following - value
    return expand(discounted_suffix(delta, decay), place).to(result_dtype(rewards, values))


def group_normalize(rewards, group_ids, mask=None, std="group", eps=1e-6):
    """A = (R - mean_g R) / (std + eps), std of the group or of the whole batch, or no division.

    std is unbiased. "group" is GRPO (2402.03300, sec. 4.1.2), None is Dr.GRPO (2503.20783), "batch"
    TRL's scale_rewards="batch". Peers' eps: verl 1e-6, TRL 1e-4, open-instruct 1e-8. A group of
    one, or of equal rewards, gives exactly 0.
    """
    if std not in ("group", "batch", None):
        raise ValueError(f'std: expected "group", "batch" or None, got {std!r}')
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps!r}")
    r, group, valid = _scores(rewards, group_ids, mask)
    out = r - group.mean(r)
    if std is not None:
        whole = group if std == "group" else Groups(torch.zeros_like(group.index), valid)
        out = out / (whole.std(r) + eps)
    return _finish(torch.where(group.equal(r), 0.0, out), valid, mask, rewards)


def leave_one_out(rewards, group_ids, mask=None):
    """A_i = R_i - mean of the others in the group = n/(n-1) (R_i - mean). (RLOO, 2402.14740)

    0 in a group of one.
    """
    r, group, valid = _scores(rewards, group_ids, mask)
    out = (r - group.mean(r)) * group.size / (group.size - 1).clamp(min=1)
    return _finish(torch.where(group.equal(r), 0.0, out), valid, mask, rewards)


def reinforce_plus_plus(rewards, mask, group_ids=None, baseline=False, gamma=1.0, eps=1e-8):
    """A = (G - mean) / (std + eps), whitened over all valid tokens. (REINFORCE++, 2501.03262)

    baseline=False: G_t = reward-to-go of `rewards` ([B, T], typically `kl_shaped`, or [B]).
    baseline=True: G is the sequence's score minus its group's mean, the same on all its tokens;
    needs group_ids, and has no gamma. With a [B] mask the "tokens" are the sequences. Equal returns
    everywhere give 0.
    """
    if baseline != (group_ids is not None):
        raise ValueError(
            f"group_ids: expected with baseline=True and only then, got baseline={baseline}"
        )
    if baseline and gamma != 1.0:
        raise ValueError(f"gamma: baseline=True has no discount, got {gamma!r}; leave it 1.0")
    flat = isinstance(mask, Tensor) and mask.dim() == 1
    tokens = _token_mask(mask[:, None] if flat else mask)
    if baseline:
        r, group, valid = _scores(_token_rewards(rewards, tokens).sum(1), group_ids, tokens)
        score = torch.where(group.equal(r), 0.0, r - group.mean(r))
        returns = torch.where(tokens, score[:, None], 0.0)
    else:
        returns = _returns(rewards, tokens, gamma)
    values, flags = returns.reshape(-1), tokens.reshape(-1)
    batch = Groups(torch.zeros_like(flags, dtype=torch.int64), flags)
    out = torch.where(
        batch.equal(values), 0.0, (values - batch.mean(values)) / (batch.std(values) + eps)
    )
    out = torch.where(flags, out, 0.0).reshape(tokens.shape).to(result_dtype(rewards))
    return out[:, 0] if flat else out


def remax(rewards, greedy, mask=None):
    """A = R - R(greedy completion of the same prompt). (ReMax, 2310.10505)

    rewards [B] -> [B] (or [B, T] with such a mask); rewards [B, T] -> reward-to-go minus the
    baseline. greedy [B].
    """
    if isinstance(rewards, Tensor) and rewards.dim() == 2:
        tokens = _token_mask(mask)
        base = clean(greedy, _rows(tokens), "greedy")
        out = _returns(rewards, tokens, 1.0) - base[:, None]
        return torch.where(tokens, out, 0.0).to(result_dtype(rewards, greedy))
    valid = _valid(rewards, mask)
    out = clean(rewards, valid, "rewards") - clean(greedy, valid, "greedy")
    return _finish(out, valid, mask, rewards, greedy)


def opo(rewards, group_ids, lengths=None, mask=None):
    """A = R - sum_g(len R) / sum_g(len). (OPO, 2505.23585)

    The variance-optimal baseline when |score|^2 grows with the length. lengths [B] > 0, or the row
    sums of a [B, T] mask. A group of one, or of equal rewards, gives exactly 0.
    """
    r, group, valid = _scores(rewards, group_ids, mask)
    if lengths is None:
        if mask is None or mask.dim() != 2:
            raise ValueError("lengths: expected [B], or a mask [B, T] to count, got neither")
        lengths = as_mask(mask).sum(-1)
    n = clean(lengths, valid, "lengths")
    if n.device.type == "cpu" and bool((valid & (n <= 0)).any()):  # a GPU is not asked
        raise ValueError(f"lengths: expected more than 0, got {n[valid].min().item():g}")
    out = torch.where(group.equal(r), 0.0, r - group.sum(n * r) / group.sum(n))
    return _finish(out, valid, mask, rewards)


def rwr(rewards, group_ids, lam=1.0, mask=None):
    """A = n_g softmax_g(lam R): non-negative, mean 1; all-zero-reward groups are skipped (A = 0).

    The plug-in weights of reward-weighted regression to h e^{lam R} / Z, times the group size so
    that a token-mean keeps its scale; a constant added to a group's rewards changes nothing.
    `diagnostics.rwr_bias` has its optimism. A group of one has weight 1 (there is nothing to
    compare, but there is something to imitate).
    """
    _positive(lam, "lam", zero=True)
    r, group, valid = _scores(rewards, group_ids, mask)
    peak = group.max(r)
    e = torch.exp(lam * (r - peak))
    skipped = (peak == 0) & (group.min(r) == 0)
    return _finish(torch.where(skipped, 0.0, group.size * e / group.sum(e)), valid, mask, rewards)


def awr(rewards, values=None, mask=None, beta=1.0, cap=20.0):
    """A = min(exp((R - V) / beta), cap), capped in the exponent. (AWR, 1910.00177, alg. 1)

    rewards are returns ([B] or [B, T], e.g. `reward_to_go`), values of the same shape; None means
    rewards are advantages.
    """
    _positive(beta, "beta")
    _positive(cap, "cap", infinite=True)
    tokens = isinstance(rewards, Tensor) and rewards.dim() == 2
    valid = _token_mask(mask) if tokens else _valid(rewards, mask)
    gain = clean(rewards, valid, "rewards")
    if values is not None:
        gain = gain - clean(values, valid, "values")
    out = torch.exp((gain / beta).clamp(max=math.log(cap)))
    inputs = (rewards,) if values is None else (rewards, values)
    if tokens:
        return torch.where(valid, out, 0.0).to(result_dtype(*inputs))
    return _finish(out, valid, mask, *inputs)


def position(mask, dtype=torch.float32):
    """A_k = (K - k) / K at the k-th of K valid tokens, k = 0..K-1; [B, T].

    1 at the first, 1/K at the last. Forward KL between state-action occupancy measures instead of
    trajectories. (2403.12017, eq. 12)
    """
    mask = _token_mask(mask)
    total = mask.sum(-1, keepdim=True).double()
    rank = mask.cumsum(-1) - 1
    return torch.where(mask, (total - rank) / total, 0.0).to(dtype)


def kl_shaped(rewards, old_logps, ref_logps, mask, beta=0.05):
    """r_t = -beta (old_t - ref_t), plus R on the last valid token; [B, T].

    Token *rewards*, for `gae` or `reward_to_go`. rewards [B] (or [B, T], added token by token);
    old_logps, ref_logps [B, T]. (InstructGPT, 2203.02155, eq. 2)
    """
    mask = _token_mask(mask)
    ratio = clean(old_logps, mask, "old_logps") - clean(ref_logps, mask, "ref_logps")
    _positive(beta, "beta", zero=True)
    out = _token_rewards(rewards, mask) - beta * ratio
    return out.to(result_dtype(rewards, old_logps, ref_logps))


def adaptive_kl(beta, kl, target):
    """beta / 2 if kl < target / 1.5, 2 beta if kl > 1.5 target, else beta. (1707.06347, sec. 4)

    kl is the measured mean KL of the last update, a float or a one-element tensor (read once: a
    host sync). A float comes back. ValueError if kl is not finite, or beta or target not positive.
    """
    _positive(beta, "beta")
    _positive(target, "target")
    kl = float(kl)
    if not math.isfinite(kl):
        raise ValueError(
            f"kl: expected a finite number, got {kl}; the update before this one diverged"
        )
    return beta / 2 if kl < target / 1.5 else beta * 2 if kl > 1.5 * target else float(beta)


def optimal_token_baseline(rewards, group_ids, mask, old_logps, log_sum_p2, gamma=1.0):
    """A_t = G_t - sum_g(W_t G_t) / sum_g(W_t), W_t = sum_{j<=t} (1 - 2 p_j + sum_v p_v^2); [B, T].

    G is the reward-to-go. The sum runs over the group's sequences that still have a t-th valid
    token; one alone gives 0. p = exp(old_logps) and log_sum_p2 (a row statistic) are [B, T];
    rewards [B, T] or [B]. |1[y] - p|^2 = 1 - 2 p_y + sum p^2 is the squared length of the score
    with respect to the logits. (verl optimal_token_baseline)
    """
    mask = _token_mask(mask)
    place = places(mask)
    returns = compact(_returns(rewards, mask, gamma), place)
    p = torch.exp(clean(old_logps, mask, "old_logps"))
    score = 1 - 2 * p + torch.exp(clean(log_sum_p2, mask, "log_sum_p2"))
    score = torch.where(score.isfinite(), score.clamp(min=0), torch.nan)  # rounding gives -1e-17
    weight = compact(torch.where(mask, score, 0.0), place).cumsum(-1)
    alive = compact(mask.double(), place) > 0
    group = Groups(_group_index(group_ids, mask.shape[0]), alive)
    total = group.sum(weight)
    out = returns - group.sum(weight * returns) / total
    out = torch.where((group.equal(returns) & total.isfinite()) | (total == 0), 0.0, out)
    return expand(torch.where(alive, out, 0.0), place).to(
        result_dtype(rewards, old_logps, log_sum_p2)
    )


def astar_value(rewards, group_ids, beta1=0.5, mask=None):
    """V* = beta1 log mean_g exp(R / beta1) of each row's group; [B]. (A*-PO, 2505.20686)

    The optimal value of the KL-regularised problem. Estimated from reference samples, which need
    not be the rows that are trained on.
    """
    _positive(beta1, "beta1")
    r, group, valid = _scores(rewards, group_ids, mask)
    peak = group.max(r)
    out = peak + beta1 * torch.log(group.sum(torch.exp((r - peak) / beta1)) / group.size)
    return _finish(out, valid, mask, rewards)


def rso_pairs(rewards, group_ids, beta=0.5, num_samples=8, mask=None, generator=None):
    """Pairs of answers drawn from pi* ~ h e^{R/beta} by rejection. (RSO, 2309.06657, alg. 1)

    `num_samples` are drawn from a group, without replacement, and paired in order. Accepting one
    candidate at a time with probability exp((R - max R)/beta) and then removing it orders a group
    as `(R/beta + gumbel).argsort(descending)`: that is how it is drawn. The 1st and 2nd accepted
    are a pair, the 3rd and 4th, ...; ties are dropped. Returns `Pairs`, groups in ascending order
    of their ids. Host sync (the number of pairs). ValueError for a reward that is not finite.
    """
    _positive(beta, "beta")
    if type(num_samples) is not int or num_samples < 2 or num_samples % 2:
        raise ValueError(f"num_samples: expected an even int >= 2, got {num_samples!r}")
    r, group, valid = _scores(rewards, group_ids, mask)
    if not bool(r.isfinite().all()):
        row = int((~r.isfinite()).nonzero()[0])
        raise ValueError(
            f"rewards: expected finite numbers, got {float(r[row])} in row {row}; drop it with mask"
        )
    noise = torch.empty_like(r).exponential_(generator=generator).log().neg()
    order = torch.where(valid, r / beta + noise, -torch.inf).argsort(descending=True)
    order = order[group.index[order].argsort(stable=True)]
    index = group.index[order]
    first = torch.searchsorted(index, index)
    rank = torch.arange(index.numel(), device=index.device) - first
    even = (rank[:-1] % 2 == 0) & (rank[:-1] < num_samples) & (index[:-1] == index[1:])
    left, right = order[:-1][even], order[1:][even]
    better = torch.where(r[left] >= r[right], left, right)
    worse = torch.where(r[left] >= r[right], right, left)
    gap = r[better] - r[worse]
    keep = (gap > 0) & valid[better] & valid[worse]
    return Pairs(better[keep], worse[keep], gap[keep].to(result_dtype(rewards)))


def _token_mask(mask):
    mask = as_mask(mask)
    if mask.dim() != 2:
        raise ValueError(f"mask: expected [B, T], got shape {tuple(mask.shape)}")
    return mask


def _rows(tokens):
    return tokens.any(-1)


def _valid(rewards, mask):
    """[B] bool: which sequences count, from no mask, a [B] mask or a [B, T] mask."""
    if not isinstance(rewards, Tensor) or rewards.dim() != 1:
        got = tuple(rewards.shape) if isinstance(rewards, Tensor) else type(rewards).__name__
        raise ValueError(
            f"rewards: expected a tensor [B], got {got}; sum token rewards over each sequence first"
        )
    if mask is None:
        return torch.ones_like(rewards, dtype=torch.bool)
    if (
        not isinstance(mask, Tensor)
        or mask.dim() not in (1, 2)
        or mask.shape[0] != rewards.shape[0]
    ):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected [B] or [B, T] with B={rewards.shape[0]}, got {got}")
    mask = as_mask(mask)
    return _rows(mask) if mask.dim() == 2 else mask


def _group_index(group_ids, rows):
    index = dense_ids(group_ids)
    if index.shape != (rows,):
        raise ValueError(f"group_ids: expected shape {(rows,)}, got {tuple(index.shape)}")
    return index


def _scores(rewards, group_ids, mask):
    valid = _valid(rewards, mask)
    group = Groups(_group_index(group_ids, rewards.shape[0]), valid)
    return clean(rewards, valid, "rewards"), group, valid


def _finish(out, valid, mask, *inputs):
    out = torch.where(valid, out, 0.0).to(result_dtype(*inputs))
    if mask is not None and mask.dim() == 2:
        return torch.where(as_mask(mask), out[:, None], 0.0)
    return out


def _token_rewards(rewards, mask):
    """[B, T] float64 token rewards; [B] scores go to the last valid token."""
    if isinstance(rewards, Tensor) and rewards.dim() == 1:
        score = clean(rewards, _rows(mask), "rewards")
        last = mask & (mask.cumsum(-1) == mask.sum(-1, keepdim=True))
        return torch.where(last, score[:, None], 0.0)
    return clean(rewards, mask, "rewards")


def _returns(rewards, mask, gamma):
    """Reward-to-go in float64, [B, T]."""
    place = places(mask)
    tokens = compact(_token_rewards(rewards, mask), place)
    return expand(discounted_suffix(tokens, _unit(gamma, "gamma")), place)


def _unit(value, name):
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value!r}")
    return float(value)


def _positive(value, name, zero=False, infinite=False):
    if not (value > 0 or (zero and value == 0)) or (value == math.inf and not infinite):
        sign = "non-negative" if zero else "positive"
        raise ValueError(f"{name}: expected a {sign} finite number, got {value!r}")

"""advantages.*, token by token: plain loops over masks with holes, and the masking promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyoffline import advantages as adv

F64 = torch.float64
CHECK = settings(max_examples=60, deadline=None)


def mean(x):
    return sum(x) / len(x)


def std(x):
    return math.sqrt(sum((v - mean(x)) ** 2 for v in x) / (len(x) - 1)) if len(x) > 1 else 0.0


def close(got, want, rtol=1e-11, atol=1e-11):
    torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=rtol, atol=atol)


def sequences(mask, *arrays):
    """For each row the positions of its valid tokens."""
    return [[t for t, valid in enumerate(row) if valid] for row in mask.tolist()]


@st.composite
def token_batches(draw, count=4):
    """A mask with holes (also empty rows) and `count` random arrays, NaN and inf where masked."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    flags = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)
    mask = torch.tensor(draw(flags)).reshape(rows, width)
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    arrays = [torch.randn(rows, width, dtype=F64, generator=g) for _ in range(count)]
    return mask, arrays


def poison(x, mask, value):
    return torch.where(mask, x, torch.tensor(value, dtype=x.dtype))


@CHECK
@given(token_batches(2), st.sampled_from([0.0, 0.3, 0.95, 1.0]), st.sampled_from([0.0, 0.9, 1.0]))
def test_gae_is_the_naive_recursion(batch, gamma, lam):
    """Per sequence, over its valid tokens only: a hole is neither a step nor a value."""
    mask, (rewards, values) = batch
    want = torch.zeros_like(rewards).tolist()
    for b, valid in enumerate(sequences(mask)):
        running, following = 0.0, 0.0
        for t in reversed(valid):
            delta = float(rewards[b, t]) + gamma * following - float(values[b, t])
            running = delta + gamma * lam * running
            following = float(values[b, t])
            want[b][t] = running
    close(adv.gae(rewards, values, mask, gamma=gamma, lam=lam), want)


@CHECK
@given(token_batches(1), st.sampled_from([0.0, 0.5, 0.99, 1.0]), st.booleans())
def test_reward_to_go_is_the_double_loop(batch, gamma, scalar):
    """A [B] reward sits on the last valid token."""
    mask, (rewards,) = batch
    want = torch.zeros_like(rewards).tolist()
    for b, valid in enumerate(sequences(mask)):
        for i, t in enumerate(valid):
            steps = enumerate(valid[i:])
            want[b][t] = sum(
                gamma**k * (float(rewards[b, s]) if not scalar else float(s == valid[-1]) * (b + 1))
                for k, s in steps
            )
    scores = torch.arange(1, len(mask) + 1, dtype=F64)
    close(adv.reward_to_go(scores if scalar else rewards, mask, gamma), want)


def test_long_sequences_are_accurate():
    """T = 32,768: the doubling scan in float32 in/out is within one rounding of the exact sum."""
    rewards = torch.rand(2, 32768, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    got = adv.reward_to_go(rewards, mask)
    for b in range(2):
        exact = math.fsum(rewards[b].tolist())
        assert abs(float(got[b, 0]) - exact) <= exact * 2**-24
    discounted = adv.gae(rewards, torch.zeros_like(rewards), mask, gamma=0.999, lam=0.95)
    running = 0.0
    for r in reversed(rewards[0].tolist()):
        running = r + 0.999 * 0.95 * running
    assert abs(float(discounted[0, 0]) - running) <= abs(running) * 1e-7


@CHECK
@given(token_batches(4), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_are_never_read(batch, garbage):
    """Bitwise the same whatever they hold, 0 in the result, the inputs unwritten."""
    mask, arrays = batch
    ids = torch.arange(len(mask)) // 2
    calls = {
        "reward_to_go": lambda a, b, c, d: adv.reward_to_go(a, mask, 0.9),
        "gae": lambda a, b, c, d: adv.gae(a, b, mask, 0.9, 0.8),
        "kl_shaped": lambda a, b, c, d: adv.kl_shaped(a, b, c, mask, 0.1),
        "awr": lambda a, b, c, d: adv.awr(a, b, mask),
        "r++": lambda a, b, c, d: adv.reinforce_plus_plus(a, mask),
        "r++ base": lambda a, b, c, d: adv.reinforce_plus_plus(a, mask, ids, baseline=True),
        "remax": lambda a, b, c, d: adv.remax(a, torch.ones(len(mask)), mask),
        "otb": lambda a, b, c, d: adv.optimal_token_baseline(a, ids, mask, b, c),
    }
    dirty = [poison(x, mask, garbage) for x in arrays]
    copies = [x.clone() for x in dirty]
    clean = [poison(x, mask, 0.0) for x in arrays]
    for name, call in calls.items():
        got = call(*dirty)
        assert got.equal(call(*clean)), name
        assert bool((got[~mask] == 0).all()), name
    torch.testing.assert_close(dirty, copies, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["gae", "reward_to_go", "kl_shaped", "awr", "otb"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_token_stays_in_its_row(name, bad):
    mask = torch.ones(2, 3, dtype=torch.bool)
    x = torch.tensor([[0.1, -0.2, -0.3], [-0.1, bad, -0.4]])
    y = torch.tensor([[-1.0, -2.0, -0.3], [-0.4, -0.6, -0.8]])
    ids = torch.tensor([0, 1])
    call = {
        "gae": lambda x, y: adv.gae(y, x, mask[: len(x)]),
        "reward_to_go": lambda x, y: adv.reward_to_go(x, mask[: len(x)]),
        "kl_shaped": lambda x, y: adv.kl_shaped(y, x, y, mask[: len(x)]),
        "awr": lambda x, y: adv.awr(y, x, mask[: len(x)]),
        "otb": lambda x, y: adv.optimal_token_baseline(y, ids[: len(x)], mask[: len(x)], x, y),
    }[name]
    got = call(x, y)
    assert got[0].equal(call(x[:1], y[:1])[0])
    if (name, bad) == ("awr", math.inf):
        assert got[1, 1] == 0, "exp(-inf) is the true value"
    else:
        assert not bool(got[1, 1].isfinite())


@CHECK
@given(token_batches(1), st.booleans())
def test_reinforce_plus_plus(batch, baseline):
    """Whitened over all valid tokens of the batch."""
    mask, (rewards,) = batch
    ids = [b % 2 for b in range(len(mask))]
    rows = sequences(mask)
    returns = {}
    totals = [sum(float(rewards[b, t]) for t in valid) for b, valid in enumerate(rows)]
    for b, valid in enumerate(rows):
        mates = [totals[c] for c, v in enumerate(rows) if v and ids[c] == ids[b]]
        for i, t in enumerate(valid):
            to_go = sum(float(rewards[b, s]) for s in valid[i:])
            returns[b, t] = totals[b] - mean(mates) if baseline else to_go
    values = list(returns.values())
    want = torch.zeros_like(rewards).tolist()
    for (b, t), v in returns.items():
        if max(values) - min(values) > 1e-12:
            want[b][t] = (v - mean(values)) / (std(values) + 1e-8)
    kw = {"group_ids": torch.tensor(ids), "baseline": True} if baseline else {}
    close(adv.reinforce_plus_plus(rewards, mask, **kw), want, rtol=1e-6, atol=1e-6)


@CHECK
@given(token_batches(3))
def test_optimal_token_baseline(batch):
    """verl's formula, position by position, over the group's sequences that are still alive."""
    mask, (rewards, old, spare) = batch
    old = -old.abs()
    log_sum_p2 = torch.maximum(2 * old, -spare.abs() - 0.1)
    ids = [b % 2 for b in range(len(mask))]
    rows = sequences(mask)
    returns, energy = {}, {}
    for b, valid in enumerate(rows):
        total = 0.0
        for k, t in enumerate(valid):
            p = math.exp(old[b, t])
            total += max(0.0, 1 - 2 * p + math.exp(log_sum_p2[b, t]))
            energy[b, k] = total
            returns[b, k] = sum(float(rewards[b, s]) for s in valid[k:])
    want = torch.zeros_like(rewards).tolist()
    for b, valid in enumerate(rows):
        for k, t in enumerate(valid):
            mates = [c for c in range(len(mask)) if ids[c] == ids[b] and (c, k) in returns]
            den = sum(energy[c, k] for c in mates)
            base = sum(energy[c, k] * returns[c, k] for c in mates) / den if den else 0.0
            want[b][t] = returns[b, k] - base if len(mates) > 1 and den else 0.0
    got = adv.optimal_token_baseline(rewards, torch.tensor(ids), mask, old, log_sum_p2)
    close(got, want, rtol=1e-8, atol=1e-8)


@CHECK
@given(token_batches(3))
def test_kl_shaped_position_and_awr(batch):
    mask, (old, ref, returns) = batch
    scores = torch.arange(len(mask), dtype=F64) + 1
    shaped, where, weight = (torch.zeros_like(old).tolist() for _ in range(3))
    for b, valid in enumerate(sequences(mask)):
        for k, t in enumerate(valid):
            end = float(scores[b]) if t == valid[-1] else 0.0
            shaped[b][t] = -0.3 * (float(old[b, t]) - float(ref[b, t])) + end
            where[b][t] = (len(valid) - k) / len(valid)
            weight[b][t] = min(math.exp((float(returns[b, t]) - float(ref[b, t])) / 0.7), 2.5)
    close(adv.kl_shaped(scores, old, ref, mask, beta=0.3), shaped)
    close(adv.position(mask, dtype=F64), where)
    close(adv.awr(returns, ref, mask, beta=0.7, cap=2.5), weight)


def test_awr_does_not_overflow_and_takes_advantages():
    got = adv.awr(torch.tensor([1e30, -1e30, 0.0, math.nan]), beta=0.1)
    assert got[:3].tolist() == [pytest.approx(20.0), 0.0, 1.0] and bool(got[3].isnan())
    assert adv.awr(torch.tensor([1e30]), cap=math.inf).isinf()


def test_remax_subtracts_the_greedy_reward():
    mask = torch.tensor([[True, False, True], [False, False, False]])
    tokens = torch.tensor([[1.0, 9.0, 2.0], [9.0, 9.0, 9.0]])
    greedy = torch.tensor([0.5, math.nan])
    assert adv.remax(tokens, greedy, mask).tolist() == [[2.5, 0, 1.5], [0, 0, 0]]
    assert adv.remax(torch.tensor([3.0, 9.0]), greedy, mask).tolist() == [[2.5, 0, 2.5], [0, 0, 0]]
    assert adv.remax(torch.tensor([3.0, 1.0]), torch.tensor([1.0, 1.0])).tolist() == [2, 0]

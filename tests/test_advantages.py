"""advantages.* against plain-Python loops, the masking promises, and the degenerate groups."""

import inspect
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


@st.composite
def groups(draw):
    n = draw(st.integers(1, 8))
    ids = draw(st.lists(st.sampled_from([5, -7, 2**40]), min_size=n, max_size=n))
    score = st.one_of(st.sampled_from([0.0, 0.1, 1.0]), st.floats(-3, 3))
    rewards = draw(st.lists(score, min_size=n, max_size=n))
    return rewards, ids, [draw(st.integers(1, 9)) for _ in ids]


def grouped(fn, ids):
    """fn(i, members) per row, members being the row numbers of the group."""
    return [fn(i, [j for j, h in enumerate(ids) if h == g]) for i, g in enumerate(ids)]


def oracles(r, ids, lengths):
    """name -> (call, expected), each from its definition; equal rewards are 0 exactly."""
    t, g, n = torch.tensor(r, dtype=F64), torch.tensor(ids), torch.tensor(lengths)

    def of(fn):
        def one(i, rows):
            return fn(i, rows) if len({r[j] for j in rows}) > 1 else 0.0

        return grouped(one, ids)

    def weigh(i, rows):
        if all(r[j] == 0 for j in rows):
            return 0.0
        return len(rows) * math.exp(2 * r[i]) / sum(math.exp(2 * r[j]) for j in rows)

    def value(i, rows):
        return 0.5 * math.log(mean([math.exp(r[j] / 0.5) for j in rows]))

    def baseline(rows):
        return sum(lengths[j] * r[j] for j in rows) / sum(lengths[j] for j in rows)

    return {
        "grpo": (
            adv.group_normalize(t, g, eps=1e-4),
            of(lambda i, m: (r[i] - mean([r[j] for j in m])) / (std([r[j] for j in m]) + 1e-4)),
        ),
        "grpo batch": (
            adv.group_normalize(t, g, std="batch", eps=1e-4),
            of(lambda i, m: (r[i] - mean([r[j] for j in m])) / (std(r) + 1e-4)),
        ),
        "dr_grpo": (
            adv.group_normalize(t, g, std=None),
            of(lambda i, m: r[i] - mean([r[j] for j in m])),
        ),
        "rloo": (
            adv.leave_one_out(t, g),
            of(lambda i, m: r[i] - mean([r[j] for j in m if j != i])),
        ),
        "opo": (adv.opo(t, g, lengths=n), of(lambda i, m: r[i] - baseline(m))),
        "rwr": (adv.rwr(t, g, lam=2.0), grouped(weigh, ids)),
        "astar": (adv.astar_value(t, g, beta1=0.5), grouped(value, ids)),
    }


@CHECK
@given(groups())
def test_group_estimators_are_their_definitions(batch):
    for got, want in oracles(*batch).values():
        close(got, want, rtol=1e-8, atol=1e-8)


ESTIMATORS = {
    "grpo": adv.group_normalize,
    "grpo batch": lambda r, g, **k: adv.group_normalize(r, g, std="batch", **k),
    "grpo no std": lambda r, g, **k: adv.group_normalize(r, g, std=None, **k),
    "rloo": adv.leave_one_out,
    "opo": lambda r, g, **k: adv.opo(r, g, lengths=(r.nan_to_num().abs() + 1).ceil(), **k),
    "rwr": adv.rwr,
    "astar": adv.astar_value,
    "r++": lambda r, g, mask=None: adv.reinforce_plus_plus(
        r, torch.ones_like(r, dtype=torch.bool) if mask is None else mask, g, baseline=True
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
@CHECK
@given(batch=groups(), seed=st.integers(0, 999))
def test_groups_do_not_depend_on_order_or_names(name, batch, seed):
    rewards, ids, _ = batch
    r, g = torch.tensor(rewards, dtype=F64), torch.tensor(ids)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    renamed = (-3 * g + 17)[order]
    got = ESTIMATORS[name](r[order], renamed)
    torch.testing.assert_close(got, ESTIMATORS[name](r, g)[order], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
def test_masked_sequences_are_never_read(name, garbage):
    """Bitwise the batch without them, and 0 where masked; [B] and [B, T] masks agree."""
    r = torch.tensor([0.3, 1.0, 0.1, 0.7, 0.2, 1.5])
    g = torch.tensor([1, 2, 1, 2, 1, 9])
    keep = torch.tensor([True, True, False, True, True, False])
    got = ESTIMATORS[name](torch.where(keep, r, garbage), g, mask=keep)
    assert got[keep].equal(ESTIMATORS[name](r[keep], g[keep])) and bool((got[~keep] == 0).all())
    tokens = keep[:, None] & torch.tensor([True, False, True])
    spread = ESTIMATORS[name](torch.where(keep, r, garbage), g, mask=tokens)
    assert spread.shape == tokens.shape and bool((spread[~tokens] == 0).all())
    if name != "r++":  # whitened over tokens there, so the statistic is another one
        assert spread[:, 0].equal(got)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_reward_stays_visible_in_its_group(name, bad):
    r, g = torch.tensor([0.3, bad, 0.1, 0.7]), torch.tensor([1, 1, 2, 2])
    got = ESTIMATORS[name](r, g)
    assert not bool(got[1].isfinite())
    if name not in ("grpo batch", "r++"):  # those divide by the standard deviation of the batch
        assert got[2:].equal(ESTIMATORS[name](r[2:], g[2:]))
    alone = ESTIMATORS[name](torch.tensor([bad]), torch.tensor([0]))
    assert not bool(alone.isfinite()), "a group of one hides nothing"


@pytest.mark.parametrize("name", [n for n in ESTIMATORS if n not in ("rwr", "astar")])
@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e9 + 0.3, -2.0])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_nothing_to_compare_gives_exactly_zero(name, value, size):
    """0.1 three times has a mean one ulp off: divided by std + eps that would be visible."""
    got = ESTIMATORS[name](
        torch.full((size,), value, dtype=F64), torch.zeros(size, dtype=torch.int)
    )
    assert got.eq(0).all()


@pytest.mark.parametrize("shift", [-1e6, -3.0, 0.5, 1e3])
def test_rwr_is_invariant_to_a_shift_and_convex(shift):
    """The seed's two properties: no constant matters, the weights are convex (times the size)."""
    r = torch.tensor([0.0, 1.0, 2.0, 0.25, 0.5], dtype=F64)
    g = torch.tensor([4, 4, 4, 1, 1])
    got = adv.rwr(r, g, lam=3.0)
    torch.testing.assert_close(adv.rwr(r + shift, g, lam=3.0), got, rtol=1e-8, atol=0)
    assert bool((got >= 0).all()) and abs(float(got[:3].sum()) - 3) < 1e-12
    huge = adv.rwr(r * 1e6, g, lam=1e3)
    assert huge.tolist() == [0, 0, 3, 0, 2], "no overflow: the best takes all"


def test_rwr_skips_zero_reward_groups_only():
    r, g = torch.tensor([0.0, 0.0, 1.0, 1.0, -1.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    got = adv.rwr(r, g)
    assert got[:4].tolist() == [0, 0, 1, 1] and bool((got[4:] > 0).all())


@pytest.mark.parametrize(
    ("kl", "want", "why"),
    [
        (0.0, 1.0, "far below"),
        (0.0099, 1.0, "just below target / 1.5"),
        (0.0101, 2.0, "inside"),
        (0.0224, 2.0, "inside"),
        (0.0226, 4.0, "just above 1.5 target"),
        (-1.0, 1.0, "a k1 estimate may be negative"),
        (torch.tensor([9.0]), 4.0, "a tensor"),
    ],
)
def test_adaptive_kl(kl, want, why):
    assert adv.adaptive_kl(2.0, kl, target=0.015) == want, why


def test_rso_first_acceptance_is_softmax():
    """4,000 groups in one call: the first pair is softmax without replacement, to 4 sigma."""
    r, beta, n = [0.0, 0.3, 1.0], 0.5, 4000
    rewards = torch.tensor(r * n, dtype=F64)
    ids = torch.arange(n).repeat_interleave(3)
    got = adv.rso_pairs(
        rewards, ids, beta=beta, num_samples=2, generator=torch.Generator().manual_seed(0)
    )
    assert len(got.chosen) == n and bool((ids[got.chosen] == ids[got.rejected]).all())
    e = [math.exp(x / beta) for x in r]
    for i in range(3):
        for j in range(i):
            both = e[i] / sum(e) * e[j] / (sum(e) - e[i]) + e[j] / sum(e) * e[i] / (sum(e) - e[j])
            seen = ((got.chosen % 3 == i) & (got.rejected % 3 == j)).double().mean()
            assert abs(float(seen) - both) < 4 * math.sqrt(both * (1 - both) / n), (i, j)
    assert got.gap.equal(rewards[got.chosen] - rewards[got.rejected])


def test_rso_pairs_respect_masks_ties_and_group_sizes():
    """Ties, groups of one and masked rows make no pair; no row is used twice."""
    r = torch.tensor([1.0, 1.0, 5.0, math.nan, 0.0, 1.0, 2.0, 3.0])
    g = torch.tensor([3, 3, 1, 0, 0, 0, 0, 0])
    keep = ~r.isnan()
    for seed in range(20):
        got = adv.rso_pairs(
            r, g, num_samples=4, mask=keep, generator=torch.Generator().manual_seed(seed)
        )
        used = torch.cat([got.chosen, got.rejected])
        assert len(got.chosen) == 2 and used.unique().numel() == 4 and bool((used >= 4).all())
    with pytest.raises(ValueError, match="row 3"):
        adv.rso_pairs(r, g)
    assert len(adv.rso_pairs(r[:0], g[:0]).chosen) == 0


TOKENS = torch.ones(2, 3, dtype=torch.bool)
R2, G2 = torch.zeros(2), torch.zeros(2, dtype=torch.int64)
ERRORS = [
    (lambda: adv.remax([1.0], R2), ValueError, "rewards: expected a tensor"),
    (lambda: adv.awr([1.0]), ValueError, "rewards: expected a tensor"),
    (lambda: adv.reward_to_go(R2, TOKENS, gamma=1.1), ValueError, "gamma"),
    (lambda: adv.reward_to_go(torch.zeros(2, 4), TOKENS), ValueError, "(2, 3), got (2, 4)"),
    (lambda: adv.reward_to_go(R2, TOKENS[0]), ValueError, "[B, T]"),
    (lambda: adv.reward_to_go(R2, None), TypeError, "mask"),
    (lambda: adv.gae(R2, R2, TOKENS), ValueError, "values"),
    (lambda: adv.gae([1.0], TOKENS.float(), TOKENS), TypeError, "rewards"),
    (lambda: adv.group_normalize(R2, G2, std="groups"), ValueError, '"batch"'),
    (lambda: adv.group_normalize(R2, G2, eps=-1), ValueError, "eps"),
    (lambda: adv.group_normalize(R2, G2[:1]), ValueError, "group_ids"),
    (lambda: adv.group_normalize(R2, R2), TypeError, "integer"),
    (lambda: adv.group_normalize(torch.zeros(2, 3), G2), ValueError, "sum token rewards"),
    (lambda: adv.group_normalize(R2, G2, mask=TOKENS[:1]), ValueError, "B=2"),
    (lambda: adv.opo(R2, G2), ValueError, "lengths"),
    (lambda: adv.opo(R2, G2, lengths=torch.tensor([3, 0])), ValueError, "more than 0, got 0"),
    (lambda: adv.rwr(R2, G2, lam=math.inf), ValueError, "lam"),
    (lambda: adv.awr(R2, beta=0), ValueError, "beta"),
    (lambda: adv.reinforce_plus_plus(R2, TOKENS, G2), ValueError, "baseline"),
    (lambda: adv.reinforce_plus_plus(R2, TOKENS, baseline=True), ValueError, "group_ids"),
    (lambda: adv.reinforce_plus_plus(R2, TOKENS, G2, True, 0.9), ValueError, "gamma"),
    (lambda: adv.adaptive_kl(0.1, math.nan, 0.01), ValueError, "finite"),
    (lambda: adv.astar_value(R2, G2, beta1=0.0), ValueError, "beta1"),
    (lambda: adv.rso_pairs(R2, G2, num_samples=3), ValueError, "even"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_dtypes_gradients_and_empty_batches():
    """float64 only for float64 in; integer and bool rewards are fine; nothing is differentiable."""
    for dtype, want in [(F64, F64), (torch.float16, torch.float32), (torch.int64, torch.float32)]:
        r = torch.tensor([1, 0, 1], dtype=dtype)
        g = torch.tensor([1, 1, 1], dtype=torch.int32)
        assert all(fn(r, g).dtype == want for name, fn in ESTIMATORS.items())
    values = torch.zeros(2, 3, requires_grad=True)
    assert not adv.gae(R2, values, TOKENS).requires_grad
    none = torch.zeros(0, dtype=torch.int64)
    assert all(fn(torch.zeros(0), none).shape == (0,) for fn in ESTIMATORS.values())
    for shape in [(0, 3), (2, 0)]:
        mask, x = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
        assert adv.gae(x, x, mask).shape == adv.reward_to_go(x, mask).shape == shape
        ids = torch.zeros(shape[0], dtype=torch.int64)
        assert adv.optimal_token_baseline(x, ids, mask, x, x).shape == shape


def test_no_host_sync():
    """On the meta device every read-back raises (rso_pairs and adaptive_kl say that they sync)."""
    r, x = torch.zeros(2, device="meta"), torch.zeros(2, 3, device="meta")
    g, mask = r.long(), x.bool()
    calls = [fn(r, g) for fn in ESTIMATORS.values()]
    calls += [fn(r, g, mask=mask) for fn in ESTIMATORS.values()]
    calls += [adv.gae(x, x, mask), adv.reward_to_go(r, mask), adv.kl_shaped(r, x, x, mask)]
    calls += [adv.position(mask), adv.awr(x, x, mask), adv.remax(r, r), adv.remax(x, r, mask)]
    calls += [adv.reinforce_plus_plus(x, mask), adv.optimal_token_baseline(x, g, mask, x, x)]
    assert all(call.device.type == "meta" for call in calls)


def test_signatures_stay_small():
    """At most 7 parameters and one bool (STYLE 3)."""
    public = [f for n, f in vars(adv).items() if inspect.isfunction(f) and n[0] != "_"]
    for fn in (f for f in public if f.__module__ == adv.__name__):
        parameters = inspect.signature(fn).parameters.values()
        assert len(parameters) <= 7, fn
        assert sum(isinstance(p.default, bool) for p in parameters) <= 1, fn

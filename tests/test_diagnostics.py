"""diagnostics.* against loops, exact enumeration and simulation."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyoffline import diagnostics as dg

F64 = torch.float64
CHECK = settings(max_examples=60, deadline=None)


@st.composite
def batches(draw):
    n = draw(st.integers(1, 12))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    logps, old, advantages = (torch.randn(n, dtype=F64, generator=g) for _ in range(3))
    return logps, old, advantages.round(), mask


def mean(x):
    return math.fsum(x) / len(x) if x else 0.0


def loop_metrics(logps, old, advantages, mask, lo, hi):
    """Every metric of ratio_metrics from its definition; all 0 on an empty mask."""
    rows = zip(logps.tolist(), old.tolist(), advantages.tolist(), mask.tolist(), strict=True)
    data = [(x - y, a) for x, y, a, m in rows if m]
    d, w = [x for x, _ in data], [math.exp(x) for x, _ in data]
    n, center = len(d), mean(w)
    low, high = [x < 1 - lo for x in w], [x > 1 + hi for x in w]
    acts_low = [x and a < 0 for x, (_, a) in zip(low, data, strict=True)]
    acts_high = [x and a > 0 for x, (_, a) in zip(high, data, strict=True)]
    return {
        "kl": mean([-x for x in d]),
        "k2_kl": mean([x * x / 2 for x in d]),
        "k3_kl": mean([math.exp(x) - 1 - x for x in d]),
        "chi2_token": mean([x * x for x in w]) - (1 if n else 0),
        "log_ratio_min": min(d, default=0),
        "log_ratio_mean": mean(d),
        "log_ratio_max": max(d, default=0),
        "rollout_is_min": min(w, default=0),
        "rollout_is_mean": center,
        "rollout_is_max": max(w, default=0),
        "rollout_is_std": math.sqrt(sum((x - center) ** 2 for x in w) / (n - 1)) if n > 1 else 0,
        "rollout_is_eff_sample_size": 1 / mean([(x / center) ** 2 for x in w]) if n else 0,
        "is_masked": mean([x or y for x, y in zip(low, high, strict=True)]),
        "is_masked_low": mean(low),
        "is_masked_high": mean(high),
        "clip_ratio/low_mean": mean(acts_low),
        "clip_ratio/high_mean": mean(acts_high),
        "clip_ratio/region_mean": mean([x or y for x, y in zip(acts_low, acts_high, strict=True)]),
        "non_finite": 0,
        "num_tokens": n,
    }


@CHECK
@given(batches(), st.sampled_from([(0.2, 0.2), (0.0, 0.28), (0.9, 3.0)]))
def test_ratio_metrics_are_their_definitions(batch, clip):
    got = dg.ratio_metrics(*batch[:2], batch[3], batch[2], *clip)
    want = loop_metrics(*batch, *clip)
    assert got.keys() == want.keys()
    for name, value in got.items():
        assert value.shape == (), name
        assert float(value) == pytest.approx(want[name], rel=1e-10, abs=1e-12), name


@CHECK
@given(batches())
def test_single_functions_agree_with_the_dict(batch):
    logps, old, advantages, mask = batch
    d, m = logps - old, dg.ratio_metrics(logps, old, mask, advantages)
    singles = {
        "kl": dg.k1(old, logps, mask),
        "k2_kl": dg.k2(old, logps, mask),
        "k3_kl": dg.k3(old, logps, mask),
        "chi2_token": dg.chi2(d, mask),
        "rollout_is_eff_sample_size": dg.effective_sample_size(d, mask),
        "is_masked": dg.clip_fractions(d, mask).region,
        "clip_ratio/low_mean": dg.clip_fractions(d, mask, advantages=advantages).low,
    }
    for name, value in singles.items():
        torch.testing.assert_close(value, m[name], rtol=1e-12, atol=1e-15)
    assert "clip_ratio/low_mean" not in dg.ratio_metrics(logps, old, mask)
    factors = (d.abs() < 0.5).double()
    valid = [f for f, k in zip(factors.tolist(), mask.tolist(), strict=True) if k]
    assert float(dg.masked_fraction(factors, mask)) == pytest.approx(mean([f == 0 for f in valid]))


@CHECK
@given(batches(), st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_are_never_read(batch, garbage):
    logps, old, advantages, mask = batch
    clean = dg.ratio_metrics(logps, old, mask, advantages)
    dirty = dg.ratio_metrics(
        *(torch.where(mask, x, garbage) for x in (logps, old)), mask, advantages
    )
    assert all(dirty[k].equal(v) for k, v in clean.items())
    f, w = torch.where(mask, advantages, garbage), torch.where(mask, logps, garbage)
    assert dg.is_variance(w, f, mask).equal(dg.is_variance(logps, advantages, mask))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_log_ratio_is_counted_and_seen(bad):
    logps = torch.tensor([0.1, bad, -0.2])
    got = dg.ratio_metrics(logps, torch.zeros(3), torch.ones(3, dtype=torch.bool))
    assert int(got["non_finite"]) == 1
    assert not bool(got["kl"].isfinite()) and not bool(got["k3_kl"].isfinite())
    assert not bool((got["log_ratio_min"] + got["log_ratio_max"]).isfinite()), "min/max keep NaN"
    if bad == math.inf:
        assert float(got["k3_kl"]) == math.inf, "the limit, not inf - inf"
    if bad == -math.inf:
        assert float(got["k3_kl"]) == math.inf and float(got["rollout_is_min"]) == 0


def test_raw_ratios_are_not_clamped():
    """verl clamps log-ratios to +-20 before it reports them: drift beyond is invisible there."""
    got = dg.ratio_metrics(torch.tensor([50.0]), torch.zeros(1), torch.ones(1, dtype=torch.bool))
    assert float(got["log_ratio_max"]) == 50
    assert float(got["rollout_is_max"]) == pytest.approx(math.exp(50), rel=1e-6)


ESS = [
    ([0.0] * 4, 1.0, "equal weights: every sample counts"),
    ([800.0] * 4, 1.0, "a common factor cancels, beyond exp's range"),
    ([-9000.0, -9000.0, -1e30, -1e30], 0.5, "half of the samples carry everything"),
    ([0.0, -1e30, -1e30, -1e30], 0.25, "one of four"),
]


@pytest.mark.parametrize(("log_ratio", "want", "why"), ESS)
def test_effective_sample_size_in_log_space(log_ratio, want, why):
    d = torch.tensor(log_ratio)
    got = dg.effective_sample_size(d, torch.ones(4, dtype=torch.bool))
    assert float(got) == pytest.approx(want, rel=1e-6), why


def test_kl_estimators_and_chi2_on_an_enumerated_pair():
    """Expectations taken exactly: rows repeated in proportion to pi, against the closed forms."""
    pi, other = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    rows = [i for i, p in enumerate(pi) for _ in range(int(p * 4))]
    lp = torch.tensor([math.log(pi[i]) for i in rows], dtype=F64)
    lo = torch.tensor([math.log(other[i]) for i in rows], dtype=F64)
    mask = torch.ones(4, dtype=torch.bool)
    kl = sum(p * math.log(p / q) for p, q in zip(pi, other, strict=True))
    assert float(dg.k1(lp, lo, mask)) == pytest.approx(kl, abs=1e-15)
    assert float(dg.k3(lp, lo, mask)) == pytest.approx(kl, abs=1e-15)
    chi2 = sum(q * q / p for p, q in zip(pi, other, strict=True)) - 1
    assert float(dg.chi2(lo - lp, mask)) == pytest.approx(chi2, abs=1e-15)


def test_is_variance_is_the_textbook_formula():
    """Var_mu[f pi/mu] = E_pi[f^2 pi/mu] - (E_pi f)^2, mu enumerated; unbiased, so times n/(n-1)."""
    mu, pi, f = [0.5, 0.25, 0.25], [0.1, 0.3, 0.6], [1.0, -2.0, 3.0]
    rows = [i for i, p in enumerate(mu) for _ in range(int(p * 4))]
    log_w = torch.tensor([math.log(pi[i] / mu[i]) for i in rows], dtype=F64)
    values = torch.tensor([f[i] for i in rows], dtype=F64)
    exact = sum(p * x * x * p / q for p, q, x in zip(pi, mu, f, strict=True))
    exact -= sum(p * x for p, x in zip(pi, f, strict=True)) ** 2
    got = dg.is_variance(log_w, values, torch.ones(4, dtype=torch.bool))
    assert float(got) == pytest.approx(exact * 4 / 3, rel=1e-12)
    zero = dg.is_variance(torch.tensor([800.0, 0.0]), torch.zeros(2), torch.ones(2).int())
    assert float(zero) == 0, "0 times an infinite ratio is 0"


@pytest.mark.parametrize(("n", "lam"), [(16, 0.7), (64, 0.7), (64, 1.2)])
def test_rwr_bias_predicts_a_simulation(n, lam):
    """Average RWR weight per response over many groups of n, one noisy Gaussian reward each.

    log(simulated / exact) against `total`: tolerance 4 standard errors of the simulation plus the
    neglected second order, 3 (E w^2 / n)^2, with E w^2 the second moment of the noisy weights.
    """
    means, sds = [0.0, 0.5, 1.0, 1.0], [1.0, 0.2, 0.0, 0.8]
    k, trials = len(means), 60_000
    g = torch.Generator().manual_seed(n)
    drawn = torch.randint(k, (trials, n), generator=g)
    m, s = torch.tensor(means, dtype=F64), torch.tensor(sds, dtype=F64)
    r = m[drawn] + s[drawn] * torch.randn(trials, n, dtype=F64, generator=g)
    weight = n * (lam * r).softmax(1)
    z = mean([math.exp(lam * x) for x in means])
    ids = torch.zeros(k, dtype=torch.int64)
    bias = dg.rwr_bias(m, s**2, ids, lam=lam, num_samples=n)
    noisy = lam * r - (lam * r).exp().mean().log()
    second = 3 * (float((2 * noisy).exp().mean()) / n) ** 2
    without = {"finite_sample": 0, "optimism": 0, "normalizer": 0}
    for y in range(k):
        chosen = weight[drawn == y]
        simulated = math.log(float(chosen.mean()) / (math.exp(lam * means[y]) / z))
        sigma = float(chosen.std() / chosen.mean()) / math.sqrt(chosen.numel())
        error, tolerance = simulated - float(bias.total[y]), 4 * sigma + second
        assert abs(error) < tolerance, (y, simulated)
        for term in without:
            without[term] += abs(error + float(getattr(bias, term)[y])) > tolerance
        assert float(bias.optimism[y]) == pytest.approx(lam**2 / 2 * sds[y] ** 2, abs=1e-15)
    assert all(without.values()), "each of the three terms is needed to agree"


def test_rwr_bias_vanishes_where_it_should():
    """Deterministic rewards have no optimism; a constant noise cancels in Z; 1/N falls as 1/N."""
    r, ids = torch.tensor([0.0, 1.0, 5.0], dtype=F64), torch.tensor([2, 2, 1])
    none = dg.rwr_bias(r, torch.zeros(3, dtype=F64), ids)
    assert none.optimism.eq(0).all() and none.normalizer.abs().max() < 1e-15
    same = dg.rwr_bias(r, torch.full((3,), 0.4, dtype=F64), ids, num_samples=10**9)
    assert same.total.abs().max() < 1e-8
    few, many = (dg.rwr_bias(r, r, ids, num_samples=k).finite_sample for k in (10, 1000))
    torch.testing.assert_close(few, many * 100)


def tree(lam):
    """Every completion of length 3 over two symbols: h, reward, and pi* ~ h e^{lam r}."""
    g = torch.Generator().manual_seed(5)
    step = {}
    leaves = list(itertools.product((0, 1), repeat=3))
    for t in range(3):
        for prefix in itertools.product((0, 1), repeat=t):
            p = float(torch.rand((), generator=g) * 0.8 + 0.1)
            step[prefix] = (p, 1 - p)
    h = {y: math.prod(step[y[:t]][y[t]] for t in range(3)) for y in leaves}
    r = {y: float(torch.randn((), generator=g)) for y in leaves}
    z = sum(h[y] * math.exp(lam * r[y]) for y in leaves)
    return leaves, h, r, {y: h[y] * math.exp(lam * r[y]) / z for y in leaves}


@pytest.mark.parametrize("depth", [0, 1, 2, 3])
@pytest.mark.parametrize("lam", [0.5, 3.0])
def test_prefix_ratio_by_exact_enumeration(depth, lam):
    """log of (sum of pi* over the leaves below) / (the same of h): sums of probabilities only."""
    leaves, h, r, star = tree(lam)
    prefixes = sorted({y[:depth] for y in leaves})
    got = dg.prefix_ratio(
        torch.tensor([r[y] for y in leaves], dtype=F64),
        torch.tensor([prefixes.index(y[:depth]) for y in leaves]),
        torch.full((8,), 3),
        lam=lam,
        log_weights=torch.tensor([math.log(h[y]) for y in leaves], dtype=F64),
    )
    for i, y in enumerate(leaves):
        below = [x for x in leaves if x[:depth] == y[:depth]]
        want = math.log(sum(star[x] for x in below) / sum(h[x] for x in below))
        assert float(got[i]) == pytest.approx(want, abs=1e-12)


def test_prefix_ratio_groups_shift_and_scale():
    """Prefix numbers are per prompt; a reward shift cancels; nothing overflows at lam r = 1e6."""
    r = torch.tensor([0.0, 1.0, 2.0, 3.0, 9.0, 9.0], dtype=F64)
    prefix, prompt = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor([7, 7, 7, 7, -1, -1])
    got = dg.prefix_ratio(r, prefix, prompt)
    numerators = [math.log(mean([1, math.e])), math.log(mean([math.e**2, math.e**3]))]
    assert float(got[2] - got[0]) == pytest.approx(numerators[1] - numerators[0])
    assert got[4:].abs().max() < 1e-15, "the other prompt's prefixes are its own"
    torch.testing.assert_close(dg.prefix_ratio(r + 100, prefix, prompt), got)
    assert bool(dg.prefix_ratio(r, prefix, prompt, lam=1e6).isfinite().all())


X = torch.zeros(3)
KEEP = torch.ones(3, dtype=torch.bool)
IDS = torch.zeros(3, dtype=torch.int64)
ERRORS = [
    (lambda: dg.ratio_metrics(X, X[:2], KEEP), ValueError, "(3,), got (2,)"),
    (lambda: dg.ratio_metrics(X, X, X), TypeError, "mask.bool"),
    (lambda: dg.ratio_metrics(X, X, KEEP, clip_low=-0.1), ValueError, "clip_low"),
    (lambda: dg.ratio_metrics(X, X, KEEP, X[:1]), ValueError, "advantages"),
    (lambda: dg.prefix_ratio(X, IDS, IDS[:2]), ValueError, "group_ids"),
    (lambda: dg.prefix_ratio(X, X, IDS), TypeError, "prefix_ids"),
    (lambda: dg.rwr_bias(X, X, IDS[:2]), ValueError, "expected [B]"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


def test_no_host_sync_no_gradient_and_empty_inputs():
    """Meta tensors raise on any read-back; live log-probs may be passed, no graph is kept."""
    live = torch.zeros(2, 3, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for value in dg.ratio_metrics(live, live.detach(), mask, live).values():
        assert not value.requires_grad
    meta = torch.zeros(2, 3, device="meta")
    for value in dg.ratio_metrics(meta, meta, meta.bool(), meta).values():
        assert value.shape == () and value.device.type == "meta"
    assert dg.is_variance(meta, meta, meta.bool()).device.type == "meta"
    for empty in (
        dg.ratio_metrics(X, X, ~KEEP, X),
        dg.ratio_metrics(X[:0], X[:0], KEEP[:0], X[:0]),
    ):
        assert all(float(v) == 0 for v in empty.values())
        assert empty["kl"].dtype == torch.float32

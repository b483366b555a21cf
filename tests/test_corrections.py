"""corrections.* against plain-Python loops in float64; masking, overflow, NaN and ties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyoffline import corrections

F64 = torch.float64
CHECK = settings(max_examples=60, deadline=None)
LEVELS = ("token", "sequence", "sequence-mean")


def loop_ratios(old, mu, mask, level):
    """The ratio every valid token is judged by; None where masked."""
    out = []
    for o, m, keep in zip(old.tolist(), mu.tolist(), mask.tolist(), strict=True):
        d = [a - b if k else None for a, b, k in zip(o, m, keep, strict=True)]
        valid = [x for x in d if x is not None]
        whole = math.fsum(valid) / (len(valid) if level == "sequence-mean" else 1) if valid else 0
        out.append([None if x is None else math.exp(x if level == "token" else whole) for x in d])
    return out


def normalized(rows, level):
    """Divided by the mean over valid tokens, or over the means of the sequences."""
    kept = [[x for x in row if x is not None] for row in rows]
    units = sum(kept, []) if level == "token" else [sum(r) / len(r) for r in kept if r]
    mean = sum(units) / len(units) if units else 0.0
    return [[None if x is None else x / mean if mean else 0.0 for x in row] for row in rows]


@st.composite
def batches(draw):
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    flags = st.lists(st.booleans(), min_size=rows * width, max_size=rows * width)
    mask = torch.tensor(draw(flags)).reshape(rows, width)
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    old, mu = (torch.randn(rows, width, dtype=F64, generator=g) for _ in range(2))
    return old, mu, mask


BOUNDS = [
    (0.0, 2.0, "TIS and MIS: an upper bound"),
    (0.5, 5.0, "IcePop: both sides"),
    (0.0, math.inf, "no bound at all: plain importance weights"),
    (1.0, 1.0, "only exact on-policy tokens survive a mask"),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("low", "high", "why"), BOUNDS)
@CHECK
@given(batch=batches(), normalize=st.booleans())
def test_truncate_and_mask(level, low, high, why, batch, normalize):
    old, mu, mask = batch
    ratios = loop_ratios(old, mu, mask, level)
    rules = {
        corrections.truncate: lambda w: min(max(w, low), high),
        corrections.mask: lambda w: w if low <= w <= high else 0.0,
    }
    for fn, rule in rules.items():
        want = [[None if w is None else rule(w) for w in row] for row in ratios]
        want = normalized(want, level) if normalize else want
        want = [[0.0 if w is None else w for w in row] for row in want]
        got = fn(old, mu, mask, level, low, high, batch_normalize=normalize)
        torch.testing.assert_close(got, torch.tensor(want, dtype=F64), rtol=1e-12, atol=0)


@CHECK
@given(batches(), st.sampled_from([0.01, 0.3, 1.0, 100.0]))
def test_m2po_drops_the_largest_until_the_mean_is_below(batch, tau):
    """Drop one by one, from the largest, as long as the mean is not below tau."""
    old, mu, mask = batch
    valid = [tuple(x) for x in mask.nonzero().tolist()]
    kept = sorted(valid, key=lambda i: (float(old[i]) - float(mu[i])) ** 2)
    while kept and math.fsum((float(old[i]) - float(mu[i])) ** 2 for i in kept) / len(kept) >= tau:
        kept.pop()
    want = torch.zeros_like(old)
    for i in kept:
        want[i] = 1.0
    assert corrections.m2po(old, mu, mask, tau).equal(want)


def test_m2po_ties_go_together():
    """Half-precision log-probs tie often; which one goes must not depend on the order."""
    d = torch.tensor([0.1] * 10 + [-math.sqrt(0.1)] * 10, dtype=F64)
    mask = torch.ones(20, dtype=torch.bool)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    got = corrections.m2po(d, torch.zeros_like(d), mask, tau=0.04)
    assert got.sum() == 10 and got[:10].eq(1).all()
    assert corrections.m2po(d[order], torch.zeros_like(d), mask, 0.04).equal(got[order])


CALLS = {
    "truncate": corrections.truncate,
    "mask": corrections.mask,
    "truncate seq": lambda o, m, k: corrections.truncate(o, m, k, "sequence"),
    "mask mean": lambda o, m, k: corrections.mask(o, m, k, "sequence-mean", 0.5, 2.0),
    "normalized": lambda o, m, k: corrections.mask(o, m, k, batch_normalize=True),
    "normalized seq": lambda o, m, k: corrections.truncate(o, m, k, "sequence", 0, 2, True),
    "m2po": corrections.m2po,
}


@pytest.mark.parametrize("name", CALLS)
@CHECK
@given(batch=batches(), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e30]))
def test_masked_tokens_are_never_read(name, batch, garbage):
    old, mu, mask = batch
    clean = CALLS[name](old * mask, mu * mask, mask)
    dirty = CALLS[name](torch.where(mask, old, garbage), torch.where(mask, mu, garbage), mask)
    assert dirty.equal(clean) and bool((dirty[~mask] == 0).all())


@pytest.mark.parametrize("name", CALLS)
def test_nan_at_a_valid_token_stays_visible(name):
    """At its token, or its sequence; the other sequences are bitwise what they were."""
    old = torch.tensor([[-0.1, -0.2, -0.3], [-0.4, math.nan, -0.6]])
    mu = torch.tensor([[-0.2, -0.2, -0.2], [-0.2, -0.2, -0.2]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    got = CALLS[name](old, mu, mask)
    assert bool(got[1, 1].isnan())
    if "normalized" not in name and name != "m2po":  # those are statistics of the batch
        assert got[0].equal(CALLS[name](old[:1], mu[:1], mask[:1])[0])
    if name == "m2po":
        assert bool(got[0].isfinite().all()), "the NaN takes no part in the mean"
        kept = corrections.m2po(old, mu, mask, tau=1.0)[~old.isnan()]
        assert bool((kept == 1).all()), "nor does it drop what is below tau"


@pytest.mark.parametrize("d", [-1e30, -700.0, -100.0, 100.0, 700.0, 1e30, math.inf, -math.inf])
@pytest.mark.parametrize("level", LEVELS)
def test_extreme_ratios(d, level):
    """The true value of the bound, never NaN: a clamp is not a product."""
    old, mu, mask = torch.tensor([[d, 0.0]]), torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    got = corrections.truncate(old, mu, mask, level, low=0.25, high=4.0)
    assert got[0, 0] == (4.0 if d > 0 else 0.25)
    assert corrections.mask(old, mu, mask, level, low=0.25, high=4.0)[0, 0] == 0
    if d > 0:
        assert corrections.truncate(old, mu, mask, level, high=math.inf)[0, 0] > 1e20


def test_sequence_ratio_is_a_product_not_a_sum_of_exponentials():
    old, mu = torch.full((1, 400), -2.0), torch.full((1, 400), -1.0)
    mask = torch.ones(1, 400, dtype=torch.bool)
    low = corrections.truncate(old.double(), mu.double(), mask, "sequence")
    torch.testing.assert_close(low[0, 0], torch.tensor(math.exp(-400), dtype=F64))


ONES = torch.ones(2, 3)
KEEP = torch.ones(2, 3, dtype=torch.bool)
ERRORS = [
    (lambda: corrections.truncate(ONES, ONES, KEEP, "seq"), ValueError, "sequence-mean"),
    (lambda: corrections.truncate(ONES, ONES, KEEP, low=3.0), ValueError, "low <= high"),
    (lambda: corrections.mask(ONES, ONES, KEEP, low=-1.0), ValueError, "low=-1.0"),
    (lambda: corrections.mask(ONES, ONES, KEEP, high=math.nan), ValueError, "high=nan"),
    (lambda: corrections.mask(ONES, ONES[:, :2], KEEP), ValueError, "(2, 3), got (2, 2)"),
    (lambda: corrections.mask(ONES, ONES, KEEP.float()), TypeError, "mask.bool"),
    (lambda: corrections.mask(ONES[0], ONES[0], KEEP[0], "sequence"), ValueError, "[B, T]"),
    (lambda: corrections.m2po(ONES, ONES, KEEP, tau=0.0), ValueError, "tau"),
]


@pytest.mark.parametrize(("call", "error", "text"), ERRORS)
def test_errors(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)


@pytest.mark.parametrize("name", CALLS)
def test_dtypes_empties_and_no_host_sync(name):
    """On the meta device every read-back raises, so this proves that there is none."""
    for dtype, want in [(torch.bfloat16, torch.float32), (F64, F64)]:
        old = torch.zeros(2, 3, dtype=dtype, requires_grad=True)
        got = CALLS[name](old, old, KEEP)
        assert got.dtype == want and not got.requires_grad and bool((got == 1).all())
    assert bool((CALLS[name](ONES, ONES, ~KEEP) == 0).all()), "an empty mask"
    assert CALLS[name](ONES[:0], ONES[:0], KEEP[:0]).shape == (0, 3)
    meta = torch.ones(2, 3, device="meta")
    assert CALLS[name](meta, meta, meta.bool()).shape == (2, 3)

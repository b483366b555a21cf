"""What does not count is invisible, what is broken is visible (PROMISES N2, N3, N4, N5, N6)."""

import math

import batches
import compare
import pytest
import torch
from batches import BACKENDS, DTYPES, dtype_name

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf
# the band is wide, so that no token is clipped: a clipped gradient is 0 whatever the advantage
OBJECTIVE = po.DecoupledPPO(1.0, 50.0) + 0.1 * po.KL("k3") - 0.05 * po.Entropy() + po.NLL(0.1, 1e-3)
GATED = OBJECTIVE + po.NLL().weighted_by("g")
READS = ("old", "mu", "ref", "adv")
VECTORS = (*READS, "temperature", "g")


def poisoned(batch, rows, name, value):
    """A copy of the batch whose `rows` of one tensor hold `value`."""
    source = batch["extra"] if name == "g" else batch
    changed = source[name].clone()
    # a tensor: torch 2.6 refuses the number 1e30 in fp16
    changed[rows] = torch.tensor(value).to(changed.dtype)
    new = {**source, name: changed}
    return {**batch, "extra": new} if name == "g" else new


def full_batch(dtype, **shape):
    return batches.make(
        dtype=dtype, reads=READS, temperature=True, extra=("g",), bias=True, **shape
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e30])
def test_N2_ignored_tokens_are_bitwise_invisible(backend, dtype, value):
    """Every tensor of a position that does not count, poisoned one by one and all at once."""
    batch = full_batch(dtype)
    out = (batch["labels"] == -100) | (batch["weights"] == 0)
    clean = batches.run(batch, GATED, backend)
    assert (
        out.sum() >= 6 and (clean["dhidden"][out] == 0).all() and (clean["logps"][out] == 0).all()
    )
    everything = batch
    for name in ("hidden", *VECTORS):
        everything = poisoned(everything, out, name, value)
    cases = [poisoned(batch, out, name, value) for name in ("hidden", *VECTORS)] + [everything]
    for case in cases:
        got = batches.run(case, GATED, backend)
        for name in ("loss", "dhidden", "dweight", "dbias", *batches.STATS, "is_top1"):
            compare.same_bits(name, got[name], clean[name])
        for name, x in got["metrics"].items():
            compare.same_bits(name, x, clean["metrics"][name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_N2_ignored_tokens_are_invisible_in_given_logits(backend, value):
    batch = full_batch(torch.float32)
    z = torch.randn(37, 301, generator=torch.Generator().manual_seed(5))
    out = (batch["labels"] == -100) | (batch["weights"] == 0)
    clean = batches.run_logits(z, batch, GATED, backend)
    bad = z.clone()
    bad[out] = value
    everything = batch
    for name in VECTORS:
        everything = poisoned(everything, out, name, value)
    got = batches.run_logits(bad, everything, GATED, backend)
    for name in ("loss", "dlogits", *batches.STATS):
        compare.same_bits(name, got[name], clean[name])
    assert (got["dlogits"][out] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("label", [-1, 301, 2**31, -(2**63), 2**63 - 1])
def test_N2_the_label_of_a_weight_0_token_is_never_read(backend, label):
    batch = full_batch(torch.float32)
    zero = (batch["weights"] == 0) & (batch["labels"] != -100)
    assert zero.any()
    clean = batches.run(batch, GATED, backend)
    got = batches.run(poisoned(batch, zero, "labels", label), GATED, backend)
    for name in ("loss", "dhidden", "dweight"):
        compare.same_bits(name, got[name], clean[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-1, 0, 300, 305])
def test_N2_any_ignore_index_is_honoured(backend, ignore_index):
    """0 and V-1 are ids of the vocabulary too: only the positions that carry them are left out."""
    batch = full_batch(torch.float32)
    labels = batch["labels"].where(batch["labels"] != ignore_index, torch.tensor(7))
    moved = labels.where(labels != -100, torch.tensor(ignore_index))
    want = batches.run({**batch, "labels": labels}, GATED, backend)
    h = batch["hidden"].clone().requires_grad_()
    tokens = batches.tokens({**batch, "labels": moved}, ignore_index=ignore_index)
    with po.use_backend(backend):
        out = po.linear_policy_loss(h, po.Head(batch["weight"], batch["bias"]), tokens, GATED)
        out.loss.backward()
    compare.same_bits("loss", out.loss, want["loss"])
    compare.same_bits("dhidden", h.grad, want["dhidden"])


# V = 67: whole vectors of 8 and 16, the start of the tail and its end.
POSITIONS = (0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 66)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("at_label", [True, False])
def test_N3_a_broken_logit_is_seen_wherever_it_stands(backend, dtype, value, at_label):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(5, 67, generator=g).to(dtype)
    labels = torch.tensor([3, 66, 20, 0, 40])
    clean = batches.run_logits(z, batches.row_batch(labels), po.NLL(), backend)
    others = torch.arange(5) != 2
    for position in POSITIONS:
        bad, y = z.clone(), labels.clone()
        bad[2, position] = value
        if at_label:
            y[2] = position
        got = batches.run_logits(bad, batches.row_batch(y), po.NLL(), backend)
        assert not got["loss"].isfinite(), position
        assert not got["dlogits"][2].isfinite().all(), position
        assert not got["logps"][2].isfinite(), position
        assert got["metrics"]["num_nonfinite"] == 1
        compare.same_bits("dlogits", got["dlogits"][others], clean["dlogits"][others])
        compare.same_bits("logps", got["logps"][others], clean["logps"][others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_N3_minus_inf_logits_mean_probability_zero(backend):
    """A masked-out vocabulary entry is legal; as the label it is a visible -inf."""
    z = torch.tensor([[0.0, -INF, 1.0], [0.0, -INF, 1.0], [-INF] * 3])
    got = batches.run_logits(z[:1], batches.row_batch([0]), po.NLL(), backend)
    want = torch.tensor([0.0, 1.0]).log_softmax(-1)
    torch.testing.assert_close(got["logps"][0], want[0])
    torch.testing.assert_close(got["entropy"][0], -(want.exp() * want).sum())
    assert got["dlogits"][0, 1] == 0 and got["dlogits"].isfinite().all()
    for rows, label in ((z[1:2], 1), (z[2:3], 0)):
        got = batches.run_logits(rows, batches.row_batch([label]), po.NLL(), backend)
        assert not got["loss"].isfinite() and not got["logps"].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("name", ["hidden", *VECTORS, "weights"])
@pytest.mark.parametrize("value", [NAN, INF])
def test_N3_a_broken_valid_token_is_seen_and_harms_no_other(backend, dtype, name, value):
    if name in ("temperature", "old", "mu") and value == INF:
        pytest.skip("T = inf is a uniform row; old or mu = +inf a ratio of 0 or inf: the next test")
    batch = full_batch(dtype)
    clean = batches.run(batch, GATED, backend)
    row = 12
    assert batch["labels"][row] != -100 and batch["weights"][row] != 0
    got = batches.run(poisoned(batch, row, name, value), GATED, backend)
    assert not got["loss"].isfinite()
    assert not got["dhidden"][row].isfinite().all()
    assert not got["dweight"].isfinite().all() and not got["dbias"].isfinite().all()
    others = torch.arange(37) != row
    for field in ("dhidden", *batches.STATS):
        compare.same_bits(field, got[field][others], clean[field][others])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_N3_an_infinite_log_ratio_is_clipped_or_visible(backend, adv):
    """old = -inf: r = inf. A > 0 is clipped with gradient 0; A < 0 has the loss inf."""
    z = torch.zeros(2, 2)
    batch = batches.row_batch([0, 0], old=torch.tensor([-INF, -0.7]), adv=torch.tensor([adv, 1.0]))
    got = batches.run_logits(z, batch, po.PPOClip(), backend)
    if adv > 0:
        assert got["loss"].isfinite() and (got["dlogits"][0] == 0).all()
    else:
        assert got["loss"] == INF and not got["dlogits"][0].isfinite().any()
    assert got["metrics"]["ratio/max"] == INF
    assert got["dlogits"][1].isfinite().all() and (got["dlogits"][1] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N4_clipped_tokens_have_exactly_zero_rows(backend, dtype):
    """Ratios far outside the band, on the clipped side of each sign; the rest are live."""
    batch = batches.make(dtype=dtype, reads=("old", "adv"), ignored=False)
    batch["adv"] = torch.where(torch.arange(37) % 2 == 0, 1.0, -1.0)
    clipped = torch.arange(37) % 3 == 0
    far = torch.where(batch["adv"] > 0, -30.0, 30.0)  # old far below l: r = e^30, and e^-30
    batch["old"] = torch.where(clipped, batch["old"] + far, batch["old"])
    objective = po.PPOClip(0.99, 20.0)
    got = batches.run(batch, objective, backend)
    assert (got["dhidden"][clipped] == 0).all()
    assert (got["dhidden"][~clipped] != 0).any(-1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_N5_ratios_are_formed_in_log_space_and_reported_raw(backend):
    """p underflows fp32 at l = -200 and exp(l)/exp(old) is 0/0; in log space the ratio is e^0.1."""
    z = torch.tensor([[0.0, 200.0], [0.0, 200.0], [0.0, 200.0]])
    old = torch.tensor([-200.1, -203.0, -190.0])
    batch = batches.row_batch([0, 0, 0], old=old, adv=torch.ones(3))
    got = batches.run_logits(z, batch, po.PPOClip(), backend)
    ratio = torch.exp(torch.tensor([-200.0] * 3) - old)
    want = -(ratio[0] + 1.2 + ratio[2])
    torch.testing.assert_close(got["loss"], want, rtol=1e-6, atol=0)
    torch.testing.assert_close(got["metrics"]["ratio/max"], ratio.max(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["metrics"]["ratio/min"], ratio.min(), rtol=1e-6, atol=0)
    torch.testing.assert_close(got["metrics"]["ratio/mean"], ratio.mean(), rtol=1e-6, atol=0)
    assert (got["dlogits"][1] == 0).all() and (got["dlogits"][0] != 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_N5_half_inputs_give_fp32_logps_and_ratios(backend, dtype):
    batch = batches.make(dtype=dtype, reads=("old", "adv"), ignored=False)
    first = batches.run(batch, po.PPOClip(), backend)
    assert first["logps"].dtype == torch.float32
    batch["old"] = first["logps"] - 1e-3  # a bf16 ratio would be 1 or 1.0078
    got = batches.run(batch, po.PPOClip(), backend)["metrics"]["ratio/mean"]
    assert abs(got.item() - math.exp(1e-3)) < 2e-6


BAD_LABELS = (301, 302, -1, -99, 2**31, 2**63 - 1, -(2**63))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", BAD_LABELS)
@pytest.mark.parametrize("call", ["policy", "linear_policy", "logps", "linear_logps", "ce"])
def test_N6_a_label_out_of_range_is_an_index_error_naming_row_and_value(backend, value, call):
    """Row 12 of the batch, after ignored ones; inputs stay as they were, the next call is right."""
    batch = batches.make(ignored=True)
    z = batch["hidden"] @ batch["weight"].t()
    z.requires_grad_()
    head = po.Head(batch["weight"])
    calls = {
        "policy": lambda t: po.policy_loss(z, t, po.NLL()).loss,
        "linear_policy": lambda t: po.linear_policy_loss(batch["hidden"], head, t, po.NLL()).loss,
        "logps": lambda t: po.token_logps(z, t.labels).logps,
        "linear_logps": lambda t: po.linear_token_logps(batch["hidden"], head, t.labels).logps,
        "ce": lambda t: po.linear_cross_entropy(batch["hidden"], batch["weight"], t.labels),
    }
    bad = poisoned(batch, 12, "labels", value)
    with po.use_backend(backend):
        before = calls[call](batches.tokens(batch)).detach().clone()
        kept = z.detach().clone()
        with pytest.raises(IndexError) as caught:
            calls[call](batches.tokens(bad))
        assert "row 12" in str(caught.value) and str(value) in str(caught.value)
        assert torch.equal(z.detach(), kept) and bad["labels"][12] == value
        compare.same_bits("again", calls[call](batches.tokens(batch)), before)

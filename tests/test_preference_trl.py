"""Parity with TRL, value for value, gradient for gradient: its own trainers' loss code, called on
the same logits (`trl_losses.py`), for every preference loss it has.

Needs the package `trl`; without it these tests are not run.
"""

import pytest
import torch

import pyoffline as po

pytest.importorskip("trl", reason="not run: trl is not installed (pip install pyoffline[dev])")
import trl_losses as trl  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = (3, 5, 2, 4, 6, 1, 4, 3)
P = len(LENGTHS) // 2
# TRL forms log eps of exo_pair in fp32 and its alpha scores in fp32 only
TOLERANCE = {"exo_pair": 2e-7, "alpha_divergence": 2e-5}


def ours(batch, objective, **given):
    labels = given.pop("labels", batch.labels)
    tokens = po.TokenBatch(labels, **given)
    return po.policy_loss(batch.logits[:, :-1], tokens, objective).loss


def check(got, want, logits, tol=1e-12):
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)
    a, b = (torch.autograd.grad(x, logits)[0] for x in (got, want))
    assert b.abs().max() > 1e-4
    torch.testing.assert_close(a, b, rtol=tol, atol=tol)


DPO_CASES = [
    ("sigmoid", {}),
    ("hinge", {}),
    ("ipo", {}),
    ("exo_pair", {"label_smoothing": 1e-3}),
    ("exo_pair", {"label_smoothing": 0.3}),
    ("robust", {}),
    ("robust", {"label_smoothing": 0.2}),
    ("nca_pair", {}),
    ("bco_pair", {}),
    ("sppo_hard", {}),
    ("aot", {}),
    ("aot", {"label_smoothing": 0.2}),
    ("aot_unpaired", {}),
    ("aot_unpaired", {"label_smoothing": 0.2}),
    ("apo_zero", {}),
    ("apo_down", {}),
    ("discopop", {}),
    ("sigmoid_norm", {}),
]


@pytest.mark.parametrize(("loss", "options"), DPO_CASES)
@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_dpo_losses(loss, options, beta):
    batch = trl.Batch(1, LENGTHS)
    want = trl.dpo(batch, loss, beta, **options)
    got = ours(batch, po.DPO(beta, loss=loss, **options), ref_logps=batch.ref)
    check(got, want, batch.logits, TOLERANCE.get(loss, 1e-12))


SCORED = ("sigmoid", "hinge", "ipo", "sigmoid_norm", "robust", "exo_pair", "discopop")


@pytest.mark.parametrize("loss", SCORED)
@pytest.mark.parametrize("name", ["forward_kl", "js_divergence", "alpha_divergence"])
def test_f_divergence_scores(loss, name):
    dtype = torch.float32 if name == "alpha_divergence" else torch.float64
    batch = trl.Batch(2, LENGTHS, dtype=dtype)
    eps = 0.1 if loss in ("exo_pair", "robust") else 0.0
    alpha = 0.3 if name == "alpha_divergence" else 0.5
    options = {"f_divergence_type": name, "f_alpha_divergence_coef": alpha, "label_smoothing": eps}
    want = trl.dpo(batch, loss, 0.3, **options)
    objective = po.DPO(0.3, eps, loss=loss, f_divergence=name, alpha=alpha)
    got = ours(batch, objective, ref_logps=batch.ref)
    check(got, want, batch.logits, max(TOLERANCE.get(loss, 1e-12), TOLERANCE.get(name, 0)))


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "nca_pair", "sppo_hard", "robust"])
def test_wpo_weighting(loss):
    """TRL multiplies in place: with its hinge loss that breaks its own backward, so not here."""
    batch = trl.Batch(3, LENGTHS)
    want = trl.dpo(batch, loss, 0.3, use_weighting=True)
    got = ours(batch, po.WPO(po.DPO(0.3, loss=loss)), ref_logps=batch.ref)
    check(got, want, batch.logits)


def test_rpo_is_dpo_and_its_sft_term():
    """TRL's sum of losses `sigmoid` and `sft`, whose mean runs over the chosen tokens."""
    batch = trl.Batch(4, LENGTHS)
    want = trl.dpo(batch, "sigmoid", 0.3) + 0.5 * trl.dpo(batch, "sft", 0.3)
    tokens = sum(LENGTHS)
    positive = torch.zeros(batch.labels.shape, dtype=torch.float64)
    positive[:P] = tokens / sum(LENGTHS[:P])
    objective = po.DPO(0.3) + 0.5 * po.NLL().weighted_by("positive")
    got = ours(batch, objective, ref_logps=batch.ref, extra={"positive": positive})
    check(got, want, batch.logits)


@pytest.mark.parametrize("kl", [0.0, 0.7, -2.0])
def test_kto(kl):
    batch = trl.Batch(5, LENGTHS)
    label = torch.arange(len(LENGTHS)) % 3 == 0
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.8}
    want = trl.kto(batch, label, 0.3, kl, **weights)
    sequences = po.SequenceBatch(targets=label)
    got = ours(batch, po.KTO(0.3, 1.5, 0.8, kl), ref_logps=batch.ref, sequences=sequences)
    check(got, want, batch.logits)


def test_apo_zero_unpaired_is_kto_without_kl():
    batch = trl.Batch(6, LENGTHS)
    label = torch.arange(len(LENGTHS)) % 2 == 0
    want = trl.kto(batch, label, 0.3, 0.0, loss_type="apo_zero_unpaired", calculate_KL=False)
    sequences = po.SequenceBatch(targets=label)
    got = ours(batch, po.KTO(0.3), ref_logps=batch.ref, sequences=sequences)
    check(got, want, batch.logits)


CPO_CASES = [
    ("sigmoid", {}, po.CPO(0.3)),
    ("sigmoid", {"label_smoothing": 0.1, "cpo_alpha": 0.4}, po.CPO(0.3, 0.1, nll=0.4)),
    ("hinge", {}, po.CPO(0.3, loss="hinge")),
    ("ipo", {"cpo_alpha": 0}, po.CPO(0.3, loss="ipo", nll=0.0)),
    ("simpo", {"cpo_alpha": 0}, po.SimPO(0.3, 0.5)),
    ("simpo", {"simpo_gamma": 1.2, "label_smoothing": 0.1}, po.SimPO(0.3, 1.2, 0.1, nll=1.0)),
    ("simpo", {"alpha": 0.25, "cpo_alpha": 0}, po.AlphaPO(0.25, 0.3, 0.5)),
    ("simpo", {"alpha": -0.5, "label_smoothing": 0.1}, po.AlphaPO(-0.5, 0.3, 0.5, 0.1, 1.0)),
]


@pytest.mark.parametrize(("loss", "options", "objective"), CPO_CASES)
def test_cpo_simpo_and_alpha_po(loss, options, objective):
    batch = trl.Batch(7, LENGTHS)
    check(ours(batch, objective), trl.cpo(batch, loss, 0.3, **options), batch.logits)


def test_orpo():
    batch = trl.Batch(8, LENGTHS)
    # TRL rounds the mean log-probs to fp32
    check(ours(batch, po.ORPO(0.3)), trl.orpo(batch, 0.3), batch.logits, 1e-6)


@pytest.mark.parametrize("loss", ["sigmoid", "hinge", "ipo", "tpo-l"])
def test_tpo_and_its_gold_answers_in_a_second_call(loss):
    batch = trl.Batch(9, (3, 5, 2, 4, 6, 1, 4, 3, 2))
    eps = 0.1 if loss in ("sigmoid", "tpo-l") else 0.0
    want = trl.tpo(batch, loss, 0.3, label_smoothing=eps, tpo_alpha=0.7)
    logits, labels = batch.logits[:, :-1], batch.labels
    contrast = po.TPO(0.3, eps, loss)
    got = po.policy_loss(logits[:6], po.TokenBatch(labels[:6]), contrast).loss
    got = got + po.policy_loss(logits[6:], po.TokenBatch(labels[6:]), 0.7 * po.NLL()).loss
    check(got, want, batch.logits)


def test_fp32_and_metrics_as_well():
    batch = trl.Batch(10, LENGTHS, dtype=torch.float32)
    want = trl.dpo(batch, "sigmoid", 0.3)
    got = ours(batch, po.DPO(0.3), ref_logps=batch.ref)
    check(got, want, batch.logits, 2e-6)

"""The metrics of a loss call against their definitions in fp64, over the positions that count."""

import batches
import pytest
import torch
from batches import BACKENDS

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVE = po.DecoupledPPO() + 0.1 * po.KL("k3")


@pytest.mark.parametrize("backend", BACKENDS)
def test_n5_metrics_are_their_definitions_over_valid_tokens(backend):
    batch = batches.make(reads=("old", "mu", "ref", "adv"))
    batch["old"][0] -= 30.0  # a ratio of e^30: reported as it is, not clamped
    got = batches.run(batch, OBJECTIVE, backend)
    valid = (batch["labels"] != -100) & (batch["weights"] != 0)
    assert 0 < valid.sum() < valid.numel() - 6 and valid[0]
    logps, old, mu, ref = (
        x.double()[valid] for x in (got["logps"], batch["old"], batch["mu"], batch["ref"])
    )
    r, w, gap = (logps - old).exp(), (logps - mu).exp(), ref - logps
    adv = batch["adv"].double()[valid]
    below, above = (r < 0.8) & (adv < 0), (r > 1.2) & (adv > 0)
    assert 0 < below.sum() and 0 < above.sum() and (below | above).sum() < valid.sum()
    want = {
        "num_tokens": valid.sum(),
        "num_nonfinite": 0,
        "entropy": got["entropy"].double()[valid].mean(),
        "mean_token_accuracy": got["is_top1"].double()[valid].mean(),
        "logps": logps.mean(),
        "ratio/mean": r.mean(),
        "ratio/min": r.min(),
        "ratio/max": r.max(),
        "approx_kl": (r - 1 - (logps - old)).mean(),
        "kl": (gap.exp() - 1 - gap).mean(),
        "sampling/importance_sampling_ratio/mean": w.mean(),
        "sampling/importance_sampling_ratio/min": w.min(),
        "sampling/importance_sampling_ratio/max": w.max(),
        "sampling/sampling_logp_difference/mean": (logps - mu).abs().mean(),
        "sampling/sampling_logp_difference/max": (logps - mu).abs().max(),
        "clip_ratio/low_mean": below.double().mean(),
        "clip_ratio/high_mean": above.double().mean(),
        "clip_ratio/region_mean": (below | above).double().mean(),
        "ess": w.mean() ** 2 / (w * w).mean(),
    }
    assert set(want) == set(got["metrics"])
    for name, x in want.items():
        value = torch.as_tensor(x).double()
        torch.testing.assert_close(
            got["metrics"][name].double(), value, rtol=2e-5, atol=1e-6, msg=name
        )


CLIPS = {"clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"}
# objective, whether its rows clip the ratio to old
CLIPPED = [
    (po.PPOClip(0.1, 0.3), True),
    (0.5 * po.PPOClip(0.1, 0.3) + 0.1 * po.KL("k2", against="old"), True),
    (po.CISPO() + 0.0 * po.KL("k1", against="old"), False),
]


@pytest.mark.parametrize("objective, clips", CLIPPED)
def test_clip_fractions_are_there_where_a_ratio_is_clipped(objective, clips):
    # ratios 0.85, 0.85, 1.25, 1.25, 1.35, 1.35 with advantages of both signs
    z, labels = torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)
    ratio = torch.tensor([0.85, 0.85, 1.25, 1.25, 1.35, 1.35])
    adv = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    old = -torch.tensor(4.0).log() - ratio.log()
    got = po.policy_loss(z, po.TokenBatch(labels, adv, old), objective).metrics
    assert CLIPS <= set(got) if clips else not CLIPS & set(got)
    if clips:
        values = [round(float(got[f"clip_ratio/{k}_mean"]) * 6) for k in ("low", "high", "region")]
        assert values == [1, 1, 2]


def test_without_advantages_every_token_wants_to_rise():
    z, labels = torch.zeros(2, 4), torch.zeros(2, dtype=torch.long)
    old = -torch.tensor(4.0).log() - torch.tensor([0.5, 2.0]).log()
    got = po.policy_loss(z, po.TokenBatch(labels, old_logps=old), po.ProximalSFT()).metrics
    assert (float(got["clip_ratio/low_mean"]), float(got["clip_ratio/high_mean"])) == (0.0, 0.5)


@pytest.mark.parametrize("offset", [44.0, 46.0, 89.0, 700.0, 1e30, -89.0, -700.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ess_is_a_ratio_of_weights_whatever_their_size(offset, backend):
    batch = batches.make(reads=("mu", "adv"))
    plain = batches.run(batch, po.ImportanceSampling(), backend)["metrics"]["ess"]
    valid = (batch["labels"] != -100) & (batch["weights"] != 0)
    batch["mu"] -= offset  # on every token: the fraction is the same
    got = batches.run(batch, po.ImportanceSampling(), backend)["metrics"]["ess"]
    assert got.isfinite()
    if abs(offset) < 100:
        torch.testing.assert_close(got, plain, rtol=1e-3, atol=0)
    batch["mu"] += offset
    batch["mu"][valid.nonzero()[0]] -= abs(offset)  # on one: nobody else counts
    got = batches.run(batch, po.ImportanceSampling(), backend)["metrics"]["ess"]
    torch.testing.assert_close(got, 1.0 / valid.sum(), rtol=1e-3, atol=0)

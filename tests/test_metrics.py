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
        "ess": w.mean() ** 2 / (w * w).mean(),
    }
    assert set(want) == set(got["metrics"])
    for name, x in want.items():
        value = torch.as_tensor(x).double()
        torch.testing.assert_close(
            got["metrics"][name].double(), value, rtol=2e-5, atol=1e-6, msg=name
        )

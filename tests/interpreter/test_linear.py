"""The Triton backend through the public API, in the interpreter: objectives, heads, gradients."""

import batches
import oracle
import pytest
import torch
from compare import check_forward, check_gradient, same_bits

import pyoffline as po


def test_smoke():
    objective = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy()
    batch = batches.make(n=9, d=16, v=77, reads=("old", "ref", "adv"), bias=True)
    got = batches.run(batch, objective, "triton", 0.5)
    want = batches.run(batch, objective, "reference", 0.5)
    for k in ("loss", "logps", "entropy", "lse", "log_sum_p2", "dhidden", "dweight", "dbias"):
        torch.testing.assert_close(got[k], want[k], rtol=2e-5, atol=2e-6)

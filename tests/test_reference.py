"""The reference backend in fp64 against autograd: the ground that the other backends stand on."""

import math

import batches
import compare
import oracle
import pytest
import torch
from test_objectives import CASES

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
READS = ("old", "mu", "ref", "adv")
GRADS = ("dhidden", "dweight", "dbias")
# fp64 rounding of a few hundred terms
TIGHT = {"rtol": 1e-10, "atol": 1e-13}


def fp64_batch(objective, **options):
    """A batch in fp64 that holds what the objective reads."""
    program = objective.program(True)
    reads = [r for r in READS if r in program.reads]
    batch = batches.make(13, 9, 21, reads=reads, extra=program.gates, **options)
    for name in ("hidden", "weight", "bias"):
        batch[name] = None if batch[name] is None else batch[name].double()
    return batch


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_every_objective_equals_autograd_through_the_whole_head(name, chunk):
    objective = CASES[name]
    head = {"softcap": 4.0, "logit_scale": 0.6, "temperature": 1.3}
    batch = fp64_batch(objective, bias=True, head=head)
    with po.chunk_rows(chunk):
        got = batches.run(batch, objective, "reference")
    want = oracle.run(batch, objective, torch.float64)
    torch.testing.assert_close(got["loss"], want["loss"], **TIGHT)
    for key in ("logps", "entropy", "lse", *GRADS):
        torch.testing.assert_close(got[key], want[key], **TIGHT, msg=lambda m, k=key: f"{k}: {m}")


HEADS = [
    ({}, False, False),
    ({"softcap": 2.0}, False, True),
    ({"logit_scale": -0.5}, True, False),
    ({"temperature": 0.7}, True, False),
    ({"softcap": 3.0, "logit_scale": 2.0}, True, True),
]


@pytest.mark.parametrize("head, bias, temperature", HEADS)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_gradcheck_of_every_head_option(head, bias, temperature, smoothing):
    """Finite differences know nothing of the formulas, here or in the oracle."""
    objective = po.NLL(smoothing, 0.05) - 0.3 * po.Entropy() + po.KL("k3", "old")
    batch = batches.make(4, 5, 7, reads=("old",), bias=bias, temperature=temperature, head=head)
    leaves = [batch[k].double() for k in ("hidden", "weight", "bias") if batch[k] is not None]

    def loss(*leaves):
        with po.use_backend("reference"), po.chunk_rows(3):
            h = po.Head(leaves[1], leaves[2] if bias else None, **head)
            return po.linear_policy_loss(leaves[0], h, batches.tokens(batch), objective).loss

    leaves = [x.requires_grad_() for x in leaves]
    assert torch.autograd.gradcheck(loss, leaves, nondet_tol=0.0)


def test_gradcheck_of_token_logps_entropy_and_lse():
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    w = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 6, -100, 3])

    def rows(z):
        return po.token_logps(z, labels, temperature=1.7)[:3]

    def linear(x, w):
        return po.linear_token_logps(x, po.Head(w, softcap=3.0), labels)[:3]

    with po.use_backend("reference"):
        assert torch.autograd.gradcheck(rows, (z,), nondet_tol=0.0)
        assert torch.autograd.gradcheck(linear, (x, w), nondet_tol=0.0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_gradcheck_of_cross_entropy_with_class_weights(reduction):
    z = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    y, u = torch.tensor([0, 5, -100, 3, 3]), torch.rand(6).double()

    def loss(z):
        return po.cross_entropy(z, y, u, reduction=reduction, label_smoothing=0.3, z_loss=0.1)

    with po.use_backend("reference"):
        assert torch.autograd.gradcheck(loss, (z,), nondet_tol=0.0)


# logits, label, what is known of the row: logp, entropy, log sum p^2, is_top1
KNOWN = [
    ([5.0] * 8, 3, -math.log(8), math.log(8), -math.log(8), True, "all equal, a tie is top"),
    ([-1e4] * 8, 0, -math.log(8), math.log(8), -math.log(8), True, "all -1e4"),
    ([0.0] * 7 + [1e4], 7, 0.0, 0.0, 0.0, True, "one-hot at +1e4"),
    ([0.0] * 7 + [1e4], 0, -1e4, 0.0, 0.0, False, "the other label of a one-hot row"),
    ([2.5], 0, 0.0, 0.0, 0.0, True, "a vocabulary of one"),
    ([0.0, 0.0, -math.inf], 1, -math.log(2), math.log(2), -math.log(2), True, "a masked entry"),
]


@pytest.mark.parametrize("backend", batches.BACKENDS)
@pytest.mark.parametrize("logits, y, logp, entropy, p2, top, reason", KNOWN)
def test_statistics_of_rows_that_are_known_exactly(
    backend, logits, y, logp, entropy, p2, top, reason
):
    with po.use_backend(backend):
        got = po.token_logps(torch.tensor([logits]), torch.tensor([y]))
    for name, want in (("logps", logp), ("entropy", entropy), ("log_sum_p2", p2)):
        assert getattr(got, name).item() == pytest.approx(want, rel=3e-7, abs=3e-7), (name, reason)
    assert got.is_top1.item() is top


@pytest.mark.parametrize("backend", batches.BACKENDS)
def test_log_sum_p2_and_top1_against_fp64(backend):
    z = torch.randn(20, 500, generator=torch.Generator().manual_seed(8)) * 3
    labels = torch.arange(20)
    labels[::2] = z[::2].argmax(-1)
    with po.use_backend(backend):
        got = po.token_logps(z, labels)
    want = (2 * z.double().log_softmax(-1)).logsumexp(-1)
    assert (got.log_sum_p2.double() - want).abs().max() < 8 * compare.EPS32 * (1 + want.abs().max())
    assert torch.equal(got.is_top1, labels == z.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_logps_by_no_more_than_the_gemm(dtype):
    batch = batches.make(50, dtype=dtype, reads=READS)
    objective = po.DecoupledPPO() + po.KL()
    whole = batches.run(batch, objective, "reference")
    ours, truth = [], oracle.run(batch, objective, torch.float64)
    for rows in (1, 7, 49):
        with po.chunk_rows(rows):
            ours.append(batches.run(batch, objective, "reference"))
    for got in ours:
        for name in ("logps", "dhidden", "dweight"):
            compare.check_gradient(name, got[name], truth[name], whole[name])


def test_memory_budget_and_chunk_rows_reject_nonsense():
    for bad in (0, -1, 1.5, True, "8"):
        with pytest.raises(ValueError, match="chunk_rows"), po.chunk_rows(bad):
            pass
        with pytest.raises(ValueError, match="memory_budget"), po.memory_budget(bad):
            pass
    batch = batches.make(20)
    with po.memory_budget(1):  # one row at a time, never none
        got = batches.run(batch, po.NLL(), "reference")
    torch.testing.assert_close(got["loss"], batches.run(batch, po.NLL(), "reference")["loss"])


def test_the_cpu_backend_refuses_fp64_with_a_reason():
    batch = batches.make(4)
    batch["hidden"], batch["weight"] = batch["hidden"].double(), batch["weight"].double()
    if batches.MISSING_CPU:
        pytest.skip(f"not run: {batches.MISSING_CPU}")
    with pytest.raises(RuntimeError, match="fp64 inputs run on the reference"):
        batches.run(batch, po.NLL(), "cpu")
    auto = batches.run(batch, po.NLL(), "auto")
    assert auto["logps"].dtype == torch.float64

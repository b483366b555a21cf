"""What a coupled call costs: GEMMs counted per token, what is allocated (PROMISES A1, M2)."""

import coupled_batches as cb
import pytest
import torch
from batches import BACKENDS
from coupled_batches import CASES

import pyoffline as po
from pyoffline.backends import load

pytestmark = pytest.mark.usefixtures("one_thread")
D, V = 32, 211


@pytest.fixture
def kernels(monkeypatch):
    """Counts the rows that each GEMM takes and remembers what is allocated, by backend name."""

    def watch(backend):
        module = load(backend, torch.zeros(1))
        cls = module.CpuKernels if backend == "cpu" else module.ReferenceKernels
        seen = {"logits": 0, "dhidden": 0, "add_dweight": 0, "shapes": []}
        arguments = {"logits": 1, "dhidden": 0, "add_dweight": 0}

        def spy(name, plain):
            def counted(self, *args):
                seen[name] += args[arguments[name]].shape[0]
                return plain(self, *args)

            return counted

        def shape_spy(plain):
            def made(self, *args):
                out = plain(self, *args)
                seen["shapes"].append(tuple(out.shape))
                return out

            return made

        for name in arguments:
            monkeypatch.setattr(cls, name, spy(name, getattr(cls, name)))
        for name in ("buffer", "scratch", "empty"):
            monkeypatch.setattr(cls, name, shape_spy(getattr(cls, name)))
        return seen

    return watch


HEAD, ALL = ("weight",), ("hidden", "weight")
GEMMS = [
    # rows of a chunk, gradients wanted, GEMMs of logits, dhidden, dweight, why
    (100, ALL, (1, 1, 1), "everything fits: three"),
    (9, ALL, (1, 1, 1), "every sequence fits: three"),
    (1, ALL, (2, 1, 1), "longer than a chunk: the logits twice"),
    (100, ("hidden",), (1, 1, 0), "frozen head: two"),
    (1, ("hidden",), (1, 1, 0), "frozen head, longer than a chunk: still two"),
    (9, HEAD, (1, 0, 1), "head only"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "wanted", "counts", "reason"), GEMMS)
def test_gemms_per_token(rows, wanted, counts, reason, backend, kernels):
    lengths = (9,) * 5
    batch = cb.make("mu adv", lengths=lengths, ignored=False)
    seen, n = kernels(backend), 45
    with po.chunk_rows(rows):
        cb.run(batch, po.SequencePowerIS(0.5), backend, wanted=wanted)
    got = tuple(seen[k] / n for k in ("logits", "dhidden", "add_dweight"))
    assert got == counts, reason
    assert sum(got) <= 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_coefficient_0_are_left_out_before_the_recomputation(backend, kernels):
    batch = cb.make("old adv", lengths=(9,) * 5, ignored=False)
    batch["adv"] = torch.tensor([0.0, 1.0, 0.0, -1.0, 0.0])
    seen = kernels(backend)
    with po.chunk_rows(4):
        got = cb.run(batch, po.GSPO(1.0, 100.0), backend)
    # the last unit has no gradient: a row of zeros ends the accumulation of dweight
    assert (seen["logits"], seen["dhidden"], seen["add_dweight"]) == (45 + 18, 18, 18 + 1)
    with po.chunk_rows(100):
        whole = cb.run(batch, po.GSPO(1.0, 100.0), backend)
    for key in ("dhidden", "dweight"):
        torch.testing.assert_close(got[key], whole[key], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clipped", range(9))
def test_rows_that_are_left_are_cut_by_the_height_of_the_buffer(clipped, backend):
    # 8 rows in chunks of at most 5 are 4 and 4; the 5 that are left of them do not fit one of 4
    batch = cb.make("old adv", lengths=(8, 8), ignored=False)
    batch["adv"] = torch.ones(2)
    rows = {**batch, "adv": None, "old": None}
    logps = cb.run(rows, po.NLL(), "reference")["logps"]
    batch["old"] = logps - torch.where(torch.arange(16) % 8 < clipped, 3.0, 0.1)
    whole = cb.run(batch, po.GMPO(0.5), backend)
    with po.chunk_rows(5):
        got = cb.run(batch, po.GMPO(0.5), backend)
    for key in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(got[key], whole[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_entropy_term_recomputes_with_a_frozen_head(backend, kernels):
    batch = cb.make("old ref adv", lengths=(9,) * 5, ignored=False)
    seen = kernels(backend)
    with po.chunk_rows(4):
        cb.run(batch, CASES["composed"][0], backend, wanted=("hidden",))
    assert seen["logits"] == 90


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_is_one_gemm_and_allocates_none(backend, kernels):
    batch = cb.make("old adv", lengths=(9,) * 5, ignored=False)
    seen = kernels(backend)
    with po.use_backend(backend), po.chunk_rows(4):
        for context in (torch.no_grad(), torch.inference_mode()):
            with context:
                head = po.Head(
                    batch["weight"].requires_grad_(not torch.is_inference_mode_enabled())
                )
                out = po.linear_policy_loss(batch["hidden"], head, cb.tokens(batch), po.GSPO())
            assert not out.loss.requires_grad
    assert seen["logits"] in (0, 90) and seen["dhidden"] == seen["add_dweight"] == 0
    assert (V, D) not in seen["shapes"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_M2_one_chunk_buffer_within_the_budget_whatever_the_batch(backend, kernels):
    budget = 4 * V * 20
    for count in (3, 40):
        batch = cb.make("mu rewards group", lengths=(5, 11, 30) * count, groups=tuple(range(120)))
        seen = kernels(backend)
        with po.memory_budget(budget):
            cb.run(batch, po.RenyiRWR(0.5), backend)
        wide = [s for s in seen["shapes"] if len(s) == 2 and s[1] == V]
        assert len(set(wide)) == 1 and 10 <= wide[0][0] <= 20
        # the gradient, and beyond 32 chunks its second level
        assert len([s for s in seen["shapes"] if s == (V, D)]) == (1 if count == 3 else 2)

"""Distillation on the Triton backend through the public API, in the interpreter: values and
gradients of every divergence and teacher against fp64 autograd.
"""

import distill_cases as cases
import pytest
import torch

import pyoffline as po
from pyoffline.kernels import distill_row_pass as kernel
from pyoffline.kernels import row_pass as rows
from pyoffline.kernels.configs import RowConfig

SHAPE = {"n": 3, "d": 12, "v": 45}
MIXED = po.JSD(0.3) + 0.5 * po.ReverseKL() + 0.1 * po.NLL() - 0.01 * po.Entropy()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 32 logits: a full one and a tail."""

    def config(*_):
        return RowConfig(8, 4, 4, 1)

    monkeypatch.setattr(kernel, "pair_config", config)
    monkeypatch.setattr(rows, "row_config", config)


def compare(batch, divergence, chunk=None):
    """On this backend."""
    return cases.compare(batch, divergence, "triton", chunk)


@pytest.mark.parametrize("divergence", cases.EACH, ids=cases.name_of)
def test_N1_each_divergence_against_fp64(divergence):
    compare(cases.make(5, 12, 45), divergence)


@pytest.mark.parametrize("divergence", cases.EACH[::4], ids=cases.name_of)
def test_N1_buckets_of_a_top_k_teacher_against_fp64(divergence):
    compare(cases.make(**SHAPE, teacher="top-k"), divergence)


HEADS = [
    ("softcap", {"head": {"softcap": 3.0}, "t_head": {"softcap": 5.0}, "bias": True}),
    ("scale", {"head": {"logit_scale": -0.7, "temperature": 1.3}, "t_head": {"logit_scale": 0.5}}),
]


@pytest.mark.parametrize("teacher", ["head", "top-k"])
@pytest.mark.parametrize("name, options", HEADS, ids=[h[0] for h in HEADS])
def test_N1_heads_beside_an_objective(name, options, teacher):
    compare(cases.make(**SHAPE, teacher=teacher, **options), MIXED)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", ["head", "logits", "top-k"])
def test_N1_half_precision_in_two_chunks(teacher, dtype):
    batch = cases.make(**SHAPE, dtype=dtype, teacher=teacher)
    compare(batch, po.ForwardKL() + 0.1 * po.NLL(), chunk=2)


@pytest.mark.parametrize("k", [1, 44, 45])
def test_top_k_of_one_and_of_all(k):
    compare(cases.make(**SHAPE, teacher="top-k", k=k), MIXED)


@pytest.mark.parametrize("teacher", ["head", "top-k"])
def test_statistics_equal_the_reference_backends(teacher):
    batch = cases.make(**SHAPE, teacher=teacher)
    got, want = (cases.run(batch, MIXED, name) for name in ("triton", "reference"))
    for key in ("logps", "entropy", "lse", "divergence", "teacher_entropy"):
        if key in want:
            torch.testing.assert_close(got[key], want[key], rtol=2e-5, atol=2e-6)
    assert set(got["metrics"]) == set(want["metrics"])
    for key, value in want["metrics"].items():
        torch.testing.assert_close(got["metrics"][key], value, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("teacher", ["logits", "top-k"])
def test_N3_a_nan_of_one_row_stays_there_and_shows(teacher):
    batch = cases.make(**SHAPE, teacher=teacher)
    clean = cases.run(batch, po.JSD(0.5), "triton")
    batch["hidden"] = batch["hidden"].clone()
    batch["hidden"][1] = torch.nan
    got = cases.run(batch, po.JSD(0.5), "triton")
    assert got["loss"].isnan() and got["dhidden"][1].isnan().all()
    others = torch.arange(SHAPE["n"]) != 1
    assert torch.equal(got["dhidden"][others], clean["dhidden"][others])


def test_N2_rows_that_do_not_count_are_zero():
    batch = cases.make(n=9, d=8, v=33)
    got = compare(batch, po.TVD())
    out = (batch["labels"] == -100) | (batch["weights"] == 0)
    assert out.sum() > 1 and not got["dhidden"][out].any()


def test_masked_entries_of_the_teacher_make_no_nan():
    """Forward KL and JSD where T = 0 is a mask; reverse KL is +inf there."""
    batch = cases.make(**SHAPE, teacher="logits")
    batch["t_logits"][:, ::5] = -torch.inf
    compare(batch, po.ForwardKL())
    compare(batch, po.JSD(0.5))
    assert cases.run(batch, po.ReverseKL(), "triton")["loss"] == torch.inf


@pytest.mark.parametrize("teacher", ["head", "top-k"])
def test_a_custom_term_beside_it(teacher):
    batch = cases.make(**SHAPE, teacher=teacher)
    mixed = po.ForwardKL() + 0.1 * po.custom(lambda t: -t.logp * t.logp.exp() + t.entropy)
    got, want = (cases.run(batch, mixed, name) for name in ("triton", "reference"))
    for key in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(got[key], want[key], rtol=2e-5, atol=2e-6)


def test_programs_do_not_depend_on_their_number(monkeypatch):
    batch = cases.make(**SHAPE)
    one = cases.run(batch, MIXED, "triton")
    monkeypatch.setattr(kernel, "row_programs", lambda *_: 3)
    three = cases.run(batch, MIXED, "triton")
    assert all(torch.equal(one[k], three[k]) for k in ("loss", "dhidden", "dweight"))

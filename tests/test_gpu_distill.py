"""Distillation on a GPU (PROMISES N1 to N3, N9): every divergence and teacher of the Triton backend
against fp64, and what only a device has: rows in place of wider ones, programs side by side.

Counted as not run where there is no GPU.
"""

import distill_cases as cases
import pytest
import torch
from compare import same_bits
from gpu_cases import move, on_cpu

import pyoffline as po

pytestmark = pytest.mark.gpu
SHAPE = {"n": 301, "d": 64, "v": 4099}
MIXED = po.JSD(0.3) + 0.5 * po.ReverseKL() + 0.1 * po.NLL() - 0.01 * po.Entropy()


def run(batch, divergence, backend="triton", **head):
    """`distill_cases.run` on the device."""
    return on_cpu(cases.run(move(batch), divergence, backend, **head))


def compare(batch, divergence, chunk=None, **head):
    return cases.compare(batch, divergence, "triton", chunk, run, **head)


@pytest.mark.parametrize("divergence", cases.EACH, ids=cases.name_of)
def test_n1_each_divergence_against_fp64(divergence):
    compare(cases.make(**SHAPE), divergence, chunk=100)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("teacher", ["head", "logits", "top-k"])
def test_n1_half_precision_of_every_teacher(teacher, dtype):
    batch = cases.make(**SHAPE, dtype=dtype, teacher=teacher)
    compare(batch, po.ForwardKL() + 0.1 * po.NLL(), chunk=100)


HEADS = [
    ("softcap", {"head": {"softcap": 3.0}, "t_head": {"softcap": 5.0}, "bias": True}),
    ("scale", {"head": {"logit_scale": -0.7, "temperature": 1.3}, "t_head": {"logit_scale": 0.5}}),
]


@pytest.mark.parametrize("teacher", ["head", "top-k"])
@pytest.mark.parametrize("name, options", HEADS, ids=[h[0] for h in HEADS])
def test_n1_heads_beside_an_objective(name, options, teacher):
    compare(cases.make(**SHAPE, teacher=teacher, **options), MIXED)


def test_n1_a_wider_vocabulary_than_one_program_holds_in_a_tile():
    compare(cases.make(n=40, d=64, v=128_256, dtype=torch.bfloat16), po.JSD(0.5), chunk=16)


def test_n1_gradients_narrower_than_their_logits_in_place():
    """fp32 logits, bf16 gradients over the same memory."""
    batch = cases.make(**SHAPE, dtype=torch.bfloat16)
    compare(batch, MIXED, logits_dtype=torch.float32)


def test_n1_a_teacher_in_another_dtype():
    batch = cases.make(**SHAPE, dtype=torch.bfloat16, teacher="logits")
    batch["t_logits"] = batch["t_logits"].float()
    compare(batch, po.ReverseKL())


def test_n2_n3_a_bad_row_stays_alone_and_rows_that_do_not_count_are_zero():
    batch = cases.make(**SHAPE, dtype=torch.bfloat16)
    clean = run(batch, po.JSD(0.5))
    counted = (batch["labels"] != -100) & (batch["weights"] != 0)
    assert not clean["dhidden"][~counted].any() and not counted.all()
    batch["hidden"] = batch["hidden"].clone()
    bad = int(counted.nonzero()[-3])
    batch["hidden"][bad] = torch.nan
    got, others = run(batch, po.JSD(0.5)), torch.arange(SHAPE["n"]) != bad
    assert got["loss"].isnan() and got["dhidden"][bad].isnan().all()
    same_bits("dhidden", got["dhidden"][others], clean["dhidden"][others])


@pytest.mark.parametrize("teacher", ["head", "top-k"])
def test_n9_the_same_bits_run_to_run(teacher):
    batch = cases.make(**SHAPE, dtype=torch.bfloat16, teacher=teacher)
    first, second = (run(batch, MIXED) for _ in range(2))
    for k in ("loss", "dhidden", "dweight"):
        same_bits(k, first[k], second[k])

"""The row pass (`kernels/row_pass.py`) as it is compiled for a GPU, on the emulator: objectives of
THE TABLE, gradients over their logits, what a logit costs, and that no barrier is missing.

Against `_C.row_pass`, whose own truth is fp64 (test_numbers*.py).
"""

import functools
import math
import operator

import pytest
import torch
from emulator.barriers import survivors
from emulator.triton_driver import LAUNCHES
from row_cases import outputs, random_rows, swept
from test_objectives import CASES

import pyoffline as po
from pyoffline.gpu_rows import float32_rows
from pyoffline.kernels import row_pass as kernel

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMPOSED = CASES["composed"]
# PTX of both sweeps for a logit, moves and widening not counted; ptxas joins some of it.
MOST_INSTRUCTIONS = {BF16: 26, FP32: 27.5}


def launched(logits, rows, dlogits):
    """Outputs by name."""
    out, flag = outputs(logits.shape[0]), torch.zeros(2, dtype=torch.int64)
    kernel.row_pass(logits, dlogits, rows, tuple(out.values()), flag)
    assert not flag.any()
    return out


def case(n, vocab, dtype, objective, stride=None, seed=0):
    """(logits of some row stride, rows)."""
    stride = stride or vocab + -vocab % 16
    memory = torch.full((n, stride), math.nan, dtype=dtype)
    logits = memory[:, :vocab]
    logits.copy_(3 * torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)))
    return logits, float32_rows(random_rows(n, vocab, objective, seed))


def compare(logits, grad, rows, in_place=True):
    """Both row passes, their gradients over their logits or apart, from memory that holds NaN."""
    n, vocab = logits.shape
    results = []
    for run in (launched, swept):
        memory = torch.full((n, logits.stride(0)), math.nan, dtype=logits.dtype)
        given = memory[:, :vocab]
        given.copy_(logits)
        place = memory if in_place else torch.full_like(memory, math.nan)
        dlogits = place.view(grad)[:, :vocab]
        results.append((run(given, rows, dlogits), dlogits))
        assert place[:, vocab:].isnan().all(), "what lies between rows is not written"
    (got, dlogits), (want, expected) = results
    for name, x in want.items():
        torch.testing.assert_close(
            got[name], x, atol=5e-6, rtol=5e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    largest, step = float(expected.float().abs().max()), torch.finfo(grad).eps
    torch.testing.assert_close(
        dlogits.float(), expected.float(), atol=2e-6 * largest, rtol=max(step, 5e-6)
    )


# One program a handful: a compilation takes longer than its run.
HANDFULS = [list(CASES)[i : i + 5] for i in range(0, len(CASES), 5)]


@pytest.mark.parametrize("names", HANDFULS, ids="+".join)
def test_every_objective_of_the_table(names):
    terms = [(1.0 + 0.1 * i) * CASES[name] for i, name in enumerate(names)]
    logits, rows = case(9, 300, FP32, functools.reduce(operator.add, terms))
    compare(logits, FP32, rows)


@pytest.mark.parametrize(
    ("dtype", "grad", "vocab", "stride", "in_place"),
    [
        (BF16, BF16, 20_000, None, True),
        (FP16, FP16, 1003, 1003, False),
        (BF16, BF16, 5001, 5001, False),
        (FP32, BF16, 18_011, None, True),
        (FP32, FP32, 4099, 4099, False),
        (FP32, FP32, 4099, None, True),
    ],
)
def test_gradients_of_rows_that_start_anywhere(dtype, grad, vocab, stride, in_place):
    """The library's own rows start at multiples of 16 elements; given ones are not overwritten."""
    logits, rows = case(3, vocab, dtype, COMPOSED, stride)
    compare(logits, grad, rows, in_place)


def test_infinite_constants_leave_entries_without_probability_alone():
    """A ratio that overflows: its row is infinite where p > 0, and 0, not NaN, where p = 0."""
    logits, rows = case(2, 300, FP32, po.PPOClip(0.2, None))
    logits[:, 7] = -math.inf
    rows.labels[:] = 5
    rows.old[:] = -1e4
    rows.adv[:] = 1.0
    got = torch.full((2, 300), math.nan)
    launched(logits, rows, got)
    assert (got[:, 7] == 0).all() and not got.isnan().any() and got[:, 5].isinf().all()


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_what_a_logit_costs(dtype):
    """Two reads, of which the second is from L2, one write, two exponentials and an eighth."""
    seen = []
    for vocab in (32_768, 65_536):
        logits, rows = case(1, vocab, dtype, COMPOSED)
        launched(logits, rows, logits)
        seen.append(LAUNCHES[-1].counts)
    few, many = seen
    per_logit = {k: (many.by_opcode[k] - few.by_opcode[k]) / 32_768 for k in many.by_opcode}
    size = dtype.itemsize
    assert many.global_stored - few.global_stored == size * 32_768
    loaded = (many.global_loaded - few.global_loaded) / 32_768
    assert 2 * size <= loaded <= 2.01 * size  # the lane of the maximum is read once more
    assert per_logit["ex2.approx.ftz.f32"] <= 2 + size / 16 + 0.01
    work = {k: n for k, n in per_logit.items() if not k.startswith(("mov.", "cvt."))}
    assert sum(work.values()) < MOST_INSTRUCTIONS[dtype]


@pytest.mark.parametrize(("dtype", "grad", "idle"), [(BF16, BF16, 0), (FP32, BF16, 2)], ids=str)
def test_a_barrier_that_is_left_out_is_found(dtype, grad, idle):
    """A narrower gradient overwrites logits of its own tile in the first tile only."""
    logits, rows = case(1, 20_000, dtype, po.PPOClip())
    want = logits.clone()
    launched(want, rows, want.view(grad)[:, :20_000])

    def run():
        got = logits.clone()
        launched(got, rows, got.view(grad)[:, :20_000])
        assert torch.equal(got.view(torch.uint8), want.view(torch.uint8))

    assert len(survivors(LAUNCHES[-1].kernel, run)) == idle

"""What the tests of row kernels share: poisoned outputs, random rows, the comparison with fp64."""

import math

import batches
import oracle
import torch
from compare import check_forward, check_gradient, check_loss

import pyoffline as po
from pyoffline import _C
from pyoffline.calls import RowOutputs, Rows
from pyoffline.cpu import row_arguments

NAMES = ("loss", "logps", "entropy", "lse", "log_sum_p2", "is_top1", "gap", "coefs")


def outputs(n, **changes):
    """The kernels' outputs by name, in order, poisoned with NaN (is_top1: 7)."""
    one = {name: torch.full((n,), math.nan) for name in NAMES[:-1]}
    one["is_top1"] = torch.full((n,), 7, dtype=torch.uint8)
    return one | {"coefs": torch.full((4, n), math.nan)} | changes


def random_rows(n, vocab, objective, seed=0, **options):
    """Rows with a program and all that one can read; about a third of them do not count."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, vocab, (n,), generator=g)
    weights = torch.rand(n, generator=g) + 0.5
    if n > 5:
        labels[3::7], weights[5::6] = -100, 0.0
    near = -torch.rand(n, generator=g) * 3 - 0.5
    program = objective.program(False)
    return Rows(
        labels, weights, old=near, mu=near, ref=near - 0.1, adv=torch.randn(n, generator=g),
        extras={k: torch.rand(n, generator=g) for k in program.gates},
        codes=program.codes, hyper=program.hyper, **options,
    )  # fmt: skip


def swept(logits, rows, dlogits=None):
    """Outputs of `_C.row_pass` by name; the gradient goes into dlogits. Without a program the loss
    and the coefficients stay NaN."""
    out = outputs(logits.shape[0])
    named = RowOutputs(**{k: x for k, x in out.items() if k != "coefs"}, coefs=None)
    program = {"codes": rows.codes, "hyper": rows.hyper, "loss": out["loss"]} if rows.codes else {}
    _C.row_pass(
        logits, rows.labels, **row_arguments(rows, named), **program, gap=out["gap"],
        dlogits=dlogits, coefs_out=out["coefs"] if rows.codes else None,
    )  # fmt: skip
    return out


def compare(batch, objective, backend="triton", chunk=None, upstream=1.0, run=batches.run, **head):
    """Against fp64, at the bar of the same-dtype PyTorch reference on the CPU."""
    truth = oracle.run(batch, objective, torch.float64, upstream)
    bar = oracle.run(batch, objective, None, upstream)
    with po.chunk_rows(chunk or 10_000):
        got = run(batch, objective, backend, upstream, **head)
    check_loss(got["loss"], truth, bar)
    for k in ("logps", "entropy", "lse"):
        check_forward(k, got[k], truth[k], bar[k])
    for k in ("dhidden", "dweight", "dbias"):
        if truth.get(k) is not None:
            check_gradient(k, got[k], truth[k], bar[k])
    return got

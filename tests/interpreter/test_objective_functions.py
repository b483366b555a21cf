"""Every row of THE TABLE as a Triton device function against the PyTorch reference, on the grid
with ties, clip borders and overflow (PROMISES N3, N4, N5), and the scalar functions against fp64.
"""

import inspect
import math

import pytest
import torch
import triton
import triton.language as tl
from test_objectives import ADVANTAGES, CASES, LOG_RATIOS
from test_objectives_cpu import check_same, rounding_unit

import pyoffline as po
from pyoffline.kernels import objective_functions, scalar_ops
from pyoffline.kernels.objective_functions import evaluate_program
from pyoffline.objectives import TABLE
from pyoffline.program import RowScalars, evaluate

NAN, INF = math.nan, math.inf
NAMES = ("logp", "entropy", "lse", "gap", "old", "mu", "ref", "adv", "g")


@triton.jit
def program_kernel(in_ptr, out_ptr, n, hyper, CODES: tl.constexpr, BLOCK: tl.constexpr):
    """evaluate_program on n tokens at once; in [9, n], out [5, n]."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < n
    values = ()
    for k in tl.static_range(9):
        values = values + (tl.load(in_ptr + k * n + i, mask=inside, other=0.0),)
    stats = (values[0], values[1], values[2], values[3])
    given = (values[4], values[5], values[6], values[7])
    out = evaluate_program(stats, given, (values[8],), hyper, CODES)
    for k in tl.static_range(5):
        tl.store(out_ptr + k * n + i, out[k], mask=inside)


def triton_and_python(objective, vectors):
    """(loss, a, b, c, e) of the kernel and of program.evaluate in fp32, and in fp64."""
    program = objective.program(True)
    table = torch.stack([vectors[k] for k in NAMES])
    n = table.shape[1]
    got = torch.full((5, n), NAN)
    hyper = tuple(program.hyper.float().flatten().tolist())
    program_kernel[(-(-n // 64),)](table, got, n, hyper, CODES=program.codes, BLOCK=64)
    rows = RowScalars(**{k: vectors[k] for k in NAMES[:-1]})
    extras = {k: vectors[k] for k in program.gates}
    want = evaluate(program.codes, program.hyper, rows, extras)
    wide = RowScalars(*(x.double() for x in rows))
    truth = evaluate(program.codes, program.hyper, wide, {k: v.double() for k, v in extras.items()})
    return list(got), list(want), list(truth), rows


def grid():
    """Log-ratios x advantages at a likely and an unlikely label; both sides of usual borders."""
    points = [(p, r, a) for p in (-0.3, -40.0) for r in LOG_RATIOS for a in ADVANTAGES]
    points += [(-0.3, math.log(x), a) for x in (0.8, 1.2, 1.28, 1.5, 2.0, 0.5) for a in (-1.0, 1.0)]
    logp, ratio, adv = (torch.tensor(x, dtype=torch.float32) for x in zip(*points, strict=True))
    vectors = dict.fromkeys(("old", "mu", "ref"), logp - ratio) | {"adv": adv, "g": adv}
    other = torch.linspace(-3, 3, logp.numel())
    return vectors | {"logp": logp, "entropy": other.abs(), "lse": other, "gap": other.abs() + 1}


@pytest.mark.parametrize("name", CASES)
def test_N4_triton_equals_python_on_the_grid(name):
    vectors = grid()
    got, want, truth, rows = triton_and_python(CASES[name], vectors)
    check_same(got, want, truth, rounding_unit(CASES[name], rows, vectors))


@pytest.mark.parametrize("name", CASES)
def test_N3_triton_and_python_agree_on_nan_and_inf_inputs(name):
    """NaN, inf and -inf in each input in turn, in one launch."""
    g = torch.Generator().manual_seed(0)
    n = 3 * len(NAMES) * 2
    logp = -torch.rand(n, generator=g) * 5 - 0.1
    vectors = {k: (logp + 0.3 * torch.randn(n, generator=g)).clamp(max=-0.01) for k in NAMES[4:7]}
    vectors |= {k: torch.randn(n, generator=g) for k in ("adv", "g", "entropy", "lse", "gap")}
    vectors["logp"] = logp
    for i, (field, value) in enumerate((k, v) for k in NAMES for v in (NAN, INF, -INF)):
        vectors[field][2 * i + 1] = value
    got, want, _, _ = triton_and_python(CASES[name], vectors)
    for part, t, p in zip(("loss", *"abce"), got, want, strict=True):
        assert torch.equal(t.isnan(), p.isnan()), part
        assert torch.equal(t.isinf(), p.isinf()), part
        assert (t[t.isinf()] == p[p.isinf()]).all(), part


def test_every_function_of_the_table_is_compiled_and_called_with_its_own_arguments():
    """The calls in objective_row, read from its source, are the table's rows in its order."""
    assert set(TABLE) <= set(objective_functions.FUNCTIONS)
    source = inspect.getsource(objective_functions.objective_row.fn)
    branches = [b.strip() for b in source.split("loss, coef = ")[1:]]
    assert len(branches) == len(TABLE)
    for branch, (name, row) in zip(branches, TABLE.items(), strict=True):
        numbered = [f"p[{i}]" for i in range(len(row.params))]
        assert branch.startswith(f"{name}({', '.join((*row.reads, *numbered))})")
        if row is not list(TABLE.values())[-1]:
            assert f"CODE == {row.code}:" in source.split(branch)[0][-60:]


def test_a_gate_or_scale_of_zero_switches_a_term_off_even_where_it_is_not_finite():
    vectors = grid()
    vectors["ref"] = torch.full_like(vectors["ref"], INF)
    vectors["g"] = torch.zeros_like(vectors["g"])
    alone = triton_and_python(po.WeightedNLL(), vectors)[0]
    for other in (po.KL("k3").weighted_by("g"), 0.0 * po.KL("k3")):
        got = triton_and_python(po.WeightedNLL() + other, vectors)[0]
        for a, b in zip(got, alone, strict=True):
            assert torch.equal(a, b)


@triton.jit
def scalar_kernel(x_ptr, y_ptr, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=1.0)
    tl.store(y_ptr + i, FUNCTION(x), mask=i < n)


EDGES = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e-8, 0.25, 0.5, 1.0, 1.5, 88.0, 88.72, 88.73, 89.0, 103.9]
EDGES += [104.0, 110.0, 1e5, 3e38, INF]
# function, low, high, largest error in ulps of the result
SCALARS = [
    ("exp", -104.0, 89.0, 2.0),
    ("expm1", -30.0, 60.0, 2.0),
    ("expm1_near", -0.3465, 0.3465, 2.0),  # no further
    ("log", 1e-3, 1e3, 2.0),
    ("log_normal", 1e-3, 1e3, 2.0),
    ("log1p", -0.999, 1e3, 2.0),
    ("tanh", -12.0, 12.0, 4.0),
]


@pytest.mark.parametrize("name, low, high, ulps", SCALARS)
def test_N5_scalar_functions_are_within_a_few_ulps_and_keep_nan(name, low, high, ulps):
    x = torch.cat([torch.linspace(low, high, 20_001), torch.tensor(EDGES), -torch.tensor(EDGES)])
    if name in ("expm1", "expm1_near", "log1p", "tanh"):
        x = torch.cat([x, torch.logspace(-30, 0, 2001), -torch.logspace(-30, -0.01, 2001)])
    elif name.startswith("log"):
        x = torch.cat([x, 1 + torch.logspace(-7, 0, 2001), 1 - torch.logspace(-7, -1, 2001)])
    if name == "expm1_near":
        x = x[x.abs() <= high]
    elif name == "log_normal":
        x = x[(x >= 2.0**-126) & (x <= 2.0**126)]
    x = torch.cat([x, torch.tensor([NAN])])
    got = torch.full_like(x, -7.0)
    scalar_kernel[(-(-x.numel() // 8192),)](
        x, got, x.numel(), FUNCTION=getattr(scalar_ops, name), BLOCK=8192
    )
    truth = getattr(torch, name.split("_")[0])(x.double())
    want = truth.float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf())
    ok = want.isfinite()
    up = torch.nextafter(want.abs(), torch.tensor(INF)) - want.abs()
    error = ((got.double() - truth).abs() / up.double())[ok]
    assert error.max() <= ulps, (error.max(), x[ok][error.argmax()])

"""The C++ objective functions against the Python ones, on the row scalars that C++ itself found."""

import math

import pytest
import torch
from batches import needs_cpu
from compare import EPS32
from test_objectives import ADVANTAGES, CASES, LOG_RATIOS

from pyoffline.objectives import TABLE
from pyoffline.program import RowScalars, evaluate

pytestmark = [needs_cpu, pytest.mark.usefixtures("one_thread")]
NAN, INF = math.nan, math.inf
NAMES = ("old", "mu", "ref", "adv", "g")


def c_and_python(objective, logits, vectors):
    """(loss, a, b, c, e) of C++ and of program.evaluate in fp32 on C++'s own row scalars."""
    from pyoffline import _C

    n = logits.shape[0]
    program = objective.program(True)
    out = {k: torch.full((n,), NAN) for k in ("loss", "logps", "entropy", "lse", "gap")}
    coefs = torch.full((4, n), NAN)
    extras = {k: vectors[k] for k in program.gates}
    given = {k: vectors[k] for k in ("old", "mu", "ref", "adv") if k in program.reads}
    _C.row_pass(
        logits,
        torch.zeros(n, dtype=torch.long),
        codes=program.codes,
        hyper=program.hyper,
        extras=tuple(extras.values()),
        coefs_out=coefs,
        **given,
        **out,
    )
    rows = RowScalars(out["logps"], out["entropy"], out["lse"], out["gap"], **given)
    want = evaluate(program.codes, program.hyper, rows, extras)
    wide = RowScalars(*(None if x is None else x.double() for x in rows))
    truth = evaluate(program.codes, program.hyper, wide, {k: v.double() for k, v in extras.items()})
    return [out["loss"], *coefs], list(want), list(truth), rows


def two_tokens(logp):
    """[N, 2] logits whose first token has about these log-probs (below -60 they are exact)."""
    other = torch.where(logp < -60, -logp, torch.log(torch.expm1(-logp.double())).float())
    return torch.stack([torch.zeros_like(other), other], -1)


def grid(objective):
    """Log-ratios x advantages, at a likely and at an unlikely label; ties at ratio 1 and A = 0."""
    points = [(p, r, a) for p in (-0.3, -40.0) for r in LOG_RATIOS for a in ADVANTAGES]
    # both sides of, and at, the usual clip borders
    points += [(-0.3, math.log(x), a) for x in (0.8, 1.2, 1.28, 1.5, 2.0, 0.5) for a in (-1.0, 1.0)]
    logp, ratio, adv = (torch.tensor(x, dtype=torch.float32) for x in zip(*points, strict=True))
    vectors = dict.fromkeys(("old", "mu", "ref"), logp - ratio) | {"adv": adv, "g": adv}
    return two_tokens(logp), vectors


def check_same(got, want, truth, size):
    """Equal NaN and inf patterns; finite values within a few ulps of `size`."""
    for (
        name,
        g,
        w,
        t,
    ) in zip(("loss", *"abce"), got, want, truth, strict=True):
        assert torch.equal(g.isnan(), w.isnan()), name
        wild = g.isinf() | w.isinf()
        # at the edge of fp32 one may round to inf where the other holds the largest number
        assert (wild <= ((g == w) | g.isnan() | (t.abs() > 3e38))).all(), name
        ok = g.isfinite() & w.isfinite()
        allowed = 8 * EPS32 * (t.abs() + size)[ok] + 1e-37
        assert ((g - w).abs()[ok] <= allowed).all(), (name, (g - w).abs()[ok].max())


def rounding_unit(objective, rows, vectors):
    """What cancels inside a loss leaves this behind: the D and the exp(-D) of a KL."""
    unit = torch.ones_like(rows.logp.double())
    for name in ("old", "mu", "ref"):
        moved = (rows.logp.double() - vectors[name].double()).abs().clamp(max=1e6)
        unit = unit + moved
    ratio = (rows.logp.double() - vectors["old"].double()).clamp(max=88).exp()
    scales = sum(abs(t.scale) for t in objective.terms(True))
    heavy = {"kl_k3_is"} & {t.row for t in objective.terms(True)}
    return scales * unit * (ratio.clamp(min=1.0) if heavy else 1.0)


@pytest.mark.parametrize("name", CASES)
def test_cpp_equals_python_on_the_grid(name):
    logits, vectors = grid(CASES[name])
    got, want, truth, rows = c_and_python(CASES[name], logits, vectors)
    size = rounding_unit(CASES[name], rows, vectors)
    check_same(got, want, truth, size)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_N3_cpp_and_python_agree_on_nan_and_inf_inputs(name, value):
    """Each input in turn, in a batch of 40 rows so that whole vectors and a tail are met."""
    g = torch.Generator().manual_seed(0)
    n = 40
    logp = -torch.rand(n, generator=g) * 5 - 0.1
    vectors = {k: logp + 0.3 * torch.randn(n, generator=g) for k in ("old", "mu", "ref")}
    vectors = {k: v.clamp(max=-1e-2) for k, v in vectors.items()}
    vectors |= {k: torch.randn(n, generator=g) for k in ("adv", "g")}
    for target in ("logits", *NAMES):
        logits, changed = two_tokens(logp), {k: v.clone() for k, v in vectors.items()}
        if target == "logits":
            logits[5::6, 0] = value
        else:
            changed[target][5::6] = value
        got, want, _, _ = c_and_python(CASES[name], logits, changed)
        for part, c, p in zip(("loss", *"abce"), got, want, strict=True):
            assert torch.equal(c.isnan(), p.isnan()), (target, part)
            assert torch.equal(c.isinf(), p.isinf()), (target, part)
            assert (c[c.isinf()] == p[p.isinf()]).all(), (target, part)


def test_tables_agree():
    from pyoffline import _C

    assert _C.codes() == {name: row.code for name, row in TABLE.items()}

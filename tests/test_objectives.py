"""Objectives as functions of row scalars: the maths against an independent autograd oracle, the
extreme ratios, composition, names and validation (PROMISES N4, N5, N12).

The C++ functions against these are in test_objectives_cpu.py.
"""

import dataclasses
import inspect
import math

import oracle
import pytest
import torch

import pyoffline as po
from pyoffline import objective_math
from pyoffline.objectives import REGISTRY, ROW_INPUTS, TABLE, from_name, snake_case
from pyoffline.program import RowScalars, evaluate
from pyoffline.token_objectives import DFT, ImportanceSampling, Luffy

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "nll": po.NLL(),
    "nll_smoothing_z": po.NLL(label_smoothing=0.1, z_loss=1e-2),
    "weighted_nll": po.WeightedNLL(),
    "dft": DFT(),
    "prob_power": po.ProbPower(0.5),
    "prob_power_0": po.ProbPower(0.0),
    "luffy": Luffy(),
    "iw_sft": po.ImportanceWeightedSFT(),
    "iw_sft_open": po.ImportanceWeightedSFT(low=0.0, high=None),
    "proximal_sft": po.ProximalSFT(),
    "is": ImportanceSampling(),
    "power_is": po.PowerIS(0.5),
    "power_is_0": po.PowerIS(0.0),
    "power_is_negative": po.PowerIS(-0.7),
    "power_is_above_1": po.PowerIS(1.5),
    "truncated_is": po.TruncatedIS(0.5, 1.2),
    "truncated_is_open": po.TruncatedIS(0.0, None),
    "ppo": po.PPOClip(),
    "ppo_dual_delta": po.PPOClip(0.1, 0.28, dual_clip=1.5, delta=1.7),
    "ppo_delta_inside_clip": po.PPOClip(0.2, 0.9, delta=1.3),
    "decoupled": po.DecoupledPPO(),
    "decoupled_cap": po.DecoupledPPO(0.2, 0.3, behavior_cap=1.1),
    "cispo": po.CISPO(0.7, 1.2),
    "sapo": po.SAPO(),
    "dppo_tv": po.DPPO("tv", 0.02, 0.01),
    "dppo_kl": po.DPPO("kl", 0.002, 0.001, cap=1.1),
    "dro": po.DRO(0.3),
    "asym_re": po.AsymRE(),
    "topr": po.TOPRToken(),
    "distill_is": po.DistillToken(0.5, 1.5),
    "kl_k1": po.KL("k1"),
    "kl_k2": po.KL("k2", "old"),
    "kl_k3": po.KL("k3", "mu"),
    "kl_k3_is": po.KL("k3_is"),
    "entropy": po.Entropy(),
    "z_loss": po.ZLoss(),
    "composed": po.PPOClip() + 0.04 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss(),
    "gated": po.WeightedNLL() - 0.5 * po.NLL(0.2).weighted_by("g"),
    "negative_nested": -2.0 * (po.SAPO() - 3.0 * (po.KL("k2") + po.DRO(0.1))),
}


def scalars(n=200, seed=0, spread=0.4):
    """Random row scalars in fp64; advantages of both signs, some 0; a few labels exactly equal."""
    g = torch.Generator().manual_seed(seed)

    def randn():
        return torch.randn(n, generator=g, dtype=torch.float64)

    logp = -randn().abs() * 2 - 0.05
    rows = {"logp": logp, "entropy": randn().abs(), "lse": 3 * randn(), "gap": randn().abs() + 1}
    for name in ("old", "mu", "ref"):
        rows[name] = (logp + spread * randn()).clamp(max=-0.01)
        rows[name][::17] = logp[::17]
    rows["adv"] = randn()
    rows["adv"][::9] = 0.0
    return rows, {"g": randn().where(torch.arange(n) % 5 != 0, torch.zeros(()))}


def autograd(objective, rows, extra):
    """Loss, a, b, c, e of the oracle."""
    leaves = {k: rows[k].clone().requires_grad_() for k in ("logp", "entropy", "lse", "gap")}
    loss = oracle.losses(objective, oracle.Rows(**{**rows, **leaves}, extra=extra))
    loss.sum().backward()
    zero = torch.zeros_like(loss)
    grads = [x.grad if x.grad is not None else zero for x in leaves.values()]
    return [loss.detach(), *grads]


def ours(objective, rows, extra, has_mu=True):
    """The same five vectors from the package's table."""
    program = objective.program(has_mu)
    extra = {k: extra[k] for k in program.gates}
    return evaluate(program.codes, program.hyper, RowScalars(**rows), extra)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_coefficients_equal_autograd_of_the_oracle(name):
    rows, extra = scalars()
    got, want = ours(CASES[name], rows, extra), autograd(CASES[name], rows, extra)
    for part, g, w in zip(got._fields, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-12, msg=lambda m, p=part: f"{p}: {m}")


def test_every_row_of_the_table_is_a_case():
    reached = {t.row for o in CASES.values() for t in o.terms(True)} | {"distill_token"}
    assert reached == set(TABLE)


def test_distill_token_without_behaviour_logps_has_weight_one():
    rows, extra = scalars()
    rows["mu"] = None
    got = ours(po.DistillToken(), rows, extra, has_mu=False)
    want = autograd(po.DistillToken(), rows, extra)
    torch.testing.assert_close(got.loss, want[0])
    torch.testing.assert_close(got.a, want[1])


def test_prob_power_without_advantages_means_one():
    rows, extra = scalars()
    alone, ones = dict(rows, adv=None), dict(rows, adv=torch.ones_like(rows["adv"]))
    for part in ("loss", "a"):
        got = getattr(ours(po.ProbPower(), alone, extra), part)
        assert torch.equal(got, getattr(ours(po.ProbPower(), ones, extra), part))


# objective, which log-probs its ratio is against, sign of the log-ratio that is clipped per A sign
LOG_RATIOS = [s * x for x in (0.0, 1e-8, 20, 88, 89, 100, 104, 700, 1e30) for s in (1, -1)]
ADVANTAGES = [-1.0, 0.0, 1.0, 1e-30]
BY_ADVANTAGE = [n for n in CASES if n in REGISTRY and n not in ("nll", "dro", "entropy", "z_loss")]
EXTREME = {
    name: o
    for name, o in CASES.items()
    if name not in ("nll", "nll_smoothing_z", "entropy", "z_loss", "gated", "composed")
}


def extreme_rows(dtype):
    """Every log-ratio with every advantage; old, mu and ref share the ratio; all logps <= -1.5."""
    grid = [(r, a) for r in LOG_RATIOS for a in ADVANTAGES]
    ratio, adv = (torch.tensor(x, dtype=torch.float32).to(dtype) for x in zip(*grid, strict=True))
    # rounded to fp32 in both, so that both precisions see the same differences
    l = (ratio.float().clamp(max=0.0) - 1.5).to(dtype)  # noqa: E741  the docstrings' symbol
    anchor = (l.float() - ratio.float()).to(dtype)
    ones = torch.ones_like(l)
    rows = {"logp": l, "entropy": ones, "lse": ones, "gap": ones, "adv": adv}
    return rows | {k: anchor.clone() for k in ("old", "mu", "ref")}


@pytest.mark.parametrize("name", EXTREME)
def test_N4_extreme_log_ratios_give_the_true_value_or_a_visible_inf(name):
    objective = EXTREME[name]
    got = ours(objective, extreme_rows(torch.float32), {})
    truth = autograd(objective, extreme_rows(torch.float64), {})
    for part, g, w in zip(("loss", "a"), got[:2], truth[:2], strict=True):
        assert not g.isnan().any(), f"{part} NaN at {g.isnan().nonzero()[:, 0].tolist()}"
        finite = w.isfinite() & g.isfinite()
        # exp turns the rounding of its argument (88 eps at most) into a relative error
        torch.testing.assert_close(g[finite].double(), w[finite], rtol=3e-5, atol=1e-30)
        visible = g.isinf() & w.isfinite()
        rows = extreme_rows(torch.float64)
        power = max(1.0, getattr(objective, "alpha", 1.0))  # w^alpha is formed at once
        overflow = (power * (rows["logp"] - rows["old"]) > 88.7) | (w.abs() > 3.4e38)
        assert overflow[visible].all(), "an inf where neither ratio nor result overflows fp32"
        assert (g[visible].sign() == w[visible].sign()).all(), "an inf of the wrong sign"


@pytest.mark.parametrize("name", BY_ADVANTAGE)
def test_N4_advantage_zero_gives_exactly_zero_at_any_ratio(name):
    objective = CASES[name]
    rows = extreme_rows(torch.float32)
    if "adv" not in objective.program(True).reads or name == "asym_re":
        pytest.skip("the advantage does not multiply this loss")
    rows["adv"] = torch.zeros_like(rows["adv"])
    got = ours(objective, rows, {})
    assert (got.loss == 0).all() and (got.a == 0).all()


# log(r), log(old/mu), advantage: one of the factors alone is 0 or inf in fp32, their product is not
TWO_RATIOS = [
    (300.0, -310.0, -1.0),
    (-120.0, 118.0, 1.0),
    (-300.0, 299.0, 1.0),
    (95.0, -90.0, -1.0),
]


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("log_ratio, log_behavior, adv", TWO_RATIOS)
def test_N5_the_two_ratios_of_decoupled_ppo_are_exponentiated_once(
    log_ratio, log_behavior, adv, backend
):
    logits = torch.tensor([[0.0, 0.0]], requires_grad=True)
    logp = torch.tensor([-math.log(2.0)])
    old = logp - log_ratio
    tokens = po.TokenBatch(
        torch.tensor([0]), torch.tensor([adv]), old, behavior_logps=old - log_behavior
    )
    with po.use_backend(backend):
        out = po.policy_loss(logits, tokens, po.DecoupledPPO())
        out.loss.backward()
    both = math.exp((logp - old).double() + (old - tokens.behavior_logps).double())
    assert out.loss.item() == pytest.approx(-adv * both, rel=3e-5)
    assert logits.grad[0, 0].item() == pytest.approx(-adv * both / 2, rel=3e-5)


# objective, log-ratio, advantage: what is clipped there, and the loss that it then has
CLIPPED = [
    (po.PPOClip(), 1.0, 1.0, -1.2, "above 1+high with A > 0"),
    (po.PPOClip(), -1.0, -1.0, 0.8, "below 1-low with A < 0"),
    (po.PPOClip(), 1e30, 1.0, -1.2, "an infinite ratio is clipped, not multiplied"),
    (po.PPOClip(dual_clip=3.0), 20.0, -1.0, 3.0, "dual clip"),
    (po.PPOClip(dual_clip=3.0), 1e30, -1.0, 3.0, "dual clip of an infinite ratio"),
    (po.PPOClip(delta=2.0), 100.0, -1.0, 2.0, "delta cap"),
    (po.PPOClip(delta=2.0), 1e30, -1.0, 2.0, "delta cap of an infinite ratio"),
    (po.ProximalSFT(), 1.0, 1.0, -1.28, "A = 1"),
    (po.ProximalSFT(), 1e30, 1.0, -1.28, "A = 1, infinite ratio"),
    (po.DecoupledPPO(), 89.0, 1.0, -1.2, "old = mu, so the behaviour factor is 1"),
    (po.DPPO("tv", 0.1, 0.1), 89.0, 1.0, 0.0, "p moved up by more than delta_high"),
    (po.DPPO("kl", 0.1, 0.1), 89.0, 1.0, 0.0, "the same for the KL ball"),
    (po.SAPO(), 1e30, 1.0, -4.0, "saturated at 4/tau, gradient 0 by branch"),
    (po.SAPO(), 700.0, -1.0, 4.0 / 1.05, "saturated, A < 0"),
]


@pytest.mark.parametrize(
    "objective, log_ratio, adv, loss, reason", CLIPPED, ids=[str(c[0])[:40] + c[4] for c in CLIPPED]
)
def test_N4_a_clipped_token_has_gradient_exactly_zero(objective, log_ratio, adv, loss, reason):
    l = torch.tensor([-0.5])  # noqa: E741
    anchor = l - log_ratio
    rows = RowScalars(l, l, l, l, anchor, anchor, anchor, torch.tensor([adv]))
    got = evaluate(objective.program(True).codes, objective.program(True).hyper, rows, {})
    assert got.a.item() == 0.0, reason
    assert got.loss.item() == pytest.approx(loss, rel=1e-6), reason


@pytest.mark.parametrize("adv", [1.0, -1.0])
def test_N4_the_clip_border_counts_as_unclipped(adv):
    """log 2 and log 1/2 are borders of clip_high = 1, clip_low = 0.5 that fp64 reaches exactly."""
    ratio = torch.tensor([2.0, 0.5], dtype=torch.float64)
    l = torch.zeros(2, dtype=torch.float64)  # noqa: E741
    rows = RowScalars(l, l, l, l, -ratio.log(), adv=torch.full_like(l, adv))
    assert torch.equal(torch.exp(l - rows.old), ratio)
    program = po.PPOClip(0.5, 1.0).program(False)
    assert torch.equal(evaluate(program.codes, program.hyper, rows, {}).a, -ratio * adv)


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("gated", "composed")])
@pytest.mark.parametrize("field", ["logp", "entropy", "lse", "gap", "old", "mu", "ref", "adv"])
def test_N3_a_nan_input_that_is_read_makes_loss_and_a_coefficient_nan(name, field):
    rows, extra = scalars(n=40)
    objective, poisoned = CASES[name], dict(rows, **{field: rows[field].clone()})
    poisoned[field][11] = math.nan
    got, clean = ours(objective, poisoned, extra), ours(objective, rows, extra)
    read = {a for t in objective.terms(True) for a in TABLE[t.row].reads}
    anchors = {t.anchor for t in objective.terms(True)}
    read |= {n for n, i in (("ref", 1), ("old", 2), ("mu", 3)) if i in anchors}
    coefs = torch.stack(got[1:])
    assert bool(got.loss[11].isnan()) == (field in read)
    assert bool(coefs[:, 11].isnan().any()) == (field in read)
    others = torch.arange(40) != 11
    for g, c in zip(got, clean, strict=True):
        assert torch.equal(g[others], c[others])


def test_a_gate_of_zero_switches_a_term_off_even_where_it_is_not_finite():
    objective = po.WeightedNLL() + po.KL("k3").weighted_by("g")
    l = torch.tensor([-1.0, -1.0])  # noqa: E741
    rows = RowScalars(l, l, l, l, ref=torch.full((2,), math.inf), adv=torch.ones(2))
    program = objective.program(False)
    got = evaluate(program.codes, program.hyper, rows, {"g": torch.tensor([0.0, 1.0])})
    assert got.loss[0] == 1.0 and got.a[0] == -1.0
    assert not got.loss[1].isfinite()


def test_composition_is_linear_and_keeps_its_parts():
    rows, extra = scalars()
    a, b = po.PPOClip(), po.KL("k2")
    for composed, want in (
        (a + b, (1, 1)),
        (a - b, (1, -1)),
        (0.3 * a + b * 2, (0.3, 2)),
        (-(a + b) * 0.5, (-0.5, -0.5)),
        (a + 0.0 * b, (1, 0)),
        (2 * (a - 3 * b), (2, -6)),
    ):
        got = ours(composed, rows, extra)
        parts = [ours(x, rows, extra) for x in (a, b)]
        for i, g in enumerate(got):
            torch.testing.assert_close(g, want[0] * parts[0][i] + want[1] * parts[1][i])
    assert (a + 0.0 * b).program(False).reads == {"old", "adv", "ref"}


def test_table_fields_and_signatures_agree():
    """A row's parameters are the dataclass's fields in order; the rows are all the functions."""
    functions = {
        n
        for n, f in vars(objective_math).items()
        if inspect.isfunction(f) and next(iter(inspect.signature(f).parameters)) in ROW_INPUTS
    }
    assert set(TABLE) == functions - {"dppo_masked"}
    codes = [row.code for row in TABLE.values()]
    assert codes == list(range(1, len(codes) + 1))
    for name, cls in REGISTRY.items():
        if not inspect.isclass(cls) or name in ("nll", "kl", "entropy", "z_loss"):
            continue
        if cls.__module__ != "pyoffline.token_objectives":  # coupled rows: their own tests
            continue
        fields = [f.name for f in dataclasses.fields(cls) if f.name != "kind"]
        rows = [name] if name in TABLE else [r for r in TABLE if r.startswith(name)]
        assert rows and all(list(TABLE[r].params) == fields for r in rows), name


def test_names_of_configuration_files():
    classes = {n: c for n, c in REGISTRY.items() if inspect.isclass(c)}
    builtin = {n: c for n, c in classes.items() if c.__module__ == "pyoffline.token_objectives"}
    assert all(name == snake_case(cls.__name__) for name, cls in classes.items())
    for name, cls in builtin.items():
        assert isinstance(from_name(name, **({"beta": 0.1} if name == "dro" else {})), cls)
    assert from_name("ppo_clip", clip_high=0.28) == po.PPOClip(clip_high=0.28)
    with pytest.raises(ValueError, match="did you mean 'ppo_clip'"):
        from_name("ppo_clp")
    assert set(oracle.LOSSES) == {cls.__name__ for cls in builtin.values()}


# call, exception, words that the message must hold
INVALID = [
    (lambda: po.PPOClip(clip_low=-0.1), ValueError, "clip_low=-0.1"),
    (lambda: po.PPOClip(clip_low=1.5), ValueError, "clip_low=1.5"),
    (lambda: po.PPOClip(dual_clip=0.5), ValueError, "dual_clip=0.5"),
    (lambda: po.PPOClip(delta=0.0), ValueError, "delta=0"),
    (lambda: po.PPOClip(clip_high=math.nan), ValueError, "clip_high=nan"),
    (lambda: po.PPOClip(clip_high="0.2x"), (TypeError, ValueError), "clip_high"),
    (lambda: po.PPOClip(clip_high=True), TypeError, "clip_high"),
    (lambda: po.PPOClip(clip_hi=0.2), TypeError, "clip_hi"),
    (lambda: po.TruncatedIS(low=2.0, high=1.0), ValueError, "low=2.0 is above high=1.0"),
    (lambda: po.CISPO(low=6.0), ValueError, "low=6.0"),
    (lambda: po.ImportanceWeightedSFT(low=3.0), ValueError, "low=3.0"),
    (lambda: po.DistillToken(low=3.0, high=1.0), ValueError, "low=3.0"),
    (lambda: po.DPPO(kind="js"), ValueError, "kind='js'"),
    (lambda: po.DRO(), TypeError, "beta"),
    (lambda: po.DRO(beta=-1.0), ValueError, "beta=-1"),
    (lambda: po.SAPO(tau_pos=0.0), ValueError, "tau_pos=0"),
    (lambda: Luffy(gamma=0.0), ValueError, "gamma=0"),
    (lambda: po.NLL(label_smoothing=1.1), ValueError, "label_smoothing=1.1"),
    (lambda: po.NLL(z_loss=-1.0), ValueError, "z_loss=-1"),
    (lambda: po.KL("k4"), ValueError, "k4"),
    (lambda: po.KL("k3", against="policy"), ValueError, "policy"),
    (lambda: math.inf * po.NLL(), ValueError, "finite"),
    (lambda: po.NLL() * "2", TypeError, ""),
    (lambda: po.NLL() + 1.0, TypeError, ""),
    (lambda: po.NLL().weighted_by(3), TypeError, "3"),
    (lambda: po.NLL().weighted_by("a").weighted_by("b"), ValueError, "'a' and 'b'"),
    (lambda: from_name("ppo_clip", epsilon=0.2), TypeError, "epsilon"),
]


@pytest.mark.parametrize(
    "call, error, words", INVALID, ids=[i[2] or str(k) for k, i in enumerate(INVALID)]
)
def test_N12_a_bad_parameter_raises_and_is_named(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)

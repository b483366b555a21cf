"""Objectives written by the user: traced once, equal to their built-in twins on every backend."""

import pickle  # noqa: S403  the test is that our records survive it
from types import SimpleNamespace

import batches
import compare
import oracle
import pytest
import torch
from batches import BACKENDS, DTYPES, dtype_name

import pyoffline as po
from pyoffline.objectives import REGISTRY, from_name
from pyoffline.token_objectives import DFT

pytestmark = pytest.mark.usefixtures("one_thread")
GRADS = ("dhidden", "dweight", "dbias")


def power(t):
    return -t.adv * torch.expm1(t.params.alpha * (t.logp - t.mu)) / t.params.alpha


def ppo(t):
    ratio = torch.exp(t.logp - t.old)
    return -torch.minimum(ratio * t.adv, ratio.clamp(0.8, 1.2) * t.adv)


def dft(t):
    return -t.logp.exp().detach() * t.logp


def bonus(t):
    return -t.logp - 0.05 * t.entropy + 1e-3 * t.lse**2


def gated(t):
    return -t.adv * t.logp - t.extra["g"] * t.logp


# function, parameters, the built-in twin, what the batch must hold
TWINS = [
    (power, {"alpha": 0.5}, po.PowerIS(0.5), ("mu", "adv")),
    (ppo, {}, po.PPOClip(), ("old", "adv")),
    (dft, {}, DFT(), ()),
    (bonus, {}, po.NLL(z_loss=1e-3) - 0.05 * po.Entropy(), ()),
    (gated, {}, po.WeightedNLL() + po.NLL().weighted_by("g"), ("adv", "g")),
]


def batch_for(reads, dtype=torch.float32):
    extra = ("g",) if "g" in reads else ()
    return batches.make(dtype=dtype, reads=reads, extra=extra, bias=True, temperature=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("fn, params, twin, reads", TWINS, ids=[t[0].__name__ for t in TWINS])
def test_N1_a_custom_objective_equals_its_built_in_twin(backend, dtype, fn, params, twin, reads):
    batch = batch_for(reads, dtype)
    with po.chunk_rows(16):
        got = batches.run(batch, po.custom(fn, **params), backend)
    truth, reference = oracle.run(batch, twin, torch.float64), oracle.run(batch, twin)
    for name in GRADS:
        compare.check_gradient(name, got[name], truth[name], reference[name])
    want = batches.run(batch, twin, backend)
    compare.same_bits("logps", got["logps"], want["logps"])
    torch.testing.assert_close(got["loss"], want["loss"], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_terms_compose_with_built_in_ones(backend):
    batch = batch_for(("old", "mu", "adv", "g"))
    mine = 0.5 * po.custom(power, alpha=0.5).weighted_by("g") + po.PPOClip() - po.custom(dft)
    theirs = 0.5 * po.PowerIS(0.5).weighted_by("g") + po.PPOClip() - DFT()
    got, truth = batches.run(batch, mine, backend), oracle.run(batch, theirs, torch.float64)
    reference = oracle.run(batch, theirs)
    for name in GRADS:
        compare.check_gradient(name, got[name], truth[name], reference[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_on_given_logits_and_scaled_gradients_reach_entropy_and_lse(backend):
    z = torch.randn(6, 50, generator=torch.Generator().manual_seed(1))
    batch = batches.row_batch(torch.arange(6))
    got = batches.run_logits(z, batch, po.custom(bonus), backend)
    w = z.double().requires_grad_()
    loss = bonus(oracle.row_scalars(w, torch.arange(6))).sum()
    (want,) = torch.autograd.grad(loss, w)
    torch.testing.assert_close(got["dlogits"].double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["loss"].double(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_change_by_call_and_only_known_ones(backend):
    batch = batch_for(("mu", "adv"))
    first = po.custom(power, alpha=0.5)
    other = first(alpha=1.5)
    assert first.params == {"alpha": 0.5} and other.params == {"alpha": 1.5}
    truth = oracle.run(batch, po.PowerIS(1.5), torch.float64)
    reference = oracle.run(batch, po.PowerIS(1.5))
    got = batches.run(batch, other, backend)
    compare.check_gradient("dhidden", got["dhidden"], truth["dhidden"], reference["dhidden"])
    with pytest.raises(TypeError, match="no parameter 'beta'"):
        first(beta=1.0)
    with pytest.raises((AttributeError, TypeError), match="gamma"):
        po.custom(lambda t: t.logp * t.params.gamma, alpha=1.0)
    with pytest.raises(ValueError, match="at most 6 parameters"):
        po.custom(dft, **dict.fromkeys("abcdefg", 1.0))


@pytest.mark.parametrize("backend", BACKENDS)
def test_N2_N3_ignored_tokens_are_invisible_and_broken_ones_seen_in_custom_terms(backend):
    batch = batch_for(("mu", "adv"))
    objective = po.custom(power, alpha=0.5)
    clean = batches.run(batch, objective, backend)
    out = (batch["labels"] == -100) | (batch["weights"] == 0)
    bad = {k: batch[k].clone() for k in ("mu", "adv", "hidden")}
    for x in bad.values():
        x[out] = float("nan")
    got = batches.run({**batch, **bad}, objective, backend)
    for name in ("loss", *GRADS, "logps"):
        compare.same_bits(name, got[name], clean[name])
    adv = batch["adv"].clone()
    adv[12] = float("nan")
    got = batches.run({**batch, "adv": adv}, objective, backend)
    others = torch.arange(37) != 12
    assert got["loss"].isnan() and got["dhidden"][12].isnan().all()
    compare.same_bits("dhidden", got["dhidden"][others], clean["dhidden"][others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_shaped_is_equals_truncated_and_power_shapes(backend):
    batch = batches.make(reads=("mu", "adv"), bias=True)
    for shape, twin in (
        (lambda w: w.clamp(0.5, 1.2), po.TruncatedIS(0.5, 1.2)),
        (torch.ones_like, po.WeightedNLL()),
    ):
        got = batches.run(batch, po.ShapedIS(shape), backend)
        truth, reference = oracle.run(batch, twin, torch.float64), oracle.run(batch, twin)
        for name in GRADS:
            compare.check_gradient(name, got[name], truth[name], reference[name])


@pytest.mark.parametrize("backend", BACKENDS)
def test_N4_shaped_is_at_advantage_zero_is_zero_at_an_infinite_weight(backend):
    batch = batches.row_batch([0], mu=torch.tensor([-1e30]), adv=torch.zeros(1))
    got = batches.run_logits(torch.zeros(1, 3), batch, po.ShapedIS(lambda w: w), backend)
    assert got["loss"] == 0 and (got["dlogits"] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_form_is_checked_and_then_used(backend):
    def right(t):
        zero = torch.zeros_like(t.logp)
        return -t.adv * t.logp, -t.adv, zero, zero

    def wrong(t):
        zero = torch.zeros_like(t.logp)
        return -t.adv * t.logp, t.adv, zero, zero

    def weighted(t):
        return -t.adv * t.logp

    batch = batches.make(reads=("adv",))
    got = batches.run(batch, po.custom(weighted, closed_form=right), backend)
    want = batches.run(batch, po.custom(weighted), backend)
    compare.same_bits("dhidden", got["dhidden"], want["dhidden"])
    with pytest.raises(ValueError, match="closed form of a differs"):
        po.custom(weighted, closed_form=wrong)


def branches(t):
    return -t.logp if t.logp.sum() > 0 else t.logp


# function, exception, what the message must say
ERRORS = [
    (lambda t: -t.adv.log().cumsum(0) * t.logp, ValueError, "mixes tokens"),
    (lambda t: -t.extra["a,b"] * t.logp, ValueError, "comma"),
    (lambda t: -(t.logp - t.logp.mean()), ValueError, "mixes tokens"),
    (lambda t: -t.logp.cumsum(0).flip(0), ValueError, "mixes tokens"),
    (lambda t: -t.logp.flip(0), ValueError, "mixes tokens"),
    (lambda t: -t.logp.roll(1), ValueError, "mixes tokens"),
    (lambda t: -t.logp.cumsum(0), ValueError, "mixes tokens"),
    (lambda t: -t.logp.sum(), ValueError, "one loss per token"),
    (lambda t: 1.0, ValueError, "one loss per token"),
    (branches, TypeError, "torch.where"),
    (lambda t: -t.probability, AttributeError, "no input 'probability'"),
]


@pytest.mark.parametrize("fn, error, words", ERRORS)
def test_N12_a_function_that_cannot_be_an_objective_raises(fn, error, words):
    with pytest.raises(error, match=words):
        po.custom(fn)


# finite on the batch below only: advantages and entropies are positive there
DOMAINS = [
    lambda t: -t.adv.sqrt() * t.logp,
    lambda t: -(t.adv**0.5) * t.logp,
    lambda t: -t.adv.log() * t.logp,
    lambda t: -t.adv * t.entropy.log() * t.logp,
    lambda t: -t.adv * t.entropy.sqrt(),
    lambda t: -t.adv * t.lse.log(),
]


@pytest.mark.parametrize("fn", DOMAINS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_function_with_a_domain_can_be_an_objective(fn, backend):
    g = torch.Generator().manual_seed(0)
    z = (3 + torch.rand(5, 7, generator=g, dtype=torch.float64)).requires_grad_()
    adv, labels = torch.rand(5, generator=g, dtype=torch.float64) + 0.5, torch.arange(5)
    logps = z.log_softmax(-1)
    entropy, lse = -(logps.exp() * logps).sum(-1), z.logsumexp(-1)
    row = SimpleNamespace(logp=logps[labels, labels], entropy=entropy, lse=lse, adv=adv)
    want = fn(row).mean()
    (truth,) = torch.autograd.grad(want, z)
    given = z.detach().requires_grad_()
    with po.use_backend("reference"):
        got = po.policy_loss(given, po.TokenBatch(labels, adv), po.custom(fn)).loss
    got.backward()
    assert torch.allclose(got, want, rtol=1e-12) and torch.allclose(given.grad, truth, rtol=1e-10)
    single = z.detach().float().requires_grad_()
    with po.use_backend(backend):
        po.policy_loss(single, po.TokenBatch(labels, adv.float()), po.custom(fn)).loss.backward()
    assert torch.allclose(single.grad.double(), truth, rtol=1e-4, atol=1e-6)


def test_a_closed_form_of_the_wrong_length_says_what_it_returns():
    with pytest.raises(ValueError, match=r"closed form returns \(loss, .*got 2"):
        po.custom(lambda t: -t.logp, closed_form=lambda t: (-t.logp, -1.0))


def test_a_closed_form_is_checked_on_advantages_of_both_signs():
    def clipped(t):
        return -torch.where(t.adv > 0, t.adv, 0.5 * t.adv) * t.logp

    def half_right(t):
        return clipped(t), -0.5 * t.adv, 0.0, 0.0

    with pytest.raises(ValueError, match="closed form of a differs"):
        po.custom(clipped, closed_form=half_right)


def test_shaped_is_takes_a_constant_shape():
    z, labels, x = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2)
    tokens = po.TokenBatch(labels, advantages=x, behavior_logps=-x)
    got = po.policy_loss(z, tokens, po.ShapedIS(lambda w: 2.0)).loss
    assert torch.allclose(got, torch.tensor(3.0).log() * 2)


def test_N12_missing_and_unused_tensors_are_named():
    z, labels, x = torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), torch.ones(2)
    objective = po.custom(gated)
    with pytest.raises(ValueError, match="'g'"):
        po.policy_loss(z, po.TokenBatch(labels, advantages=x), objective)
    with pytest.raises(ValueError, match="advantages"):
        po.policy_loss(z, po.TokenBatch(labels, extra={"g": x}), objective)
    with pytest.raises(ValueError, match="ref_logps"):
        tokens = po.TokenBatch(labels, advantages=x, ref_logps=x, extra={"g": x})
        po.policy_loss(z, tokens, objective)


def test_registered_objectives_are_named_and_cannot_shadow():
    @po.register_objective(beta=0.5)
    def only_in_this_test(t):
        return -t.params.beta * t.logp

    try:
        assert from_name("only_in_this_test", beta=2.0).params == {"beta": 2.0}
        with pytest.raises(ValueError, match="exists already"):
            po.register_objective(only_in_this_test_twin())
    finally:
        del REGISTRY["only_in_this_test"]


def only_in_this_test_twin():
    def only_in_this_test(t):
        return -t.logp

    return only_in_this_test


@po.register_objective(alpha=0.5)
def decorated(t):
    return -t.adv * torch.exp(t.params.alpha * (t.logp - t.old))


def test_a2_an_objective_under_its_functions_name_pickles_as_that_name():
    """The decorator leaves the objective where pickle looks for the function."""
    for objective in (decorated, decorated(alpha=0.25), 2.0 * decorated(alpha=0.25) + po.KL()):
        loaded = pickle.loads(pickle.dumps(objective))  # noqa: S301
        assert type(loaded) is type(objective)
        for a, b in zip(loaded.terms(), objective.terms(), strict=True):
            assert (a.row, a.scale, a.params, a.custom) == (b.row, b.scale, b.params, b.custom)

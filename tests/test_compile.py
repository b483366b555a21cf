"""torch.compile and torch.library (PROMISES A3, A4): one graph, one compile for twenty values of a
hyper-parameter, the same numbers as eager; opcheck of every op; every output element written.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import pyoffline as po
from pyoffline import autograd, ops, token_losses

BACKENDS = ("reference", "cpu")
D, V = 16, 37
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def fresh():
    """No compiled code of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def draw(n=8, ignored=0.25, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g).requires_grad_()
    w = (torch.randn(V, D, generator=g) / 4).requires_grad_()
    labels = torch.randint(0, V, (n,), generator=g)
    labels[: int(n * ignored)] = -100
    adv = torch.randn(n, generator=g)
    return x, w, labels, adv, -torch.rand(n, generator=g) - 3.0


def linear_policy_loss(x, w, labels, adv, old, objective):
    out = po.linear_policy_loss(x, po.Head(w), po.TokenBatch(labels, adv, old), objective)
    return out.loss, out.stats.logps, *out.metrics.values()


def policy_loss(x, w, labels, adv, old, objective):
    out = po.policy_loss(x @ w.t(), po.TokenBatch(labels, adv, old), objective)
    return out.loss, out.stats.entropy, *out.metrics.values()


def linear_token_logps(x, w, labels, adv, old, objective):
    s = po.linear_token_logps(x, po.Head(w), labels)
    return ((s.logps * adv).sum() + s.entropy.sum() + 0.1 * s.lse.sum(), *s)


def token_logps(x, w, labels, adv, old, objective):
    s = po.token_logps(x @ w.t(), labels)
    return ((s.logps * adv).sum() + s.entropy.sum(), *s)


def cross_entropy(x, w, labels, adv, old, objective):
    return (po.cross_entropy(x @ w.t(), labels, label_smoothing=0.1, z_loss=1e-3),)


def cross_entropy_none(x, w, labels, adv, old, objective):
    return ((po.cross_entropy(x @ w.t(), labels, reduction="none") * adv).sum(),)


def linear_cross_entropy(x, w, labels, adv, old, objective):
    return (po.linear_cross_entropy(x, w, labels, softcap=20.0),)


def linear_cross_entropy_none(x, w, labels, adv, old, objective):
    return ((po.linear_cross_entropy(x, w, labels, reduction="none") * adv).sum(),)


FUNCTIONS = (
    linear_policy_loss,
    policy_loss,
    linear_token_logps,
    token_logps,
    cross_entropy,
    cross_entropy_none,
    linear_cross_entropy,
    linear_cross_entropy_none,
)


def run(fn, args):
    out = fn(*args)
    return [t.detach() for t in out], torch.autograd.grad(out[0], args[:2])


def assert_equal_to_eager(compiled, fn, args):
    want, want_grads = run(fn, args)
    got, grads = run(compiled, args)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(list(grads), list(want_grads), rtol=1e-6, atol=1e-7)


@each_backend
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a3_fullgraph_dynamic_shapes_equal_eager(fn, backend):
    """Four batch sizes, 25 % ignored: one graph, at most one recompile (static, then dynamic)."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    with po.use_backend(backend):
        for i, n in enumerate((8, 12, 20, 33)):
            args = (*draw(n, seed=i), po.PPOClip(0.1 + 0.02 * i))
            assert_equal_to_eager(compiled, fn, args)
    assert counter.frame_count <= 2


@pytest.mark.parametrize("fn", [linear_policy_loss, token_logps])
def test_a3_inductor_equals_eager(fn):
    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    for n in (8, 20):
        assert_equal_to_eager(compiled, fn, (*draw(n, seed=n), po.PPOClip()))


@pytest.mark.parametrize("how", ["argument", "captured"])
def test_a3_twenty_values_of_beta_and_clip_are_one_compile(how):
    counter = CompileCounterWithBackend("aot_eager")
    args = draw(8)

    def objective(beta, clip):
        kl = beta * po.KL("k3", against="old")
        return po.PPOClip(clip, clip * 1.4) + kl - beta * po.Entropy()

    def loss(x, w, labels, adv, old, given):
        return linear_policy_loss(x, w, labels, adv, old, given)

    class Step(torch.nn.Module):
        given = None

        def forward(self, *args):
            return linear_policy_loss(*args, self.given)

    step = Step()
    compiled = torch.compile(step if how == "captured" else loss, fullgraph=True, backend=counter)
    for i in range(20):
        given = objective(0.01 * (i + 1), 0.1 + 0.01 * i)
        want = linear_policy_loss(*args, given)[0]
        if how == "captured":
            step.given = given
            got = compiled(*args)[0]
        else:
            got = compiled(*args, given)[0]
        torch.testing.assert_close(got, want)
        a, b = (torch.autograd.grad(t, args[0])[0] for t in (got, want))
        torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@each_backend
def test_a3_objective_built_inside_the_compiled_function(backend):
    def fn(x, w, labels, adv, old, _):
        objective = po.PPOClip(0.1, 0.3) + 0.04 * po.KL("k3", against="old")
        return linear_policy_loss(x, w, labels, adv, old, objective)

    with po.use_backend(backend):
        compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
        assert_equal_to_eager(compiled, fn, (*draw(), None))


def test_a3_objective_built_inside_from_floats_is_right_but_compiles_per_value():
    """Floats that dynamo sees become constants of the graph: build objectives outside instead."""

    def fn(x, w, labels, adv, old, beta):
        return (po.policy_loss(x @ w.t(), po.TokenBatch(labels), beta * po.Entropy()).loss,)

    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    for beta in (0.1, 0.2):
        assert_equal_to_eager(compiled, fn, (*draw(), beta))


def test_a2_a3_forward_ad_under_compile_raises_and_names_the_op():
    """The compiled graph, too, would give a tangent of 0 in silence."""
    x, w, *rest = (t.detach() for t in draw())

    def fn(x, w):
        return torch.func.jvp(
            lambda q: linear_policy_loss(q, w, *rest, po.PPOClip())[0], (x,), (torch.ones_like(x),)
        )

    with pytest.raises(Exception, match="pyoffline::linear_policy"):
        torch.compile(fn, backend="aot_eager")(x, w)


@each_backend
def test_a3_custom_objective_under_compile(backend):
    def shaped(t):
        return -t.params.alpha * torch.tanh(t.logp - t.old) * t.adv

    objective = po.custom(shaped, alpha=0.7) + 0.1 * po.Entropy()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend=counter)
    with po.use_backend(backend):
        assert_equal_to_eager(compiled, linear_policy_loss, (*draw(), objective))
        other = po.custom(shaped, alpha=0.2)
        assert_equal_to_eager(compiled, linear_policy_loss, (*draw(), other))


@each_backend
@pytest.mark.parametrize("ignored", [0.25, 1.0])
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a3_a4_ignored_rows_under_compile_with_poisoned_memory(fn, ignored, backend):
    """torch.empty gives NaN: an element that nobody writes would show (mutation 13)."""
    args = (*draw(12, ignored), po.PPOClip())
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    torch.use_deterministic_algorithms(True)
    try:
        with po.use_backend(backend):
            assert_equal_to_eager(compiled, fn, args)
            out, grads = run(compiled, args)
        assert all(t.isfinite().all() for t in (*out, *grads))
        rows = args[2] == -100
        assert not grads[0][rows].any()
    finally:
        torch.use_deterministic_algorithms(False)


@each_backend
@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a4_every_element_is_written_in_eager(fn, backend):
    """All gradients and statistics from NaN-filled memory, several chunks, ignored rows between."""
    x, w, labels, adv, old = draw(20, 0.0)
    labels[3::4] = -100
    assert torch.utils.deterministic.fill_uninitialized_memory
    want = None
    for poison in (False, True):
        torch.use_deterministic_algorithms(poison)
        try:
            with po.use_backend(backend), po.chunk_rows(4):
                got = run(fn, (x, w, labels, adv, old, po.PPOClip()))
        finally:
            torch.use_deterministic_algorithms(False)
        want = want or got
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_backend
def test_a3_compiled_under_no_grad(backend):
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")
    with po.use_backend(backend), torch.no_grad():
        args = (*draw(), po.PPOClip())
        torch.testing.assert_close(compiled(*args), linear_policy_loss(*args))
        assert not compiled(*args)[0].requires_grad


def test_a3_use_backend_and_chunk_plan_hold_for_a_graph_compiled_before():
    """A context variable cannot be guarded on; the op reads it when it runs."""
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend="aot_eager")
    args = (*draw(20), po.PPOClip())
    seen = []
    plain = ops.load

    def spy(name, x):
        seen.append(plain(name, x).__name__.split(".")[-1])
        return plain(name, x)

    ops.load = spy
    try:
        for name in ("cpu", "reference", "cpu"):
            with po.use_backend(name), po.chunk_rows(4):
                compiled(*args)
    finally:
        ops.load = plain
    assert seen == ["cpu", "reference", "cpu"]


HEAD = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
SOFTCAP = torch.tensor([5.0, 0.5, 2.0], dtype=torch.float64)
PLAN = [3, 0, 0]


def _linear_args(
    objective, n=6, grads=(True, True), head=HEAD, bias=False, extras=(), all_out=False
):
    x, w, labels, adv, old = draw(n)
    if all_out:
        labels.fill_(-100)
    p = objective.program(False)
    x.requires_grad_(grads[0]), w.requires_grad_(grads[1])
    b = torch.randn(V, requires_grad=True) if bias else None
    needs = grads[0] * ops.HIDDEN + grads[1] * ops.WEIGHT + bias * ops.BIAS
    weights = torch.full((n,), 0.25)
    reads = {"old": old, "adv": adv}
    old, adv = (reads[k] if k in p.reads else None for k in ("old", "adv"))
    vectors = (weights, old, None, None, adv, None)
    given = [torch.rand(n) for _ in extras]
    tail = (None, p.hyper, head, p.codes, ",".join(extras), -100, 0, needs, "reference", PLAN)
    return (x, w, b, None, None, labels, *vectors, given, *tail)


def _logits_args(n=6, grad=True):
    x, w, labels, adv, old = draw(n)
    z = (x @ w.t()).detach().requires_grad_(grad)
    p = po.PPOClip().program(False)
    vectors = (torch.full((n,), 0.25), old, None, None, adv, None)
    return (z, labels, *vectors, [], None, p.hyper, p.codes, "", -100, grad, "reference")


def _logps_args(n=6, grads=(True, True)):
    x, w, labels, _, _ = draw(n)
    x.requires_grad_(grads[0]), w.requires_grad_(grads[1])
    needs = grads[0] * ops.HIDDEN + grads[1] * ops.WEIGHT
    return (x, w, None, None, None, labels, None, HEAD, -100, 0, needs, "reference", PLAN)


def _losses_args(linear, n=6):
    x, w, labels, _, _ = draw(n)
    p = (po.NLL() + 0.1 * po.ZLoss()).program(False)
    if linear:
        needs = ops.HIDDEN + ops.WEIGHT
        tail = (p.codes, "", -100, 0, needs, "reference", PLAN)
        return (x, w, None, labels, [], None, p.hyper, HEAD, *tail)
    z = (x @ w.t()).detach().requires_grad_()
    return (z, labels, [], None, p.hyper, p.codes, "", -100, "reference")


def _coefs_args(linear, n=6):
    x, w, labels, _, _ = draw(n)
    x, w, coefs = x.detach(), w.detach(), torch.randn(4, n)
    coefs[3] = 0
    if linear:
        tail = (HEAD, -100, 0, ops.HIDDEN + ops.WEIGHT, "reference", PLAN)
        return (x, w, None, None, None, labels, None, None, coefs, *tail)
    return (x @ w.t(), labels, None, None, coefs, -100, "reference")


def _custom():
    return po.custom(lambda t: -t.adv * torch.tanh(t.logp - t.old))


OPCHECKS = {
    "policy both gradients": (ops.linear_policy, lambda: _linear_args(po.PPOClip())),
    "policy hidden only": (
        ops.linear_policy,
        lambda: _linear_args(po.PPOClip(), grads=(True, False)),
    ),
    "policy weight only": (
        ops.linear_policy,
        lambda: _linear_args(po.PPOClip(), grads=(False, True)),
    ),
    "policy no gradient": (
        ops.linear_policy,
        lambda: _linear_args(po.PPOClip(), grads=(False, False)),
    ),
    "policy bias and softcap": (
        ops.linear_policy,
        lambda: _linear_args(po.PPOClip(), head=SOFTCAP, bias=True),
    ),
    "policy 0 rows": (ops.linear_policy, lambda: _linear_args(po.PPOClip(), n=0)),
    "policy all ignored": (ops.linear_policy, lambda: _linear_args(po.PPOClip(), all_out=True)),
    "policy extras": (
        ops.linear_policy,
        lambda: _linear_args(po.NLL().weighted_by("positive"), extras=("positive",)),
    ),
    "policy custom objective": (ops.linear_policy, lambda: _linear_args(_custom())),
    "logits policy": (ops.logits_policy, _logits_args),
    "logits policy no gradient": (ops.logits_policy, lambda: _logits_args(grad=False)),
    "logits policy 0 rows": (ops.logits_policy, lambda: _logits_args(n=0)),
    "linear logps": (autograd.linear_logps, _logps_args),
    "linear logps weight only": (autograd.linear_logps, lambda: _logps_args(grads=(False, True))),
    "logits logps": (
        autograd.logits_logps,
        lambda: (*_logits_args()[:2], None, -100, "reference"),
    ),
    "linear losses": (token_losses.linear_losses, lambda: _losses_args(True)),
    "logits losses": (token_losses.logits_losses, lambda: _losses_args(False)),
    "linear coefs": (ops.linear_coefs, lambda: _coefs_args(True)),
    "logits coefs": (ops.logits_coefs, lambda: _coefs_args(False)),
    "scale by upstream": (
        ops.scale_by_upstream,
        lambda: (torch.randn(3, 4), torch.tensor(2.0), 1),
    ),
}


@each_backend
@pytest.mark.parametrize("case", OPCHECKS)
def test_a3_opcheck_all_four_utilities(case, backend):
    op, make = OPCHECKS[case]
    args = [backend if isinstance(a, str) and a == "reference" else a for a in make()]
    torch.library.opcheck(op, args)


def test_a3_every_op_of_the_library_is_in_the_opcheck_table():
    ours = {name.split(".")[0] for name in dir(torch.ops.pyoffline) if not name.startswith("_")}
    elsewhere = {"name", "linear_distill", "soft_losses", "linear_coupled", "logits_coupled"}
    assert {op._qualname.split("::")[1] for op, _ in OPCHECKS.values()} >= ours - elsewhere


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_a3_fake_tensors_have_the_real_shapes_strides_and_dtypes(fn):
    args = draw(9)
    real, real_grads = run(fn, (*args, po.PPOClip()))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake_args = [mode.from_tensor(a.detach()).requires_grad_(a.requires_grad) for a in args]
        fake, fake_grads = run(fn, (*fake_args, po.PPOClip()))
    for a, b in zip((*real, *real_grads), (*fake, *fake_grads), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)

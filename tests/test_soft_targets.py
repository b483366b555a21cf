"""Class probabilities as targets, K-dimensional heads and torch's chunking options: the rest of the
drop-in contract of `cross_entropy` and `linear_cross_entropy`, against torch in fp64.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F
from batches import BACKENDS

import pyoffline as po
from pyoffline import chunk_loop, ops
from pyoffline.distill_ops import soft_losses
from pyoffline.plan import plan_list, settings_of

pytestmark = pytest.mark.usefixtures("one_thread")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
N, D, C = 11, 8, 23
OPTIONS = list(itertools.product(("mean", "sum", "none"), (0.0, 0.1), (False, True)))
# shape of the logits beyond [N, C], and of the weight between C and D
INNER = [(), (1,), (3,), (2, 2)]


def draw(inner=(), dtype=torch.float32, seed=0):
    """hidden, weight, bias, probabilities (with zeros and one empty row), class weights, upstream
    per token.
    """
    g = torch.Generator().manual_seed(seed)
    x, w, b = (
        torch.randn(*s, generator=g).to(dtype) for s in ((N, D), (C, *inner, D), (C, *inner))
    )
    t = (torch.randn(N, C, *inner, generator=g) * 3).softmax(1)
    t[:, :4], t[5] = 0.0, 0.0
    u = torch.rand(C, generator=g) + 0.2
    u[7] = 0.0
    up = torch.randn(N, *inner, generator=g)
    return [x, w / 3, b], t.to(dtype), u.to(dtype), up


def through(fn, leaves, up, dtype=None):
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    loss = fn(*leaves)
    up = up.to(loss.dtype) if loss.dim() else torch.ones_like(loss)
    first = torch.autograd.grad(loss, leaves, up, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, leaves, up), strict=True):
        assert torch.equal(a, b), "a second backward"
    return [loss.detach(), *first]


def assert_close(got, want, tolerance):
    for i, (g, w) in enumerate(zip(got, want, strict=True)):
        assert g.shape == w.shape
        error = (g.double() - w).abs().max()
        assert error <= tolerance * (1.0 + w.abs().max()), f"{i}: {error:.3e}"


# fp32 sums of 23 terms; bf16 logits are rounded to 2^-9 of values up to about 4
TOLERANCES = [(torch.float32, 3e-6), (torch.float64, 1e-13), (torch.bfloat16, 2e-2)]


@each_backend
@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=str)
@pytest.mark.parametrize("reduction, smoothing, weighted", OPTIONS)
@pytest.mark.parametrize("inner", INNER, ids=str)
def test_N1_class_probabilities_are_torchs_for_every_option(
    backend, dtype, tolerance, reduction, smoothing, weighted, inner
):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("not run: the cpu backend computes in fp32")
    leaves, t, u, up = draw(inner, dtype)
    u = u if weighted else None
    how = {"reduction": reduction, "label_smoothing": smoothing}

    def ours(x, w, b):
        return po.linear_cross_entropy(x, w, t, linear_bias=b, weight=u, **how)

    def theirs(x, w, b):
        wide = None if u is None else u.double()
        z = F.linear(x, w.flatten(0, -2), b.flatten()).reshape(N, C, *inner)
        return F.cross_entropy(z, t.double(), wide, **how)

    with po.use_backend(backend), po.chunk_rows(4):
        got = through(ours, leaves, up)
    assert_close(got, through(theirs, leaves, up, torch.float64), tolerance)

    z = torch.randn(N, C, *inner, generator=torch.Generator().manual_seed(1)).to(dtype)
    with po.use_backend(backend):
        got = through(lambda z: po.cross_entropy(z, t, u, **how), [z], up)
    wide = None if u is None else u.double()
    want = through(lambda z: F.cross_entropy(z, t.double(), wide, **how), [z], up, torch.float64)
    assert_close(got, want, tolerance)


@each_backend
@pytest.mark.parametrize("reduction, smoothing, weighted", OPTIONS)
@pytest.mark.parametrize("inner", INNER[1:], ids=str)
def test_N1_a_k_dimensional_head_is_torchs_for_every_option(
    backend, reduction, smoothing, weighted, inner
):
    leaves, _, u, up = draw(inner)
    y = torch.randint(0, C, (N, *inner), generator=torch.Generator().manual_seed(2))
    y[2:5] = -100
    u = u if weighted else None
    how = {"reduction": reduction, "label_smoothing": smoothing}

    def ours(x, w, b):
        return po.linear_cross_entropy(x, w, y, linear_bias=b, weight=u, **how)

    def theirs(x, w, b):
        wide = None if u is None else u.double()
        z = F.linear(x, w.flatten(0, -2), b.flatten()).reshape(N, C, *inner)
        return F.cross_entropy(z, y, wide, **how)

    with po.use_backend(backend):
        got = through(ours, leaves, up)
    assert_close(got, through(theirs, leaves, up, torch.float64), 3e-6)


@each_backend
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softcap_and_z_loss_join_class_probabilities(backend, reduction):
    (x, w, b), t, u, up = draw()
    how = {"reduction": reduction, "softcap": 3.0, "z_loss": 1e-2, "weight": u}

    def theirs(x, w, b):
        z = 3.0 * torch.tanh(F.linear(x, w, b) / 3.0)
        loss = F.cross_entropy(z, t.double(), u.double(), reduction="none")
        loss = loss + 1e-2 * z.logsumexp(-1) ** 2
        return {"mean": loss.mean(), "sum": loss.sum(), "none": loss}[reduction]

    want = through(theirs, [x, w, b], up, torch.float64)
    with po.use_backend(backend):
        a = through(
            lambda x, w, b: po.linear_cross_entropy(x, w, t, linear_bias=b, **how), [x, w, b], up
        )
        b = through(lambda x, w, b: po.cross_entropy(F.linear(x, w, b), t, **how), [x, w, b], up)
    assert_close(a, want, 3e-6)
    assert_close(b, want, 3e-6)


@each_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_N3_a_probability_that_is_no_number_shows_itself_and_moves_no_other_row(backend, bad):
    (x, w, _), t, _, _ = draw()
    broken = t.clone()
    broken[3, 9] = bad
    x.requires_grad_()
    with po.use_backend(backend):
        clean, got = (po.linear_cross_entropy(x, w, p, reduction="none") for p in (t, broken))
        (dclean,), (dgot,) = (torch.autograd.grad(a.sum(), x) for a in (clean, got))
    others = torch.arange(N) != 3
    assert not got[3].isfinite() and not dgot[3].isfinite().any()
    assert torch.equal(got[others], clean[others]) and torch.equal(dgot[others], dclean[others])


@each_backend
@pytest.mark.parametrize("linear", [True, False])
def test_a_masked_class_of_probability_0_takes_no_part_and_a_wanted_one_is_inf(backend, linear):
    (x, w, b), t, _, _ = draw()
    b[:4] = -torch.inf  # t is 0 there; torch has 0 * inf = NaN

    def loss(t):
        if linear:
            return po.linear_cross_entropy(x, w, t, linear_bias=b)
        return po.cross_entropy(F.linear(x, w, b), t)

    with po.use_backend(backend):
        got, inf = loss(t), loss(t + 0.1)
    want = F.cross_entropy(F.linear(x, w, b)[:, 4:].double(), t[:, 4:].double())
    assert got.item() == pytest.approx(want.item(), rel=1e-6) and inf.item() == torch.inf


@each_backend
def test_one_hot_probabilities_are_class_indices(backend):
    (x, w, b), _, _, _ = draw()
    y = torch.randint(0, C, (N,), generator=torch.Generator().manual_seed(3))
    with po.use_backend(backend):
        a = po.linear_cross_entropy(x, w, F.one_hot(y, C).float(), linear_bias=b)
        b = po.linear_cross_entropy(x, w, y, linear_bias=b)
    torch.testing.assert_close(a, b, rtol=1e-6, atol=0.0)


def test_no_rows_are_loss_0():
    (x, w, _), t, _, _ = draw((3,))
    y = torch.zeros(0, 3, dtype=torch.long)
    z = F.linear(x, w.flatten(0, -2)).reshape(N, C, 3)
    for target in (t[:0], y):
        assert po.linear_cross_entropy(x[:0], w, target) == 0
        assert po.cross_entropy(z[:0], target) == 0


def test_the_targets_of_given_logits_have_torchs_gradient():
    _, t, u, _ = draw()
    z = torch.randn(N, C, generator=torch.Generator().manual_seed(4))
    t.requires_grad_()
    got, want = (
        torch.autograd.grad(f(z, t, u, label_smoothing=0.1), t)[0]
        for f in (po.cross_entropy, F.cross_entropy)
    )
    torch.testing.assert_close(got, want)


# options of torch, the most rows of a chunk that they ask for at N=64, D=8, C=23; 0: ours
CHUNKS = [
    ({}, 0),
    ({"batch_chunk_size": 5}, 5),
    ({"batch_chunk_size": 5, "acc_policy": "compact", "allow_retain_graph": True}, 5),
    ({"chunking_method": "aspect_ratio"}, 32),
    ({"chunking_method": "aspect_ratio:4"}, 8),
    ({"chunking_method": None, "batch_chunk_size": 500}, 500),
]


@pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="not run: torch below 2.13"
)
@pytest.mark.parametrize("given, rows", CHUNKS, ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_torchs_chunking_options_set_the_rows_of_a_chunk(given, rows, compiled, monkeypatch):
    options = torch.nn.LinearCrossEntropyOptions(**given)
    g = torch.Generator().manual_seed(5)
    x, w = (torch.randn(*s, generator=g).requires_grad_() for s in ((64, D), (C, D)))
    y = torch.randint(0, C, (64,), generator=g)
    settings = []
    real = chunk_loop.plan_chunks
    monkeypatch.setattr(
        chunk_loop, "plan_chunks", lambda *a: settings.append(a[3].rows) or real(*a)
    )

    def ours(x, w):
        return po.linear_cross_entropy(x, w, y, options=options)

    torch._dynamo.reset()
    call = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    got, want = call(x, w), F.linear_cross_entropy(x, w, y, options=options)
    torch.testing.assert_close(got, want)
    assert set(settings) == {rows}
    adjusted = options._adjust(64, D, C, torch.float32, None).batch_chunk_size
    assert rows in (0, adjusted, given.get("batch_chunk_size"))


def test_a_call_and_a_context_that_both_limit_a_chunk_take_the_smaller():
    assert settings_of(plan_list(rows=7)).rows == 7
    with po.chunk_rows(3):
        assert settings_of(plan_list(rows=7)).rows == 3
    with po.chunk_rows(9):
        assert settings_of(plan_list(rows=7)).rows == 7


X, W, T = torch.zeros(4, D), torch.zeros(C, D), torch.full((4, C), 1 / C)
Y, WIDE = torch.zeros(4, dtype=torch.long), torch.zeros(C, 3, D)
Z = torch.zeros(4, C)


class Chunks:
    """What torch's record of options has, for versions without it."""

    batch_chunk_size, chunking_method, acc_dtype = 3, "aspect_ratio", None


class Wide(Chunks):
    batch_chunk_size, acc_dtype = None, torch.float64


ERRORS = [
    (lambda: po.linear_cross_entropy(X, W, T.requires_grad_()), "target", "detach"),
    (lambda: po.linear_cross_entropy(X, W, -T.detach()), "target", ">= 0"),
    (lambda: po.linear_cross_entropy(X, W, T[:, :5]), "target", "(4, 23)"),
    (lambda: po.linear_cross_entropy(X, W, T, ignore_index=3), "ignore_index", "leave it None"),
    (lambda: po.cross_entropy(Z, T, ignore_index=3), "ignore_index", "leave it -100"),
    (lambda: po.cross_entropy(Z, T[:3]), "target", "(4, 23)"),
    (lambda: po.cross_entropy(Z, T.long()), "target", "float"),
    (lambda: po.cross_entropy(Z, Y, torch.ones(C).requires_grad_()), "weight", "detach"),
    (lambda: po.linear_cross_entropy(X, WIDE, Y), "target", "(4, 3)"),
    (lambda: po.linear_cross_entropy(X[None], WIDE, Y), "input", "[N, D]"),
    (lambda: po.linear_cross_entropy(X, WIDE, Y, linear_bias=Z[0]), "linear_bias", "(23, 3)"),
    (lambda: po.linear_cross_entropy(X, W, Y, options=Chunks()), "options", "one of them"),
    (lambda: po.linear_cross_entropy(X, W, Y, options=Wide()), "options.acc_dtype", "float32"),
]


@pytest.mark.parametrize("call, name, words", ERRORS)
def test_N12_wrong_arguments_raise_and_are_named(call, name, words):
    with pytest.raises(ValueError) as error:
        call()
    assert name in str(error.value) and words in str(error.value)


def op_args(backend, grads=(True, True), bias=True, n=N):
    (x, w, b), t, _, _ = draw()
    t[5, 9] = 1.0  # the entropy of an empty row is NaN, and NaN is not equal to itself
    x, w = x[:n].requires_grad_(grads[0]), w.requires_grad_(grads[1])
    needs = grads[0] * ops.HIDDEN + grads[1] * ops.WEIGHT + bias * ops.BIAS
    p = po.ForwardKL().weighted_by("mass").program(False)
    head = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    labels, mass = torch.zeros(n, dtype=torch.long), t[:n].sum(-1)
    q = p.objective
    linear = (x, w, b.requires_grad_() if bias else None, labels, [mass], q.hyper, head)
    tail = (list(q.codes), "mass", 0, needs, backend, [3, 0, 0], t[:n].log(), head)
    return (*linear, *tail, list(p.codes), p.hyper)


@each_backend
@pytest.mark.parametrize(
    "case",
    [{}, {"grads": (True, False), "bias": False}, {"grads": (False, True)}, {"n": 0}],
    ids=str,
)
def test_a3_opcheck_all_four_utilities(backend, case):
    torch.library.opcheck(soft_losses, op_args(backend, **case))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a3_fullgraph_equals_eager(reduction):
    (x, w, _), t, _, _ = draw()
    x.requires_grad_(), w.requires_grad_()

    def call(x, w):
        return po.linear_cross_entropy(x, w, t, reduction=reduction, label_smoothing=0.1).sum()

    torch._dynamo.reset()
    got = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")(x, w)
    want = call(x, w)
    torch.testing.assert_close(got, want)
    a, b = (torch.autograd.grad(loss, (x, w)) for loss in (got, want))
    torch.testing.assert_close(a, b)


def test_a2_double_backward_raises_and_names_the_op():
    (x, w, _), t, _, _ = draw()
    loss = po.linear_cross_entropy(x.requires_grad_(), w, t, reduction="none").sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(RuntimeError, match="soft_losses: double backward"):
        dx.sum().backward()

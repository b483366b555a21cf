"""`cross_entropy` and `linear_cross_entropy` against torch's, option by option."""

import itertools

import batches
import compare
import pytest
import torch
import torch.nn.functional as F
from batches import BACKENDS, DTYPES, dtype_name

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
C = 23


def data(shape=(40,), dtype=torch.float32, seed=0, ignored=True, ignore_index=-100):
    """Logits with the class dimension second, targets, class weights, an upstream per token."""
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(*shape[:1], C, *shape[1:], generator=g) * 2 if shape else torch.randn(C)
    y = torch.randint(0, C, shape, generator=g)
    if ignored and y.dim():
        y[torch.rand(shape, generator=g) < 0.2] = ignore_index
    u = torch.rand(C, generator=g) + 0.2
    u[3] = 0.0
    return z.to(dtype), y, u, torch.randn(shape, generator=g)


def through(fn, leaves, upstream, reduction, dtype=None):
    """Loss and the gradients of the leaves; reduction="none" gets a random upstream per token."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in leaves]
    loss = fn(*leaves)
    up = upstream.to(loss.dtype) if reduction == "none" else torch.ones_like(loss)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, up)]


def compared(ours, theirs, leaves, upstream, reduction, backend):
    """Both as functions of (*leaves, reduction) against torch in fp64; torch in the data's dtype
    is the bar. A scalar is one draw of the error: its bar is the error of the terms it adds.
    """
    with po.use_backend(backend):
        got = through(lambda *a: ours(*a, reduction), leaves, upstream, reduction)
    truth = through(lambda *a: theirs(*a, reduction), leaves, upstream, reduction, torch.float64)
    reference = through(lambda *a: theirs(*a, reduction), leaves, upstream, reduction)
    assert got[0].dtype == torch.float32 and got[0].shape == truth[0].shape
    if reduction == "none":
        compare.check_forward("loss", got[0], truth[0], reference[0])
    else:
        terms = theirs(*(x.double() for x in leaves), "none")
        error = (theirs(*leaves, "none").double() - terms).abs().sum()
        count = 1.0 if reduction == "sum" else (terms.sum() / truth[0]).abs()
        allowed = compare.FORWARD * error + compare.FLOOR_ULPS * compare.EPS32 * terms.abs().sum()
        assert (got[0].double() - truth[0]).abs() <= allowed / count
    for i, (g, t, r) in enumerate(zip(got[1:], truth[1:], reference[1:], strict=True)):
        assert g.dtype == leaves[i].dtype
        compare.check_gradient(f"gradient {i}", g, t, r)


OPTIONS = list(itertools.product(("mean", "sum", "none"), (0.0, 0.1, 1.0), (False, True)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("reduction, smoothing, weighted", OPTIONS)
def test_N1_cross_entropy_is_torchs_for_every_option(
    backend, dtype, reduction, smoothing, weighted
):
    z, y, u, upstream = data(dtype=dtype)

    def call(f, cast):
        return lambda x, reduction: f(
            x,
            y,
            weight=cast(x, u) if weighted else None,
            reduction=reduction,
            label_smoothing=smoothing,
        )

    theirs = call(F.cross_entropy, lambda x, u: u.to(x.dtype))
    # the truth has the class weights that were given, not their rounding
    ours = call(po.cross_entropy, lambda x, u: u.to(x.dtype))
    u = u.to(dtype).float()
    compared(ours, theirs, [z], upstream, reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (1,), (5, 4), (3, 2, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 0, C - 1, 1000])
def test_cross_entropy_takes_the_shapes_of_torch(backend, shape, reduction, ignore_index):
    z, y, u, upstream = data(shape, ignore_index=ignore_index, seed=2)
    if not shape:
        y = torch.tensor(5)

    def call(f):
        return lambda x, reduction: f(
            x,
            y,
            u.to(x.dtype),
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=0.05,
        )

    assert (y != ignore_index).any()
    compared(call(po.cross_entropy), call(F.cross_entropy), [z], upstream, reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("reduction, smoothing, weighted", OPTIONS[::2] + OPTIONS[3::4])
def test_N1_linear_cross_entropy_is_torchs_for_every_option(
    backend, dtype, biased, reduction, smoothing, weighted
):
    _, y, u, upstream = data((300,))
    g = torch.Generator().manual_seed(9)
    x, w, b = (torch.randn(*s, generator=g).to(dtype) for s in ((300, 16), (C, 16), (C,)))
    w = w / 4
    leaves = [x, w, b] if biased else [x, w]

    def class_weight(x):
        return u.to(dtype).to(x.dtype) if weighted else None

    def split(a):
        x, w, b = a[:3] if biased else (*a[:2], None)
        return x, w, b, {"reduction": a[-1], "label_smoothing": smoothing}

    def ours(*a):
        x, w, b, options = split(a)
        return po.linear_cross_entropy(x, w, y, linear_bias=b, weight=class_weight(x), **options)

    def theirs(*a):
        x, w, b, options = split(a)
        z = F.linear(x, w, b)
        z = z if z.dtype == torch.float64 else z.float()
        return F.cross_entropy(z, y, weight=class_weight(z), **options)

    with po.chunk_rows(64):
        compared(ours, theirs, leaves, upstream, reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_softcap_and_z_loss_are_added_as_documented(backend, linear, reduction):
    z, y, u, upstream = data()
    eye = torch.eye(C)
    extras = {"softcap": 3.0, "z_loss": 1e-2, "label_smoothing": 0.1}

    def ours(x, reduction):
        extras["reduction"] = reduction
        if linear:
            return po.linear_cross_entropy(x, eye, y, weight=u, **extras)
        return po.cross_entropy(x, y, u, **extras)

    def theirs(x, reduction):
        x = 3.0 * torch.tanh(x / 3.0)
        wide = u.to(x.dtype)
        plain = F.cross_entropy(x, y, wide, label_smoothing=0.1, reduction=reduction)
        lse2 = torch.where(y == -100, 0.0, x.logsumexp(-1) ** 2)
        if reduction != "none":
            lse2 = lse2.sum()
        # the mean divides by the same normaliser as the cross entropy: the labels' class weights
        total = wide[y.clamp(min=0)].where(y != -100, torch.zeros(())).sum()
        return plain + 1e-2 * (lse2 / total if reduction == "mean" else lse2)

    compared(ours, theirs, [z], upstream, reduction, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_N3_a_class_weight_that_is_no_number_is_not_hidden(backend, bad, reduction):
    z, y, u, _ = data()
    u[y[y != -100][0]] = bad
    with po.use_backend(backend):
        a = po.cross_entropy(z, y, u, reduction=reduction)
        b = po.linear_cross_entropy(z, torch.eye(C), y, weight=u, reduction=reduction)
    assert not a.isfinite() and not b.isfinite()


def test_class_weights_of_a_negative_sum_mean_what_they_mean_in_torch():
    z, y, u, _ = data()
    assert torch.allclose(po.cross_entropy(z, y, -u), F.cross_entropy(z, y, -u), rtol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_N11_all_targets_ignored_is_loss_0_and_zero_gradients(backend, reduction, weighted):
    z, y, u, _ = data()
    z[::2] = float("nan")
    y = torch.full_like(y, -100)
    z.requires_grad_()
    w = torch.eye(C).requires_grad_()
    given = {"weight": u if weighted else None, "reduction": reduction, "label_smoothing": 0.1}
    with po.use_backend(backend):
        a, b = po.cross_entropy(z, y, **given), po.linear_cross_entropy(z, w, y, **given)
        (a.sum() + b.sum()).backward()
    assert (a == 0).all() and (b == 0).all() and (z.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_N2_ignored_rows_are_bitwise_invisible_per_token(backend):
    z, y, u, upstream = data()
    bad = torch.where((y == -100)[:, None], float("nan"), z)

    def call(x):
        return po.cross_entropy(x, y, u, reduction="none", label_smoothing=0.1)

    with po.use_backend(backend):
        clean, got = (through(call, [x], upstream, "none") for x in (z, bad))
    for name, a, b in zip(("loss", "gradient"), got, clean, strict=True):
        compare.same_bits(name, a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_token_with_upstream_0_or_label_weight_0_keeps_zero_gradients(backend):
    z, _, u, _ = data((4,))
    y = torch.tensor([3, 5, 3, 7])  # class 3 has weight 0
    up = torch.tensor([1.0, 0.0, 0.0, -2.0])
    with po.use_backend(backend):
        loss, grad = through(lambda x: po.cross_entropy(x, y, u, reduction="none"), [z], up, "none")
    assert loss[0] == 0 and (grad[:3] == 0).all() and (grad[3] != 0).all()


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_legacy_reduction_arguments_are_torchs(size_average, reduce):
    if size_average is None and reduce is None:
        pytest.skip("nothing legacy is given")
    z, y, _, _ = data()
    with pytest.warns(UserWarning):
        want = F.cross_entropy(z, y, None, size_average, -100, reduce)
        got = po.cross_entropy(z, y, None, size_average, -100, reduce)
    torch.testing.assert_close(got, want)


Z, Y = torch.zeros(4, C), torch.zeros(4, dtype=torch.long)
# call, exception, what the message must name
ERRORS = [
    (lambda: po.cross_entropy(Z, torch.zeros(4, C - 1)), ValueError, "probabilities"),
    (lambda: po.linear_cross_entropy(Z, Z, torch.zeros(4, 3)), ValueError, "probab"),
    (lambda: po.cross_entropy(Z, Y[:3]), ValueError, "target"),
    (lambda: po.cross_entropy(Z, Y.bool()), TypeError, "target"),
    (lambda: po.cross_entropy(Z, Y, torch.ones(C - 1)), ValueError, "weight"),
    (lambda: po.cross_entropy(Z, Y, reduction="avg"), ValueError, "reduction"),
    (lambda: po.cross_entropy(Z, Y, label_smoothing=1.5), ValueError, "label_smoothing"),
    (lambda: po.cross_entropy(Z, Y, label_smoothing=-0.1), ValueError, "label_smoothing"),
    (lambda: po.cross_entropy(Z, Y, z_loss=-1.0), ValueError, "z_loss"),
    (lambda: po.cross_entropy(Z, Y, softcap=0.0), ValueError, "softcap"),
    (lambda: po.cross_entropy(Z, Y, softcap=-1.0), ValueError, "softcap"),
    (lambda: po.linear_cross_entropy(Z, Z, Y, softcap=-1.0), ValueError, "softcap"),
    (lambda: po.cross_entropy(torch.tensor(1.0), Y), ValueError, "input"),
    (lambda: po.cross_entropy(Z.long(), Y), TypeError, "input"),
    (lambda: po.linear_cross_entropy(Z, Z, Y, options={"chunk": 1}), TypeError, "options"),
    (lambda: po.linear_cross_entropy(Z, torch.zeros(5, C + 1), Y), ValueError, "hidden|input"),
    (lambda: po.linear_cross_entropy(Z, Z, Y, smoothing=0.1), TypeError, "smoothing"),
]


@pytest.mark.parametrize("call, error, words", ERRORS)
def test_N12_wrong_arguments_raise_and_are_named(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize("backend", BACKENDS)
def test_N9_per_token_gradients_are_bitwise_the_scalar_ones(backend):
    """reduction="none" summed equals reduction="sum": the same row pass from given coefficients."""
    z, y, u, _ = data()
    ones = torch.ones(y.shape)
    with po.use_backend(backend), batches.threads(1):
        a, b = (
            through(
                lambda x, r=r: po.cross_entropy(x, y, u, reduction=r, label_smoothing=0.1),
                [z],
                ones,
                r,
            )[1]
            for r in ("none", "sum")
        )
    compare.same_bits("gradient", a, b)

"""linear_distill_loss under autograd (PROMISES A1, A2, A4)."""

import itertools

import distill_cases as cases
import pytest
import torch
import torch.autograd.forward_ad as fwd
from batches import BACKENDS

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
N, D, V = 6, 16, 37
TEACHERS = ("head", "logits", "top-k")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(n=N, teacher="head", seed=0):
    batch = cases.make(n, D, V, seed=seed, teacher=teacher, k=5)
    x, w = (batch[k].clone().requires_grad_() for k in ("hidden", "weight"))
    labels = batch["labels"]
    labels[1::4] = -100
    return x, w, labels, cases.teacher_of(batch)


def distill(x, w, labels, teacher, divergence=None):
    divergence = divergence or po.JSD(0.4) + 0.2 * po.NLL()
    return po.linear_distill_loss(x, po.Head(w), teacher, po.TokenBatch(labels), divergence)


@each_backend
def test_a1_gradients_exactly_where_asked_for_every_subset(backend):
    """All subsets of hidden, weight, bias, and a teacher that requires gradients and gets none."""
    g = torch.Generator().manual_seed(3)
    x, w, labels, teacher = draw()
    base = {"hidden": x.detach(), "weight": w.detach(), "bias": torch.randn(V, generator=g)}
    keep = labels != -100
    t_h = teacher.hidden.clone().requires_grad_()
    t_w = teacher.head.weight.clone().requires_grad_()
    log_t = (t_h.detach().double() @ t_w.detach().double().t()).log_softmax(-1)
    for subset in itertools.product((False, True), repeat=3):
        leaf = {
            k: v.clone().requires_grad_(on) for (k, v), on in zip(base.items(), subset, strict=True)
        }
        with po.use_backend(backend):
            loss = po.linear_distill_loss(
                leaf["hidden"],
                po.Head(leaf["weight"], leaf["bias"]),
                po.TeacherHead(t_h, po.Head(t_w)),
                po.TokenBatch(labels),
                po.ForwardKL(),
            ).loss
        assert loss.requires_grad == any(subset)
        if not any(subset):
            continue
        loss.backward()
        wide = {k: v.double().requires_grad_(leaf[k].requires_grad) for k, v in base.items()}
        s = (wide["hidden"] @ wide["weight"].t() + wide["bias"]).log_softmax(-1)
        ((log_t.exp() * (log_t - s)).sum(-1)[keep].sum() / keep.sum()).backward()
        for k, v in leaf.items():
            assert (v.grad is not None) == v.requires_grad
            if v.requires_grad:
                torch.testing.assert_close(v.grad.double(), wide[k].grad, rtol=1e-4, atol=1e-6)
    assert t_h.grad is None and t_w.grad is None


@each_backend
def test_a1_lora_factors_of_the_student_and_of_the_teacher(backend):
    """A head with LoRA: W + sBA without forming it, on both sides."""
    from test_autograd import lora_head

    g = torch.Generator().manual_seed(4)
    a, b = (torch.randn(s, generator=g) / 3 for s in ((3, D), (V, 3)))
    x, w, labels, _ = draw()
    leaf = {k: v.detach().clone().requires_grad_() for k, v in (("a", a), ("b", b))}
    student = lora_head(leaf["a"], leaf["b"], w.detach(), None)
    teacher = po.TeacherHead(x.detach().flip(0), lora_head(a.flip(1), b.flip(0), w.detach(), None))
    with po.use_backend(backend):
        loss = po.linear_distill_loss(
            x, student, teacher, po.TokenBatch(labels), po.ReverseKL()
        ).loss
    loss.backward()
    wide = {k: v.double().requires_grad_() for k, v in (("a", a), ("b", b))}
    h, big = x.detach().double(), w.detach().double()
    s = (h @ (big + 0.5 * wide["b"] @ wide["a"]).t()).log_softmax(-1)
    t = (h.flip(0) @ (big + 0.5 * (b.flip(0) @ a.flip(1)).double()).t()).log_softmax(-1)
    keep = labels != -100
    want = (s.exp() * (s - t)).sum(-1)[keep].mean()
    want.backward()
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    for k in leaf:
        torch.testing.assert_close(leaf[k].grad.double(), wide[k].grad, rtol=1e-4, atol=1e-6)


@each_backend
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a1_no_grad_and_inference_mode_form_no_gradient(backend, teacher):
    args = draw(teacher=teacher)
    with po.use_backend(backend):
        want = distill(*args).loss
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                got = distill(*args).loss
            assert not got.requires_grad
            torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


@each_backend
@pytest.mark.parametrize("grads", [(True, False), (False, True), (False, False)])
def test_a1_a_frozen_head_or_hidden_costs_no_gemm_and_no_memory(backend, grads):
    """GEMMs of one call: student's logits, teacher's logits, then one for each gradient asked."""
    from pyoffline import cpu, reference

    kernels = cpu.CpuKernels if backend == "cpu" else reference.ReferenceKernels
    names = ("logits", "dhidden", "add_dweight")
    made, plain = [], {n: getattr(kernels, n) for n in names}
    x, w, labels, teacher = draw()
    x.requires_grad_(grads[0]), w.requires_grad_(grads[1])
    for n in names:
        setattr(kernels, n, lambda *a, n=n: made.append(n) or plain[n](*a))
    try:
        with po.use_backend(backend):
            distill(x, w, labels, teacher)
    finally:
        for n in names:
            setattr(kernels, n, plain[n])
    assert sorted(made) == sorted(["logits"] * 2 + [n for n, g in zip(names[1:], grads) if g])  # noqa: B905


@each_backend
@pytest.mark.parametrize("factor", [0.0, 1.0, -2.5, 65536.0])
def test_a2_upstream_of_any_scalar(backend, factor):
    args = draw()
    with po.use_backend(backend):
        plain = torch.autograd.grad(distill(*args).loss, args[:2])
        scaled = torch.autograd.grad(distill(*args).loss * factor, args[:2])
    for p, s in zip(plain, scaled, strict=True):
        torch.testing.assert_close(s, p * factor, rtol=2e-6, atol=1e-7 * abs(factor))


@each_backend
@pytest.mark.parametrize("teacher", TEACHERS)
def test_a2_backward_twice_and_an_untouched_first_gradient(backend, teacher):
    args = draw(teacher=teacher)
    with po.use_backend(backend):
        loss = distill(*args).loss
        first = torch.autograd.grad(loss, args[:2], torch.tensor(1.0), retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, args[:2], torch.tensor(2.0))
        for a, k, b in zip(first, kept, second, strict=True):
            assert torch.equal(a, k)
            torch.testing.assert_close(b, 2 * k, rtol=1e-6, atol=0)
        with pytest.raises(RuntimeError, match="retain_graph"):
            torch.autograd.grad(loss, args[:2])


def _double(f, x):
    (g,) = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.pow(2).sum(), x)


def _forward_ad(f, x):
    with fwd.dual_level():
        return f(fwd.make_dual(x.detach(), torch.ones_like(x)))


REFUSED = {
    "double backward": _double,
    "torch.func": lambda f, x: torch.func.grad(f)(x.detach()),
    "forward AD": _forward_ad,
    "vmap": lambda f, x: torch.vmap(f)(torch.stack([x.detach()] * 2)),
}


@each_backend
@pytest.mark.parametrize("how", REFUSED)
def test_a2_other_derivatives_raise_and_name_the_op(backend, how):
    x, w, labels, teacher = draw()
    with (
        po.use_backend(backend),
        pytest.raises(RuntimeError, match=rf"pyoffline::linear_distill[\s\S]*{how}"),
    ):
        REFUSED[how](lambda q: distill(q, w.detach(), labels, teacher).loss, x)


def flat(fn_args):
    out = distill(*fn_args)
    return [out.loss, out.stats.logps, *out.metrics.values()], out.loss


@each_backend
@pytest.mark.parametrize("kind", TEACHERS)
def test_a4_every_element_is_written(kind, backend):
    """Several chunks, ignored rows between, torch.empty filled with NaN."""
    args = draw(20, kind)
    want = None
    for poison in (False, True):
        torch.use_deterministic_algorithms(poison)
        try:
            with po.use_backend(backend), po.chunk_rows(4):
                values, loss = flat(args)
                got = [*values, *torch.autograd.grad(loss, args[:2])]
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(t.isfinite().all() for t in got)
        want = want or got
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

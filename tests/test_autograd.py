"""The autograd contract (PROMISES A1, A2): gradients exactly where asked, any upstream, one
backward after another, and an error that names the op for every derivative that is not implemented.
"""

import functools
import itertools
import warnings

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import nn

import pyoffline as po

BACKENDS = ("reference", "cpu")
N, D, V = 6, 16, 37
pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def use(backend):
    """Every test runs on each backend."""
    batch()  # drawn outside vmap, which refuses random numbers
    with po.use_backend(backend):
        yield


@functools.cache
def batch(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, V, (n,), generator=g)
    labels[2::5] = -100
    adv = torch.randn(n, generator=g)
    old = -torch.rand(n, generator=g) - 3.0
    return labels, adv, old


def tensors(seed=1, n=N, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(V, D, generator=g) / 4).to(dtype).requires_grad_()
    return x, w


def ppo(x, w, bias=None):
    labels, adv, old = batch(x.shape[0])
    tokens = po.TokenBatch(labels, adv, old)
    return po.linear_policy_loss(x, po.Head(w, bias), tokens, po.PPOClip() - 0.01 * po.Entropy())


# name of the op in errors -> a scalar of it, from hidden and weight
CALLS = {
    "linear_policy": lambda x, w: ppo(x, w).loss,
    "logits_policy": lambda x, w: (
        po.policy_loss(x @ w.t(), po.TokenBatch(*batch(x.shape[0])), po.PPOClip()).loss
    ),
    "linear_logps": lambda x, w: po.linear_token_logps(
        x, po.Head(w), batch(x.shape[0])[0]
    ).logps.sum(),
    "logits_logps": lambda x, w: po.token_logps(x @ w.t(), batch(x.shape[0])[0]).logps.sum(),
    "linear_losses": lambda x, w: po.linear_cross_entropy(
        x, w, batch(x.shape[0])[0], reduction="none"
    ).sum(),
    "logits_losses": lambda x, w: po.cross_entropy(
        x @ w.t(), batch(x.shape[0])[0], reduction="none"
    ).sum(),
}
each_call = pytest.mark.parametrize("name", CALLS)


def lora_head(a, b, weight, bias):
    """A head with one LoRA term beside leaf tensors of our own (a module would wrap them)."""
    term = po.head.Adapter(a=a, b=b, scale=0.5, dropout=None)
    head = po.Head(weight, bias)
    t = head.tensors()
    parts = type(t)(
        weight=t.weight,
        bias=t.bias,
        adapters=(term,),
        softcap=t.softcap,
        temperature=t.temperature,
        logit_scale=t.logit_scale,
        logits_dtype=t.logits_dtype,
    )
    object.__setattr__(head, "tensors", lambda: parts)
    return head


def test_a1_gradients_exactly_where_asked_for_every_subset():
    """All 2^5 subsets of hidden, weight, bias, A, B against autograd of plain fp64 PyTorch."""
    g = torch.Generator().manual_seed(3)
    shapes = {"hidden": (N, D), "weight": (V, D), "bias": (V,), "a": (3, D), "b": (V, 3)}
    base = {k: torch.randn(s, generator=g) / 3 for k, s in shapes.items()}
    labels, adv, _ = batch()
    tokens = po.TokenBatch(labels, adv)
    keep = labels != -100
    for subset in itertools.product((False, True), repeat=5):
        leaf = {
            k: v.clone().requires_grad_(on) for (k, v), on in zip(base.items(), subset, strict=True)
        }
        head = lora_head(leaf["a"], leaf["b"], leaf["weight"], leaf["bias"])
        loss = po.linear_policy_loss(leaf["hidden"], head, tokens, po.WeightedNLL()).loss
        assert loss.requires_grad == any(subset)
        wide = {k: v.double().requires_grad_(leaf[k].requires_grad) for k, v in base.items()}
        total = wide["weight"] + 0.5 * wide["b"] @ wide["a"]
        z = wide["hidden"] @ total.t() + wide["bias"]
        logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        truth = -(adv * logps)[keep].sum() / keep.sum()
        if any(subset):
            loss.backward()
            truth.backward()
        for k, v in leaf.items():
            if not v.requires_grad:
                assert v.grad is None, (k, subset)
                continue
            assert v.grad is not None and v.grad.dtype == v.dtype, (k, subset)
            torch.testing.assert_close(
                v.grad.double(), wide[k].grad, rtol=1e-4, atol=1e-6, msg=f"{k} {subset}"
            )


@each_call
def test_a1_no_grad_and_inference_mode_form_no_gradient(name):
    x, w = tensors()
    want = CALLS[name](x, w)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = CALLS[name](x, w)
        assert not got.requires_grad
        assert got.grad_fn is None
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("grads", "reason"),
    [
        ((True, False), "frozen head: no [V, D]"),
        ((False, True), "head only: no [N, D]"),
        ((False, False), "no gradient at all: neither"),
    ],
)
def test_a1_nothing_is_allocated_for_a_gradient_nobody_asked(grads, reason, backend):
    x, w = tensors(n=8)
    x.requires_grad_(grads[0]), w.requires_grad_(grads[1])
    labels = torch.arange(8)
    ours = f"pyoffline.{backend}"
    made = []
    module = __import__(ours, fromlist=["x"])
    kernels = module.CpuKernels if backend == "cpu" else module.ReferenceKernels
    plain = kernels.empty

    def spy(self, shape, dtype, device):
        made.append(tuple(shape))
        return plain(self, shape, dtype, device)

    kernels.empty = spy
    try:
        po.linear_policy_loss(x, po.Head(w), po.TokenBatch(labels), po.NLL())
    finally:
        kernels.empty = plain
    assert ((8, D) in made) == grads[0], reason
    assert ((V, D) in made) == grads[1], reason


def test_a1_tied_embedding_gets_both_uses():
    labels, adv, _ = batch()
    ids = torch.tensor([1, 5, 9, 1, 30, 2])
    grads = []
    for fused in (True, False):
        table = tensors()[1].detach().double().requires_grad_()
        if fused:
            table = table.detach().float().requires_grad_()
        x = torch.tanh(table[ids])
        if fused:
            loss = po.linear_cross_entropy(x, table, labels)
        else:
            loss = torch.nn.functional.cross_entropy(x @ table.t(), labels)
        loss.backward()
        grads.append(table.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a1_head_parameter_trains_and_a_replaced_one_is_followed():
    """Head.of reads the module at each call, so a Parameter replaced after it still trains."""
    linear = nn.Linear(D, V)
    head = po.Head.of(linear)
    linear.weight = nn.Parameter(linear.weight.detach().clone())
    x = tensors()[0].detach()
    before = linear.weight.detach().clone()
    step = torch.optim.SGD(linear.parameters(), lr=0.1)
    po.linear_policy_loss(x, head, po.TokenBatch(batch()[0]), po.NLL()).loss.backward()
    step.step()
    assert not torch.equal(before, linear.weight)


UPSTREAMS = [
    (0.0, "a loss that is switched off"),
    (1.0, "returned untouched"),
    (-2.5, "a sign and a factor"),
    (65536.0, "a loss scale"),
]


@each_call
@pytest.mark.parametrize(("factor", "reason"), UPSTREAMS)
def test_a2_upstream_of_any_scalar(name, factor, reason):
    x, w = tensors()
    plain = torch.autograd.grad(CALLS[name](x, w), (x, w))
    scaled = torch.autograd.grad(CALLS[name](x, w) * factor, (x, w))
    for p, s in zip(plain, scaled, strict=True):
        torch.testing.assert_close(s, p * factor, rtol=2e-6, atol=1e-7 * abs(factor))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a2_upstream_loss_scale_in_half_precision(dtype):
    """scaled gradients / scale equal the unscaled ones to one rounding of the dtype."""
    x, w = tensors(dtype=dtype)
    plain = torch.autograd.grad(ppo(x, w).loss, (x, w))
    scaled = torch.autograd.grad(ppo(x, w).loss * 1024.0, (x, w))
    eps = torch.finfo(dtype).eps
    for p, s in zip(plain, scaled, strict=True):
        # fp16 gradients below 2^-14 are subnormal without the scale
        torch.testing.assert_close(s.double() / 1024, p.double(), rtol=2 * eps, atol=1e-7)


def test_a2_upstream_expanded_strided_and_low_precision():
    x, w = tensors()
    want = torch.autograd.grad(ppo(x, w).loss * 0.5, (x, w))
    shapes = {
        "expanded": torch.tensor([0.5]).expand(1)[0],
        "strided": torch.tensor([0.1, 0.5, 0.2])[1],
        "as_strided": torch.full((4,), 0.5).as_strided((), (), 2),
    }
    for reason, up in shapes.items():
        got = torch.autograd.grad(ppo(x, w).loss, (x, w), up)
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b), reason
    cast = torch.autograd.grad((ppo(x, w).loss.to(torch.bfloat16) * 0.5).sum(), (x, w))
    for a, b in zip(cast, want, strict=True):
        assert torch.equal(a, b)


PER_TOKEN = {
    "linear_logps": lambda x, w, lab: po.linear_token_logps(x, po.Head(w), lab).logps,
    "linear_entropy": lambda x, w, lab: po.linear_token_logps(x, po.Head(w), lab).entropy,
    "linear_lse": lambda x, w, lab: po.linear_token_logps(x, po.Head(w), lab).lse,
    "logits_logps": lambda x, w, lab: po.token_logps(x @ w.t(), lab).logps,
    "linear_none": lambda x, w, lab: -po.linear_cross_entropy(x, w, lab, reduction="none"),
    "logits_none": lambda x, w, lab: -po.cross_entropy(x @ w.t(), lab, reduction="none"),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_a2_upstream_per_token_contiguous_strided_expanded(name):
    """Random, zero and negative upstreams per token, against fp64 autograd of plain PyTorch."""
    x, w = tensors()
    labels = batch()[0]
    keep = labels != -100
    ups = {
        "random": torch.tensor([0.3, -2.0, 5.0, 0.0, 1.5, -0.1]),
        "strided": torch.arange(12.0)[::2],
        "expanded": torch.tensor(0.7).expand(N),
    }
    for reason, up in ups.items():
        got = torch.autograd.grad(PER_TOKEN[name](x, w, labels), (x, w), up)
        xd, wd = (t.detach().double().requires_grad_() for t in (x, w))
        lp = (xd @ wd.t()).log_softmax(-1)
        value = {
            "linear_entropy": -(lp.exp() * lp).sum(-1),
            "linear_lse": (xd @ wd.t()).logsumexp(-1),
        }.get(name, lp.gather(-1, labels.clamp(min=0)[:, None])[:, 0])
        want = torch.autograd.grad(torch.where(keep, value, 0.0), (xd, wd), up.double())
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-6, msg=reason)


@each_call
def test_a2_backward_twice_same_bits_with_retain_graph_and_an_error_without(name):
    x, w = tensors()
    loss = CALLS[name](x, w) * 1.5
    first = torch.autograd.grad(loss, (x, w), retain_graph=True)
    first = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (x, w), retain_graph=True)
    second = [g.clone() for g in second]
    third = torch.autograd.grad(loss, (x, w))
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    with pytest.raises(RuntimeError, match="retain_graph"):
        torch.autograd.grad(loss, (x, w))


def test_a2_the_first_gradient_is_not_written_by_the_second_backward():
    """Mutation 27: a second backward must not scale, in place, what the first one gave away."""
    x, w = tensors()
    loss = ppo(x, w).loss
    first = torch.autograd.grad(loss, (x, w), torch.tensor(1.0), retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(loss, (x, w), torch.tensor(2.0), retain_graph=True)
    for a, k, b in zip(first, kept, second, strict=True):
        assert torch.equal(a, k)
        torch.testing.assert_close(b, 2 * k, rtol=1e-6, atol=0)


def _double(f, x, w):
    (g,) = torch.autograd.grad(f(x, w), x, create_graph=True)
    return torch.autograd.grad(g.pow(2).sum(), x)


def _double_by_backward(f, x, w):
    (g,) = torch.autograd.grad(f(x, w), x, create_graph=True)
    return g.pow(2).sum().backward()


def _forward_ad(f, x, w):
    with fwd.dual_level():
        return f(fwd.make_dual(x.detach(), torch.ones_like(x)), w.detach())


def _vmap(f, x, w):
    return torch.vmap(lambda q: f(q, w.detach()))(torch.stack([x.detach()] * 2))


# derivative -> (how, what the error says beside the op's name); each is a listed expected failure
REFUSED = {
    "double backward by grad": (_double, "double backward"),
    "double backward by backward": (_double_by_backward, "double backward"),
    "hvp": (
        lambda f, x, w: torch.autograd.functional.hvp(
            lambda q: f(q, w), x.detach(), torch.ones_like(x)
        ),
        "double backward",
    ),
    "torch.func.grad": (lambda f, x, w: torch.func.grad(f)(x.detach(), w.detach()), "torch.func"),
    "torch.func.hessian": (
        lambda f, x, w: torch.func.hessian(f)(x.detach(), w.detach()),
        "not implemented",
    ),
    "torch.func.jvp": (
        lambda f, x, w: torch.func.jvp(
            lambda q: f(q, w.detach()), (x.detach(),), (torch.ones_like(x),)
        ),
        "forward AD",
    ),
    "forward AD": (_forward_ad, "forward AD"),
    "vmap": (_vmap, "vmap"),
}


@each_call
@pytest.mark.parametrize("how", REFUSED)
def test_a2_other_derivatives_raise_and_name_the_op(name, how):
    """Forward AD through a custom op would give a tangent of 0 in silence."""
    call, says = REFUSED[how]
    with pytest.raises(RuntimeError, match=rf"pyoffline::{name}[\s\S]*{says}"):
        call(CALLS[name], *tensors())


@each_call
def test_a2_batched_upstreams(name):
    """is_grads_batched: a vmap over the backward only."""
    x, w = tensors()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.autograd.grad(
            CALLS[name](x, w), x, torch.tensor([1.0, -3.0]), is_grads_batched=True
        )[0]
    plain = torch.autograd.grad(CALLS[name](x, w), x)[0]
    torch.testing.assert_close(got, torch.stack([plain, -3 * plain]), rtol=1e-6, atol=1e-7)


@each_call
def test_a2_create_graph_gives_the_right_first_gradient(name):
    x, w = tensors()
    want = torch.autograd.grad(CALLS[name](x, w), (x, w))
    got = torch.autograd.grad(CALLS[name](x, w), (x, w), create_graph=True)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)

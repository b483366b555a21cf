"""PROMISES A1 to A4 on a GPU: subsets of gradients, upstream gradients, streams, syncs, graphs,
torch.compile, written outputs. Each with both GPU backends; not run where there is no GPU.
"""

import itertools

import batches
import gpu_cases
import pytest
import torch
import torch.utils.checkpoint
from batches import dtype_name
from compare import same_bits
from gpu_cases import each_backend, move, served  # noqa: F401  (a fixture)
from test_autograd import lora_head
from test_compile import OPCHECKS
from torch._dynamo.testing import CompileCounterWithBackend

import pyoffline as po
from pyoffline import autograd

pytestmark = pytest.mark.gpu
HALVES = (torch.bfloat16, torch.float16)
each_half = pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)


def draw(n=9, d=16, v=301, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g).requires_grad_()
    w = (torch.randn(v, d, generator=g) / 4).requires_grad_()
    labels = torch.randint(0, v, (n,), generator=g)
    labels[1::4] = -100
    return move((x, w, labels, torch.randn(n, generator=g), -torch.rand(n, generator=g) - 4.0))


def linear_policy_loss(x, w, labels, adv, old, objective):
    out = po.linear_policy_loss(x, po.Head(w), po.TokenBatch(labels, adv, old), objective)
    return out.loss, out.stats.logps, *out.metrics.values()


def policy_loss(x, w, labels, adv, old, objective):
    out = po.policy_loss(x @ w.t(), po.TokenBatch(labels, adv, old), objective)
    return out.loss, out.stats.entropy


def linear_token_logps(x, w, labels, adv, old, objective):
    s = po.linear_token_logps(x, po.Head(w), labels)
    return ((s.logps * adv).sum() + s.entropy.sum() + 0.1 * s.lse.sum(), *s)


def token_logps(x, w, labels, adv, old, objective):
    s = po.token_logps(x @ w.t(), labels)
    return ((s.logps * adv).sum() + s.entropy.sum(), *s)


def cross_entropy_none(x, w, labels, adv, old, objective):
    return ((po.linear_cross_entropy(x, w, labels, reduction="none", softcap=20.0) * adv).sum(),)


CALLS = (linear_policy_loss, policy_loss, linear_token_logps, token_logps, cross_entropy_none)
each_call = pytest.mark.parametrize("fn", CALLS)


def outcome(fn, args):
    out = fn(*args)
    return [t.detach() for t in out], torch.autograd.grad(out[0], args[:2])


def close(got, want, rtol=1e-5, atol=1e-6):
    for a, b in zip((*got[0], *got[1]), (*want[0], *want[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@each_backend
def test_a1_gradients_exactly_where_asked_for_every_subset(backend):
    g = torch.Generator().manual_seed(3)
    shapes = {"hidden": (9, 16), "weight": (301, 16), "bias": (301,), "a": (3, 16), "b": (301, 3)}
    base = move({k: torch.randn(s, generator=g) / 3 for k, s in shapes.items()})
    _, _, labels, adv, _ = draw()
    keep = labels != -100
    for subset in itertools.product((False, True), repeat=5):
        pairs = zip(base.items(), subset, strict=True)
        leaf = {k: v.clone().requires_grad_(on) for (k, v), on in pairs}
        head = lora_head(leaf["a"], leaf["b"], leaf["weight"], leaf["bias"])
        with po.use_backend(backend):
            tokens = po.TokenBatch(labels, adv)
            loss = po.linear_policy_loss(leaf["hidden"], head, tokens, po.WeightedNLL()).loss
        assert loss.requires_grad == any(subset)
        wide = {k: v.double().requires_grad_(leaf[k].requires_grad) for k, v in base.items()}
        z = wide["hidden"] @ (wide["weight"] + 0.5 * wide["b"] @ wide["a"]).t() + wide["bias"]
        logps = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        truth = -(adv * logps)[keep].sum() / keep.sum()
        if any(subset):
            loss.backward()
            truth.backward()
        for k, v in leaf.items():
            assert (v.grad is not None) == v.requires_grad, (k, subset)
            if v.requires_grad:
                torch.testing.assert_close(v.grad.double(), wide[k].grad, rtol=1e-4, atol=1e-6)


@each_backend
@each_call
def test_a1_no_grad_and_inference_mode_form_no_gradient(fn, backend):
    args = (*draw(), po.PPOClip())
    with po.use_backend(backend):
        want = fn(*args)
        for mode in (torch.no_grad(), torch.inference_mode()):
            with mode:
                got = fn(*args)
            for a, b in zip(got, want, strict=True):
                assert not a.requires_grad
                torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


@each_backend
@each_call
@pytest.mark.parametrize("factor", [1.0, 0.0, -0.37, 1024.0])
def test_a2_any_upstream_and_a_second_backward(factor, fn, backend):
    args = (*draw(), po.PPOClip())
    with po.use_backend(backend):
        plain = torch.autograd.grad(fn(*args)[0], args[:2])
        loss = fn(*args)[0] * factor
        first = torch.autograd.grad(loss, args[:2], retain_graph=True)
        kept = [g.clone() for g in first]
        second = torch.autograd.grad(loss, args[:2])
    for a, b, c, p in zip(first, second, kept, plain, strict=True):
        same_bits("second", b, c)
        same_bits("first is not written by the second", a, c)
        torch.testing.assert_close(a, p * factor, rtol=1e-5, atol=1e-6 * max(1, abs(factor)))


@each_backend
def test_a2_double_backward_raises_and_names_the_op(backend):
    x, w, labels, adv, old = draw()
    with po.use_backend(backend):
        loss = linear_policy_loss(x, w, labels, adv, old, po.PPOClip())[0]
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="linear_policy"):
            grad.sum().backward()


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
def test_a2_checkpoint_gives_the_same_bits(reentrant, backend):
    x, w, labels, adv, old = draw()

    def step(x):
        return linear_policy_loss(x * 2.0, w, labels, adv, old, po.PPOClip())[0]

    with po.use_backend(backend):
        want = torch.autograd.grad(step(x), (x, w))
        x.grad = w.grad = None
        torch.utils.checkpoint.checkpoint(step, x, use_reentrant=reentrant).backward()
    same_bits("x", x.grad, want[0])
    same_bits("w", w.grad, want[1])


@each_backend
@pytest.mark.parametrize("size", [1, 7, 4096, 10_001, 3_000_001])
@pytest.mark.parametrize("dtype", (torch.float32, *HALVES), ids=dtype_name)
def test_a2_scale_by_upstream_in_place_and_untouched_by_one(dtype, size, backend):
    from pyoffline.backends import load

    grad = move(torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype))
    scale = load(backend, grad).scale_by_upstream
    one, factor = move((torch.tensor(1.0), torch.tensor(-0.37)))
    for part in (grad[:-1].clone(), grad.clone()[1:]):
        before = part.clone()
        assert scale(part, one) is part
        same_bits("times 1", part, before)
        scale(part, factor)
        same_bits("times -0.37", part, (before.float() * factor).to(dtype))


def step(batch, n_valid=None):
    """Loss and both gradients of a fused call, all on the device."""
    x, w = (batch[k].clone().requires_grad_() for k in ("hidden", "weight"))
    tokens = batches.tokens(batch, n_valid=n_valid)
    out = po.linear_policy_loss(x, po.Head(w), tokens, po.PPOClip())
    out.loss.backward()
    return out.loss.detach(), x.grad, w.grad


def logits_step(batch):
    """Loss and gradient on given logits, and log-probs with their backward."""
    z = (batch["hidden"] @ batch["weight"].t()).detach().requires_grad_()
    out = po.policy_loss(z, batches.tokens(batch), po.PPOClip())
    out.loss.backward()
    y = z.detach().clone().requires_grad_()
    po.token_logps(y, batch["labels"]).logps.sum().backward()
    return out.loss.detach(), z.grad, y.grad


@each_backend
@each_half
def test_no_host_sync_when_n_valid_is_given_and_on_given_logits(dtype, backend):
    batch = batches.make(n=64, d=64, v=4099, dtype=dtype, reads=("old", "adv"))
    count = int(((batch["labels"] != -100) & (batch["weights"] != 0)).sum())
    batch = move(batch)
    with po.use_backend(backend):
        want = *step(batch), *logits_step(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = *step(batch, count), *logits_step(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want, strict=True):
        same_bits("step", a, b)


@each_backend
def test_the_launch_goes_to_the_current_stream(backend):
    """The logits are written on a side stream behind a long wait; a launch elsewhere reads NaN."""
    fresh = torch.randn(8, 4099, device=gpu_cases.DEVICE)
    labels = torch.arange(8, device=gpu_cases.DEVICE)
    logits = torch.full_like(fresh, float("nan"))
    with po.use_backend(backend):
        want = po.token_logps(fresh, labels).logps
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            po.token_logps(fresh, labels)  # this stream's first allocation may wait for the device
            torch.cuda._sleep(200_000_000)  # cycles: about 0.1 s
            logits.copy_(fresh)
            got = po.token_logps(logits, labels).logps
        assert not side.query(), "the call waited for its launch"
        side.synchronize()
    same_bits("logps", got, want)


@each_backend
@each_half
def test_a3_captured_in_a_graph_and_replayed_on_new_data(dtype, backend):
    """Gradients of the fused call and of given logits; the replay reads what the tensors hold
    then. A graph multiplies every row, eager the compacted ones: another GEMM may round otherwise.
    The warm-up has the shapes of the capture, so that nothing is compiled in it.
    """
    first = move(batches.make(n=64, d=64, v=4099, dtype=dtype, reads=("old", "adv")))
    second = move(batches.make(n=64, d=64, v=4099, dtype=dtype, reads=("old", "adv"), seed=1))
    every = {**first, "labels": first["labels"].clamp(min=0), "weights": first["weights"] + 0.01}
    with po.use_backend(backend):
        want = *step(second), *logits_step(second)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(every), logits_step(first)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = *step(first), *logits_step(first)
    for k in ("hidden", "weight", "labels", "weights", "old", "adv"):
        first[k].copy_(second[k])
    for _ in range(2):
        graph.replay()
        torch.cuda.synchronize()
        for a, b in zip(got, want, strict=True):
            size = b.double().abs().max().item()
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * size)


@each_backend
@each_call
def test_a3_fullgraph_dynamic_shapes_equal_eager(fn, backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fn, fullgraph=True, backend=counter)
    with po.use_backend(backend):
        for i, n in enumerate((8, 12, 20, 33)):
            args = (*draw(n, seed=i), po.PPOClip(0.1 + 0.02 * i))
            close(outcome(compiled, args), outcome(fn, args))
    assert counter.frame_count <= 2


@each_backend
@pytest.mark.parametrize("fn", [linear_policy_loss, token_logps])
def test_a3_inductor_equals_eager(fn, backend):
    torch._dynamo.reset()
    compiled = torch.compile(fn, fullgraph=True, dynamic=True)
    with po.use_backend(backend):
        for n in (8, 20):
            args = (*draw(n, seed=n), po.PPOClip())
            close(outcome(compiled, args), outcome(fn, args))


@each_backend
def test_a3_twenty_values_of_beta_and_clip_are_one_compile(backend):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(linear_policy_loss, fullgraph=True, backend=counter)
    args = draw()
    with po.use_backend(backend):
        for i in range(20):
            kl = 0.01 * (i + 1) * po.KL("k3", against="old")
            given = (*args, po.PPOClip(0.1 + 0.01 * i) + kl - 0.01 * i * po.Entropy())
            close(outcome(compiled, given), outcome(linear_policy_loss, given))
    assert counter.frame_count == 1


@each_backend
@pytest.mark.parametrize("case", OPCHECKS)
def test_a3_opcheck_all_four_utilities(case, backend):
    op, make = OPCHECKS[case]

    def placed(x):
        if isinstance(x, torch.Tensor):
            return x if x.dtype == torch.float64 else move(x)  # fp64: hyper and head
        if isinstance(x, list):
            return [placed(v) for v in x]
        return backend if isinstance(x, str) and x == "reference" else x

    torch.library.opcheck(op, [placed(a) for a in make()])


@each_backend
@each_call
def test_a4_every_element_is_written(fn, backend):
    """From NaN-filled memory, several chunks, ignored rows between, eager and compiled."""
    torch._dynamo.reset()
    args = (*draw(20), po.PPOClip())
    compiled = torch.compile(fn, fullgraph=True, backend="aot_eager")
    assert torch.utils.deterministic.fill_uninitialized_memory
    with po.use_backend(backend), po.chunk_rows(4):
        want = outcome(fn, args)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            got = [outcome(f, args) for f in (fn, compiled)]
        finally:
            torch.use_deterministic_algorithms(False)
    for each in got:
        assert all(t.isfinite().all() for t in (*each[0], *each[1]))
        close(each, want)


@each_backend
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: one GPU")
def test_a_tensor_of_another_device_is_served_there(backend):
    """With device 0 current; its flag, stream and kernel are its own."""
    logits = torch.randn(4, 4099, device="cuda:1").requires_grad_()
    labels = torch.arange(4, device="cuda:1")
    with po.use_backend(backend):
        got = po.token_logps(logits, labels).logps
        got.sum().backward()
    want = logits.detach().double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    torch.testing.assert_close(got.detach().double(), want, rtol=1e-6, atol=1e-6)
    assert logits.grad.isfinite().all() and torch.cuda.current_device() == 0


def test_the_upstream_is_read_by_a_kernel_on_a_gpu():
    x, w, labels, adv, old = draw()
    assert not autograd.is_read_by_host(torch.ones((), device=x.device), x)

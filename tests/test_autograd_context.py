"""Autograd inside other machinery (PROMISES A2): checkpointing, DDP, pickling, deepcopy, threads,
saved-tensor hooks, and the records that travel between processes.
"""

import copy
import os
import pickle  # noqa: S403  the test is that our records survive it
import socket
import subprocess
import sys
import threading

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import pyoffline as po

BACKENDS = ("reference", "cpu")
N, D, V = 10, 16, 37
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def draw(seed=0, n=N):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, D, generator=g).requires_grad_()
    w = (torch.randn(V, D, generator=g) / 4).requires_grad_()
    labels = torch.randint(0, V, (n,), generator=g)
    labels[1::4] = -100
    tokens = po.TokenBatch(labels, torch.randn(n, generator=g), torch.full((n,), -3.5))
    return x, w, tokens


def loss_of(x, w, tokens, objective=None):
    return po.linear_policy_loss(x, po.Head(w), tokens, objective or po.PPOClip()).loss


def grads_of(x, w, tokens, objective=None):
    return torch.autograd.grad(loss_of(x, w, tokens, objective), (x, w))


LOSSES = {
    "linear_policy": loss_of,
    "linear_logps": lambda x, w, t: (
        po.linear_token_logps(x, po.Head(w), t.labels).logps * t.advantages
    ).sum(),
    "linear_losses": lambda x, w, t: po.linear_cross_entropy(
        x, w, t.labels, reduction="none"
    ).sum(),
}


@each_backend
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_a2_checkpoint_gives_the_same_bits(backend, reentrant, name):
    with po.use_backend(backend):
        x, w, tokens = draw()
        plain = torch.autograd.grad(LOSSES[name](x, w, tokens), (x, w))
        checkpoint(LOSSES[name], x, w, tokens, use_reentrant=reentrant).backward()
        assert torch.equal(x.grad, plain[0])
        assert torch.equal(w.grad, plain[1])


@each_backend
@pytest.mark.parametrize("name", LOSSES)
def test_a2_saved_tensor_hooks_see_only_inputs_and_may_replace_them(backend, name):
    """Offloading hooks: what is packed is small, what is unpacked is used, no [N, V] is saved."""
    with po.use_backend(backend):
        x, w, tokens = draw()
        plain = torch.autograd.grad(LOSSES[name](x, w, tokens), (x, w))
        shapes = []

        def pack(t):
            shapes.append(tuple(t.shape))
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = LOSSES[name](x, w, tokens)
        got = torch.autograd.grad(loss, (x, w))
        assert (N, V) not in shapes
        for a, b in zip(got, plain, strict=True):
            assert torch.equal(a, b)


@each_backend
def test_a2_inputs_changed_between_forward_and_backward_raise(backend):
    """A recomputing backward must not use changed inputs in silence: autograd's version counter."""
    with po.use_backend(backend):
        x, w, tokens = draw()
        loss = LOSSES["linear_logps"](x, w, tokens)
        with torch.no_grad():
            w.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def double(t):
    return -t.adv * t.logp


RECORDS = {
    "simple objective": lambda: po.PPOClip(0.1, 0.3),
    "composed objective": lambda: po.PPOClip() + 0.04 * po.KL("k3") - 0.001 * po.Entropy(),
    "weighted objective": lambda: po.NLL().weighted_by("positive"),
    "dual clip None": lambda: po.PPOClip(0.2, 0.28, None),
}


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
@pytest.mark.parametrize("name", RECORDS)
def test_a2_objectives_survive_pickle_and_deepcopy(name, how):
    plain = RECORDS[name]()
    again = how(plain)
    assert again == plain
    for mu in (False, True):
        a, b = plain.program(mu), again.program(mu)
        assert (a.codes, a.gates, a.reads) == (b.codes, b.gates, b.reads)
        assert torch.equal(a.hyper, b.hyper)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])  # noqa: S301
@pytest.mark.parametrize("head", ["weights", "module"])
def test_a2_head_and_batches_survive_pickle_and_deepcopy(head, how):
    """DataLoader workers pickle the batches; a deep copied trainer copies its head."""
    x, w, tokens = draw()
    linear = nn.Linear(D, V, bias=False)
    linear.weight = nn.Parameter(w.detach())
    plain = po.Head.of(linear) if head == "module" else po.Head(w, softcap=30.0)
    again, batch = how(plain), how(tokens)
    sequences = how(po.SequenceBatch(rewards=torch.ones(2)))
    assert torch.equal(sequences.rewards, torch.ones(2))
    assert again.tensors().weight is not plain.tensors().weight
    a = po.linear_policy_loss(x, plain, tokens, po.PPOClip()).loss
    b = po.linear_policy_loss(x, again, batch, po.PPOClip()).loss
    assert torch.equal(a, b)
    stats = po.linear_policy_loss(x.detach(), plain, tokens, po.PPOClip()).stats
    assert torch.equal(how(stats).logps, stats.logps)


@each_backend
def test_a2_eight_threads_equal_serial_bitwise(backend):
    """Forward and backward in eight threads at once, each on its own batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with po.use_backend(backend):
            want = [grads_of(*draw(seed)) for seed in range(8)]
        got, errors = [None] * 8, []
        start = threading.Barrier(8)

        def work(i):
            try:
                x, w, tokens = draw(i)
                start.wait()
                for _ in range(5):
                    with po.use_backend(backend):
                        got[i] = grads_of(x, w, tokens)
            except Exception as error:  # noqa: BLE001  reported by the assert below
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not errors
        for a, b in zip(got, want, strict=True):
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    finally:
        torch.set_num_threads(before)


@each_backend
def test_a2_backward_on_another_thread(backend):
    with po.use_backend(backend):
        x, w, tokens = draw()
        plain = grads_of(x, w, tokens)
        loss = LOSSES["linear_logps"](x, w, tokens)
        want = torch.autograd.grad(loss, (x, w), retain_graph=True)
        policy = loss_of(x, w, tokens)
    got = []
    worker = threading.Thread(target=lambda: got.extend((torch.autograd.grad(loss, (x, w)), None)))
    worker.start()
    worker.join()
    assert all(torch.equal(a, b) for a, b in zip(got[0], want, strict=True))
    second = threading.Thread(target=policy.backward)
    second.start()
    second.join()
    assert torch.equal(x.grad, plain[0])


@each_backend
def test_a2_gradients_that_the_caller_of_the_op_holds_are_not_scaled(backend):
    """The op's own outputs hold the formed gradients; a backward with upstream 2 leaves them."""
    g = torch.Generator().manual_seed(5)
    x, w = (torch.randn(n, D, generator=g, requires_grad=True) for n in (6, V))
    labels = torch.randint(0, V, (6,), generator=g)
    program = po.NLL().program(False)
    flat = (labels, torch.ones(6), None, None, None, None, None, [], None, program.hyper)
    head = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    tail = (head, list(program.codes), "", -100, 0, 3, backend, [0, 0, 0])
    out = torch.ops.pyoffline.linear_policy(x, w, None, None, None, *flat, *tail)
    held, kept = out[7:9], [t.detach().clone() for t in out[7:9]]
    got = torch.autograd.grad(out[0], (x, w), torch.tensor(2.0))
    for a, b, c in zip(held, kept, got, strict=True):
        assert torch.equal(a, b) and torch.equal(c, 2 * b)


class _Model(nn.Module):
    """Embedding, one layer, tied or free head: the fused loss is called inside forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(D, D)
        self.lm_head = nn.Linear(D, V, bias=True)

    def forward(self, x, tokens):
        return po.linear_policy_loss(self.body(x), po.Head.of(self.lm_head), tokens, po.NLL()).loss


def _ddp_worker(rank, world, port, backend, out):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # the first interface may have no address
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world
    )
    try:
        with po.use_backend(backend):
            model = nn.parallel.DistributedDataParallel(_Model(), static_graph=world == 2)
            x, _, tokens = draw(0, 8)
            part = slice(rank * 8 // world, (rank + 1) * 8 // world)
            weights = (tokens.labels != -100).float() / 6
            mine = po.TokenBatch(tokens.labels[part], weights=weights[part] * world)
            model(x.detach()[part], mine).backward()
        if rank == 0:
            out.put([p.grad.numpy() for p in model.parameters()])
        dist.barrier()  # a rank that leaves first aborts the other
    finally:
        dist.destroy_process_group()


def _spawn_ranks(world, port, backend):
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    ranks = [
        context.Process(target=_ddp_worker, args=(r, world, port, backend, out))
        for r in range(world)
    ]
    for p in ranks:
        p.start()
    got = out.get(timeout=90)
    for p in ranks:
        p.join(30)
        assert p.exitcode == 0
    return got


class _Box(list):
    """The queue of a rank that runs in this process."""

    put = list.append


# (ranks, backend): one rank runs in this process; starting more costs seconds, so one backend does
@pytest.mark.parametrize(("world", "backend"), [(1, "reference"), (1, "cpu"), (2, "cpu")])
def test_a2_ddp_on_gloo_equals_one_process(world, backend):
    """Ranks with unequal numbers of counted tokens; the global mean is in the weights."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    if world == 1:
        out, threads = _Box(), torch.get_num_threads()
        _ddp_worker(0, 1, port, backend, out)
        torch.set_num_threads(threads)
        got = out[0]
    else:
        got = _spawn_ranks(world, port, backend)
    with po.use_backend(backend):
        model = _Model()
        x, _, tokens = draw(0, 8)
        weights = (tokens.labels != -100).float() / 6
        model(x.detach(), po.TokenBatch(tokens.labels, weights=weights)).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        torch.testing.assert_close(torch.from_numpy(a), p.grad, rtol=1e-5, atol=1e-7)


def test_a2_a_custom_objective_travels_by_its_function():
    """Its number is a place in this process's registry: a bare copy would run another function."""
    objective = po.custom(double)
    assert copy.deepcopy(objective) is objective
    data = pickle.dumps(objective)
    loaded = pickle.loads(data)  # noqa: S301
    x, w, tokens = draw()
    tokens = po.TokenBatch(tokens.labels, tokens.advantages)
    want = loss_of(x, w, tokens, objective)
    assert torch.equal(loss_of(x, w, tokens, loaded), want)
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        pickle.dumps(po.custom(lambda t: t.logp * 0.0))


# A backward inside 60 others runs in a thread of the engine's, as every backward does on a GPU.
IN_THE_ENGINES_THREAD = """
import os, threading, torch, pyoffline as po
from pyoffline.backends import pick
from pyoffline.plan import current_settings

class Deep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones((), requires_grad=True), ctx.depth - 1).backward()
        else:
            assert threading.get_ident() != caller
            seen.append((current_settings(), pick("cpu", torch.float32)))
            with po.chunk_rows(7):
                seen.append(current_settings().rows)
            seen.append(current_settings().rows)
        return g, None

def look():
    Deep.apply(torch.ones((), requires_grad=True), 70).backward()

caller, seen = threading.get_ident(), []
with po.chunk_rows(3), po.memory_budget(5), po.deterministic(), po.use_backend("reference"):
    here = current_settings()
    look()
assert seen == [(here, "reference"), 7, 3] and (here.rows, here.budget) == (3, 5), seen
seen.clear()
look()
assert seen[0] == (current_settings(), "cpu") and seen[1:] == [7, 0], seen
print("ok", flush=True)
os._exit(0)  # the engine's threads are still there
"""


def test_a2_overrides_hold_in_the_threads_of_the_engine():
    """Else a checkpoint recomputes on a GPU with another chunk plan and another backend."""
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_ENGINES_THREAD], capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "ok\n", done.stderr

"""The CPU backend's scratch: kept between calls, bounded, given back on request, and never part of
a result; a large result is kept once the user has dropped it, and not before (PROMISES M2, M3)."""

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import pyoffline as po
from pyoffline import _C
from pyoffline.benchmarks.memory import status_nbytes
from pyoffline.cpu import CpuKernels

MIB = 1 << 20
LIMIT = 3 << 30
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc: not run")


@pytest.fixture(autouse=True)
def no_idle_scratch():
    po.release_scratch()
    yield
    po.release_scratch()


def take(nbytes):
    return torch.frombuffer(_C.scratch(nbytes), dtype=torch.uint8)


def faults(step):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def batch(n=512, d=64, v=32000, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=g).to(dtype).requires_grad_()
    w = (torch.randn(v, d, generator=g) / 8).to(dtype).requires_grad_()
    tokens = po.TokenBatch(
        torch.randint(0, v, (n,), generator=g),
        torch.randn(n, generator=g),
        torch.full((n,), -10.0),
    )
    return x, w, tokens


@linux
@pytest.mark.parametrize("rows", [512, 128])
def test_the_next_call_finds_its_pages(rows):
    """One chunk, and four with the fp32 accumulator: what the second call touches anew are its
    results."""
    x, w, tokens = batch()

    def step():
        x.grad = w.grad = None
        po.linear_policy_loss(x, po.Head(w), tokens, po.PPOClip()).loss.backward()

    with po.use_backend("cpu"), po.chunk_rows(rows):
        step()
        po.release_scratch()
        first, second = faults(step), faults(step)
    page = os.sysconf("SC_PAGESIZE")
    accumulator = 0 if rows == 512 else w.numel() * 4
    assert (first - second) * page > 0.9 * (rows * 32000 * 2 + accumulator)


@linux
def test_release_gives_the_memory_back():
    take(64 * MIB).fill_(1)
    before = status_nbytes("VmRSS")
    assert po.release_scratch() == 64 * MIB
    assert before - status_nbytes("VmRSS") > 60 * MIB
    assert po.release_scratch() == 0


def test_blocks_in_use_are_apart_and_survive_a_release():
    a, b = take(3 * MIB), take(3 * MIB)
    a.fill_(1)
    b.fill_(2)
    assert po.release_scratch() == 0
    assert a.eq(1).all() and b.eq(2).all()
    view = a[: MIB // 2]
    del a
    assert po.release_scratch() == 0  # the view holds it
    assert view.eq(1).all()
    del view
    assert po.release_scratch() == 3 * MIB


def test_one_block_serves_calls_of_many_sizes():
    """Token counts differ from step to step: a smaller block grows, a larger one is used again."""
    for mib in (40, 64, 33, 50, 61, 64, 80, 41):
        take(mib * MIB)[::4096].fill_(7)
    assert po.release_scratch() == 80 * MIB
    # none so large for so little
    take(64 * MIB)
    take(MIB)
    assert po.release_scratch() == 65 * MIB


def test_idle_memory_is_bounded():
    """Untouched pages cost nothing: only addresses are taken here."""
    sizes = (1700 * MIB, 800 * MIB, 300 * MIB, 900 * MIB)
    held = [take(n) for n in sizes]
    del held
    assert 0 < po.release_scratch() <= LIMIT
    take(LIMIT + MIB)
    assert po.release_scratch() == 0
    held = take(LIMIT)
    take(MIB)  # no room beside what is in use
    assert po.release_scratch() == 0
    del held
    many = [take(1) for _ in range(1000)]
    del many
    assert po.release_scratch() <= 256 * os.sysconf("SC_PAGESIZE")


def test_what_cannot_be_mapped_is_a_memory_error():
    with pytest.raises(MemoryError):
        _C.scratch(1 << 60)
    with pytest.raises(MemoryError):
        _C.scratch((1 << 63) - 1)
    with pytest.raises(ValueError, match="nbytes"):
        _C.scratch(-1)
    with pytest.raises(TypeError):
        _C.scratch("1")
    assert memoryview(_C.scratch(0)).nbytes == 0


LIMITED = """
import resource, torch
from pyoffline import _C
def take(mib):
    return torch.frombuffer(_C.scratch(mib << 20), dtype=torch.uint8)
for mib in (50, 500):  # neither serves the other
    take(mib)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20),) * 2)
take(200)[::4096].fill_(1)  # what is idle makes room
assert _C.release_scratch() == 0  # and nothing is kept any more
take(4)
assert _C.release_scratch() == 0
"""


@linux
def test_under_a_limit_of_mapped_memory_nothing_is_kept():
    done = subprocess.run(
        [sys.executable, "-c", LIMITED], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def losses():
    """Every loop that takes scratch: name -> results of one call with its backward."""
    x, w, tokens = batch(60, 16, 4096, torch.float32)
    half = [t.detach().bfloat16().requires_grad_() for t in (x, w)]
    teacher = po.TeacherHead(x.detach() + 0.1, po.Head(w.detach()))
    ids = torch.arange(60) // 10
    sequences = po.TokenBatch(tokens.labels, tokens.advantages, tokens.old_logps, sequence_ids=ids)

    def results(x, w, out):
        x.grad = w.grad = None
        out.loss.backward()
        stats = [v for v in out.stats if isinstance(v, torch.Tensor)]
        return [out.loss.detach(), *stats, x.grad, w.grad]

    def policy(x, w, tokens, objective):
        return results(x, w, po.linear_policy_loss(x, po.Head(w), tokens, objective))

    return {
        "fp32": lambda: policy(x, w, tokens, po.PPOClip()),
        "bf16": lambda: policy(*half, tokens, po.PPOClip() - 0.01 * po.Entropy()),
        "sequences": lambda: policy(x, w, sequences, po.GSPO()),
        "distill": lambda: results(
            x,
            w,
            po.linear_distill_loss(
                x, po.Head(w), teacher, po.TokenBatch(tokens.labels), po.ForwardKL()
            ),
        ),
        "logps": lambda: [po.linear_token_logps(x.detach(), po.Head(w), tokens.labels).logps],
    }


@pytest.mark.parametrize("rows", [64, 16, 1])
@pytest.mark.parametrize("name", ["fp32", "bf16", "sequences", "distill", "logps"])
def test_no_result_lies_in_scratch_and_none_depends_on_it(name, rows):
    """Idle blocks are filled with NaN after a call: its results stand, and the next are equal."""
    call = losses()[name]
    with po.use_backend("cpu"), po.chunk_rows(rows):
        first = call()
        copies = [t.clone() for t in first]
        blocks = [take(n) for n in poisoned_sizes()]
        for block in blocks:
            block.fill_(0xFF)
        assert all(torch.equal(a, b) for a, b in zip(first, copies, strict=True))
        del blocks
        again = call()
    assert all(torch.equal(a, b) for a, b in zip(again, copies, strict=True))
    assert all(t.isfinite().all() for t in copies if t.is_floating_point())


def large_results():
    """Calls with a result of more than 32 MiB: name -> (its leaf, a call that fills leaf.grad)."""
    x, w, tokens = batch(n=16, d=544, v=32000)
    logits = torch.randn(600, 32000).bfloat16().requires_grad_()
    labels = torch.arange(600)
    return {
        "dweight": (
            w,
            lambda: po.linear_policy_loss(x, po.Head(w), tokens, po.PPOClip()).loss.backward(),
        ),
        "dlogits": (logits, lambda: po.cross_entropy(logits, labels).backward()),
    }


@linux
@pytest.mark.parametrize("name", ["dweight", "dlogits"])
def test_a_dropped_result_serves_the_next_step(name):
    leaf, call = large_results()[name]

    def step():
        leaf.grad = None
        call()

    with po.use_backend("cpu"):
        step()
        leaf.grad = None
        po.release_scratch()
        first, second = faults(step), faults(step)
    assert (first - second) * os.sysconf("SC_PAGESIZE") > 0.9 * leaf.nbytes


@pytest.mark.parametrize("name", ["dweight", "dlogits"])
def test_a_result_that_is_held_is_left_alone(name):
    """Through release, later calls, accumulation, a view, sharing with another process, copying."""
    leaf, call = large_results()[name]
    with po.use_backend("cpu"):
        call()
        held = leaf.grad
        assert not held._is_view() and held.is_leaf and held.is_contiguous()
        copy, view = held.clone(), held[1:3]
        po.release_scratch()
        leaf.grad = None
        call()
        assert leaf.grad.data_ptr() != held.data_ptr()
        call()  # added in place
        assert torch.equal(leaf.grad, 2 * copy)
        assert torch.equal(held, copy)
        address = held.data_ptr()
        del held
        leaf.grad = None
        blocks = [take(leaf.nbytes) for _ in range(2)]
        assert address not in [b.data_ptr() for b in blocks]  # the view holds it
        for block in blocks:
            block.fill_(0xFF)
        assert torch.equal(view, copy[1:3])
        del blocks, view
        call()
        assert torch.equal(leaf.grad, copy)
        leaf.grad.share_memory_()
        assert leaf.grad.is_shared() and torch.equal(leaf.grad, copy)


def test_a_result_is_freed_on_any_thread():
    """The last reference may go in the autograd engine, on another thread, at the process's end."""
    leaf, call = large_results()["dlogits"]
    with po.use_backend("cpu"):
        call()
        grads = [leaf.grad]
        leaf.grad = None
        thread = threading.Thread(target=grads.clear)
        thread.start()
        thread.join(60)
        assert po.release_scratch() >= leaf.nbytes
        for _ in range(3):
            logits = leaf * 1.0  # its gradient is dropped by the engine
            po.cross_entropy(logits, torch.arange(600)).backward()
        leaf.grad = None
        del logits
    assert po.release_scratch() >= leaf.nbytes
    code = """
import builtins, torch, pyoffline as po
builtins.logits = torch.randn(600, 32000).requires_grad_()
with po.use_backend("cpu"):
    po.cross_entropy(builtins.logits, torch.arange(600)).backward()
print(builtins.logits.grad.isfinite().all().item())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "True"), done.stderr


def poisoned_sizes():
    """Sizes whose blocks a call of `losses` finds: every power of two it may ask for, twice."""
    return [1 << k for k in range(12, 25)] * 2


def test_threads_do_not_share_a_block():
    """Calls on several Python threads at once give what each gives alone."""
    calls = [losses()[name] for name in ("fp32", "bf16", "sequences", "distill")]
    got = [None] * len(calls)

    def work(i):
        with po.use_backend("cpu"), po.chunk_rows(16):
            for _ in range(10):
                got[i] = calls[i]()

    with po.use_backend("cpu"), po.chunk_rows(16):
        want = [[t.clone() for t in call()] for call in calls]
    team = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
    for t in team:
        t.start()
    for t in team:
        t.join()
    for a, b in zip(want, got, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@linux
def test_a_forked_child_keeps_nothing_and_leaves_the_parent_alone():
    code = """
import os, torch
from pyoffline import _C
def take(n):
    return torch.frombuffer(_C.scratch(n), dtype=torch.uint8)
held = take(1 << 20)
held.fill_(3)
take(1 << 22)
child = os.fork()
if child == 0:
    mine = take(1 << 22)
    mine[0] = 5
    del mine
    own = _C.release_scratch() == 0 and bool((held.numpy() == 3).all())
    del held
    os._exit(0 if own else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert bool(held.eq(3).all())
assert _C.release_scratch() == 1 << 22
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_an_empty_chunk_needs_no_block():
    assert CpuKernels().scratch((0, 5), torch.float32, None).shape == (0, 5)
    assert po.release_scratch() == 0

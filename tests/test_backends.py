"""The backend table, imports without side effects (PROMISES M3) and backends that are not there
(M4). What concerns a fresh interpreter runs in a subprocess.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import pyoffline as po
from pyoffline import cpu


def python(code, **env):
    """Run code in a fresh interpreter and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **env},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "pyoffline._C":
            raise ImportError("no compiler was found")
sys.meta_path.insert(0, Block())
import torch, pyoffline as po
"""


def test_m4_without_the_extension_auto_takes_the_reference_and_says_why():
    out = python(
        BLOCK
        + """
logits = torch.randn(3, 5)
assert po.token_logps(logits, torch.arange(3)).logps.isfinite().all()
print(po.backends())
try:
    with po.use_backend("cpu"): pass
except RuntimeError as error:
    print("ERROR", error)
"""
    )
    table, error = out.split("ERROR")
    for op in ("linear_policy_loss", "policy_loss", "linear_token_logps", "token_logps"):
        (line,) = [row for row in table.splitlines() if row.startswith(op + " ")]
        assert line.split()[2] == "reference"
        assert "no compiler was found" in line
    assert "use_backend('cpu')" in error and "no compiler was found" in error


def test_m4_gpu_backends_raise_with_the_reason():
    if torch.cuda.is_available():
        return
    reason = "use_backend.'triton'.*(torch sees no GPU|triton is not installed)"
    with pytest.raises(RuntimeError, match=reason), po.use_backend("triton"):
        pass
    with pytest.raises(RuntimeError, match="use_backend.'cuda'.*torch sees no GPU"):
        with po.use_backend("cuda"):
            pass


@pytest.mark.parametrize(
    ("driver", "picked"),
    [("", "cuda"), ("the driver serves CUDA 12.2", "triton")],
    ids=["there", "not there"],
)
def test_m4_the_cuda_backend_is_picked_where_its_driver_serves_it(monkeypatch, driver, picked):
    """What the table says on a GPU machine, asked here of stand-ins for torch and the driver."""
    module = sys.modules["pyoffline.backends"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(cpu._C, "cuda_why_not", lambda index: driver)
    monkeypatch.setattr(module, "_why_not_triton", lambda device, dtype: None)
    module._why_not_on_device.cache_clear()
    try:
        assert module.pick("cuda", torch.bfloat16) == picked
        assert module.pick("cuda", torch.float64) == "triton", "its stand-in takes every dtype"
        text = module.why_not("cuda", "cuda", torch.float64)
        assert "fp64" in text
        assert (
            module.why_not("cuda", "cpu") == "the cuda backend serves GPU tensors, these are on cpu"
        )
        table = str(po.backends())
        assert (driver or "available, after cuda in the order for cuda") in table
    finally:
        module._why_not_on_device.cache_clear()


def test_the_order_of_gpu_backends_names_its_benchmark_or_says_that_there_is_none():
    folder = Path(__file__).parents[1] / "bench/results/gpu"
    measured = [path.name for path in folder.glob("*.json")]
    why = sys.modules["pyoffline.backends"].ORDER["cuda"].why
    named = [name for name in measured if name in why]
    assert bool(named) if measured else "no GPU result is committed" in why
    assert why in str(po.backends())


@pytest.mark.parametrize("name", ["", "CPU", "numpy", None])
def test_m4_an_unknown_backend_raises_and_lists_the_known(name):
    with pytest.raises(ValueError, match="reference, cpu, triton, cuda, auto"):
        with po.use_backend(name):
            pass


def test_m4_fp64_on_the_cpu_backend_raises_with_the_reason_and_auto_takes_the_reference():
    logits, labels = torch.randn(3, 5, dtype=torch.float64), torch.arange(3)
    assert po.token_logps(logits, labels).logps.dtype == torch.float64
    with po.use_backend("cpu"), pytest.raises(RuntimeError, match="fp64"):
        po.token_logps(logits, labels)


def test_backends_prints_what_is_picked_and_why_not_the_others():
    table = str(po.backends())
    assert "cpu" in table and "triton" in table
    with po.use_backend("reference"):
        forced = str(po.backends())
    assert "use_backend('reference') is in force" in forced
    assert all(row[2] == "cpu" for row in po.backends().rows if row[1] == "cpu")


ISA = """
import torch, pyoffline as po
from pyoffline import cpu
g = torch.Generator().manual_seed(0)
x = torch.randn(40, 24, generator=g, requires_grad=True)
w = torch.randn(301, 24, generator=g, requires_grad=True)
labels = torch.randint(0, 301, (40,), generator=g); labels[::5] = -100
old = torch.full((40,), -6.0); adv = torch.randn(40, generator=g)
objective = po.PPOClip() + 0.1 * po.KL("k3", against="old") - 0.01 * po.Entropy()
out = po.linear_policy_loss(x, po.Head(w, softcap=20.0), po.TokenBatch(labels, adv, old), objective)
out.loss.backward()
print(cpu._C.isa())
for t in (out.loss, out.stats.logps, out.stats.entropy, x.grad, w.grad):
    print(t.double().abs().sum().item(), t.double().pow(2).sum().item())
"""


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_m4_every_instruction_set_gives_the_same_numbers(isa):
    """A CPU without AVX-512 or AVX2 takes these paths; PYOFFLINE_ISA forces them here."""
    if isa not in cpu._C.isas():
        pytest.skip(f"this CPU has no {isa}: not run")
    name, *rows = python(ISA, PYOFFLINE_ISA=isa).splitlines()
    assert name == isa
    _, *want = python(ISA).splitlines()
    for a, b in zip(rows, want, strict=True):
        for p, q in zip(a.split(), b.split(), strict=True):
            assert float(p) == pytest.approx(float(q), rel=3e-6)


@pytest.mark.parametrize("isa", ["portable", "avx2"])
def test_m4_the_table_of_errors_holds_on_every_instruction_set(isa):
    """The same tests as the default path: bad labels, empties, ignored rows."""
    if isa not in cpu._C.isas():
        pytest.skip(f"this CPU has no {isa}: not run")
    here = os.path.dirname(__file__)  # noqa: PTH120
    tests = [f"{here}/test_errors.py", "-k", "n6 or n11 or n3"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    env = {**os.environ, "PYOFFLINE_ISA": isa}
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stdout[-3000:]


IMPORT = """
import ctypes, os, sys, time
start = time.perf_counter(); import torch; torch_s = time.perf_counter() - start
def threads(): return len(os.listdir("/proc/self/task"))
def subnormal(): return float(torch.tensor([1e-40]) * 1.0)
before, tiny, modules = threads(), subnormal(), set(sys.modules)
start = time.perf_counter(); import pyoffline as po; ours_s = time.perf_counter() - start
assert threads() == before, "a thread was started"
new = {m.split(".")[0] for m in set(sys.modules) - modules}
bad = new & {"triton", "transformers", "datasets", "peft", "accelerate", "yaml", "matplotlib"}
assert not bad, bad
assert not torch.cuda.is_initialized()
assert subnormal() == tiny != 0.0
logits = torch.randn(4, 9)
po.token_logps(logits, torch.arange(4))
assert subnormal() == tiny, "FTZ after the first call"
print(ours_s / torch_s)
"""


def test_m3_import_has_no_side_effects_and_is_short():
    """Neither the import nor the first call changes MXCSR; time is relative to `import torch`."""
    ratios = [float(python(IMPORT)) for _ in range(2)]
    assert min(ratios) < 0.5


def test_m3_the_default_device_at_import_is_of_no_account():
    """torch.set_default_device("cuda") before the import, here a device that holds no numbers."""
    out = python("""
        import torch
        logits, labels = torch.randn(4, 9, requires_grad=True), torch.arange(4)
        torch.set_default_device("meta")
        import pyoffline as po
        with po.use_backend("cpu"):
            po.token_logps(logits, labels).logps.sum().backward()
            loss = po.policy_loss(logits, po.TokenBatch(labels), po.NLL()).loss
        print(logits.grad.isfinite().all().item(), loss.item() > 0)
    """)
    assert out.split() == ["True", "True"]


def test_m3_first_call_starts_no_thread_beside_torchs_own_pool():
    out = python("""
        import os, torch, pyoffline as po
        a = torch.randn(512, 512); a @ a; (a + a).exp()
        x = torch.randn(4000, 1000).exp(); x.sum(-1)
        before = len(os.listdir("/proc/self/task"))
        with po.use_backend("cpu"):
            po.token_logps(torch.randn(256, 4096), torch.zeros(256, dtype=torch.long))
        print(before, len(os.listdir("/proc/self/task")))
    """)
    before, after = map(int, out.split())
    assert after <= before


FORK = """
import os, signal, torch, pyoffline as po
logits, labels = torch.randn(64, 1000, requires_grad=True), torch.arange(64)
with po.use_backend("cpu"):
    want = po.token_logps(logits, labels).logps.sum()
    want.backward()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        with po.use_backend("cpu"):
            got = po.token_logps(logits, labels).logps
        os._exit(0 if torch.equal(got.sum(), want) else 3)
    assert os.waitpid(pid, 0)[1] == 0
print("ok")
"""


def test_m3_our_kernels_run_in_a_forked_child_after_use_in_the_parent():
    """Twenty times. (torch.mm itself hangs in a forked child with several threads: not ours.)"""
    assert python(FORK) == "ok"


def test_fp64_logits_are_computed_where_fp64_is():
    """`Head(logits_dtype=torch.float64)` over fp32 hidden states; the cpu backend has no fp64."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(4, 6, generator=g), torch.randn(13, 6, generator=g)
    head, labels = po.Head(w, logits_dtype=torch.float64), torch.arange(4)
    truth = (x.double() @ w.double().t()).log_softmax(-1)[labels, labels]
    stats = po.linear_token_logps(x, head, labels)
    assert torch.allclose(stats.logps.double(), truth, rtol=1e-6)
    leaf = x.clone().requires_grad_()
    po.linear_policy_loss(leaf, head, po.TokenBatch(labels), po.NLL()).loss.backward()
    assert leaf.grad.dtype == torch.float32
    tokens, teacher = po.TokenBatch(labels), po.TeacherLogits(torch.zeros(4, 13))
    assert po.linear_distill_loss(leaf, head, teacher, tokens, po.ReverseKL()).loss.isfinite()
    with po.use_backend("cpu"), pytest.raises(RuntimeError, match="computes in fp32"):
        po.linear_policy_loss(leaf, head, tokens, po.NLL())


@pytest.mark.parametrize(
    ("version", "is_served"),
    [("3.2.0", False), ("3.5.1+rocm7", False), ("3.6.0", True), ("4.0.0", True)],
)
def test_an_older_triton_is_named(version, is_served):
    """torch 2.6 brings 3.2, which has no tensor descriptors: a reason, not a crash at import."""
    reason = sys.modules["pyoffline.backends"].why_not_triton_version(version)
    assert (reason is None) == is_served
    assert is_served or ("3.6" in reason and version in reason)

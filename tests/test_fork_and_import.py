"""Importing changes nothing in the process, our threads are torch's, and a forked child works
(PROMISES M3). Each case runs in its own interpreter."""

import subprocess
import sys

import pytest

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="not run: reads /proc")

HEADER = """
import ctypes, os, sys, torch

def threads():
    return len(os.listdir("/proc/self/task"))

def float_mode():
    # glibc's fenv_t on x86-64 ends with MXCSR; its low six bits are sticky flags, not modes
    env = (ctypes.c_uint32 * 16)()
    assert ctypes.CDLL("libm.so.6").fegetenv(env) == 0
    return env[7] & ~0x3F if os.uname().machine == "x86_64" else list(env)

torch.set_num_threads(3)
"""

IMPORT = """
before = threads(), float_mode()
import pyoffline
from pyoffline import _C
assert (threads(), float_mode()) == before, (before, threads(), float_mode())
tiny = torch.tensor([1e-40]) * 1.0
assert tiny.item() > 0, "denormals are flushed"
"""

POOL = """
x = torch.randn(600, 600)
(x @ x).exp().sum()
before = threads()
assert before > 1
from pyoffline import _C
logits, labels, logps = torch.randn(64, 5000), torch.zeros(64).long(), torch.empty(64)
out = torch.empty(64, 5000)
for _ in range(3):
    _C.row_pass(logits, labels, logps=logps, threads=torch.get_num_threads())
    _C.gemm_logits(torch.randn(64, 32), torch.randn(5000, 32), out, threads=torch.get_num_threads())
assert threads() == before, (before, threads())
"""

FORK = """
from pyoffline import _C
logits, labels = torch.randn(64, 5000), torch.zeros(64).long()
want, got = torch.empty(64), torch.empty(64)
(logits @ logits.t()).exp().sum()

ones = {
    name: [torch.ones(size, dtype=dtype) for size in ((64, 40), (5000, 40), (64, 5000))]
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
}

def products():
    results = []
    for name in ones:
        if _C.gemm_info()[name]:
            x, w, dz = ones[name]
            out, dx, dw = torch.empty(64, 5000), torch.empty(64, 40), torch.empty(5000, 40)
            _C.gemm_logits(x, w, out, threads=3)
            _C.gemm_dhidden(dz, w, dx, threads=3)
            _C.gemm_dweight(dz, x, dw, threads=3)
            # numpy compares: torch's own parallel operations hang in a forked child
            for got, value in ((out, 40), (dx, 5000), (dw, 64)):
                results.append((got.numpy() == value).all())
    return all(results)

_C.row_pass(logits, labels, logps=want, threads=3)
assert products()
child = os.fork()
if child == 0:
    _C.row_pass(logits, labels, logps=got, threads=3)
    same = torch.equal(got.view(torch.int32), want.view(torch.int32))
    os._exit(0 if same and products() and threads() == 1 else 3)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
_C.row_pass(logits, labels, logps=got, threads=3)
"""

LOADER = """
from torch.utils.data import DataLoader, Dataset
import pyoffline as po

class Scored(Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, i):
        logits = torch.randn(64, 5000, generator=torch.Generator().manual_seed(i))
        with po.use_backend("cpu"):
            return po.token_logps(logits, torch.arange(64)).logps

if __name__ == "__main__":
    torch.set_num_threads(3)
    expected = torch.stack([Scored()[i] for i in range(4)])
    loader = DataLoader(Scored(), batch_size=2, num_workers=2, multiprocessing_context=sys.argv[1])
    torch.testing.assert_close(torch.cat(list(loader)), expected)
"""


def run(tmp_path, body, *arguments):
    script = tmp_path / "case.py"
    script.write_text(HEADER + body)
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"exit {done.returncode}\n{done.stderr[-3000:]}"


@LINUX
def test_import_starts_no_thread_and_keeps_the_float_mode(tmp_path):
    run(tmp_path, IMPORT)


@LINUX
def test_our_threads_are_the_pool_of_torch(tmp_path):
    run(tmp_path, POOL)


@LINUX
def test_a_forked_child_runs_serially_to_the_same_bits(tmp_path):
    run(tmp_path, FORK)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers(tmp_path, start):
    run(tmp_path, LOADER, start)


@pytest.mark.parametrize("name", ["portable", "avx2", "nonsense"])
def test_the_instruction_set_can_be_lowered(tmp_path, monkeypatch, name):
    """M4: a lower path runs; a name that this CPU lacks is ignored and said so."""
    monkeypatch.setenv("PYOFFLINE_ISA", name)
    body = f"""
from pyoffline import _C
known = {name!r} in _C.isas()
assert (_C.isa() == {name!r}) == known and bool(_C.isa_override_error()) != known
logps = torch.empty(2)
_C.row_pass(torch.zeros(2, 50), torch.zeros(2).long(), logps=logps)
assert logps.isfinite().all()
"""
    run(tmp_path, body)

"""The peak of a coupled call is what explain() predicts for its chunks (PROMISES M2): units that
fit a chunk, a unit longer than one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs /proc: not run"
)

PEAK = """
import json, sys, torch, pyoffline as po
from pathlib import Path
n, length, train_head, budget = json.loads(sys.argv[1])
d, v = 256, 32768
def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key))
x = torch.randn(n // length, length, d).bfloat16().requires_grad_()
w = (torch.randn(v, d) / 16).bfloat16().requires_grad_(train_head)
y = torch.randint(0, v, (n // length, length))
def step(x, w, y):
    s = y.shape[0]
    sequences = po.SequenceBatch(torch.randn(s), torch.arange(s) // 2)
    given = po.TokenBatch(y, behavior_logps=torch.full(y.shape, -10.0), sequences=sequences)
    po.linear_policy_loss(x, po.Head(w), given, po.RenyiRWR(0.01)).loss.backward()
with po.use_backend("cpu"), po.memory_budget(budget):
    small = [t.detach()[:32].clone().requires_grad_(t.requires_grad) for t in (x[:, :4], w)]
    step(*small, y[:32, :4] % 32)  # libraries, thread pools
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    step(x, w, y)
    peak = (kib("VmHWM") - before) * 1024
    e = po.explain(n, d, v, torch.bfloat16, train_head=train_head)
print(json.dumps([peak, e.extra_nbytes + e.gradient_nbytes]))
"""

CASES = [
    ((512, 32, True, 16 * MIB), "groups of 64 rows, four to a chunk"),
    ((512, 256, True, 16 * MIB), "a group of 512 rows in two chunks: the logits twice"),
]


@linux
@pytest.mark.parametrize(("case", "reason"), CASES)
def test_M2_peak_within_ten_percent_of_explain(case, reason):
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    command = [sys.executable, "-c", PEAK, json.dumps(case)]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    peak, predicted = json.loads(result.stdout)
    assert abs(peak - predicted) <= 0.1 * predicted, (reason, peak / MIB, predicted / MIB)

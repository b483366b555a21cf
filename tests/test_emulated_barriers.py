"""Every barrier and every wait of the compiled CUDA row pass is needed: without it the emulator
finds a race, an unwritten read or threads that wait for ever. So it would find one that is missing.

What a row does not need is named: a row of which nothing is copied waits for no copy, and a
narrower gradient overwrites no logit that is read after it where the row begins on chip.
"""

import shutil

import pytest
import torch
from emulator.barriers import survivors
from emulator.cuda_library import last_launch, library, row_pass

if not (shutil.which("nvcc") and shutil.which("g++")):
    pytest.skip("no nvcc: not run", allow_module_level=True)

BF16, F32 = torch.bfloat16, torch.float32
NO_COPY = ["cp.async.commit_group", "cp.async.wait_group 0"]
# (architecture, V, dtype, dtype of the gradient, KiB of shared memory, what is not needed): of the
# last two rows none and a part fits
CASES = [
    ("sm_90a", 40_000, BF16, BF16, None, []),
    ("sm_90a", 20_011, F32, BF16, None, []),
    ("sm_80", 3000, BF16, BF16, None, []),
    ("sm_80", 9000, F32, BF16, 24, NO_COPY),
    ("sm_80", 24_011, F32, BF16, 80, ["bar.sync 0"]),
]


def gradient(arch, vocab, dtype, grad, kib):
    """(loss, dlogits) of two rows of cross entropy, in place."""
    logits = 3 * torch.randn(2, vocab, generator=torch.Generator().manual_seed(0))
    logits, loss = logits.to(dtype), torch.zeros(2)
    out = logits.view(grad)[:, :vocab]
    hyper = torch.tensor([[1.0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    keywords = {"dlogits": out, "codes": [1, -1, 0], "hyper": hyper, "loss": loss}
    keywords["shared_bytes"] = kib and kib << 10
    row_pass(arch, logits, torch.tensor([5, vocab - 1]), **keywords)
    return loss, out


@pytest.mark.parametrize(("arch", "vocab", "dtype", "grad", "kib", "idle"), CASES)
def test_no_barrier_can_be_left_out(arch, vocab, dtype, grad, kib, idle):
    want = gradient(arch, vocab, dtype, grad, kib)
    kernel = library().kernels(arch)[last_launch().name]
    assert last_launch().cluster == (2 if arch == "sm_90a" else 1)

    def run():
        for got, expected in zip(gradient(arch, vocab, dtype, grad, kib), want, strict=True):
            assert torch.equal(got, expected)

    assert survivors(kernel, run) == idle

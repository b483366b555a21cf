"""That the interpreter's guards fire, 64-bit offsets (PROMISES N13), scale_by_upstream, n_valid,
the fp16 scale on the device, and the backend table under TRITON_INTERPRET=1.
"""

import batches
import pytest
import torch
import triton
import triton.language as tl
from compare import same_bits

import pyoffline as po
from pyoffline.calls import Rows
from pyoffline.chunk_loop import power_of_two_scale
from pyoffline.kernels.configs import bytes_per_logit, programs_in_flight, row_config
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.scale_by_upstream import scale_by_upstream


@triton.jit
def overflow_kernel(x_ptr, stride):
    tl.store(x_ptr, tl.load(x_ptr) + (tl.program_id(0) + 40_000) * stride)


def test_int32_overflow_is_an_error_here():
    with pytest.raises(triton.runtime.errors.InterpreterError, match="overflow"):
        overflow_kernel[(1,)](torch.zeros(1, dtype=torch.int64), 1_000_000)


def test_N13_rows_beyond_two_to_the_31_elements(tmp_path):
    """A sparse file of 2^31 + 2^21 bf16 logits: the last row equals the same row alone."""
    vocab, rows = 1 << 21, (1 << 10) + 1
    path = tmp_path / "sparse"
    logits = torch.from_file(str(path), True, vocab * rows, dtype=torch.bfloat16).view(rows, vocab)
    logits[-1, 5:4000] = torch.randn(3995, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.full((rows,), -100)
    labels[-1] = 7
    row = logits[-1:].clone()
    results = []
    for x, y in ((logits, labels), (row, labels[-1:])):
        n = x.shape[0]
        out = [torch.full((n,), float("nan")) for _ in range(5)]
        flag = torch.zeros(2, dtype=torch.int64)
        one = Rows(labels=y, codes=(1, -1, 0), hyper=po.NLL().program(False).hyper)
        config = row_config(vocab, 2)
        row_pass(x, None, one, (*out, None, None, None), flag, config=config)
        results.append(torch.stack(out)[:, -1])
    same_bits("last row", *results)
    assert results[0].isfinite().all()
    assert path.stat().st_blocks * 512 < 64 << 20, "the file is no longer sparse"


@pytest.mark.parametrize("size", [1, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_A2_scale_by_upstream_in_place_and_untouched_by_one(dtype, size):
    grad = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = grad.clone()
    assert scale_by_upstream(grad, torch.tensor(1.0)) is grad
    same_bits("times 1", grad, before)
    scale_by_upstream(grad, torch.tensor(-0.37))
    same_bits("times -0.37", grad, (before.float() * torch.tensor(-0.37)).to(dtype))


def test_n_valid_gives_the_same_bits_and_a_wrong_one_shows():
    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    count = int(((batch["labels"] != -100) & (batch["weights"] != 0)).sum())
    grads, losses = [], []
    for n_valid in (None, count):
        x = batch["hidden"].clone().requires_grad_()
        with po.use_backend("triton"):
            tokens = batches.tokens(batch, n_valid=n_valid)
            out = po.linear_policy_loss(x, po.Head(batch["weight"]), tokens, po.PPOClip())
            out.loss.backward()
        grads.append(x.grad)
        losses.append(out.loss.detach())
    same_bits("loss", *losses)
    same_bits("dhidden", *grads)
    with pytest.raises(ValueError, match="n_valid"), po.use_backend("triton"):
        wrong = batches.tokens(batch, n_valid=count - 1)
        po.linear_policy_loss(x, po.Head(batch["weight"]), wrong, po.PPOClip())


@pytest.mark.parametrize("top", [0.0, 1e-30, 3e-5, 0.5, 1.0, 1.9999, 2.0, 7e4, float("inf")])
def test_the_fp16_scale_on_the_device_is_the_one_of_the_host(top):
    rows = Rows(labels=torch.tensor([1, 2, -100]), weights=torch.tensor([top, top / 3, 0.0]))
    want = power_of_two_scale(rows, torch.float16)
    assert power_of_two_scale(rows, torch.float16, asynchronous=True).item() == want
    assert power_of_two_scale(rows, torch.bfloat16, asynchronous=True) == 1.0


def test_backends_say_that_triton_is_there_and_when_not():
    assert "available, after cpu" in str(po.backends())
    x = torch.randn(2, 5, dtype=torch.float64)
    with po.use_backend("triton"), pytest.raises(RuntimeError, match="fp64"):
        po.token_logps(x, torch.zeros(2, dtype=torch.long))


def test_the_rows_in_flight_fit_l2():
    """H200: 132 multiprocessors, 50 MiB; a bf16 row of 151,936 logits is 297 KiB."""
    l2 = 50 << 20
    config = row_config(151_936, 2)
    assert programs_in_flight(2 * 151_936, config, 132, l2) == 132
    assert bytes_per_logit(151_936, 2, 132, l2) == 4.0
    assert 4.0 < bytes_per_logit(262_144, 2, 132, l2) < 6.0
    assert bytes_per_logit(32_768, 2, 132, l2) == 4.0

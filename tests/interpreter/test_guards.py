"""That the interpreter's guards fire, 64-bit offsets (PROMISES N13), scale_by_upstream, n_valid,
the fp16 scale on the device, and the backend table under TRITON_INTERPRET=1.
"""

import ctypes
import mmap

import batches
import pytest
import torch
import triton
import triton.language as tl
from compare import same_bits
from row_cases import outputs

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


@triton.jit
def assert_kernel(x_ptr):
    tl.device_assert(tl.load(x_ptr) == 1)


def test_a_device_assert_is_an_error_here():
    assert_kernel[(1,)](torch.ones(1))
    with pytest.raises(triton.runtime.errors.InterpreterError):
        assert_kernel[(1,)](torch.zeros(1))


@triton.jit
def order_kernel(count_ptr, order_ptr):
    place = tl.load(count_ptr)
    tl.store(order_ptr + place, tl.program_id(0))
    tl.store(count_ptr, place + 1)


def test_programs_run_in_shuffled_order_here():
    order = torch.full((20,), -1, dtype=torch.int32)
    order_kernel[(20,)](torch.zeros(1, dtype=torch.int32), order)
    assert sorted(order.tolist()) == list(range(20)) != order.tolist()


@triton.jit
def bf16_kernel(a_ptr, b_ptr, product_ptr, rounded_ptr):
    offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    tl.store(product_ptr + offs, product)
    tl.store(rounded_ptr + offs, product.to(tl.bfloat16))


def test_bf16_products_and_roundings_are_those_of_a_gpu_here():
    """Products in fp32, to nearest with ties to even; NaN and inf kept."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=g).bfloat16() for _ in range(2))
    a[3, 0], a[5, 0] = float("nan"), float("inf")
    product, rounded = torch.empty(16, 16), torch.empty(16, 16, dtype=torch.bfloat16)
    bf16_kernel[(1,)](a, b, product, rounded)
    torch.testing.assert_close(product, a.float() @ b.float(), equal_nan=True)
    same_bits("rounded", rounded, product.bfloat16())


def test_N13_gradients_beyond_two_to_the_31_elements(tmp_path):
    """Rows 2^27 elements apart in two sparse files: 20 of them are 2^31 + 2^29."""
    step, shape = 1 << 27, (20, 100)
    paths = [tmp_path / name for name in ("logits", "dlogits")]
    far = [
        torch.from_file(str(p), True, 20 * step, dtype=torch.bfloat16).view(20, step)[:, :100]
        for p in paths
    ]
    g = torch.Generator().manual_seed(0)
    far[0].copy_(torch.randn(shape, generator=g))
    labels = torch.randint(0, 100, (20,), generator=g)
    labels[18] = -100
    near = (far[0].clone(), torch.full(shape, float("nan"), dtype=torch.bfloat16))
    far[1].fill_(float("nan"))
    rows = Rows(labels=labels, codes=(1, -1, 0), hyper=po.NLL().program(False).hyper)
    for x, dlogits in (far, near):
        row_pass(x, dlogits, rows, (None,) * 8, torch.zeros(2, dtype=torch.int64))
    same_bits("dlogits", far[1].clone(), near[1])
    assert near[1].isfinite().all() and (near[1][18] == 0).all() and (near[1][19] != 0).any()
    assert all(p.stat().st_blocks * 512 < 64 << 20 for p in paths), "a file is no longer sparse"


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


@pytest.mark.parametrize("start", [0, 1])
@pytest.mark.parametrize("vocab", [301, 303])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_nothing_is_read_past_the_page_of_the_last_logit(dtype, vocab, start):
    """Rows that end where memory ends: a read of more would end the process. Row 0 off and on a
    multiple of 16 bytes.
    """
    page, count = mmap.PAGESIZE, 2
    nbytes = count * vocab * dtype.itemsize
    size = -(-nbytes // page + -1) * page
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = libc.mmap(None, ctypes.c_size_t(size + page), protection, flags, -1, 0)
    assert libc.mprotect(ctypes.c_void_p(memory + size), ctypes.c_size_t(page), 0) == 0
    edge = (ctypes.c_char * nbytes).from_address(memory + size - nbytes)
    logits = torch.frombuffer(edge, dtype=dtype).view(count, vocab)[start:]
    logits.copy_(torch.randn(logits.shape))
    labels = torch.arange(logits.shape[0])
    got = outputs(logits.shape[0], gap=None, coefs=None)
    flag = torch.zeros(2, dtype=torch.int64)
    row_pass(logits, None, Rows(labels), tuple(got.values()), flag)
    want = logits.double().log_softmax(-1)[labels, labels]
    torch.testing.assert_close(got["logps"].double(), want, rtol=1e-5, atol=1e-5)
    libc.munmap(ctypes.c_void_p(memory), ctypes.c_size_t(size + page))


def test_the_rows_in_flight_fit_l2():
    """H200: 132 multiprocessors, 50 MiB; a bf16 row of 151,936 logits is 297 KiB."""
    l2 = 50 << 20
    config = row_config(151_936, 2)
    assert programs_in_flight(0, config, 132, l2) == 264  # statistics: nothing is read again
    assert programs_in_flight(2 * 151_936, config, 132, l2) == 132
    assert bytes_per_logit(151_936, 2, 132, l2) == 4.0
    assert 4.0 < bytes_per_logit(262_144, 2, 132, l2) < 6.0
    assert bytes_per_logit(32_768, 2, 132, l2) == 4.0

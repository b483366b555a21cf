"""The Triton backend on a GPU: what the interpreter cannot show (NaN in compiled maxima, the chip's
exponential, rounding to bf16, syncs, graphs). Counted as not run where there is no GPU.
"""

import batches
import oracle
import pytest
import torch
from compare import check_forward, check_gradient, same_bits
from test_objectives import CASES

import pyoffline as po

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.float32).eps


def on_gpu(batch):
    """Every tensor of a batch on the GPU."""

    def move(x):
        if isinstance(x, dict):
            return {k: move(v) for k, v in x.items()}
        return x.cuda() if isinstance(x, torch.Tensor) else x

    return move(batch)


def on_cpu(result):
    return {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in result.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_N1_every_objective_against_fp64(name, dtype):
    reads = CASES[name].program(True).reads
    extra = CASES[name].program(True).gates
    batch = batches.make(n=64, d=64, v=4099, dtype=dtype, reads=reads, extra=extra, bias=True)
    truth = oracle.run(batch, CASES[name], torch.float64)
    bar = oracle.run(batch, CASES[name], dtype)
    with po.chunk_rows(24):
        got = on_cpu(batches.run(on_gpu(batch), CASES[name], "triton"))
    for k in ("logps", "entropy", "lse"):
        check_forward(k, got[k], truth[k], bar[k])
    for k in ("dhidden", "dweight", "dbias"):
        check_gradient(k, got[k], truth[k], bar[k])


@pytest.mark.parametrize("vocab", [1, 7, 255, 4096, 50_257, 151_936, 262_147])
def test_N1_given_logits_within_8_eps(vocab):
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(4, vocab, generator=g)
    logits[1] = -12.0
    logits[1, vocab // 2] = 0.0
    logits[2] += 1e6
    labels = torch.randint(0, vocab, (4,), generator=g)
    truth = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    with po.use_backend("triton"):
        got = po.token_logps(logits.cuda(), labels.cuda()).logps.cpu().double()
    assert (got <= 0).all()
    assert ((got - truth).abs() <= 8 * EPS * (1 + truth.abs())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 16_383, 16_384, 50_000])
def test_N3_shows_in_its_row_and_nowhere_else(value, place):
    logits = torch.randn(3, 50_001, generator=torch.Generator().manual_seed(0)).cuda()
    batch = on_gpu(batches.row_batch([1, 2, 3]))
    clean = batches.run_logits(logits, batch, po.NLL(), "triton")
    logits[1, place] = value
    got = batches.run_logits(logits, batch, po.NLL(), "triton")
    assert got["loss"].isnan() and got["dlogits"][1].isnan().all()
    for row in (0, 2):
        same_bits("other rows", got["dlogits"][row], clean["dlogits"][row])


def test_N6_a_bad_label_raises_at_check():
    batch = on_gpu(batches.row_batch([1, 77, 3]))
    got = batches.run_logits(torch.randn(3, 77).cuda(), batch, po.NLL(), "triton")
    assert got["loss"].isnan()
    with pytest.raises(IndexError, match="label 77"):
        po.check()
    po.check()


def test_N9_the_same_bits_run_to_run():
    batch = on_gpu(batches.make(n=300, d=64, v=4099, dtype=torch.bfloat16, reads=("old", "adv")))
    a, b = (batches.run(batch, po.PPOClip(), "triton") for _ in range(2))
    for k in ("loss", "logps", "dhidden", "dweight"):
        same_bits(k, a[k], b[k])


def test_N13_rows_beyond_two_to_the_31_elements():
    vocab, rows = 1 << 20, (1 << 11) + 2
    logits = torch.zeros(rows, vocab, dtype=torch.bfloat16, device="cuda")
    logits[-2:] = torch.randn(2, vocab, device="cuda")
    labels = torch.full((rows,), 7, device="cuda")
    batch = on_gpu(batches.row_batch(labels))
    whole = batches.run_logits(logits, batch, po.NLL(), "triton")["dlogits"][-2:].clone()
    alone = batches.run_logits(logits[-2:], on_gpu(batches.row_batch([7, 7])), po.NLL(), "triton")
    same_bits("border rows", whole, alone["dlogits"])


def _step(batch, n_valid):
    x = batch["hidden"].clone().requires_grad_()
    w = batch["weight"].clone().requires_grad_()
    tokens = batches.tokens(batch, n_valid=n_valid)
    out = po.linear_policy_loss(x, po.Head(w), tokens, po.PPOClip())
    out.loss.backward()
    return out.loss.detach(), x.grad, w.grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_host_sync_when_n_valid_is_given(dtype):
    batch = batches.make(n=64, d=64, v=4099, dtype=dtype, reads=("old", "adv"))
    count = int(((batch["labels"] != -100) & (batch["weights"] != 0)).sum())
    batch = on_gpu(batch)
    with po.use_backend("triton"):
        want = _step(batch, None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = _step(batch, count)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want, strict=True):
        same_bits("step", a, b)


def test_A3_captured_in_a_graph_and_replayed():
    batch = on_gpu(batches.make(n=64, d=64, v=4099, dtype=torch.bfloat16, reads=("old", "adv")))
    with po.use_backend("triton"):
        want = _step(batch, None)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            _step(batch, None)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = _step(batch, None)
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=2e-2, atol=1e-5)

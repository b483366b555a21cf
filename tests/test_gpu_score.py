"""Scoring without stored logits on a GPU: what the interpreter cannot show (matrix instructions,
tensor descriptors, the chip's exponential, syncs, memory). Counted as not run without a GPU.
"""

import batches
import oracle
import pytest
import torch
from compare import check_forward, same_bits
from gpu_cases import on_gpu

import pyoffline as po
from pyoffline import triton_backend
from pyoffline.calls import Rows
from pyoffline.kernels.score_rows import score_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def no_tf32():
    """fp32 products are fp32. By hand: pytest cannot put this flag back."""
    flags = torch.backends.cuda.matmul
    before, flags.allow_tf32 = flags.allow_tf32, False
    yield
    flags.allow_tf32 = before


@pytest.fixture(autouse=True)
def no_logits(monkeypatch):
    """Storing logits is an error."""

    def fail(*_):
        raise AssertionError("logits are stored")

    monkeypatch.setattr(triton_backend.TritonKernels, "logits", fail)


def score(batch, **head):
    """TokenStats of a batch on the GPU, back on the CPU."""
    given = on_gpu(batch)
    with po.use_backend("triton"), torch.no_grad():
        h = po.Head(given["weight"], given["bias"], **given["head"], **head)
        out = po.linear_token_logps(given["hidden"], h, given["labels"], given["temperature"])
    return type(out)(*(x.cpu() for x in out))


HEADS = [
    ("plain", {}),
    ("bias", {"bias": True}),
    ("softcap and bias", {"head": {"softcap": 3.0}, "bias": True}),
    ("scale", {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    ("temperature", {"temperature": True}),
]


@pytest.mark.parametrize("dim", [64, 200, 93], ids=["aligned", "ragged", "unaligned"])
@pytest.mark.parametrize("name, options", HEADS, ids=[h[0] for h in HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_N1_against_fp64(dtype, name, options, dim):
    """Ragged rows and vocabulary; a hidden size for descriptors, one they mask, one they refuse."""
    batch = batches.make(n=301, d=dim, v=4099, dtype=dtype, **options)
    batch["weights"] = torch.ones(301)
    truth = oracle.run(batch, po.NLL(), torch.float64)
    bar = oracle.run(batch, po.NLL(), dtype)
    got = score(batch)
    for k in ("logps", "entropy", "lse"):
        check_forward(k, getattr(got, k), truth[k], bar[k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_N9_the_same_bits_run_to_run_in_any_batch_and_block(dtype):
    batch = batches.make(n=700, d=128, v=32_001, dtype=dtype, ignored=False)
    part = {**batch, "hidden": batch["hidden"][333:350], "labels": batch["labels"][333:350]}
    a, b, c = score(batch), score(batch), score(part)
    with po.chunk_rows(100):
        d = score(batch)
    for name in a._fields:
        same_bits(name, getattr(b, name), getattr(a, name))
        same_bits(name, getattr(d, name), getattr(a, name))
        same_bits(name, getattr(c, name), getattr(a, name)[333:350])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_N15_scoring_and_training_round_the_same_logits(dtype, monkeypatch):
    """The kernel adds up in the order of the matrix instructions, as the GEMM does unless it splits
    D: a 16-bit logit that rounds the other way would show as 2e-3 and more.
    """
    batch = batches.make(n=512, d=256, v=32_000, dtype=dtype, ignored=False)
    scored = score(batch)
    monkeypatch.undo()
    given = on_gpu(batch)
    with po.use_backend("triton"):
        tokens = po.TokenBatch(given["labels"])
        x = given["hidden"].requires_grad_()
        out = po.linear_policy_loss(x, po.Head(given["weight"]), tokens, po.NLL())
    gap = (scored.logps - out.stats.logps.cpu()).abs()
    assert gap.max() <= 1e-5, f"{int((gap > 1e-5).sum())} of {gap.numel()} rows, {gap.max():.1e}"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N3_shows_in_its_row_and_nowhere_else(value):
    batch = batches.make(n=200, d=64, v=5000, dtype=torch.bfloat16, ignored=False)
    clean = score(batch)
    batch["hidden"] = batch["hidden"].clone()
    batch["hidden"][130, 7] = value
    got, others = score(batch), torch.arange(200) != 130
    assert got.logps[130].isnan() and got.entropy[130].isnan()
    for name in got._fields:
        same_bits(name, getattr(got, name)[others], getattr(clean, name)[others])


def test_N3_masked_vocabulary():
    """Whole tiles and spans of -inf."""
    batch = batches.make(n=64, d=64, v=5000, dtype=torch.bfloat16, bias=True, ignored=False)
    batch["bias"][:1100] = -torch.inf
    batch["bias"][2048:2304] = -torch.inf
    batch["weights"] = torch.ones(64)
    truth = oracle.run(batch, po.NLL(), torch.float64)["logps"]
    got = score(batch).logps.double()
    masked = batch["bias"][batch["labels"]] == -torch.inf
    assert masked.any() and (got[masked] == -torch.inf).all()
    assert ((got - truth)[~masked].abs() <= 0.1).all()


def test_N6_a_bad_label_raises_at_check():
    batch = batches.make(n=9, d=64, v=77, ignored=False)
    batch["labels"][4] = 77
    got = score(batch)
    assert got.logps[4].isnan() and got.logps[:4].isfinite().all()
    with pytest.raises(IndexError, match="label 77"):
        po.check()
    po.check()


@pytest.mark.parametrize("dim", [4096, 4100], ids=["descriptors", "pointers"])
def test_N13_a_weight_beyond_two_to_the_31_elements(dim):
    vocab = (1 << 19) + 1024
    weight = torch.zeros(vocab, dim, dtype=torch.bfloat16, device="cuda")
    weight[-500:] = torch.randn(500, dim, device="cuda") / 64
    hidden = torch.randn(8, dim, device="cuda").bfloat16()
    labels = torch.arange(vocab - 8, vocab, device="cuda")
    with po.use_backend("triton"), torch.no_grad():
        got = po.linear_token_logps(hidden, po.Head(weight), labels)
    z = (hidden.float() @ weight[-500:].t().float()).bfloat16().double()
    lse = torch.logaddexp(z.logsumexp(-1), torch.tensor(float(vocab - 500)).log().to(z))
    want = z[:, -8:].diagonal() - lse
    torch.testing.assert_close(got.logps.double(), want, atol=0.02, rtol=0)


def test_no_logits_in_memory_and_no_sync():
    """4,096 x 32,000 logits would be 250 MiB; the sums of the spans are 4 MiB."""
    batch = on_gpu(batches.make(n=4096, d=64, v=32_000, dtype=torch.bfloat16, ignored=False))
    rows = Rows(labels=batch["labels"])
    names = ("loss", "logps", "entropy", "lse", "log_sum_p2")
    out = [torch.empty(4096, device="cuda") for _ in names]
    flag = torch.zeros(2, dtype=torch.int64, pin_memory=True)

    def launch():
        outputs = (*out, None, None, None)
        score_rows(batch["hidden"], batch["weight"], rows, outputs, flag, torch.bfloat16)

    launch()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before <= 5 << 20


def test_A3_captured_in_a_graph_and_replayed():
    batch = on_gpu(batches.make(n=64, d=64, v=4099, dtype=torch.bfloat16, ignored=False))

    def run():
        return po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"])

    with po.use_backend("triton"), torch.no_grad():
        want = run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = run()
    graph.replay()
    torch.cuda.synchronize()
    for name in want._fields:
        same_bits(name, getattr(got, name), getattr(want, name))

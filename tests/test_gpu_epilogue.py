"""The GEMM epilogue in place of the row pass on a GPU: what the interpreter cannot show (matrix
instructions, descriptors, 16-byte stores, graphs). Counted as not run without a GPU.
"""

import batches
import gpu_cases
import oracle
import pytest
import torch
from compare import check_gradient, same_bits

import pyoffline as po
from pyoffline import triton_backend

pytestmark = pytest.mark.gpu
COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") + 1e-3 * po.ZLoss()


@pytest.fixture(autouse=True)
def no_logits(monkeypatch):
    """The epilogue is asked for, and storing logits is an error."""

    def fail(*_):
        raise AssertionError("logits are stored")

    monkeypatch.setattr(triton_backend, "EPILOGUE", True)
    monkeypatch.setattr(triton_backend.TritonKernels, "logits", fail)


HEADS = [
    ("plain", {}),
    ("scale", {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    ("temperature", {"temperature": True}),
]


@pytest.mark.parametrize("dim", [64, 200, 93], ids=["aligned", "ragged", "unaligned"])
@pytest.mark.parametrize("name, options", HEADS, ids=[h[0] for h in HEADS])
def test_N1_against_fp64(name, options, dim):
    """Ragged rows and vocabulary, three chunks."""
    reads = COMPOSED.program(False).reads
    batch = batches.make(n=301, d=dim, v=4099, dtype=torch.bfloat16, reads=reads, **options)
    gpu_cases.compare(batch, COMPOSED, "triton", 100, 0.5)


def test_late_rows_and_the_same_bits_run_to_run():
    """Every fifth label some 80 nats below the row's maximum."""
    batch = batches.make(n=200, d=64, v=5000, dtype=torch.bfloat16, ignored=False)
    far = batch["hidden"][::5].float()
    top = (far @ batch["weight"].float().t()).argmax(-1)
    factor = 80.0 / far.norm(dim=-1) / batch["weight"][top].float().norm(dim=-1)
    batch["hidden"][::5] = (batch["weight"][top].float() * factor[:, None] * 8).to(torch.bfloat16)
    truth, bar = (oracle.run(batch, po.NLL(), d) for d in (torch.float64, torch.bfloat16))
    assert (truth["logps"] < -40).any() and (truth["logps"] > -40).any()
    got, again = (gpu_cases.run(batch, po.NLL(), "triton") for _ in range(2))
    for k in ("dhidden", "dweight"):
        check_gradient(k, got[k], truth[k], bar[k])
        same_bits(k, got[k], again[k])


def test_A3_captured_in_a_graph_and_replayed_on_new_data():
    def make(seed):
        batch = batches.make(n=64, d=64, v=5000, dtype=torch.bfloat16, seed=seed)
        return gpu_cases.on_gpu(batch)

    batch, new = make(0), make(1)
    with po.use_backend("triton"):
        hidden, weight = batch["hidden"].requires_grad_(), batch["weight"].requires_grad_()
        head = po.Head(weight)

        def step():
            hidden.grad = weight.grad = None
            loss = po.linear_policy_loss(hidden, head, batches.tokens(batch), po.NLL()).loss
            loss.backward()
            return loss

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
        dhidden = hidden.grad
        with torch.no_grad():
            for k in ("hidden", "weight", "labels", "weights"):
                batch[k].copy_(new[k])
        graph.replay()
        replayed, dreplayed = loss.clone(), dhidden.clone()
        want = step()
    torch.testing.assert_close(replayed, want)
    size = hidden.grad.abs().max().item()  # another number of rows: a GEMM may round otherwise
    torch.testing.assert_close(dreplayed, hidden.grad, rtol=2e-2, atol=2e-2 * size)


def test_N13_a_chunk_beyond_two_to_the_31_elements():
    """33,000 rows of 65,536: the last rows lie past 2^31 elements."""
    g = torch.Generator(device="cuda").manual_seed(0)
    x = torch.randn(33_000, 16, generator=g, device="cuda").bfloat16()
    w = torch.randn(65_536, 16, generator=g, device="cuda").bfloat16()
    labels = torch.randint(0, 65_536, (33_000,), generator=g, device="cuda")
    grads = []
    for rows in (33_000, 1000):
        hidden = x[-1000:] if rows == 1000 else x
        hidden = hidden.clone().requires_grad_()
        with po.use_backend("triton"), po.chunk_rows(rows):
            tokens = po.TokenBatch(labels[-rows:], torch.ones(rows, device="cuda"))
            po.linear_policy_loss(hidden, po.Head(w), tokens, po.NLL()).loss.backward()
        grads.append(hidden.grad[-1000:])
    torch.testing.assert_close(grads[0], grads[1])

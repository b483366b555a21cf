"""PROMISES N11, N12, N13, N15 on a GPU, and the CUDA row pass by itself beside the CPU's: what
compute-sanitizer runs (`-k agrees`). Counted as not run where there is no GPU.
"""

import math

import batches
import gpu_cases
import pytest
import row_pass_args
import torch
from batches import dtype_name
from compare import same_bits
from gpu_cases import each_backend, move, on_cpu, run, served  # noqa: F401  (a fixture)

import pyoffline as po
from pyoffline import _C

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


@each_dtype
@pytest.mark.parametrize("vocab", [7, 300, 4097, 32000])  # the last: a cluster of blocks
def test_agrees_with_the_cpu_row_pass(vocab, dtype):
    """Programs, heads and options at once: PPO, gated KL, entropy, smoothing, softcap, bias."""
    arguments = row_pass_args.inputs(5, vocab, dtype, vocab)
    want = row_pass_args.outputs(5, vocab, dtype)
    row_pass_args.call(arguments, want)
    given = move({k: v for k, v in arguments.items() if k != "hyper"})
    logits, labels = given.pop("logits"), given.pop("labels")
    got = {
        name: torch.full_like(x.tensor, float("nan") if x.tensor.is_floating_point() else 7)
        for name, x in want.items()
    }
    got = move(got)
    stream = torch.cuda.current_stream().cuda_stream
    _C.cuda_row_pass(logits, labels, **given, hyper=arguments["hyper"], stream=stream, **got)
    for name, x in on_cpu(got).items():
        a, b = x.double(), want[name].tensor.double()
        slack = 2e-5 + (2 * ROUNDING[dtype] if name == "dlogits" else 0)
        size = b.abs().nan_to_num(posinf=0.0)
        close = (a - b).abs() <= slack * (size + size.mean() + 0.1)
        assert (close | (a == b)).all(), name  # fp16 overflows to the same inf


@pytest.mark.parametrize("grad", [torch.bfloat16, torch.float16], ids=dtype_name)
def test_agrees_in_place_of_wider_logits_300(grad):
    """A narrower gradient over its own row of logits, from any start; nothing beside it moves."""
    labels, coefs = move(torch.tensor([3, 299, 0])), torch.zeros(4, 3)
    coefs[0] = -1.0
    for shift in (0, 1, 3):
        memory = move(torch.randn(3 * 307 + 8))
        logits = memory[shift:].as_strided((3, 300), (307, 1))
        before, p = memory.clone(), logits.double().softmax(-1)
        narrow = memory.view(grad)[2 * shift :].as_strided((3, 300), (614, 1))
        _C.cuda_row_pass(
            *(logits, labels),
            dlogits=narrow,
            coefs=move(coefs),
            stream=torch.cuda.current_stream().cuda_stream,
        )
        want = p.scatter_add(-1, labels[:, None], torch.full_like(p[:, :1], -1.0))
        torch.testing.assert_close(narrow.double(), want, rtol=2.0**-8, atol=1e-7)
        for row in range(3):
            end = shift + row * 307 + 150
            same_bits("beside", memory[end : end + 157], before[end : end + 157])


@each_backend
def test_n11_all_ignored_is_zero_and_micro_batches_add_up(backend):
    batch = batches.make(n=40, d=16, v=301, reads=("old", "adv"))
    whole = run(batch, po.PPOClip(), backend)
    parts = []
    for cut in (slice(0, 17), slice(17, 40)):
        part = {
            k: v[cut] if isinstance(v, torch.Tensor) and k != "weight" else v
            for k, v in batch.items()
        }
        parts.append(run(part, po.PPOClip(), backend))
    for k in ("loss", "dweight"):
        total = parts[0][k].double() + parts[1][k].double()
        torch.testing.assert_close(total, whole[k].double(), rtol=1e-5, atol=1e-6)
    batch["labels"][:] = -100
    got = run(batch, po.PPOClip(), backend)
    assert got["loss"] == 0 and (got["dhidden"] == 0).all() and (got["dweight"] == 0).all()


@each_backend
def test_n12_what_cannot_be_done_raises_and_is_named(backend):
    batch = move(batches.make(n=9, d=16, v=301, reads=("old", "adv")))
    x, head = batch["hidden"], po.Head(batch["weight"])
    with po.use_backend(backend):
        with pytest.raises(ValueError, match="old_logps"):
            po.linear_policy_loss(x, head, batches.tokens(batch), po.NLL())
        with pytest.raises(RuntimeError, match=f"{backend}.*fp64"):
            wide = po.Head(batch["weight"].double())
            po.linear_policy_loss(x.double(), wide, po.TokenBatch(batch["labels"]), po.NLL())
        with pytest.raises(ValueError, match="labels: expected a tensor on cuda"):
            po.token_logps(torch.zeros(2, 5, device=x.device), torch.zeros(2, dtype=torch.int64))
        with pytest.raises(RuntimeError, match="serves GPU tensors|CPU tensors|on cpu"):
            po.token_logps(torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64))


def sixteen_terms():
    return sum((0.01 * k * po.NLL() for k in range(2, 17)), po.NLL())


def test_n12_more_terms_than_a_launch_carries_are_an_error_that_says_so():
    z, y = move((torch.randn(2, 50), torch.tensor([1, 2])))
    with po.use_backend("cuda"):
        assert po.policy_loss(z, po.TokenBatch(y), sixteen_terms()).loss.isfinite()
        with pytest.raises(ValueError, match="at most 16 terms"):
            po.policy_loss(z, po.TokenBatch(y), sixteen_terms() + 0.1 * po.Entropy())


@each_backend
@pytest.mark.parametrize("gib", [4, 8], ids=["past 2^31", "past 2^32"])
def test_n13_given_logits_past_2_to_the_31_and_32_elements(gib, backend):
    """Forward and backward; the border rows equal the same rows alone."""
    vocab = 1 << 20
    n = (gib << 30) // (2 * vocab) + 2
    logits = torch.zeros(n, vocab, dtype=torch.bfloat16, device=gpu_cases.DEVICE)
    rows = torch.tensor([0, n // 2 - 1, n // 2, n - 3, n - 2, n - 1], device=logits.device)
    logits[rows] = torch.randn(6, vocab, device=logits.device).bfloat16()
    labels = torch.full((n,), -100, device=logits.device)
    labels[rows] = torch.tensor([1, vocab - 1, 77, 0, 4242, 7], device=logits.device)
    some = logits[rows].contiguous()
    batch = move({"weights": torch.ones(n), "temperature": None, "extra": {}})
    alone = batches.run_logits(
        some, {**batch, "labels": labels[rows], "weights": batch["weights"][:6]}, po.NLL(), backend
    )
    whole = batches.run_logits(logits, {**batch, "labels": labels}, po.NLL(), backend)
    for k in batches.STATS:
        same_bits(k, whole[k][rows], alone[k])
    same_bits("dlogits", whole["dlogits"][rows], alone["dlogits"])
    assert not whole["dlogits"][1].any(), "an ignored row is written, as zeros"


@each_backend
def test_n13_a_chunk_past_2_to_the_31_elements(backend):
    """The logits buffer of the fused call; the last rows equal the same rows in a small chunk."""
    d, vocab = 16, 1 << 19
    n = (1 << 12) + 64
    hidden = move(torch.randn(n, d).bfloat16())
    weight = move((torch.randn(vocab, d) / 4).bfloat16())
    labels = torch.randint(0, vocab, (n,), device=hidden.device)
    weights = torch.ones(n, device=hidden.device)
    results = []
    for cut in (slice(0, n), slice(n - 64, n)):
        x = hidden[cut].clone().requires_grad_()
        tokens = po.TokenBatch(labels[cut], weights=weights[cut])
        with po.use_backend(backend), po.memory_budget(6 << 30):
            out = po.linear_policy_loss(x, po.Head(weight), tokens, po.NLL())
            out.loss.backward()
        results.append((out.stats.logps[-64:], x.grad[-64:]))
    (logps, dhidden), (want, want_dhidden) = results
    # another chunk shape may take another GEMM: one rounding of a bf16 logit
    torch.testing.assert_close(logps, want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dhidden, want_dhidden, rtol=5e-2, atol=5e-3)


@each_backend
@each_dtype
@pytest.mark.parametrize("logits_dtype", [None, torch.float32], ids=["as_weight", "fp32_logits"])
def test_n15_the_first_step_is_on_policy(logits_dtype, dtype, backend):
    batch = move(batches.make(90, 64, 700, dtype, reads=("adv",), bias=True, ignored=False))
    head = po.Head(batch["weight"], batch["bias"], logits_dtype=logits_dtype)

    def train(rows, old):
        part = {k: batch[k][rows] for k in ("labels", "weights", "adv")}
        tokens = batches.tokens({**part, "old": old[rows], "temperature": None, "extra": {}})
        return po.linear_policy_loss(batch["hidden"][rows], head, tokens, po.PPOClip())

    everything = torch.arange(90, device=batch["labels"].device)
    with po.use_backend(backend):
        old = po.linear_token_logps(batch["hidden"], head, batch["labels"]).logps
        assert (train(everything, old).stats.logps - old).abs().max() <= 1e-5
        with po.deterministic():
            old = po.linear_token_logps(batch["hidden"], head, batch["labels"]).logps
            for rows in (everything, everything[3:40], everything[::7], everything[:1]):
                same_bits("logps", train(rows, old).stats.logps, old[rows])


@each_backend
def test_n15_fp32_logits_of_a_bf16_head(backend):
    """Logits that are not rounded: within 1e-5 of fp64, where bf16 is off by 1e-2."""
    batch = batches.make(33, 64, 1003, torch.bfloat16, reads=("old", "adv"))
    got = gpu_cases.compare(batch, po.PPOClip(), backend, logits_dtype=torch.float32)
    keep = (batch["labels"] != -100) & (batch["weights"] != 0)
    z = batch["hidden"].double() @ batch["weight"].double().t()
    truth = z.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[:, None])[:, 0]
    assert (got["logps"].double() - truth)[keep].abs().max() <= 1e-5
    assert math.isfinite(got["loss"].item())

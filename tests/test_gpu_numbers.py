"""PROMISES N1 to N10 on a GPU, each with the triton and the cuda backend: what CPU tests of the
same kernels cannot show (the chip's exponential and maxima, its rounding, clusters, tensor cores).

N11, N12, N13, N15 are in test_gpu_numbers_2.py. Counted as not run where there is no GPU.
"""

import math

import batches
import compare
import gpu_cases
import oracle
import pytest
import torch
from batches import dtype_name
from compare import same_bits
from coupled_batches import CASES as COUPLED
from gpu_cases import each_backend, on_cpu, run, run_logits, served  # noqa: F401  (a fixture)
from test_objectives import CASES

import pyoffline as po

pytestmark = pytest.mark.gpu
EPS = torch.finfo(torch.float32).eps
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss()
READS = ("old", "ref", "adv")
LOCAL = po.NLL(label_smoothing=0.1) - 0.1 * po.Entropy()


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@each_backend
@each_dtype
@pytest.mark.parametrize("name", CASES)
def test_n1_every_objective_against_fp64(name, dtype, backend):
    program = CASES[name].program(True)
    reads, extra = program.reads, program.gates
    batch = batches.make(n=64, d=64, v=4099, dtype=dtype, reads=reads, extra=extra, bias=True)
    gpu_cases.compare(batch, CASES[name], backend, chunk=24)


HEADS = {
    "softcap": {"head": {"softcap": 3.0}, "bias": True},
    "scale": {"head": {"logit_scale": -0.7, "temperature": 1.3}},
    "temperature": {"temperature": True, "seed": 1},
}


@each_backend
@each_dtype
@pytest.mark.parametrize("name", HEADS)
def test_n1_heads(name, dtype, backend):
    batch = batches.make(n=33, d=64, v=1003, dtype=dtype, reads=READS, **HEADS[name])
    gpu_cases.compare(batch, COMPOSED, backend, chunk=16, upstream=0.5)


@each_backend
def test_n1_fp16_under_a_loss_scale_of_2_to_the_16(backend):
    batch = batches.make(n=64, d=64, v=1003, dtype=torch.float16, reads=READS, bias=True)
    gpu_cases.compare(batch, COMPOSED, backend, chunk=24, upstream=2.0**16)


@each_backend
@pytest.mark.parametrize("vocab", [1, 2, 7, 255, 4096, 50_257, 151_936, 262_147])
def test_n1_given_logits_within_8_eps(vocab, backend):
    """Ordinary, confident with a heavy tail, confident with a far tail, equal logits."""
    logits = 3 * torch.randn(4, vocab, generator=generator())
    logits[1:3] = -12.0
    logits[2] = -40.0
    logits[1:3, vocab // 2] = 0.0
    logits[3] = 2.0
    labels = torch.full((4,), vocab // 2)
    labels[0] = vocab - 1
    truth = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    with po.use_backend(backend):
        s = on_cpu(po.token_logps(gpu_cases.move(logits), gpu_cases.move(labels)))
    assert (s.logps <= 0).all()
    assert ((s.logps.double() - truth).abs() <= 8 * EPS * (1 + truth.abs()) + 1e-12).all()


@each_backend
@pytest.mark.parametrize("offset", [1e6, -1e6])
def test_n1_an_offset_costs_at_most_1e_minus_5(offset, backend):
    logits = 3 * torch.randn(4, 5003, generator=generator()) + offset
    labels = torch.tensor([0, 17, 4096, 5002])
    truth = logits.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    got = run_logits(logits, batches.row_batch(labels), po.NLL(), backend)
    assert (got["logps"].double() - truth).abs().max() <= 1e-5


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_name)
@pytest.mark.parametrize("name", ["gspo", "composed", "with_nll", "renyi"])
def test_n1_coupled_objectives(name, dtype, backend):
    import coupled_batches as cb
    import coupled_oracle

    objective, reads = COUPLED[name]
    batch = cb.make(reads, dtype, seed=21, weights=True, bias=True)
    truth = coupled_oracle.run(batch, objective, torch.float64)
    bar = coupled_oracle.run(batch, objective)
    for rows in (6, 64):
        with po.chunk_rows(rows):
            got = on_cpu(cb.run(gpu_cases.move(batch), objective, backend))
        compare.check_forward("logps", got["logps"], truth["logps"], bar["logps"])
        for k in ("dhidden", "dweight", "dbias"):
            compare.check_gradient(k, got[k], truth[k], bar[k])


@each_backend
def test_custom_terms_and_class_weights(backend):
    def shaped(t):
        return -torch.exp(0.5 * (t.logp - t.old)) * t.adv - 0.1 * t.entropy

    batch = batches.make(n=33, d=16, v=301, reads=("old", "adv"))
    objective = po.custom(shaped) + 0.1 * po.KL("k2", "old")
    got, want = run(batch, objective, backend), batches.run(batch, objective, "reference")
    for k in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(got[k], want[k], rtol=2e-5, atol=1e-6)
    logits, weight = torch.randn(6, 77, generator=generator(3)), torch.rand(77)
    weight[5] = 0.0
    labels = torch.tensor([1, -100, 5, 76, 0, 33])
    results = []
    for name, device in ((backend, None), ("reference", "cpu")):
        z, u, y = gpu_cases.move((logits.clone().requires_grad_(), weight, labels), device)
        with po.use_backend(name):
            loss = po.cross_entropy(z, y, u, label_smoothing=0.1)
            loss.backward()
        results.append(on_cpu((loss, z.grad)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_n2_what_does_not_count_is_bitwise_invisible(value, dtype, backend):
    clean = batches.make(n=33, d=16, v=301, dtype=dtype, reads=READS)
    off = (clean["labels"] == -100) | (clean["weights"] == 0)
    dirty = {**clean}
    for k in ("hidden", *READS):
        dirty[k] = clean[k].clone()
        dirty[k][off] = value
    a, b = (run(x, COMPOSED, backend) for x in (clean, dirty))
    for k in ("loss", *batches.STATS, "dhidden", "dweight"):
        same_bits(k, b[k], a[k])
    assert (b["dhidden"][off] == 0).all()
    logits = torch.randn(33, 301, generator=generator()).to(dtype)
    rows = {k: clean[k] for k in ("labels", "weights", *READS, "temperature", "extra")}
    want = run_logits(logits, rows, COMPOSED, backend)
    logits[off] = value
    rows |= {k: dirty[k] for k in READS}
    got = run_logits(logits, rows, COMPOSED, backend)
    for k in ("loss", "dlogits"):
        same_bits(k, got[k], want[k])


@each_backend
@each_dtype
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf])
def test_n3_a_bad_logit_shows_in_its_row_and_nowhere_else(value, dtype, backend):
    """In every lane of a packet, at the ends of a thread's, a block's and a cluster's share."""
    clean_logits = torch.randn(3, 50_001, generator=generator()).to(dtype)
    batch = batches.row_batch([1, 2, 3])
    clean = run_logits(clean_logits, batch, po.NLL(), backend)
    for place in (*range(17), 4095, 16_383, 16_384, 25_000, 33_333, 49_999, 50_000):
        logits = clean_logits.clone()
        logits[1, place] = value
        got = run_logits(logits, batch, po.NLL(), backend)
        assert got["loss"].isnan() and got["logps"][1].isnan(), place
        assert got["dlogits"][1].isnan().all(), place
        for row in (0, 2):
            same_bits("other rows", got["dlogits"][row], clean["dlogits"][row])


@each_backend
def test_n3_masked_entries_have_no_gradient(backend):
    logits = torch.randn(2, 5003, generator=generator())
    logits[:, ::3] = -math.inf
    got = run_logits(logits, batches.row_batch([1, 4]), po.NLL() - 0.1 * po.Entropy(), backend)
    assert (got["dlogits"][:, ::3] == 0).all() and got["dlogits"].isfinite().all()
    assert got["loss"].isfinite()


@each_backend
@each_dtype
def test_n4_clipped_tokens_have_exactly_zero_rows(dtype, backend):
    batch = batches.make(dtype=dtype, reads=("old", "adv"), ignored=False)
    batch["adv"] = torch.where(torch.arange(37) % 2 == 0, 1.0, -1.0)
    clipped = torch.arange(37) % 3 == 0
    far = torch.where(batch["adv"] > 0, -30.0, 30.0)
    batch["old"] = torch.where(clipped, batch["old"] + far, batch["old"])
    got = run(batch, po.PPOClip(0.99, 20.0), backend)
    assert (got["dhidden"][clipped] == 0).all()
    assert (got["dhidden"][~clipped] != 0).any(-1).all()


@each_backend
@pytest.mark.parametrize("adv", [-1.0, 0.0, 1.0])
def test_n4_extreme_log_ratios_are_the_true_value_or_inf_never_nan(adv, backend):
    size = torch.tensor([20.0, 88.0, 89.0, 100.0, 700.0, 1e30])
    logits = torch.randn(12, 301, generator=generator())
    logps = logits.log_softmax(-1)[:, 5]
    old = logps - torch.cat([size, -size])
    rows = batches.row_batch([5] * 12, old=old, adv=torch.full((12,), adv))
    got, want = (
        f(logits, rows, po.PPOClip(), name)
        for f, name in ((run_logits, backend), (batches.run_logits, "reference"))
    )
    assert not got["loss"].isnan() and not got["dlogits"].isnan().any()
    torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got["dlogits"], want["dlogits"], rtol=1e-4, atol=1e-7)


@each_backend
def test_n5_ratios_are_formed_in_log_space_and_reported_raw(backend):
    z = torch.tensor([[0.0, 200.0]] * 3)
    old = torch.tensor([-200.1, -203.0, -190.0])
    batch = batches.row_batch([0, 0, 0], old=old, adv=torch.ones(3))
    got = run_logits(z, batch, po.PPOClip(), backend)
    ratio = torch.exp(-200.0 - old)
    torch.testing.assert_close(got["loss"], -(ratio[0] + 1.2 + ratio[2]), rtol=1e-6, atol=0)
    for name, want in (("max", ratio.max()), ("min", ratio.min()), ("mean", ratio.mean())):
        torch.testing.assert_close(got["metrics"][f"ratio/{name}"], want, rtol=1e-6, atol=0)
    assert (got["dlogits"][1] == 0).all() and (got["dlogits"][0] != 0).all()


@each_backend
@pytest.mark.parametrize("label", [77, -1, 2**31, 2**40, -(2**63)])
def test_n6_a_bad_label_is_no_address_makes_its_row_nan_and_raises_later(label, backend):
    logits, labels = torch.randn(4, 77, generator=generator()), torch.tensor([3, 69, 0, 5])
    clean = run_logits(logits, batches.row_batch(labels), po.NLL(), backend)
    labels[2] = label
    got = run_logits(logits, batches.row_batch(labels), po.NLL(), backend)
    assert got["loss"].isnan() and got["dlogits"][2].isnan().all()
    for row in (0, 1, 3):
        same_bits("others", got["dlogits"][row], clean["dlogits"][row])
    shown = max(min(label, 2**31 - 1), -(2**31))
    with pytest.raises(IndexError, match=rf"label {shown} \(row 2"):
        po.check()
    po.check()
    run_logits(logits, batches.row_batch(labels), po.NLL(), backend)  # its copy back waits
    with pytest.raises(IndexError, match=rf"label {shown} \(row 2"):
        run_logits(logits, batches.row_batch([3, 69, 0, 5]), po.NLL(), backend)


@each_backend
@each_dtype
def test_n7_views_give_the_contiguous_answer_and_are_not_written(dtype, backend):
    wide = gpu_cases.move(torch.randn(4, 2 * 1003 + 3, generator=generator(2)).to(dtype))
    batch = gpu_cases.move(batches.row_batch([0, 1002, 5, 77]))
    views = (wide[:, 1:1004], wide[:, ::2][:, :1003], wide[:, 3:1006].t().contiguous().t())
    for view in (*views, wide[:1, :1003].expand(4, 1003)):
        before = view.clone(memory_format=torch.contiguous_format)
        a = batches.run_logits(view, batch, po.NLL(), backend)
        b = batches.run_logits(before, batch, po.NLL(), backend)
        tolerance = max(1e-6, torch.finfo(dtype).eps)
        torch.testing.assert_close(a["dlogits"], b["dlogits"], rtol=tolerance, atol=1e-7)
        torch.testing.assert_close(a["logps"], b["logps"], rtol=1e-6, atol=1e-6)
        same_bits("input", view, before)


@each_backend
@each_dtype
def test_n8_the_error_of_dweight_does_not_grow_with_the_number_of_chunks(dtype, backend):
    n = 1024
    batch = batches.make(n, 8, 16, dtype, ignored=False)
    batch["weights"] = torch.ones(n)
    truth = oracle.run(batch, po.NLL(), torch.float64)["dweight"]
    errors = {}
    for chunks in (1, 4, 32, 1024):
        with po.chunk_rows(n // chunks):
            got = run(batch, po.NLL(), backend)["dweight"]
        floor = compare.EPS32 * compare.max_and_rms(truth)[1]
        errors[chunks] = compare.max_and_rms(got.double() - truth)[1] + floor
    assert all(e < 1.5 * errors[1] for e in errors.values()), errors


@each_backend
@each_dtype
def test_n9_the_same_bits_run_to_run(dtype, backend):
    batch = batches.make(n=300, d=64, v=50_257, dtype=dtype, reads=READS, bias=True)
    with po.chunk_rows(128):
        first, *others = (run(batch, COMPOSED, backend) for _ in range(4))
    for other in others:
        for k in ("loss", *batches.STATS, "dhidden", "dweight", "dbias"):
            same_bits(k, other[k], first[k])


@each_backend
@each_dtype
def test_n9_a_row_does_not_depend_on_its_position(dtype, backend):
    """Rows that start at the same multiple of 16 bytes, among others, alone, in another order."""
    logits = torch.randn(200, 50_256, generator=generator(6)).to(dtype)
    labels = torch.arange(200) * 97
    want = run_logits(logits, batches.row_batch(labels), LOCAL, backend)
    for rows in (torch.arange(200).flip(0), torch.tensor([7]), torch.tensor([199, 0, 42])):
        got = run_logits(logits[rows], batches.row_batch(labels[rows]), LOCAL, backend)
        for k in ("logps", "entropy", "lse", "dlogits"):
            same_bits(k, got[k], want[k][rows])


@each_backend
@each_dtype
def test_n9_deterministic_logps_do_not_depend_on_batch_position_or_chunks(dtype, backend):
    hidden = torch.randn(600, 64, generator=generator(6)).to(dtype)
    weight = torch.randn(5003, 64, generator=generator(7)).to(dtype)
    labels = torch.randint(0, 5003, (600,), generator=generator(8))
    hidden, weight, labels = gpu_cases.move((hidden, weight, labels))
    head = po.Head(weight)
    with po.use_backend(backend), po.deterministic():
        want = po.linear_token_logps(hidden, head, labels).logps
        order = torch.randperm(600, generator=generator(9)).to(labels.device)
        for rows in (order, order[:1], order[:257], order[300:]):
            got = po.linear_token_logps(hidden[rows], head, labels[rows]).logps
            same_bits("logps", got, want[rows])
        some = labels.clone()
        some[::3] = -100
        policy = po.linear_policy_loss(hidden, head, po.TokenBatch(some), po.NLL())
        same_bits("logps", policy.stats.logps[some != -100], want[some != -100])


@each_backend
@pytest.mark.parametrize("peak", [5, 20, 88, 160, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_n10_probabilities_sum_to_one(dtype, peak, backend):
    z = (torch.randn(8, 4003, generator=generator(peak)) * peak / 4).clamp(-peak, peak).bfloat16()
    z[:, 7] = peak
    labels = torch.randint(0, 4003, (8,), generator=generator(1))
    got = run_logits(z.to(dtype), batches.row_batch(labels), po.NLL(), backend)["dlogits"]
    p = z.double().softmax(-1)
    truth = p.scatter_add(-1, labels[:, None], -torch.ones(8, 1, dtype=torch.float64))
    if dtype == torch.float32:
        assert got.double().sum(-1).abs().max() <= 1e-5
    rounding = EPS * 128 if dtype == torch.float32 else 2.0**-8
    assert ((got.double() - truth).abs() <= rounding * truth.abs() + 2.0**-126).all()


@each_backend
@each_dtype
def test_n10_confident_rows_keep_p_minus_one(dtype, backend):
    """p_y = 1 - 2^-k, k = 1..24: rounding p_y first would give 0 from k = 9 on in bf16."""
    k = torch.arange(1, 25, dtype=torch.float64)
    z = torch.stack([torch.zeros(24, dtype=torch.float64), -torch.log(2**k - 1)], -1).to(dtype)
    batch = batches.row_batch(torch.zeros(24, dtype=torch.long))
    got = run_logits(z, batch, po.NLL(), backend)["dlogits"]
    truth = torch.expm1(z.double().log_softmax(-1)[:, 0])
    relative = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    allowed = relative * truth.abs() + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((got[:, 0].double() - truth).abs() <= allowed).all()
    assert (got[:, 0] <= 0).all() and (got[:, 1] >= 0).all()

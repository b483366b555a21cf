"""Accuracy of log-probs and gradients against fp64 (PROMISES N1, N8, N10)."""

import itertools
import math

import batches
import compare
import oracle
import pytest
import torch
from batches import BACKENDS, DTYPES, HALVES, dtype_name

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARIES = (1, 2, 31, 32, 33, 1000, 32000, 50257, 129920, 151936, 262147)
MIXED = po.PPOClip(0.1, 0.2) + 0.1 * po.KL("k3") - 0.05 * po.Entropy()


def rows_of(v: int, kind: str) -> torch.Tensor:
    """[4, V] fp32 logits, each kind with its own difficulty."""
    g = torch.Generator().manual_seed(v)
    z = torch.randn(4, v, generator=g)
    if kind == "wide":  # an ordinary trained row
        return 4 * z
    if kind == "confident":  # d = 1 + V terms below eps: a naive sum loses them all
        z = z * 1e-3 - 17.0
        z[:, 0] = 0.0
        return z
    return torch.zeros(4, v)  # "equal": exactly log V


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v", VOCABULARIES)
@pytest.mark.parametrize("kind", ["wide", "confident", "equal"])
def test_N1_logp_of_given_fp32_logits_within_8_eps(backend, v, kind):
    z = rows_of(v, kind)
    labels = torch.tensor([0, v - 1, v // 2, 0])
    with po.use_backend(backend):
        got = po.token_logps(z, labels)
    z = z.double()
    truth = z.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    error = (got.logps.double() - truth).abs()
    assert (error <= 8 * compare.EPS32 * (1 + truth.abs())).all(), error.max()
    assert (got.logps <= 0).all()
    lse = z.logsumexp(-1)
    assert ((got.lse.double() - lse).abs() <= 8 * compare.EPS32 * (1 + lse.abs())).all()
    if kind == "equal":
        assert torch.equal(got.logps, torch.full((4,), -math.log(v)))
        torch.testing.assert_close(got.entropy, torch.full((4,), math.log(v)), rtol=1e-6, atol=1e-6)
    entropy = -(z.log_softmax(-1).exp() * z.log_softmax(-1)).sum(-1)
    assert ((got.entropy.double() - entropy).abs() <= 2e-5 * (1 + entropy)).all()
    assert (got.entropy >= -1e-6).all() and (got.entropy <= math.log(v) * (1 + 1e-6)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("v", [1, 33, 50257])
def test_N1_logp_of_given_half_logits_is_exact_in_fp32(backend, dtype, v):
    z = rows_of(v, "wide").to(dtype)
    labels = torch.tensor([0, v - 1, v // 2, 0])
    with po.use_backend(backend):
        got = po.token_logps(z, labels).logps
    truth = z.double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert ((got.double() - truth).abs() <= 8 * compare.EPS32 * (1 + truth.abs())).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [s * x for x in (1e2, 1e4, 1e6) for s in (1, -1)])
def test_N1_a_common_offset_costs_at_most_1e_minus_5(backend, offset):
    z = rows_of(1000, "wide") + offset
    labels = torch.tensor([3, 999, 500, 0])
    x = z.clone().requires_grad_()
    with po.use_backend(backend):
        got = po.token_logps(x, labels)
        (got.logps.sum() + got.entropy.sum()).backward()
    w = z.double().requires_grad_()
    t = oracle.row_scalars(w, labels)
    (t.logp.sum() + t.entropy.sum()).backward()
    for name, truth in (("logps", t.logp), ("entropy", t.entropy)):
        assert (getattr(got, name).double() - truth).abs().max() <= 1e-5
    assert (x.grad.double() - w.grad).abs().max() <= 1e-5


# An orthogonal array of eight rows: every pair of options is on together, and apart, somewhere.
OPTIONS = ("bias", "softcap", "temperature", "logit_scale", "ignored", "smoothing", "entropy")
ARRAY = [
    tuple(bool(bin(row & mask).count("1") % 2) for mask in (1, 2, 4, 3, 5, 6, 7))
    for row in range(8)
]


def test_the_option_array_covers_every_pair():
    for i, j in itertools.combinations(range(len(OPTIONS)), 2):
        assert len({(row[i], row[j]) for row in ARRAY}) == 4


def check_sum(batch, objective, got):
    """The loss is the weighted sum of the objective at the very statistics that came with it."""
    if "smoothing" in {t.row for t in objective.terms()}:
        return  # its row scalar is not among the statistics
    counted = ((batch["labels"] != -100) & (batch["weights"] != 0)).nonzero()[:, 0]
    vectors = {k: got[k] for k in ("logps", "entropy", "lse")}
    vectors |= {k: batch[k] for k in ("old", "mu", "ref", "adv")}
    given = {k: x.double()[counted] for k, x in vectors.items() if x is not None}
    given["logp"] = given.pop("logps")
    terms = batch["weights"].double()[counted] * oracle.losses(objective, oracle.Rows(**given))
    # terms that cancel, and 1s inside a term, leave the rounding of their parts behind
    parts = batch["weights"].double()[counted] * oracle.magnitude(objective, oracle.Rows(**given))
    allowed = 2 * compare.FLOOR_ULPS * compare.EPS32 * parts.sum()
    assert (got["loss"].double() - terms.sum()).abs() <= allowed


def compared(batch, objective, backend, upstream=1.0, **head):
    """Every output of one call through the comparator."""
    got = batches.run(batch, objective, backend, upstream, **head)
    truth = oracle.run(batch, objective, torch.float64, upstream)
    reference = oracle.run(batch, objective, None, upstream)
    assert got["logps"].dtype == torch.float32
    for name in ("logps", "entropy", "lse"):
        compare.check_forward(name, got[name], truth[name], reference[name])
    compare.check_loss(got["loss"], truth, reference)
    check_sum(batch, objective, got)
    for name in ("dhidden", "dweight", "dbias"):
        if name in truth:
            compare.check_gradient(name, got[name], truth[name], reference[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("row", ARRAY, ids=["".join("01"[x] for x in row) for row in ARRAY])
def test_N1_every_output_within_the_error_of_pytorch(backend, dtype, row):
    on = dict(zip(OPTIONS, row, strict=True))
    head = {"softcap": 5.0} if on["softcap"] else {}
    head |= {"logit_scale": 0.7} if on["logit_scale"] else {}
    reads = ("old", "ref", "adv")
    batch = batches.make(
        dtype=dtype,
        reads=reads,
        head=head,
        **{k: on[k] for k in ("bias", "temperature", "ignored")},
    )
    objective = po.PPOClip(0.1, 0.2) + 0.1 * po.KL("k3")
    objective = objective - 0.05 * po.Entropy() if on["entropy"] else objective
    objective = objective + po.NLL(0.1, 1e-3) if on["smoothing"] else objective
    compared(batch, objective, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("n, d, v", [(24, 7, 1), (24, 64, 50), (200, 32, 33), (64, 200, 2048)])
def test_N1_shapes_and_seeds(backend, dtype, seed, n, d, v):
    batch = batches.make(n, d, v, dtype, seed, ("old", "ref", "adv"), bias=True)
    with po.chunk_rows(48):
        compared(batch, MIXED if v > 1 else MIXED + po.ZLoss(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N1_a_single_row_is_off_by_the_rounding_of_its_logits(backend, dtype):
    """One row is one draw of the error, so the bar is the bound: each logit rounded once."""
    batch = batches.make(1, 64, 50, dtype, 3, bias=True)
    got, truth = batches.run(batch, po.NLL(), backend), oracle.run(batch, po.NLL(), torch.float64)
    z = batch["hidden"].double() @ batch["weight"].double().t() + batch["bias"].double()
    allowed = (torch.finfo(dtype).eps + 16 * compare.EPS32) * z.abs().max() + compare.EPS32 * 8
    assert (got["logps"].double() - truth["logps"]).abs().item() <= allowed
    for name in ("dhidden", "dweight", "dbias"):
        error = (got[name].double() - truth[name]).abs().max()
        assert error <= 2 * allowed * truth[name].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [16, 64])
def test_N1_fp16_under_a_loss_scale_of_2_to_the_16(backend, chunk):
    batch = batches.make(dtype=torch.float16, reads=("old", "ref", "adv"), bias=True)
    with po.chunk_rows(chunk):
        compared(batch, MIXED, backend, 2.0**16)


@pytest.mark.parametrize("backend", BACKENDS)
def test_N1_fp16_with_weights_of_1e_minus_7_over_forty_chunks(backend):
    """Small weights need the power-of-two scale, many chunks join in two levels: the scale must be
    taken off each gradient once.
    """
    batch = batches.make(110, dtype=torch.float16, reads=("old", "ref", "adv"), bias=True)
    batch["weights"] *= 1e-5
    with po.chunk_rows(2):
        compared(batch, MIXED, backend, 2.0**16)


@batches.needs_cpu
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_N1_without_the_vendor_gemm(dtype, scale):
    """A torch whose library lacks the half GEMMs: two panels of V, several chunks."""
    from pyoffline import _C

    batch = batches.make(40, 32, 2100, dtype, 2, ("old", "ref", "adv"), bias=True)
    batch["weights"] *= scale
    _C.set_gemm(False)
    try:
        with po.chunk_rows(16):
            compared(batch, MIXED, "cpu", 2.0**16)
    finally:
        _C.set_gemm(True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad", [False, True])
def test_N1_a_tokens_temperature_replaces_that_of_the_head(backend, grad):
    """Trained in chunks and scored without logits."""
    batch = batches.make(temperature=True, bias=True, head={"temperature": 3.0})
    weight = batch["weight"].clone().requires_grad_(grad)
    with po.use_backend(backend):
        head = po.Head(weight, batch["bias"], temperature=3.0)
        own = po.linear_token_logps(batch["hidden"], head, batch["labels"], batch["temperature"])
        its = po.linear_token_logps(batch["hidden"], head, batch["labels"])
    counted = batch["labels"] != -100
    z = batch["hidden"].double() @ batch["weight"].double().t() + batch["bias"].double()
    for got, t in ((own, batch["temperature"].double()[:, None]), (its, 3.0)):
        truth = (z / t).log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[:, None])[:, 0]
        torch.testing.assert_close(
            got.logps.detach().double()[counted], truth[counted], rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_N1_fp32_logits_are_better_than_the_half_reference(backend, dtype):
    """logits_dtype=float32: only the inputs and the results are rounded to half."""
    batch = batches.make(dtype=dtype, reads=("old", "ref", "adv"), bias=True)
    got = batches.run(batch, MIXED, backend, logits_dtype=torch.float32)
    truth = oracle.run(batch, MIXED, torch.float64)
    single = {**batch, **{k: batch[k].float() for k in ("hidden", "weight", "bias")}}
    reference = oracle.run(single, MIXED)
    for name in ("logps", "entropy", "lse"):
        compare.check_forward(name, got[name], truth[name], reference[name])
    half = oracle.run(batch, MIXED)
    for name in ("dhidden", "dweight", "dbias"):
        compare.check_gradient(name, got[name], truth[name], half[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N8_dweight_error_does_not_grow_with_the_number_of_chunks(backend, dtype):
    n = 1024
    batch = batches.make(n, 8, 16, dtype, ignored=False, bias=True)
    batch["weights"] = torch.full((n,), 1.0)
    truth = oracle.run(batch, po.NLL(), torch.float64)["dweight"]
    errors = {}
    for chunks in (1, 4, 32, 1024):
        with po.chunk_rows(n // chunks), batches.threads(1):
            got = batches.run(batch, po.NLL(), backend)["dweight"]
        floor = compare.EPS32 * compare.max_and_rms(truth)[1]
        errors[chunks] = compare.max_and_rms(got.double() - truth)[1] + floor
    assert all(e < 1.5 * errors[1] for e in errors.values()), errors


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("peak", [5, 20, 88, 160, 640])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_N10_probabilities_sum_to_one(backend, peak, dtype):
    """dlogits of -l with weight 1 is p - onehot; the logits are the same bf16 numbers in both."""
    g = torch.Generator().manual_seed(peak)
    z = (torch.randn(8, 4003, generator=g) * peak / 4).clamp(-peak, peak).bfloat16()
    z[:, 7] = peak
    labels = torch.randint(0, 4003, (8,), generator=g)
    got = batches.run_logits(z.to(dtype), batches.row_batch(labels), po.NLL(), backend)["dlogits"]
    p = z.double().softmax(-1)
    truth = p.scatter_add(-1, labels[:, None], -torch.ones(8, 1, dtype=torch.float64))
    if dtype == torch.float32:
        assert got.double().sum(-1).abs().max() <= 1e-5
    rounding = compare.EPS32 * 64 if dtype == torch.float32 else 2.0**-8
    # below the smallest normal fp32 number exp may flush to 0
    assert ((got.double() - truth).abs() <= rounding * truth.abs() + 2.0**-126).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("linear", [False, True])
def test_N10_confident_rows_keep_p_minus_one(backend, dtype, linear):
    """p_y = 1 - 2^-k, k = 1..24: rounding p_y first would give 0 from k = 9 on in bf16."""
    k = torch.arange(1, 25, dtype=torch.float64)
    z = torch.stack([torch.zeros(24, dtype=torch.float64), -torch.log(2**k - 1)], -1).to(dtype)
    labels = torch.zeros(24, dtype=torch.long)
    batch = batches.row_batch(labels)
    if linear:  # logits = hidden I^T: dhidden is dlogits
        batch |= {"hidden": z, "weight": torch.eye(2, dtype=dtype), "head": {}}
        got = batches.run(batch, po.NLL(), backend)["dhidden"]
    else:
        got = batches.run_logits(z, batch, po.NLL(), backend)["dlogits"]
    truth = torch.expm1(z.double().log_softmax(-1)[:, 0])
    relative = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    allowed = relative * truth.abs() + (2.0**-24 if dtype == torch.float16 else 0.0)
    assert ((got[:, 0].double() - truth).abs() <= allowed).all()
    assert (got[:, 0] <= 0).all() and (got[:, 1] >= 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
@pytest.mark.parametrize("peak", [5, 40, 640])
@pytest.mark.parametrize("call", ["policy", "logps"])
def test_N10_the_gradient_is_that_of_the_rounded_logits(backend, dtype, peak, call):
    """Logits that are exact in fp32 and not in half: where the backward took the exact ones, or
    another lse, p at 640 would be off by a factor. dweight[:, 0] is dlogits, as hidden[0] is 1.
    """
    g = torch.Generator().manual_seed(peak)
    large = (torch.rand(501, generator=g) * peak).to(dtype)
    small = torch.randint(-127, 128, (501,), generator=g) / 64
    weight, labels = torch.stack([large, small.to(dtype)], -1), torch.tensor([7])
    label = torch.arange(501) == labels
    for second in (1.0, -0.5):
        hidden = torch.tensor([[1.0, second]], dtype=dtype)
        z = (hidden.double() @ weight.double().t()).to(dtype).double()
        truth = torch.where(label, torch.expm1(z.log_softmax(-1)), z.softmax(-1))[0]
        leaf = weight.clone().requires_grad_()
        with po.use_backend(backend):
            if call == "policy":
                out = po.linear_policy_loss(hidden, po.Head(leaf), po.TokenBatch(labels), po.NLL())
                loss = out.loss
            else:
                loss = -po.linear_token_logps(hidden, po.Head(leaf), labels).logps.sum()
            loss.backward()
        want = -z.log_softmax(-1)[0, 7]
        assert (loss.detach().double() - want).abs() <= 8 * compare.EPS32 * (1 + want)
        allowed = torch.finfo(dtype).eps * truth.abs() + (2.0**-24 if dtype == torch.float16 else 0)
        assert ((leaf.grad[:, 0].double() - truth).abs() <= allowed + 2.0**-126).all()

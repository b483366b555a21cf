"""Training chunks whose logits never exist (`kernels/epilogue_rows.py`), in the interpreter.

With the identity as hidden states the product is exact: outputs equal the scoring kernel's bits,
and F * exps must be the row pass's dlogits but for one bf16 rounding. Tiles are 16 x 16 x 16 and a
span two tiles wide. The public path is compared with fp64 at the bar of the bf16 reference.
"""

import dataclasses
import math

import batches
import oracle
import pytest
import torch
import triton
import triton.language as tl
from compare import check_gradient, max_and_rms, same_bits
from row_cases import compare, outputs, random_rows

import pyoffline as po
from pyoffline import triton_backend
from pyoffline.calls import HeadScalars, LinearCall, Needs, Rows
from pyoffline.kernels import epilogue_rows as kernel
from pyoffline.kernels.configs import INTERPRETER_TILE
from pyoffline.kernels.row_factors import FAR, write_factors
from pyoffline.kernels.row_pass import row_pass
from pyoffline.kernels.score_rows import STORE_UNIT, score_rows
from pyoffline.plan import PlanSettings

NAN, INF = math.nan, math.inf
BF16 = torch.bfloat16
COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") + 1e-3 * po.ZLoss()
PADDING = 7.0


@pytest.fixture
def no_logits(monkeypatch):
    """The epilogue is asked for, and storing logits is an error."""

    def fail(*_):
        raise AssertionError("logits are stored")

    monkeypatch.setattr(triton_backend, "EPILOGUE", True)
    monkeypatch.setattr(triton_backend.TritonKernels, "logits", fail)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is allocated holds NaN, and -1 where it is an integer (A4)."""
    empty = torch.empty

    def filled(*shape, **options):
        x = empty(*shape, **options)
        return x.fill_(NAN if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def launches(monkeypatch):
    """(exps, offset) of the first product of each call, (exps, offset, late) of the second."""
    found, multiply = [], kernel.Scoring.multiply

    def recorded(self, exps=(), stride_exps=0):
        if exps:
            found.append(exps)
        multiply(self, exps, stride_exps)

    monkeypatch.setattr(kernel.Scoring, "multiply", recorded)
    return found


def folded(hidden, weight, rows, config=None):
    """(F, exps, outputs by name, late, flag); exps in a buffer whose padding holds 7."""
    n, vocab = hidden.shape[0], weight.shape[0]
    width = -(-vocab // STORE_UNIT.value) * STORE_UNIT.value
    buffer = torch.full((n, width + 16), PADDING, dtype=BF16)
    out, flag = outputs(n, gap=None), torch.zeros(2, dtype=torch.int64)
    exps = buffer[:, :vocab]
    factor = kernel.epilogue_rows(hidden, weight, rows, tuple(out.values()), flag, exps, config)
    assert (buffer[:, width:] == PADDING).all(), "written past the row's padding"
    return factor, exps, out, flag


def both(logits, rows, config=None):
    """(F * exps, outputs) of the epilogue on the identity; the row pass's (dlogits, outputs)."""
    eye, weight = torch.eye(logits.shape[0], dtype=BF16), logits.t().contiguous()
    factor, exps, got, _ = folded(eye, weight, rows, config)
    scored = outputs(logits.shape[0], gap=None)
    flag = torch.zeros(2, dtype=torch.int64)
    score_rows(eye, weight, rows, tuple(scored.values()), flag, BF16, config)
    for name, x in scored.items():
        if x is not None:
            same_bits(name, got[name], x)
    # fp32 logits of the same values: dlogits without a rounding
    dlogits, want = torch.full(logits.shape, NAN), outputs(logits.shape[0], gap=None)
    row_pass(logits.float(), dlogits, rows, tuple(want.values()), flag)
    return factor[:, None] * exps.float(), got, dlogits, want


def assert_gradient(got, want, at_least=0.0):
    """Each entry within one bf16 rounding (2^-8), and a little for F."""
    allowed = (2.0**-8 + 1e-5) * want.abs() + at_least
    assert ((got - want).abs() <= allowed).all(), (got - want).abs().max()


def inputs(n, vocab, objective=COMPOSED, **options):
    """Rows with a program that the epilogue serves."""
    return random_rows(n, vocab, objective, **options)


@pytest.mark.parametrize("vocab", [1, 15, 33, 201])
def test_the_gradient_is_a_factor_times_exponentials_at_every_border(vocab):
    """17 rows: a ragged tile of them; rows that do not count, or are clipped, get F = 0."""
    logits = (3 * torch.randn(17, vocab, generator=torch.Generator().manual_seed(1))).to(BF16)
    rows = inputs(17, vocab, seed=vocab)
    got, _, want, _ = both(logits, rows)
    assert_gradient(got, want)
    off = (rows.labels == -100) | (rows.weights == 0)
    assert off.any() and (got[off] == 0).all()


TRANSFORMS = [
    ("scale", HeadScalars(0.0, -1.5, 1.3), False, False),
    ("temperature", HeadScalars(0.0, 0.7), True, False),
    ("bias", HeadScalars(0.0, 0.7), False, True),
]


@pytest.mark.parametrize("name, head, per_row, bias", TRANSFORMS, ids=[t[0] for t in TRANSFORMS])
def test_transforms_of_the_head(name, head, per_row, bias, launches):
    """And the offset is the logit of the label: no row is late."""
    g = torch.Generator().manual_seed(2)
    options = {"head": head}
    if per_row:
        options["temperature"] = (torch.rand(9, generator=g) + 0.5) * torch.tensor([1, -1, 1] * 3)
    if bias:
        options["bias"] = torch.randn(77, generator=g)
    rows = inputs(9, 77, **options)
    if bias:
        rows.bias[5:20] = -INF
        rows.labels[(rows.labels >= 5) & (rows.labels < 20)] = 20
    logits = torch.randn(9, 77, generator=g).to(BF16)
    got, _, want, _ = both(logits, rows)
    assert_gradient(got, want)
    _, offset, late = launches[1]
    at, sign = rows.labels.clamp(min=0), torch.ones(9)
    if head.logit_scale < 0:
        sign = -sign
    if per_row:
        sign = sign * rows.temperature.sign()
    label = logits.float().gather(1, at[:, None])[:, 0]
    label = label + (rows.bias[at] if bias else 0.0)
    counted = (rows.labels != -100) & (rows.weights != 0)
    assert (late == 0).all() and (offset == sign * label)[counted].all()


@pytest.mark.parametrize("changes", [{"parts": 4}, {"tma": True}, {"block_v": 64, "span": 64}])
def test_parts_descriptors_and_spans_change_nothing(changes):
    g = torch.Generator().manual_seed(3)
    logits, rows = torch.randn(24, 70, generator=g).to(BF16), inputs(24, 70)
    got, _, want, _ = both(logits, rows, dataclasses.replace(INTERPRETER_TILE, **changes))
    assert_gradient(got, want)


def test_late_rows_are_written_again_and_others_keep_their_bits(launches):
    """Labels 30, 60, 200 nats below the maximum, a confident one, and an offset of 2^20."""
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(20, 96, generator=g).to(BF16)
    rows = dataclasses.replace(inputs(20, 96, objective=po.NLL()), weights=torch.ones(20))
    rows.labels.copy_(torch.arange(20))
    calm = both(logits, rows)
    far = {2: 30.0, 3: 60.0, 4: 200.0, 17: 88.0}
    for row, nats in far.items():
        logits[row, 50 + row] = nats
    logits[5, 5] = 60.0
    logits[6] += 2.0**20
    launches.clear()
    got, out, want, _ = both(logits, rows)
    late = launches[1][2]
    assert late.nonzero()[:, 0].tolist() == [3, 4, 17]
    assert got.isfinite().all()
    # relative to the row's largest entry: far below it both paths end in 0
    assert_gradient(got, want, at_least=1e-30)
    untouched = [0, 1, *range(7, 17), 18, 19]
    same_bits("other rows", got[untouched], calm[0][untouched])
    truth = logits.double().log_softmax(-1)[torch.arange(20), rows.labels]
    torch.testing.assert_close(out["logps"].double(), truth, atol=2e-5, rtol=2e-6)


def test_a_bf16_product_and_its_label_logit_may_round_apart():
    """At 2^20 bf16 logits are 2^13 apart: the label's own dot product is far from all of them."""
    g = torch.Generator().manual_seed(5)
    hidden = torch.randn(8, 16, generator=g).to(BF16)
    weight = torch.randn(40, 16, generator=g).to(BF16)
    hidden[:, 0], weight[:, 0] = 1024.0, 1024.0
    hidden[:4, 1], weight[:, 1] = 300.0, torch.linspace(-300, 300, 40).to(BF16)
    rows = Rows(torch.arange(8), codes=po.NLL().program(False).codes)
    rows = dataclasses.replace(rows, hyper=po.NLL().program(False).hyper)
    factor, exps, out, _ = folded(hidden, weight, rows)
    z = (hidden.float() @ weight.float().t()).to(BF16).double()
    want = z.softmax(-1)
    want[torch.arange(8), rows.labels] -= 1
    assert out["logps"].isfinite().all()
    assert_gradient(factor[:, None].double() * exps.double(), want, at_least=1e-30)


@triton.jit
def _factors_kernel(factors, a, c, m, slope, d, logp, factor):
    i = tl.program_id(0)
    write_factors(
        factors, i, tl.load(a + i), tl.load(c + i), tl.load(m + i), slope, tl.load(d + i),
        tl.load(logp + i), factor,
    )  # fmt: skip


def test_factors_on_a_grid_with_ties_zeros_and_c_next_to_a():
    """dlogits_v = factor ((c - a) p_v + a [v = y]) whatever a and c are, equal ones too."""
    values = [0.0, 1.0, -(2.0**-30), -3.5e3, 1.0 + 2.0**-23]
    pairs = [(a, c, rise, p) for a in values for c in values for rise in (0.0, 30.0, -30.0, 90.0)
             for p in (1e-9, 1.0 - 1e-6)]  # fmt: skip
    a, c, rise, p = torch.tensor(pairs).t().contiguous()
    slope, d, factor = 0.5, torch.full_like(a, 1.75), -0.125
    m = torch.full_like(a, 3.0)
    offset = m - rise / slope
    given = offset.clone()
    out = [torch.full_like(a, NAN) for _ in range(2)]
    late = torch.full(a.shape, 7, dtype=torch.int32)
    _factors_kernel[(len(pairs),)]((offset, *out, late), a, c, m, slope, d, p.log(), factor)
    assert ((late == 1) == (rise.abs() > FAR.value)).all()
    assert (offset == torch.where(late == 1, m, given)).all()
    total = ((m - offset).double() * slope).exp() * d.double()
    a, c, p = a.double(), c.double(), p.log().double().exp()
    scale = a.abs() + c.abs()
    at_other = factor * (c - a) * 0.3  # an entry of probability 0.3 has e = 0.3 total
    got = out[0].double() * 0.3 * total
    assert ((got - at_other).abs() <= 2e-6 * at_other.abs() + 1e-12 * scale).all()
    at_label = factor * (a * (1 - p) + c * p)
    got = out[0].double() * out[1].double()
    assert ((got - at_label).abs() <= 2e-6 * (scale * abs(factor))).all()
    assert (out[0][scale == 0] == 0).all() and (out[1][scale == 0] == 0).all()


# what is exercised, objective, options of batches.make
CASES = [
    ("nll", po.NLL(), {}),
    ("composed", COMPOSED, {}),
    ("scale", COMPOSED, {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    ("temperature", COMPOSED, {"temperature": True, "seed": 1}),
    ("gated", po.PPOClip() + po.NLL().weighted_by("g"), {"extra": ("g",)}),
    ("power", po.PowerIS(alpha=0.5), {}),
]


@pytest.mark.parametrize("name, objective, options", CASES, ids=[c[0] for c in CASES])
def test_N1_public_path_against_fp64(name, objective, options, no_logits):
    """Chunks of 16 and 5 rows; ignored rows compacted; dweight summed over the chunks."""
    reads = objective.program(False).reads
    batch = batches.make(n=26, d=40, v=77, dtype=BF16, reads=reads, **options)
    got = compare(batch, objective, chunk=16, upstream=0.5)
    off = (batch["labels"] == -100) | (batch["weights"] == 0)
    assert off.any() and (got["dhidden"][off] == 0).all()


def test_N8_dweight_error_does_not_grow_with_the_number_of_chunks(no_logits):
    """One chunk and thirteen."""
    batch = batches.make(n=26, d=24, v=50, dtype=BF16, ignored=False)
    truth = oracle.run(batch, po.NLL(), torch.float64)["dweight"]
    errors = {}
    for rows in (26, 2):
        with po.chunk_rows(rows):
            got = batches.run(batch, po.NLL(), "triton")["dweight"]
        errors[rows] = max_and_rms(got.double() - truth)[1]
    assert errors[2] < 1.5 * errors[26]


def test_a_frozen_head_and_a_frozen_bias(no_logits):
    batch = batches.make(n=9, d=24, v=50, dtype=BF16, bias=True)
    truth, bar = (oracle.run(batch, po.NLL(), d) for d in (torch.float64, BF16))
    hidden = batch["hidden"].clone().requires_grad_()
    with po.use_backend("triton"):
        head = po.Head(batch["weight"], batch["bias"])
        po.linear_policy_loss(hidden, head, batches.tokens(batch), po.NLL()).loss.backward()
    check_gradient("dhidden", hidden.grad, truth["dhidden"], bar["dhidden"])


@pytest.mark.parametrize("value", [NAN, INF])
def test_N2_N3_bad_hidden_states_show_in_their_row_and_ignored_ones_nowhere(value, no_logits):
    batch = batches.make(n=10, d=16, v=40, dtype=BF16)
    off = (batch["labels"] == -100) | (batch["weights"] == 0)
    dirty = {**batch, "hidden": batch["hidden"].clone()}
    dirty["hidden"][off] = value
    clean = batches.run(batch, po.NLL(), "triton")
    got = batches.run(dirty, po.NLL(), "triton")
    for k in ("loss", "logps", "dhidden", "dweight"):
        same_bits(k, got[k], clean[k])
    dirty["hidden"][0, 3] = value
    got = batches.run(dirty, po.NLL(), "triton")
    assert got["loss"].isnan() and got["logps"][0].isnan() and got["dhidden"][0].isnan().all()
    assert got["dweight"].isnan().all()
    same_bits("others", got["dhidden"][1:], clean["dhidden"][1:])


@pytest.mark.parametrize("what", ["bias of -inf", "wide bias", "label", "weight"])
def test_N2_rows_that_do_not_count_have_exponentials_of_zero(what):
    """A captured graph multiplies them too: 0 times anything but inf and NaN."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 16, generator=g).to(BF16)
    weight = torch.randn(40, 16, generator=g).to(BF16)
    labels, weights, bias = torch.tensor([-100, 3, 5]), torch.ones(3), torch.zeros(40)
    if what == "weight":
        labels[0], weights[0] = 7, 0.0
    bias[0] = {"bias of -inf": -INF, "wide bias": -200.0}.get(what, 0.0)
    program = po.NLL().program(False)
    rows = Rows(labels, weights, codes=program.codes, hyper=program.hyper, bias=bias)
    factor, exps, _, flag = folded(hidden, weight, rows)
    assert factor[0] == 0 and (exps[0] == 0).all() and not flag.any()
    assert exps.isfinite().all() and (factor[1:] != 0).all() and (exps[1:] > 0).any()


def test_N6_a_bad_label_makes_its_row_nan_and_raises_later(no_logits):
    batch = batches.make(n=5, d=8, v=77, dtype=BF16, ignored=False)
    clean = batches.run(batch, po.NLL(), "triton")
    batch["labels"] = torch.where(torch.arange(5) == 2, 77, batch["labels"])
    got = batches.run(batch, po.NLL(), "triton")
    assert got["loss"].isnan() and got["dhidden"][2].isnan().all()
    same_bits("others", got["dhidden"][[0, 1, 3, 4]], clean["dhidden"][[0, 1, 3, 4]])
    with pytest.raises(IndexError, match="label 77 .row 2"):
        po.check()


def test_N9_a_row_has_the_same_bits_in_any_chunk(no_logits):
    batch = batches.make(n=20, d=24, v=77, dtype=BF16, ignored=False)
    whole = batches.run(batch, po.NLL(), "triton")
    with po.chunk_rows(7):
        parts = batches.run(batch, po.NLL(), "triton")
    for k in ("logps", "entropy", "lse"):
        same_bits(k, parts[k], whole[k])


def call(**changes):
    """A call that is served, with changes."""
    x, w = torch.zeros(2, 8, dtype=BF16), torch.zeros(5, 8, dtype=BF16)
    rows = Rows(torch.zeros(2, dtype=torch.int64), codes=po.NLL().program(False).codes)
    rows = dataclasses.replace(rows, **changes.pop("rows", {}))
    plan = PlanSettings(0, 0, changes.pop("deterministic", False))
    return LinearCall(**{
        "hidden": x, "weight": w, "rows": rows, "needs": Needs(hidden=True), "plan": plan,
        "logits_dtype": BF16, **changes,
    })  # fmt: skip


def codes(objective):
    return {"codes": objective.program(False).codes}


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": codes(po.Entropy() + po.NLL())},
        {"rows": codes(po.NLL(label_smoothing=0.1))},
        {"rows": codes(po.custom(lambda t: -t.logp))},
        {"rows": {"coefs": torch.ones(4, 2)}},
        {"rows": {"head": HeadScalars(softcap=3.0)}},
        {"needs": Needs(bias=True)},
        {"adapter_weight": torch.zeros(5, 2, dtype=BF16)},
        {"logits_dtype": torch.float32},
        {"weight": torch.zeros(5, 8), "hidden": torch.zeros(2, 8), "logits_dtype": torch.float32},
        {"deterministic": True},
        {"weight": torch.zeros(1, 8, dtype=BF16).expand(1 << 24, 8)},
    ],
    ids=["entropy", "smoothing", "custom", "coefs", "softcap", "bias", "adapter", "fp32 logits",
         "fp32", "deterministic", "2^24 entries"],
)  # fmt: skip
def test_what_is_not_served_takes_the_row_pass(changes):
    assert kernel.serves(call())
    assert not kernel.serves(call(**changes))


def test_an_entropy_term_is_right_with_the_epilogue_asked_for(monkeypatch):
    monkeypatch.setattr(triton_backend, "EPILOGUE", True)
    objective = po.NLL() - 0.1 * po.Entropy()
    batch = batches.make(n=9, d=16, v=50, dtype=BF16)
    truth, bar = (oracle.run(batch, objective, d) for d in (torch.float64, BF16))
    got = batches.run(batch, objective, "triton")
    for k in ("dhidden", "dweight"):
        check_gradient(k, got[k], truth[k], bar[k])

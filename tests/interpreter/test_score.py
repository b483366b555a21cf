"""Scoring without stored logits (`kernels/score_rows.py`) in the interpreter: every output against
fp64 and against the row pass, for ragged shapes, heads, dtypes, tiles and kinds of row.

With the identity as hidden states the product is exact, so the row pass on the transposed weight
must be met. Tiles are 16 x 16 x 16 and a span two tiles wide: a row of 201 logits has seven spans.
"""

import dataclasses
import math

import batches
import oracle
import pytest
import torch
from compare import check_forward, same_bits
from row_cases import outputs, random_rows

import pyoffline as po
from pyoffline import triton_backend
from pyoffline.calls import HeadScalars, Rows
from pyoffline.kernels import score_rows as kernel
from pyoffline.kernels.configs import (
    INTERPRETER_TILE,
    SCORE_TILES,
    multiplies_in_tf32,
    score_family,
)
from pyoffline.kernels.row_pass import row_pass
from pyoffline.plan import PlanSettings

NAN, INF = math.nan, math.inf
COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss()
SMOOTHED = po.NLL(label_smoothing=0.1, z_loss=1e-2) + po.WeightedNLL().weighted_by("g")


@pytest.fixture(autouse=True)
def no_logits(monkeypatch):
    """Storing logits is an error, and what is allocated holds NaN."""

    def fail(*_):
        raise AssertionError("logits are stored")

    empty = torch.empty

    def poisoned(*shape, **options):
        x = empty(*shape, **options)
        return x.fill_(NAN) if x.is_floating_point() else x

    monkeypatch.setattr(triton_backend.TritonKernels, "logits", fail)
    monkeypatch.setattr(torch, "empty", poisoned)


def scored(hidden, weight, rows, config=None):
    """Outputs of `score_rows` by name, and the flag."""
    out, flag = outputs(hidden.shape[0]), torch.zeros(2, dtype=torch.int64)
    kernel.score_rows(hidden, weight, rows, tuple(out.values()), flag, hidden.dtype, config)
    return out, flag


def both(logits, rows, config=None):
    """(score_rows on the identity and logits^T, row_pass on the logits)."""
    eye = torch.eye(logits.shape[0], dtype=logits.dtype)
    got, _ = scored(eye, logits.t().contiguous(), rows, config)
    want = outputs(logits.shape[0])
    row_pass(logits, None, rows, tuple(want.values()), torch.zeros(2, dtype=torch.int64))
    return got, want


def assert_same(got, want, atol=3e-6, rtol=3e-6):
    for name, x in want.items():
        torch.testing.assert_close(
            got[name], x, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def inputs(n, vocab, objective=SMOOTHED + COMPOSED, **options):
    """Rows with a program that reads everything."""
    return random_rows(n, vocab, objective, **options)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [
        *((vocab, torch.float32) for vocab in (1, 16, 17, 33)),
        (201, torch.bfloat16),
        (33, torch.float16),
    ],
    ids=str,
)
def test_every_output_equals_the_row_pass_at_every_border(vocab, dtype):
    """17 rows: a ragged tile of them, and of the hidden size."""
    logits = (3 * torch.randn(17, vocab, generator=torch.Generator().manual_seed(1))).to(dtype)
    assert_same(*both(logits, inputs(17, vocab, seed=vocab, objective=po.NLL())))


# what is exercised, head, per-row temperature, class weights
TRANSFORMS = [
    ("scale", HeadScalars(0.0, -1.5, 1.3), False, False),
    ("softcap", HeadScalars(3.0), False, False),
    ("temperature", HeadScalars(0.0, 0.7), True, True),
    ("everything", HeadScalars(5.0, -0.7), True, True),
]


@pytest.mark.parametrize("name, head, per_row, classes", TRANSFORMS, ids=[t[0] for t in TRANSFORMS])
def test_transforms_of_the_head_across_spans(name, head, per_row, classes):
    g = torch.Generator().manual_seed(2)
    options = {"head": head, "bias": torch.randn(77, generator=g)}
    if per_row:
        options["temperature"] = (torch.rand(9, generator=g) + 0.5) * torch.tensor([1, -1, 1] * 3)
    if classes:
        options["class_weight"] = torch.rand(77, generator=g)
        options["class_weight"][5:40] = 0.0
    assert_same(*both(torch.randn(9, 77, generator=g), inputs(9, 77, **options)))


TILES = [
    {"parts": 4},
    {"tma": True},
    {"block_n": 32, "block_v": 64, "block_d": 32, "span": 64, "parts": 2, "tma": True},
    {"group_n": 1, "span": 1024},
]


@pytest.mark.parametrize("changes", TILES, ids=str)
def test_descriptors_parts_and_spans_change_no_result(changes):
    """20 fp32 columns are no whole tile and rows of 80 bytes: what a descriptor takes and masks."""
    logits = torch.randn(20, 70, generator=torch.Generator().manual_seed(3))
    rows = inputs(20, 70, objective=po.NLL())
    config = dataclasses.replace(INTERPRETER_TILE, **changes)
    got, want = both(logits, rows, config)
    assert_same(got, want)
    if set(changes) == {"tma"}:
        for name, x in both(logits, rows)[0].items():
            same_bits(name, got[name], x)


HEADS = [
    ("plain", {}),
    ("softcap and bias", {"head": {"softcap": 3.0}, "bias": True}),
    ("scale", {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    ("temperature", {"temperature": True}),
]


@pytest.mark.parametrize("name, options", HEADS, ids=[h[0] for h in HEADS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=batches.dtype_name)
def test_N1_linear_token_logps_against_fp64(dtype, name, options):
    """Ragged V and D, ignored rows compacted, at the bar of the same-dtype PyTorch reference."""
    batch = batches.make(n=18, d=40, v=77, dtype=dtype, **options)
    batch["weights"] = torch.ones(18)
    truth = oracle.run(batch, po.NLL(), torch.float64)
    bar = oracle.run(batch, po.NLL(), dtype)
    with po.use_backend("triton"), torch.no_grad():
        head = po.Head(batch["weight"], batch["bias"], **batch["head"])
        got = po.linear_token_logps(batch["hidden"], head, batch["labels"], batch["temperature"])
    for k in ("logps", "entropy", "lse"):
        check_forward(k, getattr(got, k), truth[k], bar[k])
    ignored = batch["labels"] == -100
    assert ignored.any() and (got.logps[ignored] == 0).all()


@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float32])
def test_N15_logits_are_rounded_once_to_their_dtype(logits_dtype):
    """Multiples of 1/16: their products and sums are exact in fp32, but no bf16 numbers."""
    g = torch.Generator().manual_seed(7)
    x, w = (torch.randint(-32, 33, (n, 16), generator=g).bfloat16() / 16 for n in (6, 50))
    exact = x.float() @ w.float().t()
    assert (exact.bfloat16() != exact).any()
    want = exact.to(logits_dtype).double().log_softmax(-1)[:, 3]
    with po.use_backend("triton"), torch.no_grad():
        head = po.Head(w, logits_dtype=logits_dtype)
        got = po.linear_token_logps(x, head, torch.full((6,), 3)).logps
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("objective", [COMPOSED, SMOOTHED], ids=["composed", "smoothed"])
def test_losses_without_gradient_against_the_reference(objective):
    reads = objective.program(False).reads
    batch = batches.make(n=21, d=16, v=77, reads=reads, extra=objective.program(False).gates)
    results = []
    for backend in ("triton", "reference"):
        with po.use_backend(backend), torch.no_grad():
            head, given = po.Head(batch["weight"]), batches.tokens(batch)
            results.append(po.linear_policy_loss(batch["hidden"], head, given, objective))
    torch.testing.assert_close(results[0].loss, results[1].loss)
    for a, b in zip(results[0].stats, results[1].stats, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6)


def test_a_custom_objective_is_evaluated_without_logits_too():
    batch = batches.make(n=20, d=16, v=77, reads=("adv", "mu"))
    fn = po.custom(lambda t: -t.adv * torch.exp(0.5 * (t.logp - t.mu)) + 0.1 * t.entropy)
    losses = []
    for backend in ("triton", "reference"):
        with po.use_backend(backend), torch.no_grad():
            head, given = po.Head(batch["weight"]), batches.tokens(batch)
            losses.append(po.linear_policy_loss(batch["hidden"], head, given, fn).loss)
    torch.testing.assert_close(*losses)


def test_N1_the_maximum_in_any_tile_a_confident_row_and_a_large_offset():
    vocab = 96
    g = torch.Generator().manual_seed(4)
    logits = torch.randn(10, vocab, generator=g)
    for row in range(7):  # at the first and the last entry of a tile and of a span
        logits[row, (0, 15, 16, 31, 32, 63, 95)[row]] = 30.0
    logits[7] += 1e6
    logits[8, :32] -= 2000.0  # a span that adds nothing
    logits[9] = 0.0  # ties in every span
    rows = Rows(labels=torch.tensor([0, 3, 16, 5, 32, 64, 95, 7, 40, 33]))
    got, want = both(logits, rows)
    truth = logits.double().log_softmax(-1)
    logp = truth.gather(-1, rows.labels[:, None])[:, 0]
    bound = 8 * torch.finfo(torch.float32).eps * (1 + logp.abs())
    assert ((got["logps"].double() - logp).abs() <= bound).all()
    entropy = -(truth.exp() * truth).sum(-1)
    torch.testing.assert_close(got["entropy"].double(), entropy, atol=1e-5, rtol=1e-5)
    assert (got["logps"] <= 0).all() and got["is_top1"][9] == 1
    rest = (logits[0, 1:].double() - 30.0).exp().sum().log1p()  # 1 - p_y keeps its digits
    assert abs(got["logps"][0].double() + rest) <= 1e-6 * rest
    assert_same(got, want)


@pytest.mark.parametrize("nan_at", [None, 3, 40])
def test_N3_masked_vocabulary_and_rows_without_a_finite_entry(nan_at):
    """A span of -inf, a tile of -inf, -inf at the label; then nothing finite, or NaN beside it."""
    g = torch.Generator().manual_seed(5)
    logits = torch.randn(4, 96, generator=g)
    bias = torch.zeros(96)
    bias[:32], bias[48:64], bias[65::2] = -INF, -INF, -INF
    got, want = both(logits, inputs(4, 96, bias=bias, objective=po.NLL()))
    assert_same(got, want)
    masked = Rows(labels=torch.tensor([0, 33, 50, 64]), bias=bias)
    got, want = both(logits, masked)
    assert got["logps"][0] == got["logps"][2] == -INF
    assert got["logps"][[1, 3]].isfinite().all() and got["entropy"].isfinite().all()
    assert_same(got, want)
    bias = torch.full((96,), -INF)
    if nan_at is not None:
        bias[nan_at], bias[5] = NAN, 0.0
    got, want = both(logits, dataclasses.replace(masked, bias=bias))
    assert got["logps"].isnan().all() and got["lse"].isnan().all()
    assert_same(got, want)


@pytest.mark.parametrize("value", [NAN, INF])
def test_N2_N3_bad_hidden_states_show_in_their_row_alone(value):
    batch = batches.make(n=18, d=24, v=50, ignored=False)
    rows = Rows(labels=batch["labels"])
    clean, _ = scored(batch["hidden"], batch["weight"], rows)
    dirty = batch["hidden"].clone()
    dirty[17, 3] = value
    got, _ = scored(dirty, batch["weight"], rows)
    others = torch.arange(18) != 17
    for name, x in clean.items():
        same_bits(name, got[name][..., others], x[..., others])
    assert got["logps"][17].isnan() and got["entropy"][17].isnan()
    ignored = dataclasses.replace(rows, labels=torch.where(others, rows.labels, -100))
    got, _ = scored(dirty, batch["weight"], ignored)
    assert all((x[..., 17] == 0).all() for x in got.values())


@pytest.mark.parametrize("label", [77, -(2**40)])
def test_N6_a_bad_label_is_no_address_makes_its_row_nan_and_sets_the_flag(label):
    batch = batches.make(n=5, d=8, v=77, ignored=False)
    rows = Rows(labels=batch["labels"])
    clean, flag = scored(batch["hidden"], batch["weight"], rows)
    assert flag[0] == 0
    bad = torch.where(torch.arange(5) == 3, label, batch["labels"])
    got, flag = scored(batch["hidden"], batch["weight"], Rows(labels=bad))
    for name in ("logps", "entropy", "lse", "log_sum_p2", "gap"):
        assert got[name][3].isnan(), name
        same_bits(name, got[name][[0, 1, 2, 4]], clean[name][[0, 1, 2, 4]])
    shown = max(min(label, 2**31 - 1), -(2**31))
    assert flag[0] == 1 and (int(flag[1]) >> 32, int(flag[1]) & 0xFFFFFFFF) == (shown, 3)


def test_N6_a_bad_label_raises_at_check():
    batch = batches.make(n=5, d=8, v=77, ignored=False)
    batch["labels"][2] = 77
    with po.use_backend("triton"), torch.no_grad():
        got = po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"])
    assert got.logps[2].isnan() and got.logps[[0, 1, 3, 4]].isfinite().all()
    with pytest.raises(IndexError, match="label 77 .row 2"):
        po.check()
    po.check()


def test_N9_a_row_has_the_same_bits_in_any_batch_place_and_block():
    batch = batches.make(n=20, d=24, v=77, dtype=torch.bfloat16, ignored=False)
    x, labels, head = batch["hidden"], batch["labels"], po.Head(batch["weight"])
    with po.use_backend("triton"), torch.no_grad():
        whole = po.linear_token_logps(x, head, labels)
        part = po.linear_token_logps(x[11:17], head, labels[11:17])
        with po.chunk_rows(9):
            blocks = po.linear_token_logps(x, head, labels)
    for a, b, c, name in zip(whole, part, blocks, whole._fields, strict=True):
        same_bits(name, a[11:17], b)
        same_bits(name, a, c)


@pytest.mark.parametrize("big", ["weight", "hidden"])
def test_N13_rows_beyond_two_to_the_31_elements(big, tmp_path):
    """Rows 2^27 elements apart in a sparse file: 20 of them are 2^31 + 2^29."""
    g = torch.Generator().manual_seed(6)
    small = {k: torch.randn(20, 16, generator=g).bfloat16() for k in ("hidden", "weight")}
    path, step = tmp_path / "sparse", 1 << 27
    far = torch.from_file(str(path), True, 20 * step, dtype=torch.bfloat16).view(20, step)[:, :16]
    far.copy_(small[big])
    rows = Rows(labels=torch.randint(0, 20, (20,), generator=g))
    want, _ = scored(small["hidden"], small["weight"], rows)
    for tma in (False, True):
        config = dataclasses.replace(INTERPRETER_TILE, tma=tma)
        given = small | {big: far}
        got, _ = scored(given["hidden"], given["weight"], rows, config)
        same_bits("logps", got["logps"], want["logps"])
    assert path.stat().st_blocks * 512 < 64 << 20, "the file is no longer sparse"


def test_what_has_no_scoring_kernel_stores_logits(monkeypatch):
    """Deterministic mode has the bits of the training pass (N15), an adapter its second product."""
    batch = batches.make(n=9, d=16, v=50, dtype=torch.bfloat16, ignored=False)
    with po.use_backend("triton"), po.deterministic(), torch.no_grad():
        with pytest.raises(AssertionError, match="logits are stored"):
            po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"])
        monkeypatch.undo()
        got = po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"])
    x = batch["hidden"].clone().requires_grad_()
    with po.use_backend("triton"), po.deterministic():
        tokens = po.TokenBatch(batch["labels"])
        trained = po.linear_policy_loss(x, po.Head(batch["weight"]), tokens, po.NLL())
    same_bits("logps", got.logps, trained.stats.logps)


@pytest.mark.parametrize(
    ("settings", "count", "rows"),
    [
        (PlanSettings(0, 0, False), 4096, 4096),
        (PlanSettings(0, 0, False), 8193, 4112),  # evenly cut, in units of 16
        (PlanSettings(100, 0, False), 4096, 100),
        (PlanSettings(0, 1 << 20, False), 4096, 208),  # 149 spans of 32 bytes: 219 rows fit
        (PlanSettings(0, 1, False), 4096, 16),
    ],
)
def test_rows_of_a_launch_follow_the_overrides(settings, count, rows):
    assert triton_backend.score_block(settings, count, 151_936) == rows


def test_tf32_is_read_however_it_was_set():
    """torch refuses to say `allow_tf32` once `fp32_precision` was set."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for value in (True, False):
            flags.allow_tf32 = value
            assert multiplies_in_tf32() == value
        if hasattr(flags, "fp32_precision"):
            for name in ("tf32", "ieee"):
                flags.fp32_precision = name
                assert multiplies_in_tf32() == (name == "tf32")
    finally:
        flags.allow_tf32 = before


def test_every_chip_and_dtype_has_a_tile():
    """Descriptors want rows at multiples of 16 bytes; a span is cut into whole tiles."""
    for major in (8, 9, 10, 12, None):
        for itemsize in (2, 4):
            for unit in (1, 4, 8, 16):
                for plain in (True, False):
                    tile = SCORE_TILES[score_family(major, itemsize, unit), itemsize, plain]
                    assert not tile.tma or (major >= 9 and unit * itemsize >= 16)
                    assert tile.span % tile.block_v == 0 == tile.block_v % tile.parts

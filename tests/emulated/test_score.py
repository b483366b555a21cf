"""Scoring and the GEMM epilogue (`kernels/score_rows.py`, `kernels/epilogue_rows.py`) as they are
compiled for a GPU, with the library's own tiles, on the emulator.

Hidden states and weights are multiples of 1/8: products and their sums are exact in fp32 in any
order, so logits are known to the bit and every output is compared with `_C.row_pass` on them. The
emulator itself finds races, reads of what nobody wrote, and accesses outside the tensors.
"""

import dataclasses
import importlib.util
import math
import os
from pathlib import Path

import pytest
import torch
from compare import same_bits
from emulator import tiles
from emulator.triton_driver import LAUNCHES
from row_cases import outputs, random_rows, swept

import pyoffline as po
from pyoffline.calls import HeadScalars, Rows
from pyoffline.gpu_rows import float32_rows
from pyoffline.kernels import epilogue_rows as epilogue
from pyoffline.kernels import score_rows as kernel
from pyoffline.kernels.configs import (
    TF32_TILES,
    tf32_family,
)

CHIP = int(os.environ["PYOFFLINE_EMULATE"])
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NAN, INF = math.nan, math.inf
COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") + 1e-3 * po.ZLoss()
SMOOTHED = COMPOSED - 0.01 * po.Entropy() + po.NLL(label_smoothing=0.1)
GATED = SMOOTHED + po.WeightedNLL().weighted_by("g")
PADDING = 7.0
# PTX for a logit where D is one tile of it, moves not counted; on sm_80 a thread has more rows, and
# its products and copies are instructions of many threads.
MOST_INSTRUCTIONS = {80: 21.0, 90: 16.0}


@pytest.fixture(autouse=True)
def library_tiles(monkeypatch):
    """Those that the library takes on this chip; what is allocated holds NaN, or -1."""
    tiles.put(CHIP, kernel, monkeypatch.setattr)
    empty = torch.empty

    def poisoned(*shape, **options):
        x = empty(*shape, **options)
        return x.fill_(NAN if x.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


def factors(n, vocab, dim, dtype, seed=0):
    """(hidden, weight, their logits)."""
    g = torch.Generator().manual_seed(seed)
    x, w = (torch.randint(-8, 9, (m, dim), generator=g).to(dtype) / 8 for m in (n, vocab))
    return x, w, (x.float() @ w.float().t()).to(dtype)


def rows_of(n, vocab, objective, options, seed=0):
    """Random rows, with per-row options made here."""
    g, made = torch.Generator().manual_seed(seed), dict(options)
    if options.get("bias"):
        made["bias"] = torch.randn(vocab, generator=g)
    if options.get("temperature"):
        made["temperature"] = torch.rand(n, generator=g) + 0.5
        made["temperature"][::3] *= -1
    if options.get("class_weight"):
        made["class_weight"] = torch.rand(vocab, generator=g)
        made["class_weight"][5:40] = 0.0
    return float32_rows(random_rows(n, vocab, objective, seed, **made))


def scored(hidden, weight, rows, config=None, **changes):
    """Outputs of `score_rows` by name, and the flag."""
    out, flag = outputs(hidden.shape[0], **changes), torch.zeros(2, dtype=torch.int64)
    kernel.score_rows(hidden, weight, rows, tuple(out.values()), flag, hidden.dtype, config)
    return out, flag


def assert_same(got, want, rows):
    """Statistics and objectives differ by roundings of fp32 and the chip's exponential."""
    for name, x in want.items():
        if got[name] is None or (not rows.codes and name in ("loss", "coefs")):
            continue
        torch.testing.assert_close(
            got[name], x, atol=5e-6, rtol=5e-6, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_what_a_logit_costs(dtype):
    """A second span of V, without labels: one exponential, half a conversion to the logits' dtype,
    and threads join once a span.
    """
    seen = []
    for vocab in (1024, 2048):
        x, w, _ = factors(128, vocab, 64, dtype)
        scored(x, w, rows_of(128, 1024, po.NLL(), {}), gap=None)
        seen.append(
            [launch for launch in LAUNCHES if launch.name.startswith("score_tiles")][-1].counts
        )
    few, many = (counts.by_opcode for counts in seen)
    per_logit = {k: (many[k] - few[k]) / (128 * 1024) for k in many if not k.startswith("mov.")}
    assert sum(per_logit.values()) < MOST_INSTRUCTIONS[CHIP]
    assert per_logit["ex2.approx.ftz.f32"] < 1.2
    assert sum(n for k, n in per_logit.items() if k.startswith("cvt.rn.")) == 0.5
    assert per_logit["shfl.sync.bfly.b32"] < (0.3 if CHIP == 80 else 0.1)


def executed(name, count):
    """Opcodes of the last launches of a kernel."""
    found = [x for x in LAUNCHES if x.name.startswith(name)][-count:]
    return {opcode for x in found for opcode in x.counts.by_opcode}


# What multiplies 16-bit rows that start at 16 bytes, and how tiles come.
INSTRUCTIONS = {80: ("mma.sync", "cp.async.cg"), 90: ("wgmma.mma_async", "cp.async.bulk.tensor")}
ALL = {"bias": True, "temperature": True, "class_weight": True, "head": HeadScalars(5.0, -0.7)}
SCALED = {"head": HeadScalars(0.0, -1.5, 1.3)}
# why: dtype, n, vocab, dim, objective, options; 130 and 70 rows have a second tile of rows, 1,100
# entries a second span
CASES = {
    "tails of rows, V and D": (BF16, 130, 1100, 136, COMPOSED, {}),
    "D of whole tiles": (FP16, 70, 300, 128, COMPOSED, {}),
    "all options of the head": (BF16, 70, 200, 136, GATED, ALL),
    "unaligned": (BF16, 70, 300, 77, COMPOSED, {}),
    "rows of 140 bytes": (BF16, 70, 140, 70, COMPOSED, {}),
    "fp32": (FP32, 70, 1030, 68, COMPOSED, {}),
    "fp32, unaligned, a negative scale": (FP32, 70, 140, 65, SMOOTHED, SCALED),
}


@pytest.mark.parametrize("case", CASES)
def test_every_output_equals_the_row_pass_on_the_logits(case):
    dtype, n, vocab, dim, objective, options = CASES[case]
    x, w, logits = factors(n, vocab, dim, dtype)
    rows = rows_of(n, vocab, objective, options)
    plain = {} if objective is GATED else {"gap": None}
    got, flag = scored(x, w, rows, **plain)
    assert_same(got, swept(logits, rows), rows)
    assert not flag.any()
    if dtype.itemsize == 2 and dim % 8 == 0:
        opcodes = executed("score_tiles", 1)
        assert all(any(o.startswith(i) for o in opcodes) for i in INSTRUCTIONS[CHIP])
    if case in ("all options of the head", "fp32"):  # N9: the same bits elsewhere
        part, _ = scored(x[n - 9 :].clone(), w, rows.map(lambda t: t[n - 9 :]), **plain)
        for name, value in part.items():
            if value is not None:
                same_bits(name, value, got[name][..., n - 9 :])


def in_tf32():
    """(scored, swept, rows) of fp32 rows; the bits that TF32 drops do not reach the logits."""
    x, w, logits = factors(70, 300, 68, FP32)
    rows = rows_of(70, 300, COMPOSED, {})
    config = TF32_TILES[tf32_family(CHIP // 10, 4)]
    got, _ = scored(x * (1 + 2.0**-12), w * (1 + 2.0**-13), rows, config, gap=None)
    return got, swept(logits, rows), rows


def test_fp32_rows_multiplied_in_tf32():
    assert_same(*in_tf32())
    assert any("tf32" in opcode for opcode in executed("score_tiles", 1))


def test_N3_masked_vocabulary_and_N6_labels_out_of_range():
    """Entries of -inf, at the label too; nothing finite; NaN; labels that are no address."""
    x, w, logits = factors(6, 300, 68, FP32)
    bias = torch.zeros(300)
    bias[:128], bias[140:170], bias[201::2] = -INF, -INF, -INF
    rows = Rows(labels=torch.tensor([0, 133, 150, 200, 299, -100]), bias=bias)
    got, flag = scored(x, w, rows, gap=None)
    assert_same(got, swept(logits, rows), rows)
    assert got["logps"][[0, 2, 4]].eq(-INF).all() and got["logps"][[1, 3]].isfinite().all()
    assert got["logps"][5] == 0 and not flag.any()

    for label in (300, -(2**40)):
        bad = dataclasses.replace(rows, labels=rows.labels.clone())
        bad.labels[3] = label
        found, flag = scored(x, w, bad, gap=None)
        shown = max(min(label, 2**31 - 1), -(2**31))
        assert flag[0] == 1 and (int(flag[1]) >> 32, int(flag[1]) & 0xFFFFFFFF) == (shown, 3)
        for name in ("logps", "entropy", "lse", "log_sum_p2"):
            assert found[name][3].isnan(), name
            others = [0, 1, 2, 4, 5]
            same_bits(name, found[name][others], got[name][others])

    nothing = dataclasses.replace(rows, bias=torch.full((300,), -INF))
    nan = dataclasses.replace(rows, bias=bias.clone())
    nan.bias[290] = NAN
    for given in (nothing, nan):
        got, _ = scored(x, w, given, gap=None)
        assert got["logps"][:5].isnan().all() and got["lse"][:5].isnan().all()
        assert_same(got, swept(logits, given), given)


def folded(hidden, weight, rows):
    """(F * exps, outputs by name) of the epilogue; exps in a buffer whose padding holds 7."""
    n, vocab = hidden.shape[0], weight.shape[0]
    width = -(-vocab // kernel.STORE_UNIT.value) * kernel.STORE_UNIT.value
    buffer = torch.full((n, width + 16), PADDING, dtype=BF16)
    out, flag = outputs(n, gap=None), torch.zeros(2, dtype=torch.int64)
    exps = buffer[:, :vocab]
    factor = epilogue.epilogue_rows(hidden, weight, rows, tuple(out.values()), flag, exps)
    assert (buffer[:, width:] == PADDING).all(), "written past the row's padding"
    assert buffer[:, :width].isfinite().all() and not flag.any()
    return factor[:, None] * exps.float(), out


# why: n, vocab, dim, objective, options. At a fifth of the temperature most labels lie more than 40
# nats below their row's maximum.
EPILOGUES = {
    "no row is late": (130, 300, 136, COMPOSED, {}),
    "late rows in some tiles": (130, 300, 136, po.NLL(), {"head": HeadScalars(0.0, 1.0, 0.2)}),
    "unaligned, temperatures": (70, 300, 77, COMPOSED, {"temperature": True}),
}


@pytest.mark.parametrize("case", EPILOGUES)
def test_the_epilogue_leaves_the_gradient_as_factors_and_exponentials(case):
    n, vocab, dim, objective, options = EPILOGUES[case]
    x, w, logits = factors(n, vocab, dim, BF16)
    rows = rows_of(n, vocab, objective, options)
    if "late rows" in case:  # none in the last tile, whose rows are two
        rows.labels[128:] = logits[128:].float().argmax(-1)
    got, out = folded(x, w, rows)
    dlogits = torch.full((n, vocab), NAN)
    want = swept(logits.float(), rows, dlogits)
    assert_same(out, want, rows)
    # one bf16 rounding of each entry, and a little for F
    allowed = (2.0**-8 + 1e-5) * dlogits.abs() + 1e-30
    assert ((got - dlogits).abs() <= allowed).all(), (got - dlogits).abs().max()
    counted = (rows.labels != -100) & (rows.weights != 0)
    assert (got[~counted] == 0).all() and (~counted).any()
    again = LAUNCHES[-1]
    assert again.name.startswith("score_tiles")
    if "no row" in case:
        assert again.counts.global_stored == 0
    elif "late rows" in case:
        assert (out["logps"] < -40).any() and (out["logps"][counted] > -40).any()
        assert 0 < again.counts.global_stored <= 128 * -(-vocab // 16) * 16 * 2


def test_the_tiles_that_a_gpu_would_time_are_right(monkeypatch):
    """bench/gpu_score_tiles.py, but for its clock."""
    path = Path(__file__).parents[2] / "bench/gpu_score_tiles.py"
    spec = importlib.util.spec_from_file_location("gpu_score_tiles", path)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    monkeypatch.setattr(bench, "score_config", kernel.score_config)
    monkeypatch.setattr(bench, "by_events", lambda run: [run(), 1.0][1])
    found = bench.measure((130, 64, 1100), "cpu", 1)
    library = kernel.score_config(torch.empty(1, dtype=BF16), 8)
    assert [r["name"] for r in found] == list(bench.candidates(library))
    assert all(r["of_gemm"] == 1.0 for r in found)

"""linear_distill_loss and the house's promises on numbers: what does not count is invisible, what
is broken is visible, masked vocabulary, chunks and threads (PROMISES N2, N3, N6 to N9, N11, M2).
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import batches
import compare
import distill_cases as cases
import pytest
import torch
from batches import BACKENDS, DTYPES, dtype_name
from distill_cases import EACH, name_of

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = math.nan, math.inf
TEACHERS = ("head", "logits", "top-k")
MIXED = po.JSD(0.4) + 0.2 * po.ReverseKL() + 0.3 * po.NLL().weighted_by("g")
TEACHER_ROWS = {"head": ("t_hidden",), "logits": ("t_logits",), "top-k": ("t_logps", "ids")}
OUTPUTS = ("loss", "dhidden", "dweight", "logps", "entropy", "lse", "log_sum_p2", "is_top1")


def batch_of(teacher, dtype=torch.float32, **options):
    batch = cases.make(37, dtype=dtype, teacher=teacher, **options)
    g = torch.Generator().manual_seed(9)
    batch["extra"] = {"g": torch.rand(37, generator=g)}
    batch["temperature"] = torch.rand(37, generator=g) + 0.5
    return batch


def poisoned(batch, rows, name, value):
    source = batch["extra"] if name == "g" else batch
    changed = source[name].clone()
    changed[rows] = torch.tensor(value).to(changed.dtype)  # torch 2.6: no number 1e30 in fp16
    new = {**source, name: changed}
    return {**batch, "extra": new} if name == "g" else new


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_N2_what_does_not_count_is_bitwise_invisible(backend, teacher, dtype):
    batch = batch_of(teacher, dtype)
    out = (batch["labels"] == -100) | (batch["weights"] == 0)
    clean = cases.run(batch, MIXED, backend)
    assert out.sum() >= 6 and (clean["dhidden"][out] == 0).all()
    names = ("hidden", "temperature", "g", *TEACHER_ROWS[teacher])
    for value in (NAN, -INF, 1e30):
        everything = batch
        for name in names:
            everything = poisoned(everything, out, name, -7 if name == "ids" else value)
        got = cases.run(everything, MIXED, backend)
        for name in OUTPUTS:
            compare.same_bits(name, got[name], clean[name])
        for name, x in got["metrics"].items():
            compare.same_bits(name, x, clean["metrics"][name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", EACH, ids=name_of)
def test_N2_a_factor_of_0_switches_a_divergence_off(backend, divergence):
    """By scale and by gate, whatever it holds: the rest is as if it were not there."""
    batch = batch_of("logits")
    batch["t_logits"][12, 3] = INF
    batch["extra"]["h"] = torch.ones(37)
    batch["extra"]["h"][12] = 0.0
    only = {**batch, "extra": {}}
    want = cases.run(only, divergence * 0.0 + po.NLL(), backend)
    assert want["loss"].isfinite() and want["dhidden"].isfinite().all()
    del batch["extra"]["g"]
    got = cases.run(batch, divergence.weighted_by("h") + po.NLL(), backend)
    assert got["loss"].isfinite() and got["dhidden"].isfinite().all()
    compare.same_bits("dhidden", got["dhidden"][12], want["dhidden"][12])
    assert not got["metrics"][divergence.parts()[0][0].row].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", EACH, ids=name_of)
@pytest.mark.parametrize("value", [NAN, INF])
def test_N3_a_broken_row_is_seen_and_harms_no_other(backend, divergence, value):
    row, others = 12, torch.arange(37) != 12
    for teacher in TEACHERS:
        batch = batch_of(teacher)
        batch["extra"] = {}
        clean = cases.run(batch, divergence, backend)
        names = ("hidden", TEACHER_ROWS[teacher][0]) if value != INF or teacher != "top-k" else ()
        for name in names:
            got = cases.run(poisoned(batch, row, name, value), divergence, backend)
            assert not got["loss"].isfinite(), (teacher, name)
            assert not got["dhidden"][row].isfinite().all(), (teacher, name)
            assert not got["dweight"].isfinite().all()
            assert not got["metrics"]["divergence"].isfinite()
            for field in ("dhidden", "logps", "entropy"):
                compare.same_bits(field, got[field][others], clean[field][others])


# V = 67: whole vectors of 8 and 16, the start of the tail and its end.
POSITIONS = (0, 7, 8, 15, 16, 63, 64, 66)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", EACH, ids=name_of)
def test_N3_a_broken_logit_is_seen_wherever_it_stands(backend, divergence):
    for position in POSITIONS:
        batch = cases.make(9, v=67, teacher="logits", ignored=False)
        batch["t_logits"][4, position] = NAN
        got = cases.run(batch, divergence, backend)
        assert got["loss"].isnan() and got["dhidden"][4].isnan().any(), position
        assert got["dhidden"][torch.arange(9) != 4].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", [*EACH, MIXED], ids=name_of)
def test_masked_vocabulary_is_probability_0_on_either_side(backend, divergence):
    """-inf on both sides takes part in nothing; on one side it is finite or +inf by definition."""
    g = torch.Generator().manual_seed(1)
    v = 50
    s = torch.randn(4, v, generator=g)
    t = torch.randn(4, v, generator=g)
    both = torch.zeros(4, v, dtype=torch.bool)
    both[:, 5:9] = True
    batch = {"labels": torch.tensor([1, 2, 3, 4]), "weights": torch.ones(4), "bias": None}
    batch |= {"head": {}, "t_head": {}, "temperature": None, "teacher": "logits"}
    batch |= {"extra": {"g": torch.ones(4)} if divergence is MIXED else {}, "weight": torch.eye(v)}

    def run(s, t):
        # logits = bias: a masked entry is a -inf of the head's bias
        x = {**batch, "hidden": torch.zeros(4, v), "bias": s[0], "t_logits": t}
        got = cases.run(x, divergence, backend)
        return got["loss"], got["dbias"]

    rows = s[:1].expand(4, v)
    masked, cut = (x.masked_fill(both, -INF) for x in (rows, t))
    loss, dbias = run(masked, cut)
    keep = ~both[0]
    small = {**batch, "weight": torch.eye(v - 4), "hidden": torch.zeros(4, v - 4)}
    small |= {"bias": rows[0, keep], "t_logits": t[:, keep]}
    want = cases.run(small, divergence, backend)
    torch.testing.assert_close(loss, want["loss"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dbias[keep], want["dbias"], rtol=1e-4, atol=1e-6)
    assert (dbias[~keep] == 0).all()
    alpha = getattr(divergence, "alpha", 0.5)
    by_student = isinstance(divergence, po.ForwardKL) or alpha > 1
    by_teacher = isinstance(divergence, po.ReverseKL) or divergence is MIXED or alpha < 0
    for infinite, pair in ((by_student, (masked, t)), (by_teacher, (rows, cut))):
        loss, dbias = run(*pair)
        assert (loss == INF) if infinite else loss.isfinite(), (divergence, infinite)
        if not infinite:
            assert dbias.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_extreme_logits_give_the_true_value_or_a_visible_inf(backend, teacher):
    """Gaps of 20 to 1e30 nats between student and teacher, never a NaN; fp64 is the truth."""
    for gap in (20.0, 88.0, 100.0, 700.0):
        for d in (*EACH, po.RenyiDivergence(0.999)):
            z = torch.zeros(2, 6)
            z[:, 0] = torch.tensor([gap, -gap])
            t = torch.zeros(2, 6)
            t[:, 1] = gap
            batch = {"hidden": z, "weight": torch.eye(6), "bias": None, "head": {}, "t_head": {}}
            batch |= {"labels": torch.zeros(2).long(), "weights": torch.ones(2), "extra": {}}
            batch |= {"temperature": None, "teacher": teacher, "t_hidden": t}
            batch |= {"t_weight": torch.eye(6), "t_logits": t}
            batch["t_logps"], batch["ids"] = t.log_softmax(-1).topk(2)
            got = cases.run(batch, d, backend)
            assert not got["loss"].isnan(), (gap, d)
            want = cases.truth(batch, d, torch.float64)["loss"]
            if teacher == "top-k" and not isinstance(d, po.ForwardKL | po.TVD | po.JSD):
                continue  # the cached tail is 0 from 20 nats on in fp32
            if want.abs() < 1e37 and got["loss"] != INF:
                torch.testing.assert_close(got["loss"].double(), want, rtol=1e-4, atol=1e-6)
            elif got["loss"] == INF:
                assert want > 1e37 or gap >= 88.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_N6_labels_and_ids_out_of_range_name_row_and_value(backend):
    batch = batch_of("top-k")
    bad = poisoned(batch, 12, "labels", 301)
    with pytest.raises(IndexError, match="row 12.*301"):
        cases.run(bad, MIXED, backend)
    for value in (-1, 301, 2**40):
        ids = batch["ids"].clone()
        ids[12, 3] = value
        with pytest.raises(IndexError, match=f"row 12 holds {value}"):
            cases.run({**batch, "ids": ids}, MIXED, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_N7_inputs_are_never_written_and_views_are_read_right(backend, teacher):
    batch = batch_of(teacher)
    want = cases.run(batch, MIXED, backend)
    strided = dict(batch)
    for name in ("hidden", "t_hidden", "t_weight", "t_logits", "t_logps", "ids"):
        if batch.get(name) is not None:
            x = batch[name]
            wide = torch.stack([x, torch.zeros_like(x)], -1)
            strided[name] = wide[..., 0]
            assert not strided[name].is_contiguous()
    kept = {k: v.clone() for k, v in strided.items() if isinstance(v, torch.Tensor)}
    got = cases.run(strided, MIXED, backend)
    for name in OUTPUTS:
        compare.same_bits(name, got[name], want[name])
    for name, x in kept.items():
        assert torch.equal(strided[name], x), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_name)
def test_N8_dweight_error_does_not_grow_with_the_number_of_chunks(backend, dtype):
    batch = cases.make(256, 8, 16, dtype, ignored=False)
    truth = cases.truth(batch, po.JSD(0.5), torch.float64)["dweight"]
    errors = {}
    for chunks in (1, 4, 256):
        with po.chunk_rows(256 // chunks):
            got = cases.run(batch, po.JSD(0.5), backend)["dweight"]
        floor = compare.EPS32 * compare.max_and_rms(truth)[1]
        errors[chunks] = compare.max_and_rms(got.double() - truth)[1] + floor
    assert all(e < 1.5 * errors[1] for e in errors.values()), errors


@pytest.mark.parametrize("teacher", TEACHERS)
def test_N9_same_bits_whatever_the_threads_and_in_deterministic_mode(teacher):
    """Two threads for the row pass on logits of one GEMM each; deterministic: any batch."""
    batch = cases.make(64, 16, 2048, teacher=teacher)
    batch["extra"] = {}
    d = po.JSD(0.5) + po.NLL()
    results = []
    for threads in (1, 2):
        with batches.threads(threads):
            results.append(cases.run(batch, d, "cpu"))
            results.append(cases.run(batch, d, "cpu"))
    for name in ("loss", "dhidden", "logps"):
        compare.same_bits(name, results[0][name], results[1][name])
        compare.same_bits(name, results[2][name], results[3][name])
    with po.deterministic(), po.chunk_rows(16):
        whole = cases.run(batch, d, "cpu")
        half = {
            k: v[:23] if isinstance(v, torch.Tensor) and v.dim() and v.shape[0] == 64 else v
            for k, v in batch.items()
        }
        part = cases.run(half, d, "cpu")
    compare.same_bits("logps", part["logps"], whole["logps"][:23])
    compare.same_bits("dhidden", part["dhidden"], whole["dhidden"][:23])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_N11_micro_batches_add_up_and_nothing_counted_is_zero(backend, teacher):
    dtype = torch.float64 if backend == "reference" else torch.float32
    batch = cases.make(40, dtype=dtype, teacher=teacher)
    batch["weights"] = batch["weights"].to(dtype)
    whole = cases.run(batch, po.JSD(0.3), backend)
    parts = []
    for cut in (slice(0, 11), slice(11, 40)):
        piece = {
            k: v[cut] if isinstance(v, torch.Tensor) and v.shape[0] == 40 else v
            for k, v in batch.items()
        }
        parts.append(cases.run(piece, po.JSD(0.3), backend))
    tol = 1e-12 if dtype == torch.float64 else 2e-6
    for name in ("loss", "dweight"):
        total = parts[0][name] + parts[1][name]
        assert (total - whole[name]).abs().max() <= tol * whole[name].abs().max()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    none = cases.run(batch, po.JSD(0.3) + po.NLL(), backend)
    assert none["loss"] == 0 and not none["dhidden"].any() and not none["dweight"].any()
    assert all(x == 0 for x in none["metrics"].values())


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_M4_every_instruction_set_gives_the_same_numbers(isa, teacher):
    from pyoffline import _C

    if isa not in _C.isas():
        pytest.skip(f"not run: this CPU has no {isa}")
    before = _C.isa()
    for dtype in DTYPES:
        batch = cases.make(24, v=517, dtype=dtype, teacher=teacher, head={"softcap": 6.0})
        d = sum(EACH[1:7], EACH[0]) + po.NLL(0.1)
        want = cases.run(batch, d, "cpu")
        _C.set_isa(isa)
        try:
            got = cases.run(batch, d, "cpu")
        finally:
            _C.set_isa(before)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got["loss"], want["loss"], rtol=2e-6, atol=0)
        error = (got["dhidden"].double() - want["dhidden"].double()).abs().max()
        assert error <= max(4e-6, 2 * eps) * want["dhidden"].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_M2_nothing_of_size_n_by_v_and_both_chunks_in_one_budget(backend, teacher):
    from torch.utils._python_dispatch import TorchDispatchMode

    n, v = 64, 257
    batch = cases.make(n, 16, v, teacher=teacher)
    largest = [0]

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, list | tuple) else (out,):
                if isinstance(t, torch.Tensor) and t is not batch.get("t_logits"):
                    if t.untyped_storage().data_ptr() != given:
                        largest[0] = max(largest[0], t.numel())
            return out

    given = batch["t_logits"].untyped_storage().data_ptr() if teacher == "logits" else 0
    w = batch["weight"].requires_grad_()
    x = batch["hidden"].requires_grad_()
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.untyped_storage().data_ptr() == given or t.numel()) or t,
        lambda t: t,
    )
    record = cases.teacher_of(batch)
    with po.use_backend(backend), po.chunk_rows(8), Spy():
        with hooks:
            loss = po.linear_distill_loss(
                x, po.Head(w), record, po.TokenBatch(batch["labels"]), po.JSD(0.5)
            ).loss
        loss.backward()
    assert largest[0] < n * v / 2
    assert max(saved) <= batch["t_weight"].numel()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_M2_the_budget_covers_the_teachers_chunk(teacher):
    """Rows of a chunk: budget / (V x bytes of both logits)."""
    from pyoffline import cpu_distill

    heights = []
    plain = cpu_distill.pair_pass

    def spy(call, logits, *rest):
        heights.append(logits.shape[0])
        return plain(call, logits, *rest)

    batch = cases.make(64, 16, 256, torch.bfloat16, teacher=teacher, ignored=False)
    cpu_distill.pair_pass = spy
    try:
        with po.memory_budget(32 * 256 * 4):
            cases.run(batch, po.ForwardKL(), "cpu")
    finally:
        cpu_distill.pair_pass = plain
    assert max(heights) == (64 if teacher == "top-k" else 32)


PEAK = """
import json, sys, torch, pyoffline as po
from pathlib import Path
n, d, v, dtype, train_head, budget = json.loads(sys.argv[1])
dtype = getattr(torch, dtype)
def kib(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(key))
x = torch.randn(n, d).to(dtype).requires_grad_()
w = (torch.randn(v, d) / 16).to(dtype).requires_grad_(train_head)
t_x, t_w = torch.randn(n, d).to(dtype), (torch.randn(v, d) / 16).to(dtype)
y = torch.randint(0, v, (n,))
def step(x, w, t_x, t_w, y):
    teacher = po.TeacherHead(t_x, po.Head(t_w))
    po.linear_distill_loss(x, po.Head(w), teacher, po.TokenBatch(y), po.JSD(0.5)).loss.backward()
with po.use_backend("cpu"), po.memory_budget(budget):
    small = [t.detach()[:32].clone().requires_grad_(t.requires_grad) for t in (x, w, t_x, t_w)]
    step(*small, y[:32] % 32)  # libraries, thread pools
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    step(x, w, t_x, t_w, y)
    peak = (kib("VmHWM") - before) * 1024
    e = po.explain(n, d, v, dtype, train_head=train_head, teacher=dtype)
print(json.dumps([peak, e.extra_nbytes + e.gradient_nbytes, e.full_logits_nbytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc: not run")
def test_M2_peak_within_ten_percent_of_explain():
    """Several chunks, both of logits in 32 MiB; all logits would be 128 MiB on each side."""
    case = json.dumps([2048, 256, 32768, "bfloat16", True, 32 << 20])
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    command = [sys.executable, "-c", PEAK, case]
    result = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert result.returncode == 0, result.stderr
    peak, predicted, full_logits = json.loads(result.stdout)
    assert abs(peak - predicted) <= 0.1 * predicted, (peak / 2**20, predicted / 2**20)
    assert peak < predicted + full_logits / 2

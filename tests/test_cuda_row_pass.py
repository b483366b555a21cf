"""The CUDA row algorithm (csrc/cuda/row_algorithm.h) run by clusters of CPU threads: the template
that the GPU runs, with its barriers, packets and edges, against fp64 and the CPU row pass.

What only a GPU can show (the device texts of elements.h and cuda_group.h) is not tested here.
"""

import itertools
import math
import subprocess

import host_cluster
import numpy as np
import pytest
import row_pass_args
import torch
from compare import same_bits
from row_pass_args import Guarded

if not host_cluster.compiler():
    pytest.skip("no C++ compiler: not run", allow_module_level=True)

EPS = torch.finfo(torch.float32).eps
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STATS = ("logps", "entropy", "lse", "gap", "log_sum_p2")
PLAIN = ("logps", "entropy", "lse", "log_sum_p2")  # the gap makes a row general (row_sums.h)


def stats_and_gradient(logits, labels, coefs, out=None, stats=STATS, **how):
    """Guarded statistics and dlogits for given coefficients; the guards are checked."""
    rows, vocab = logits.shape
    results = {name: Guarded((rows,), F32) for name in stats}
    results["dlogits"] = Guarded((rows, vocab), logits.dtype) if out is None else out
    plain = {name: getattr(x, "tensor", x) for name, x in results.items()}
    host_cluster.row_pass(logits, labels, coefs=coefs, **plain, **how)
    assert all(x.intact() for x in results.values() if isinstance(x, Guarded))
    return plain


def truth(logits, labels, coefs):
    """Statistics and gradient in fp64, from log_softmax of what the rows hold."""
    z = logits.double()
    peak = z.amax(-1, keepdim=True)
    t = z - peak
    first = torch.zeros_like(t, dtype=torch.bool).scatter(-1, t.argmax(-1, keepdim=True), True)
    tail = torch.where(first, 0.0, t.exp()).sum(-1, keepdim=True)
    log_d = tail.log1p()
    logp = t - log_d
    p = logp.exp()
    y = labels[:, None]
    logp_y = logp.gather(-1, y)
    entropy = log_d - torch.special.xlogy(p, t.exp()).sum(-1, keepdim=True)
    a, b, c, e = (x.double()[:, None] for x in coefs)
    rest = c + e - torch.where(p == 0, 0.0, b * (logp + entropy))
    dz = torch.where(p == 0, 0.0, p * (rest - a)) - e / z.shape[-1]
    at_label = (p * rest).gather(-1, y) - a * torch.expm1(logp_y) - e / z.shape[-1]
    dz.scatter_(-1, y, at_label)
    stats = (
        logp_y,
        entropy,
        peak + log_d,
        (log_d - t).mean(-1, keepdim=True),
        torch.where(first, 0.0, (2 * t).exp()).sum(-1, keepdim=True).log1p() - 2 * log_d,
    )
    return dict(zip(STATS, (x[:, 0] for x in stats), strict=True)), dz


ROUNDING = {F32: 0.0, BF16: 1 / 256, F16: 1 / 2048}


def check(logits, labels, coefs, **how):
    """Statistics within 8 eps (1 + |x|); each gradient entry within its own rounding. As a plain
    row where it can be one, then with the gap, which is returned.
    """
    want, dz = truth(logits, labels, coefs)
    for stats in (PLAIN, STATS):
        got = stats_and_gradient(logits, labels, coefs, stats=stats, **how)
        within_bounds(got, stats, want, dz)
    return got


def within_bounds(got, stats, want, dz):
    for name in stats:
        error = (got[name].double() - want[name]).abs() / (1 + want[name].abs())
        assert error.max() <= 8 * EPS, f"{name}: {error.max() / EPS:.2f} eps"
    assert (got["logps"] <= 0).all()
    dlogits = got["dlogits"]
    tiny = 3.1e-8 if dlogits.dtype == F16 else 1e-38
    size = dz.abs().amax(-1, keepdim=True)
    bound = dz.abs() * (ROUNDING[dlogits.dtype] + 6e-6) + 4 * EPS * size + tiny
    worst = ((dlogits.double() - dz).abs() / bound).max()
    assert worst <= 1, f"dlogits: {worst:.3g} bounds off"


def draw(rows, vocab, dtype, seed=0, offset=0.0, spread=3.0):
    g = torch.Generator().manual_seed(seed)
    logits = (offset + spread * torch.randn(rows, vocab, generator=g)).to(dtype)
    coefs = torch.randn(4, rows, generator=g)
    coefs[1:, ::2] = 0  # every other row takes the short gradient
    return logits, torch.randint(0, vocab, (rows,), generator=g), coefs


RAGGED = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 63, 64, 65, 127, 129, 255, 257, 300)


@pytest.mark.parametrize("blocks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_n1_statistics_and_gradient_on_ragged_vocabularies(dtype, blocks):
    some = RAGGED[blocks % 3 :: 3] + (4095 + blocks % 3,)
    for vocab in some:
        check(*draw(3, vocab, dtype, vocab), blocks=blocks)


@pytest.mark.parametrize(("vocab", "dtype"), [(151936, BF16), (262147, F32), (262147, F16)])
def test_n1_large_vocabularies_by_eight_blocks(vocab, dtype):
    check(*draw(1, vocab, dtype, 5), blocks=8, threads=8)


@pytest.mark.parametrize("capacity", [None, 0, 64])
def test_n1_a_confident_row_keeps_its_tail(capacity):
    vocab = 32001
    for tail in (1e-2, 1e-6, 1e-12):
        logits = torch.full((2, vocab), math.log(tail / vocab))
        logits[:, vocab - 2] = 0.0
        labels, coefs = torch.tensor([vocab - 2, 5]), torch.zeros(4, 2)
        coefs[0] = -1.0
        got = check(logits, labels, coefs, blocks=1, capacity=capacity)
        want = truth(logits, labels, coefs)[1][0, vocab - 2]
        # 2^w carries the rounding of w = log2(e) t, |w| eps / 2
        assert abs(got["dlogits"][0, vocab - 2].double() / want - 1) <= 3e-6


def test_n1_an_offset_of_a_million_costs_nothing():
    for offset in (1e6, -1e6):
        check(*draw(3, 5003, F32, 8, offset=offset), blocks=4)
    check(*draw(2, 4099, BF16, 1, offset=2.0, spread=0.0), blocks=2)  # all equal


# (offset, spread, dtype): the last place of z, or the residual of a fused w, is a large part of w
OFFSETS = [
    (300.0, 3.0, F32),
    (-2.2e4, 3.0, F32),  # |k max| is just below the bound of a plain row
    (2.4e4, 3.0, F32),  # and above it
    (1.5e4, 400.0, BF16),
    (-1.5e4, 40.0, F16),
]


@pytest.mark.parametrize(("offset", "spread", "dtype"), OFFSETS, ids=str)
@pytest.mark.parametrize("capacity", [None, 64])
def test_n1_the_residual_of_a_plain_row_is_taken_out(offset, spread, dtype, capacity):
    logits, labels, coefs = draw(4, 3001, dtype, 3, offset, spread)
    coefs[3] = 0.0  # beside PPO's coefficient that of an entropy bonus: p t in every other row
    check(logits, labels, coefs, blocks=1 if capacity else 4, capacity=capacity)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(F32).min])
def test_n3_masked_entries_cost_no_statistic(mask):
    """Sums with 0 * -inf in them are formed again; a row of finite masks alone is uniform."""
    logits, labels, coefs = draw(3, 3001, F32)
    logits[0, 100:2000], logits[1, ::7] = mask, mask
    labels[:], coefs[3] = 50, 0.0
    if math.isfinite(mask):
        logits[2] = mask
    want, dz = truth(logits, labels, coefs)
    got = stats_and_gradient(logits, labels, coefs, stats=PLAIN)
    within_bounds(got, PLAIN, want, dz)
    assert (got["dlogits"][0, 100:2000] == 0).all()


@pytest.mark.parametrize(("dtype", "grad"), host_cluster.PAIRS, ids=str)
def test_n7_n13_any_row_start_and_stride_in_place_or_apart(dtype, grad):
    """Rows that start anywhere, out of place, in place, and in place of a wider dtype."""
    vocab, rows = 517, 3
    for shift, pad, capacity in itertools.product((0, 1, 3), (0, 5), (None, 0, 24)):
        logits, labels, coefs = draw(rows, vocab, dtype, shift + pad)
        memory = Guarded((rows * (vocab + pad) + 8,), dtype)
        start = memory.tensor.storage_offset() + shift
        view = memory.tensor.as_strided((rows, vocab), (vocab + pad, 1), start)
        view.copy_(logits)
        blocks = 1 if capacity is not None else 4
        how = {"blocks": blocks, "capacity": capacity}
        want = check(view, labels, coefs, out=torch.empty(rows, vocab, dtype=grad), **how)
        same_bits("logits", view.contiguous(), logits)
        ratio = dtype.itemsize // grad.itemsize
        narrow = memory.tensor.view(grad).as_strided(
            (rows, vocab), ((vocab + pad) * ratio, 1), start * ratio
        )
        got = stats_and_gradient(view, labels, coefs, out=narrow, **how)
        assert memory.intact()
        same_bits("dlogits in place", got["dlogits"].contiguous(), want["dlogits"])


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_programs_heads_and_options_agree_with_the_cpu_row_pass(dtype):
    """PPO, gated KL, entropy and smoothing at once, bias, softcap, temperature, class weights."""
    for vocab, blocks in ((37, 2), (1003, 4)):
        for left_out in ((), ("bias", "softcap"), ("softcap", "logit_scale", "class_weight")):
            arguments = row_pass_args.inputs(5, vocab, dtype, vocab)
            for name in left_out:
                del arguments[name]
            want = row_pass_args.outputs(5, vocab, dtype)
            row_pass_args.call(arguments, want)
            got = row_pass_args.outputs(5, vocab, dtype)
            logits, labels = arguments.pop("logits"), arguments.pop("labels")
            plain = {name: x.tensor for name, x in got.items()}
            host_cluster.row_pass(logits, labels, blocks=blocks, **arguments, **plain)
            for name, x in want.items():
                assert got[name].intact()
                a, b = plain[name].double(), x.tensor.double()
                slack = 2e-5 + (2 * ROUNDING[dtype] if name == "dlogits" else 0)
                size = b.abs().nan_to_num(posinf=0.0)
                close = (a - b).abs() <= slack * (size + size.mean() + 0.1)
                assert (close | (a == b)).all(), name  # fp16 overflows to the same inf


def test_n2_a_row_that_does_not_count_is_zero_whatever_it_holds():
    logits, labels, coefs = draw(4, 300, BF16)
    weights = torch.tensor([1.0, 0.0, -0.0, 1.0])
    labels[3] = -100
    clean = stats_and_gradient(logits, labels, coefs, weights=weights)
    logits[1:] = float("nan")
    labels[1] = 10**9
    got = stats_and_gradient(logits, labels, coefs, weights=weights)
    for name, x in got.items():
        assert (x[1:] == 0).all(), name
        same_bits(name, x, clean[name])


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
def test_n3_a_bad_logit_shows_in_its_row_only(bad):
    for dtype, vocab, at, stats in itertools.product(
        (F32, BF16, F16), (9, 300), (0, 8), (PLAIN, STATS)
    ):
        logits, labels, coefs = draw(3, vocab, dtype)
        how = {"blocks": 2, "stats": stats}
        clean = stats_and_gradient(logits, labels, coefs, **how)
        logits[1, at] = bad
        got = stats_and_gradient(logits, labels, coefs, **how)
        assert got["logps"][1].isnan() and got["dlogits"][1].isnan().all()
        for row in (0, 2):
            for name, x in got.items():
                same_bits(name, x[row : row + 1], clean[name][row : row + 1])


def test_n3_masked_entries_and_a_row_of_nothing_but_masks():
    logits, labels, coefs = draw(3, 300, F32)
    logits[:, ::3] = -math.inf
    logits[2] = -math.inf
    labels[:] = 31
    coefs[3] = 0
    coefs[0, 0] = math.inf
    got = stats_and_gradient(logits, labels, coefs, blocks=4)
    masked = got["dlogits"][:2, ::3]
    assert (masked == 0).all()
    assert got["dlogits"][0, 31] == math.inf and got["dlogits"][0, 32] == -math.inf
    assert got["logps"][2].isnan() and got["dlogits"][2].isnan().all()


def test_n4_a_silent_row_is_exactly_zero():
    logits, labels, coefs = draw(2, 300, BF16)
    coefs[:, 0] = 0.0
    got = stats_and_gradient(logits, labels, coefs)
    assert (got["dlogits"][0] == 0).all() and (got["dlogits"][1] != 0).any()


@pytest.mark.parametrize("label", [300, -1, 2**40, -(2**40)])
def test_n6_a_bad_label_marks_its_row_and_sets_the_flag(label):
    logits, labels, coefs = draw(3, 300, F32)
    clean = stats_and_gradient(logits, labels, coefs)
    flag = torch.zeros(2, dtype=torch.int64)
    stats_and_gradient(logits, labels, coefs, bad_label=flag)
    assert flag.tolist() == [0, 0]
    labels[1] = label
    got = stats_and_gradient(logits, labels, coefs, bad_label=flag)
    shown = max(min(label, 2**31 - 1), -(2**31))
    assert flag.tolist() == [1, shown * 2**32 + 1]
    for name, x in got.items():
        assert x[1].isnan().all(), name
        for row in (0, 2):
            same_bits(name, x[row : row + 1], clean[name][row : row + 1])


def test_n9_the_same_bits_every_time_and_at_every_position():
    logits, labels, coefs = draw(4, 1003, BF16)
    first = stats_and_gradient(logits, labels, coefs, blocks=4)
    for _ in range(3):
        again = stats_and_gradient(logits, labels, coefs, blocks=4)
        for name, x in again.items():
            same_bits(name, x, first[name])
    turned = stats_and_gradient(logits.flip(0), labels.flip(0), coefs.flip(1), blocks=4)
    for name in STATS:
        assert (turned[name].flip(0) - first[name]).abs().max() <= 1e-5


def test_n13_rows_past_two_to_the_32_elements(tmp_path):
    """Two rows 2^32 + 3 elements apart in a sparse file, forward and backward."""
    stride, vocab = 2**32 + 3, 65
    file = np.memmap(tmp_path / "rows", dtype=np.float16, mode="w+", shape=(stride + vocab,))
    view = torch.from_numpy(file).as_strided((2, vocab), (stride, 1))
    logits, labels, coefs = draw(2, vocab, F16)
    want = stats_and_gradient(logits, labels, coefs, out=torch.empty(2, vocab, dtype=F16))
    view.copy_(logits)
    got = stats_and_gradient(view, labels, coefs, out=view)
    for name, x in got.items():
        assert torch.allclose(x.float(), want[name].float(), rtol=2e-3, atol=1e-6), name


def test_a_scale_on_the_device_multiplies_the_gradient_only():
    logits, labels, coefs = draw(3, 300, F32)
    plain = stats_and_gradient(logits, labels, coefs)
    scaled = stats_and_gradient(logits, labels, coefs, device_scale=torch.tensor([0.25]))
    same_bits("dlogits", scaled["dlogits"], plain["dlogits"] * 0.25)
    same_bits("logps", scaled["logps"], plain["logps"])


def test_the_launch_plan_of_csrc_cuda_readme():
    """(blocks, threads, resident) for H100 (227 KiB a block) and A100 (163 KiB)."""
    table = {
        (32000, 2): (2, 256, True),
        (128256, 2): (8, 256, True),
        (151936, 2): (8, 256, True),
        (262147, 2): (8, 256, True),
        (32000, 4): (4, 256, True),
        (128256, 4): (8, 256, True),
        (262147, 4): (8, 1024, True),
    }
    for (vocab, item), want in table.items():
        blocks, threads, capacity, shared, resident = host_cluster.plan(vocab, item)
        assert (blocks, threads, bool(resident)) == want, (vocab, item)
        assert blocks * capacity * 16 >= vocab * item and shared <= 232448
    for vocab, item, resident in ((32000, 2, 1), (75000, 2, 1), (151936, 2, 0), (262147, 4, 0)):
        plan = host_cluster.plan(vocab, item, 80, 166912)
        assert plan[0] == 1 and plan[4] == resident and plan[3] <= 166912


def test_no_data_race_and_a_missing_barrier_is_found():
    """ThreadSanitizer on the cluster, then with its cluster barriers made block barriers."""
    binary = host_cluster.build("race_driver.cpp", "race_driver", "-O1", "-fsanitize=thread")
    env = {"TSAN_OPTIONS": "halt_on_error=1"}
    clean = subprocess.run([binary], capture_output=True, text=True, env=env)
    assert clean.returncode == 0, clean.stderr[:4000]
    broken = subprocess.run([binary, "fault"], capture_output=True, text=True, env=env)
    assert broken.returncode != 0 and "data race" in broken.stderr

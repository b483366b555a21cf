"""The CUDA kernels as nvcc compiles them, host half and PTX, run without a GPU by an emulator
(emulator/), which also checks every access, shared memory nobody wrote, and races: against fp64,
at the bounds of test_cuda_row_pass.py.

Not here: machine code and timing (a GPU), registers and spills (test_cuda_compile.py).
"""

import math
import shutil

import host_cluster
import pytest
import torch

if not shutil.which("nvcc"):
    pytest.skip("not run: no nvcc", allow_module_level=True)

import batches
import cuda_on_cpu
import row_cases
import row_pass_args
import test_cuda_row_pass as cases
from compare import same_bits
from emulator import cuda_library
from emulator.memory import MemoryFault

import pyoffline as po

ARCHS = tuple(cuda_library.CHIPS)
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
STATS = ("logps", "entropy", "lse", "log_sum_p2")  # the gap would take the row's general path
each_arch = pytest.mark.parametrize("arch", ARCHS)


def draw(rows, vocab, dtype, seed=0):
    """Coefficients by row: a alone, without e, all four: the short, the whole, the general path."""
    logits, labels, coefs = cases.draw(rows, vocab, dtype, seed)
    coefs = torch.randn(4, rows, generator=torch.Generator().manual_seed(seed))
    coefs[1:, ::3], coefs[3, 1::3] = 0.0, 0.0
    return logits, labels, coefs


def check(arch, logits, labels, coefs, dlogits, **how):
    """Statistics and dlogits against fp64, at the bounds of test_cuda_row_pass.check."""
    want, dz = cases.truth(logits, labels, coefs)
    got = {name: torch.full((len(labels),), math.nan) for name in STATS}
    got["dlogits"] = dlogits
    cuda_library.row_pass(arch, logits, labels, coefs=coefs, **got, **how)
    for name in STATS:
        error = (got[name].double() - want[name]).abs() / (1 + want[name].abs())
        assert error.max() <= 8 * cases.EPS, f"{name}: {error.max() / cases.EPS:.2f} eps"
    tiny = 3.1e-8 if dlogits.dtype == F16 else 1e-38
    size = dz.abs().amax(-1, keepdim=True)
    bound = dz.abs() * (cases.ROUNDING[dlogits.dtype] + 6e-6) + 4 * cases.EPS * size + tiny
    worst = ((dlogits.double() - dz).abs() / bound).max()
    assert worst <= 1, f"dlogits: {worst:.3g} bounds off"
    return got


def in_place(logits, dtype):
    """dlogits of a dtype that begins where each row of logits does."""
    ratio = logits.element_size() // dtype.itemsize
    return logits.view(dtype).as_strided(logits.shape, (logits.stride(0) * ratio, 1))


# (arch, vocab, logits, dlogits, rows, blocks of a cluster, KiB of the device's shared memory)
LAUNCHES = [
    ("sm_80", 1003, BF16, BF16, 3, 1, None),
    ("sm_80", 1003, F16, F16, 3, 1, None),
    ("sm_80", 1003, F32, F32, 3, 1, None),
    ("sm_80", 1003, F32, BF16, 3, 1, None),
    ("sm_80", 1003, F32, F16, 3, 1, None),
    ("sm_90a", 1003, BF16, BF16, 3, 1, None),
    ("sm_90a", 1003, F16, F16, 3, 1, None),
    ("sm_90a", 1003, F32, F32, 3, 1, None),
    ("sm_90a", 1003, F32, BF16, 3, 1, None),
    ("sm_90a", 1003, F32, F16, 3, 1, None),
    ("sm_90a", 16001, F32, BF16, 3, 2, None),
    ("sm_90a", 32000, BF16, BF16, 3, 2, None),
    ("sm_90a", 32002, F32, F32, 3, 4, None),
    ("sm_90a", 57346, F16, F16, 3, 4, None),
    ("sm_90a", 57344, F32, F32, 3, 8, None),
    ("sm_90a", 128256, BF16, BF16, 3, 8, None),
    ("sm_80", 20011, BF16, BF16, 3, 1, 24),  # nothing stays on chip
    ("sm_80", 20011, BF16, BF16, 3, 1, 36),  # the first 16384 logits do
    ("sm_80", 7001, F32, F16, 3, 1, 24),  # overwritten by narrower elements while it streams
    ("sm_90a", 7001, F32, BF16, 3, 1, 24),
]


@pytest.mark.parametrize(
    ("arch", "vocab", "dtype", "grad", "rows", "blocks", "kib"), LAUNCHES, ids=str
)
def test_n1_statistics_and_gradient_in_place(arch, vocab, dtype, grad, rows, blocks, kib):
    logits, labels, coefs = draw(rows, vocab, dtype, vocab)
    how = {"shared_bytes": kib and kib << 10}
    check(arch, logits, labels, coefs, in_place(logits, grad), **how)
    launch = cuda_library.last_launch()
    assert (launch.cluster, launch.grid) == (blocks, (rows * blocks, 1, 1))


@each_arch
@pytest.mark.parametrize(("dtype", "grad"), host_cluster.PAIRS, ids=str)
def test_n7_n13_rows_that_start_anywhere(arch, dtype, grad):
    """Odd strides: each row lies differently modulo 16 bytes, its gradient again differently."""
    rows, vocab = 3, 517
    logits, labels, coefs = draw(rows, vocab, dtype, 7)
    memory, out = torch.full((1600,), math.nan).to(dtype), torch.full((1600,), math.nan).to(grad)
    view = memory.as_strided((rows, vocab), (vocab + 4, 1), 1).copy_(logits)
    got = check(arch, view, labels, coefs, out.as_strided((rows, vocab), (vocab + 2, 1), 3))
    same_bits("logits", view.contiguous(), logits)
    assert out.isnan().sum() == out.numel() - rows * vocab
    again = check(arch, view, labels, coefs, in_place(view, grad))
    same_bits("in place", again["dlogits"].contiguous(), got["dlogits"].contiguous())


# Tests of the same kernel on CPU threads, with their arguments.
REUSED = [
    (cases.test_n1_a_confident_row_keeps_its_tail, (None,)),
    (cases.test_n2_a_row_that_does_not_count_is_zero_whatever_it_holds, ()),
    (cases.test_n3_a_bad_logit_shows_in_its_row_only, (math.nan,)),
    (cases.test_n3_masked_entries_and_a_row_of_nothing_but_masks, ()),
    (cases.test_n4_a_silent_row_is_exactly_zero, ()),
    (cases.test_n6_a_bad_label_marks_its_row_and_sets_the_flag, (300,)),
    (cases.test_n6_a_bad_label_marks_its_row_and_sets_the_flag, (-(2**40),)),
    (cases.test_n9_the_same_bits_every_time_and_at_every_position, ()),
    (cases.test_a_scale_on_the_device_multiplies_the_gradient_only, ()),
]


@pytest.fixture(params=ARCHS)
def swapped(request, monkeypatch):
    """test_cuda_row_pass.py with the compiled kernel of an architecture in place of threads."""

    def row_pass(logits, labels, *, blocks=None, capacity=None, **keywords):
        cuda_library.row_pass(request.param, logits, labels, **keywords)

    monkeypatch.setattr(host_cluster, "row_pass", row_pass)


@pytest.mark.parametrize(("test", "arguments"), REUSED)
def test_as_on_cpu_threads(swapped, test, arguments):
    test(*arguments)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_programs_heads_and_options_agree_with_the_cpu_row_pass(swapped, dtype):
    """PPO, gated KL, entropy, smoothing; bias, softcap, temperature, class weights; masked rows."""
    cases.test_programs_heads_and_options_agree_with_the_cpu_row_pass(dtype)


def test_programs_heads_and_options_by_a_cluster(monkeypatch):
    """The same on two blocks: 16,000 logits more."""
    monkeypatch.setattr(host_cluster, "row_pass", by_two_blocks)
    for name in ("inputs", "outputs"):
        plain = getattr(row_pass_args, name)
        longer = lambda rows, vocab, *rest, plain=plain: plain(rows, vocab + 16000, *rest)  # noqa: E731
        monkeypatch.setattr(row_pass_args, name, longer)
    cases.test_programs_heads_and_options_agree_with_the_cpu_row_pass(F32)


def by_two_blocks(logits, labels, *, blocks, **keywords):
    cuda_library.row_pass("sm_90a", logits, labels, **keywords)
    assert cuda_library.last_launch().cluster == 2


def test_rows_of_a_cluster_that_are_not_summed():
    """Ignored, of weight 0, with a bad label, of -inf alone; beside them a row with -inf in it."""
    logits, labels, coefs = draw(6, 16001, F32)
    weights, flag = torch.ones(6), torch.zeros(2, dtype=torch.int64)
    logits[1:3], labels[1], weights[2] = math.nan, -100, 0.0
    labels[3], labels[4] = 16001, 16000
    logits[4] = -math.inf
    logits[5, ::3], labels[5], coefs[1:, 5] = -math.inf, 4, 0.0
    want, dz = cases.truth(logits[[0, 5]], labels[[0, 5]], coefs[:, [0, 5]])
    logps, dlogits = torch.full((6,), math.nan), in_place(logits, BF16)
    given = {"coefs": coefs, "weights": weights, "bad_label": flag}
    cuda_library.row_pass("sm_90a", logits, labels, logps=logps, dlogits=dlogits, **given)
    assert cuda_library.last_launch().cluster == 2
    assert flag.tolist() == [1, 16001 * 2**32 + 3]
    assert (dlogits[1:3] == 0).all() and (logps[1:3] == 0).all()
    assert dlogits[3:5].isnan().all() and logps[3:5].isnan().all()
    assert (dlogits[5, ::3] == 0).all()
    torch.testing.assert_close(logps[[0, 5]].double(), want["logps"], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dlogits[[0, 5]].double(), dz, rtol=1 / 256 + 1e-5, atol=1e-9)


def test_n13_rows_past_two_to_the_32_elements(swapped, tmp_path):
    cases.test_n13_rows_past_two_to_the_32_elements(tmp_path)


@each_arch
def test_statistics_alone_write_nothing_else(arch):
    logits, labels, coefs = draw(2, 1003, BF16)
    want, _ = cases.truth(logits, labels, coefs)
    got = {name: torch.full((2,), math.nan) for name in STATS}
    before = logits.clone()
    cuda_library.row_pass(arch, logits, labels, **got)
    for name in STATS:
        torch.testing.assert_close(got[name].double(), want[name], rtol=1e-6, atol=1e-6)
    same_bits("logits", logits, before)
    assert cuda_library.last_counts().global_stored == 4 * len(STATS) * len(labels)


# (arch, logits, dlogits, two vocabularies that are launched alike, KiB of shared memory, reads)
TRAFFIC = [
    ("sm_80", BF16, BF16, 16384, 24576, None, 1),
    ("sm_80", F32, BF16, 12288, 18432, None, 1),
    ("sm_90a", F16, F16, 16384, 24576, None, 1),
    ("sm_90a", F32, F32, 32768, 49152, None, 1),
    ("sm_80", BF16, BF16, 16384, 24576, 24, 3),  # csrc/cuda/README.md, "Traffic"
]


def cost_of_more(arch, dtype, grad, small, large, kib):
    """(bytes loaded, stored, instructions by opcode) of the logits of a row beyond `small`."""
    seen, shapes = [], []
    for vocab in (small, large):
        logits, labels, coefs = draw(1, vocab, dtype)
        how = {"coefs": coefs, "dlogits": in_place(logits, grad)}
        cuda_library.row_pass(arch, logits, labels, **how, shared_bytes=kib and kib << 10)
        launch = cuda_library.last_launch()
        seen.append(launch.counts)
        shapes.append((launch.cluster, launch.block))
    assert shapes[0] == shapes[1]
    a, b = seen
    opcodes = {name: n - a.by_opcode[name] for name, n in b.by_opcode.items()}
    return b.global_loaded - a.global_loaded, b.global_stored - a.global_stored, opcodes


@pytest.mark.parametrize(("arch", "dtype", "grad", "small", "large", "kib", "reads"), TRAFFIC)
def test_each_logit_is_read_once_and_its_gradient_written_once(
    arch, dtype, grad, small, large, kib, reads
):
    """A row that streams is read three times. Two 2^x a logit, copies of 16 bytes."""
    loaded, stored, opcodes = cost_of_more(arch, dtype, grad, small, large, kib)
    more = large - small
    assert (loaded, stored) == (reads * more * dtype.itemsize, more * grad.itemsize)
    assert opcodes["ex2.approx.ftz.f32"] == 2 * more
    copies = 0 if kib else more * dtype.itemsize // 16
    assert opcodes.get("cp.async.cg.shared.global", 0) == copies


@pytest.mark.parametrize(
    ("arch", "dtype", "grad", "small", "large", "kib"), [t[:6] for t in TRAFFIC[:4]]
)
def test_an_aligned_gradient_is_stored_by_packets(arch, dtype, grad, small, large, kib):
    """16 bytes at a time; 8 where four fp32 logits make four 16-bit elements."""
    _, _, opcodes = cost_of_more(arch, dtype, grad, small, large, kib)
    stores = {name: n for name, n in opcodes.items() if name.startswith("st.global") and n}
    width = 4 if dtype == grad else 2
    assert sum(stores.values()) == (large - small) * dtype.itemsize // 16
    assert all(name.startswith(f"st.global.v{width}.") for name in stores)


# (logits, vocab, PTX instructions of a logit at most): csrc/cuda/README.md, "Work", and 3 %
INSTRUCTIONS = [(BF16, 32000, 20.4), (BF16, 151936, 19.4), (F32, 151936, 18.1)]


@pytest.mark.parametrize(("dtype", "vocab", "most"), INSTRUCTIONS, ids=str)
def test_a_logit_costs_no_more_instructions_than_the_readme_says(dtype, vocab, most):
    """PPO with a KL ratio, statistics and gradient, in place; moves are not counted."""
    logits, labels, _ = draw(1, vocab, dtype)
    got = {name: torch.full((1,), math.nan) for name in (*STATS, "loss")}
    hyper = torch.tensor([[1.0, 0.2, 0.28, math.inf, math.inf, 0, 0, 0]], dtype=torch.float64)
    program = {"codes": [11, -1, 0], "hyper": hyper, "old": torch.tensor([-9.0])}
    given = {**program, "adv": torch.ones(1), "is_top1": torch.zeros(1, dtype=torch.uint8)}
    cuda_library.row_pass("sm_90a", logits, labels, dlogits=logits, **given, **got)
    opcodes = cuda_library.last_counts().by_opcode
    free = ("mov.", "cvta")
    assert sum(n for name, n in opcodes.items() if not name.startswith(free)) <= most * vocab


@pytest.mark.parametrize(("dtype", "vocab"), [(F32, 16001), (BF16, 32000), (F16, 32003)], ids=str)
def test_the_sums_of_a_plain_row(dtype, vocab):
    """A confident tail, a residual of 2^-10, masks in whole steps: a cluster, no general row."""
    logits, labels, coefs = draw(4, vocab, dtype, 2)
    logits[0], logits[0, vocab // 2] = math.log(1e-2 / vocab), 0.0
    logits[1] *= 200.0  # up to 3000
    logits[2, 64:5000] = -math.inf
    logits[3] = torch.finfo(dtype).min
    labels[:], coefs[3] = vocab // 2, 0.0
    check("sm_90a", logits, labels, coefs, torch.empty_like(logits))
    assert cuda_library.last_launch().cluster == 2


@each_arch
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
def test_scale_by_upstream(arch, dtype):
    """One read and one write, 4 bytes a thread beside it; nothing is written where it is 1."""
    memory = torch.randn(5003, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in (0, 1):
        grad = memory.clone()[start:]
        before, nbytes = grad.clone(), grad.numel() * dtype.itemsize
        cuda_library.scale_by_upstream(arch, grad, torch.ones(1))
        counts = cuda_library.last_counts()
        same_bits("times 1", grad, before)
        threads = counts.global_loaded // 4
        assert (threads % 256, counts.global_stored) == (0, 0)
        cuda_library.scale_by_upstream(arch, grad, torch.tensor([-0.37]))
        counts = cuda_library.last_counts()
        same_bits("scaled", grad, (before.float() * torch.tensor(-0.37)).to(dtype))
        assert (counts.global_loaded, counts.global_stored) == (nbytes + 4 * threads, nbytes)
        wide = sum(n for name, n in counts.by_opcode.items() if name.startswith("st.global.v4"))
        assert wide == (nbytes // 16 if start == 0 else 0)


@each_arch
def test_the_backend_on_the_compiled_kernels(arch, monkeypatch, one_thread):
    """From a loss to its gradients (cuda_on_cpu.py), each kernel the compiled one."""
    cuda_on_cpu.emulate(monkeypatch)

    def row_pass(logits, labels, *, blocks, threads, **keywords):
        cuda_library.row_pass(arch, logits, labels, **keywords)

    def scale(grad, factor):
        cuda_library.scale_by_upstream(arch, grad, torch.tensor([factor]))

    monkeypatch.setattr(cuda_on_cpu, "row_pass", row_pass)
    monkeypatch.setattr(cuda_on_cpu, "host_scale", scale)
    objective = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss()
    batch = batches.make(n=9, d=16, v=77, dtype=F16, reads=("old", "ref", "adv"), bias=True)
    row_cases.compare(batch, objective, "cuda", chunk=4, upstream=2.0**16)


def test_the_kernel_is_given_what_the_call_says():
    """Name, shape and every byte of the parameters, terms and extras by value."""
    given, out = row_pass_args.inputs(5, 37, BF16), row_pass_args.outputs(5, 37, BF16)
    logits, labels = given.pop("logits"), given.pop("labels")
    given |= {name: x.tensor for name, x in out.items()} | {"bad_label": torch.zeros(2).long()}
    cuda_library.row_pass("sm_90a", logits, labels, **given)
    launch = cuda_library.last_launch()
    task, terms, extras = host_cluster.task_of(logits, labels, given)
    task.terms[: len(terms)], task.extras[: len(extras)] = terms, extras
    _, threads, task.capacity, shared_bytes, _ = host_cluster.plan(37, 2)
    assert launch.params == (bytes(task), bytes(8))
    assert (launch.grid, launch.block) == ((5, 1, 1), (threads, 1, 1))
    assert (launch.cluster, launch.shared_bytes) == (1, shared_bytes)
    assert "row_kernel" in launch.name and launch.name.count("bf16") == 1


def test_what_a_device_refuses_is_refused_and_faults_are_raised():
    library = cuda_library.library()
    logits, labels, coefs = draw(2, 40, F32)
    with pytest.raises(MemoryFault, match="no tensor of the call"):
        cuda_library.row_pass("sm_90a", logits, labels, logps=torch.zeros(1), coefs=coefs)
    with pytest.raises(RuntimeError, match="no kernel for this pair"):
        cuda_library.row_pass("sm_90a", logits.bfloat16(), labels, dlogits=logits, coefs=coefs)
    device = library.device("sm_90a")
    assert cuda_library.why_not(device) == ""
    assert "there is no device" in cuda_library.why_not(len(library.devices))
    [name] = (n for n in library.kernels("sm_90a") if "row_kernelIff" in n)
    for grid, block, cluster, shared_bytes, error in REFUSED:
        got = library.refusal(device, name, grid, block, cluster, shared_bytes)
        assert got == error, (grid, block, cluster, shared_bytes)
    assert library.refusal(device, "another", 8, 64, 1, 0) == 98  # cudaErrorInvalidDeviceFunction


# (blocks, threads, blocks of a cluster, bytes of shared memory, cudaError_t) on an H100
REFUSED = [
    (8, 1025, 1, 0, 9),  # cudaErrorInvalidConfiguration
    (0, 64, 1, 0, 9),
    (8, 64, 1, 232449, 1),  # cudaErrorInvalidValue
    (16, 64, 16, 0, 912),  # cudaErrorInvalidClusterSize
    (9, 64, 8, 0, 912),
]

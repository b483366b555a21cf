"""The CUDA backend above the kernel, on CPU tensors (`cuda_on_cpu.py`), against fp64: objectives,
dtypes, chunks, given logits, log-probs, custom terms, coupled objectives, labels, syncs.

What only a GPU can show is in test_gpu_*.py.
"""

import batches
import coupled_batches as cb
import coupled_oracle
import cuda_on_cpu
import host_cluster
import oracle
import pytest
import torch
from compare import check_forward, check_gradient, check_loss, same_bits
from test_objectives import CASES
from torch.utils._python_dispatch import TorchDispatchMode

import pyoffline as po
from pyoffline import _C, device_flags, ops
from pyoffline.device_flags import flag_of

if not host_cluster.compiler():
    pytest.skip("no C++ compiler: not run", allow_module_level=True)

COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss()
READS = ("old", "ref", "adv")
OUTPUTS = ("logps", "entropy", "lse", "log_sum_p2")
BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def emulation(monkeypatch, one_thread):
    return cuda_on_cpu.emulate(monkeypatch)


def compare(batch, objective, chunk=None, upstream=1.0, **head):
    """Against fp64, at the bar of the same-dtype PyTorch reference."""
    truth = oracle.run(batch, objective, torch.float64)
    bar = oracle.run(batch, objective, batch["hidden"].dtype)
    with po.chunk_rows(chunk or 10_000):
        got = batches.run(batch, objective, "cuda", upstream, **head)
    check_loss(got["loss"], truth, bar)
    for k in ("logps", "entropy", "lse"):
        check_forward(k, got[k], truth[k], bar[k])
    for k in ("dhidden", "dweight", "dbias"):
        if truth.get(k) is not None:
            check_gradient(k, got[k], truth[k], bar[k])
    return got


@pytest.mark.parametrize("name", CASES)
def test_N1_every_objective_against_fp64(name, emulation):
    program = CASES[name].program(True)
    batch = batches.make(n=9, d=16, v=77, reads=program.reads, extra=program.gates)
    compare(batch, CASES[name], chunk=5)
    assert emulation.calls == 2


HEADS = {
    "softcap and bias": (COMPOSED, {"head": {"softcap": 3.0}, "bias": True}),
    "scale": (COMPOSED, {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    "temperature": (COMPOSED, {"temperature": True, "seed": 1}),
    "smoothing": (po.NLL(label_smoothing=0.1, z_loss=1e-2), {}),
    "gated": (po.PPOClip() + po.NLL().weighted_by("g"), {"extra": ("g",)}),
}


@pytest.mark.parametrize("name", HEADS)
def test_N1_heads(name):
    objective, options = HEADS[name]
    batch = batches.make(n=9, d=16, v=77, reads=objective.program(False).reads, **options)
    compare(batch, objective, chunk=4, upstream=0.5)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=batches.dtype_name)
def test_N1_sixteen_bit_heads_under_a_loss_scale(dtype, emulation):
    batch = batches.make(n=9, d=16, v=77, dtype=dtype, reads=READS, bias=True)
    upstream = 2.0**16 if dtype == F16 else 1.0
    compare(batch, COMPOSED, chunk=4, upstream=upstream)
    # dlogits travel under the power of two of the largest weight, from a number on the device
    top = batch["weights"][batch["labels"] != -100].max()
    want = [2.0 ** -torch.frexp(top).exponent.item() * 2] * 2 if dtype == F16 else []
    assert [float(x) for x in emulation.scales] == want
    assert emulation.scaled == 3, "hidden, weight, bias: each by the kernel that reads upstream"


def test_N15_fp32_logits_of_a_bf16_head_are_overwritten_by_bf16_gradients():
    batch = batches.make(n=9, d=16, v=77, dtype=BF16, reads=("old", "adv"))
    compare(batch, po.PPOClip(), logits_dtype=torch.float32)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=batches.dtype_name)
def test_N15_given_logits_and_their_log_probs(dtype, backend):
    """Forward and backward of policy_loss and token_logps, beside another backend."""
    g = torch.Generator().manual_seed(1)
    logits, labels = (3 * torch.randn(5, 70, generator=g)).to(dtype), torch.tensor([3, 9, 69, 0, 5])
    labels[1] = -100
    batch = batches.row_batch(labels, torch.tensor([1.0, 1.0, 0.0, 0.3, 1e-3]))
    objective = po.NLL(label_smoothing=0.1) - 0.1 * po.Entropy()
    a, b = (batches.run_logits(logits, batch, objective, x) for x in ("cuda", backend))
    tolerance = {torch.float32: 3e-6, BF16: 2**-7, F16: 2**-10}[dtype]
    for k in ("loss", *OUTPUTS):
        torch.testing.assert_close(a[k], b[k].float(), rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(a["dlogits"], b["dlogits"], rtol=tolerance, atol=1e-7)
    upstream = torch.randn(3, 5, generator=g)
    results = []
    for name in ("cuda", backend):
        z = logits.clone().requires_grad_()
        with po.use_backend(name):
            s = po.token_logps(z, labels)
            sum((u * x).sum() for u, x in zip(upstream, s[:3], strict=True)).backward()
        results.append((s, z.grad))
    (s, dz), (want, want_dz) = results
    for x, y in zip(s, want, strict=True):
        torch.testing.assert_close(x.detach(), y.detach(), rtol=3e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(dz, want_dz, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("chunk", [2, 100])
def test_linear_token_logps_backward(chunk):
    """Gradients of hidden and head from given coefficients, chunk by chunk."""
    batch = batches.make(n=9, d=8, v=40)
    results = []
    for backend in ("cuda", "reference"):
        x, w = (batch[k].clone().requires_grad_() for k in ("hidden", "weight"))
        with po.use_backend(backend), po.chunk_rows(chunk):
            out = po.linear_token_logps(x, po.Head(w), batch["labels"])
            (out.logps.sum() + 0.3 * out.entropy.sum() - 0.2 * out.lse.sum()).backward()
        results.append((out.logps.detach(), x.grad, w.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_custom_terms_run_between_the_two_halves(emulation):
    def shaped(t):
        return -torch.exp(0.5 * (t.logp - t.old)) * t.adv - 0.1 * t.entropy

    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    objective = po.custom(shaped) + 0.1 * po.KL("k2", "old")
    got = batches.run(batch, objective, "cuda")
    assert emulation.calls == 2
    want = batches.run(batch, objective, "reference")
    for k in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_with_class_weights(reduction):
    g = torch.Generator().manual_seed(3)
    logits, weight = torch.randn(6, 77, generator=g), torch.rand(77, generator=g)
    weight[5] = 0.0
    labels = torch.tensor([1, -100, 5, 76, 0, 33])
    results = []
    for backend in ("cuda", "reference"):
        z = logits.clone().requires_grad_()
        with po.use_backend(backend):
            loss = po.cross_entropy(z, labels, weight, reduction=reduction, label_smoothing=0.1)
            loss.sum().backward()
        results.append((loss.detach(), z.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_lora_head_adds_its_product_and_gets_its_gradients():
    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    g = torch.Generator().manual_seed(4)
    adapter = torch.randn(3, 8, generator=g), torch.randn(40, 3, generator=g)
    results = []
    for backend in ("cuda", "reference"):
        given = (batch["hidden"], batch["weight"], *adapter)
        x, w, a, b = (t.clone().requires_grad_() for t in given)
        flat = (x, w, None, x @ a.t(), b, batch["labels"])
        vectors = (batch["weights"], batch["old"], None, None, batch["adv"], None)
        program = po.PPOClip().program(True)
        rest = (program.hyper, ops.PLAIN_HEAD, list(program.codes), "", -100)
        out = ops.linear_policy(*flat, *vectors, [], None, *rest, 0, 0b11011, backend, [4, 0, 0])
        out[0].backward()
        results.append((out[0].detach(), x.grad, w.grad, a.grad, b.grad))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["gspo", "composed", "with_nll"])
@pytest.mark.parametrize("dtype", [torch.float32, F16], ids=batches.dtype_name)
def test_N1_coupled_objectives(name, dtype):
    """The fp16 scale is a number of the host there: it reaches the kernel too."""
    objective, reads = cb.CASES[name]
    batch = cb.make(reads, dtype, seed=21, weights=True, bias=True)
    truth = coupled_oracle.run(batch, objective, torch.float64)
    bar = coupled_oracle.run(batch, objective)
    for rows in (6, 64):
        with po.chunk_rows(rows):
            got = cb.run(batch, objective, "cuda")
        check_forward("logps", got["logps"], truth["logps"], bar["logps"])
        for k in ("dhidden", "dweight", "dbias"):
            check_gradient(k, got[k], truth[k], bar[k])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N2_rows_that_do_not_count_contribute_exactly_nothing(value):
    clean = batches.make(n=9, d=8, v=40, reads=READS)
    off = (clean["labels"] == -100) | (clean["weights"] == 0)
    dirty = {**clean}
    for k in ("hidden", *READS):
        dirty[k] = clean[k].clone()
        dirty[k][off] = value
    a, b = (batches.run(x, COMPOSED, "cuda") for x in (clean, dirty))
    for k in ("loss", *OUTPUTS, "dhidden", "dweight"):
        same_bits(k, b[k], a[k])
    assert (b["dhidden"][off] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N3_a_bad_logit_shows_in_its_row_and_nowhere_else(value):
    logits = torch.randn(3, 70, generator=torch.Generator().manual_seed(1))
    batch = batches.row_batch([3, 0, 5])
    clean = batches.run_logits(logits, batch, po.NLL(), "cuda")
    logits[1, 33] = value
    got = batches.run_logits(logits, batch, po.NLL(), "cuda")
    assert got["loss"].isnan() and got["logps"][1].isnan() and got["dlogits"][1].isnan().all()
    for row in (0, 2):
        same_bits("others", got["dlogits"][row], clean["dlogits"][row])


@pytest.mark.parametrize("label", [70, -1, 2**40])
def test_N6_a_bad_label_makes_its_row_nan_and_raises_at_check_or_the_next_call(label):
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(4, 70, generator=g), torch.tensor([3, 69, 0, 5])
    clean = batches.run_logits(logits, batches.row_batch(labels), po.NLL(), "cuda")
    labels[2] = label
    got = batches.run_logits(logits, batches.row_batch(labels), po.NLL(), "cuda")
    assert got["loss"].isnan() and got["dlogits"][2].isnan().all()
    for row in (0, 1, 3):
        same_bits("others", got["dlogits"][row], clean["dlogits"][row])
    shown = min(label, 2**31 - 1)
    with pytest.raises(IndexError, match=rf"label {shown} \(row 2"):
        po.check()
    po.check()
    batches.run_logits(logits, batches.row_batch(labels), po.NLL(), "cuda")
    with pytest.raises(IndexError, match=r"\(row 2"):
        batches.run(batches.make(n=3, d=8, v=40), po.NLL(), "cuda")


def test_N6_a_flag_that_inference_mode_made_can_be_raised_outside_it(monkeypatch):
    monkeypatch.setattr(device_flags, "_flags", {})
    with torch.inference_mode():
        with po.use_backend("cuda"):
            po.token_logps(torch.randn(2, 9), torch.tensor([0, 9]))
    with pytest.raises(IndexError, match=r"label 9 \(row 1"):
        po.check()
    po.check()


def test_hyper_parameters_and_flags_are_the_hosts_whatever_the_default_device_is(monkeypatch):
    """As under torch.set_default_device("cuda"), here with a device that holds no numbers."""
    batch = batches.make(n=9, d=8, v=40, reads=READS)
    want = batches.run(batch, COMPOSED, "cuda")
    monkeypatch.setattr(device_flags, "_flags", {})
    with torch.device("meta"):
        got = batches.run(batch, COMPOSED, "cuda")
        assert po.custom(lambda t: t.adv * t.logp) is not None
    for k in ("loss", "logps", "dhidden", "dweight"):
        same_bits(k, got[k], want[k])


def test_N7_strided_views_give_the_contiguous_answer_and_are_not_written():
    wide = torch.randn(2, 153, generator=torch.Generator().manual_seed(2))
    batch = batches.row_batch(torch.tensor([0, 74]))
    for view in (wide[:, 1:76], wide[:, ::2][:, :75], wide[:, 3:78].t().contiguous().t()):
        before = view.clone()
        a = batches.run_logits(view, batch, po.NLL(), "cuda")
        b = batches.run_logits(before, batch, po.NLL(), "cuda")
        torch.testing.assert_close(a["dlogits"], b["dlogits"], rtol=3e-7, atol=1e-9)
        same_bits("input", view, before)


def test_N8_N9_chunks_change_nothing_but_the_order_of_a_sum():
    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    with po.chunk_rows(3):
        a, b = (batches.run(batch, po.PPOClip(), "cuda") for _ in range(2))
    c = batches.run(batch, po.PPOClip(), "cuda")
    for k in ("loss", "logps", "dhidden", "dweight"):
        same_bits(k, a[k], b[k])
        torch.testing.assert_close(a[k], c[k], rtol=1e-5, atol=1e-7)


def test_N9_N15_deterministic_logps_do_not_depend_on_the_batch():
    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"), ignored=False)
    with po.deterministic(), po.chunk_rows(4), po.use_backend("cuda"):
        whole = po.linear_token_logps(batch["hidden"], po.Head(batch["weight"]), batch["labels"])
        one = po.linear_token_logps(
            batch["hidden"][6:7], po.Head(batch["weight"]), batch["labels"][6:7]
        )
        trained = batches.run(batch, po.PPOClip(), "cuda")["logps"]
    same_bits("logps of one row", one.logps, whole.logps[6:7])
    same_bits("logps of training", trained, whole.logps)


def test_N11_all_ignored_is_zero():
    batch = batches.make(n=4, d=8, v=40, ignored=False)
    batch["labels"][:] = -100
    got = batches.run(batch, po.NLL(), "cuda")
    assert got["loss"] == 0 and (got["dhidden"] == 0).all() and (got["dweight"] == 0).all()


class Asked(TorchDispatchMode):
    """What an op asks of a device, or copies to it from the host."""

    SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "lift_fresh", "masked_select", "item")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        flag = flag_of(torch.device("cpu"))  # on a GPU this one is host memory
        name = func._schema.name.removeprefix("aten::")
        if name in self.SYNCS and args[0].data_ptr() not in (x.data_ptr() for x in flag):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def asked_by(monkeypatch, name, run) -> list[str]:
    """The syncs inside the op pyoffline::`name` while `run` runs."""
    op, mode = getattr(ops, name), Asked()

    def spied(*args):
        with mode, torch.no_grad():
            return op._init_fn(*args)

    spied._qualname = name
    monkeypatch.setattr(ops, name, spied)
    with po.use_backend("cuda"):
        run()
    return mode.seen


@pytest.mark.parametrize("dtype", [BF16, F16], ids=batches.dtype_name)
def test_no_op_asks_the_device_when_n_valid_is_known(monkeypatch, dtype):
    """With it, and on given logits always; without it for the number of rows, once."""
    batch = batches.make(n=9, d=8, v=40, dtype=dtype, reads=("old", "adv"))
    count = int(((batch["labels"] != -100) & (batch["weights"] != 0)).sum())
    x = batch["hidden"].clone().requires_grad_()

    def linear(n_valid):
        tokens = batches.tokens(batch, n_valid=n_valid)
        return po.linear_policy_loss(x, po.Head(batch["weight"]), tokens, po.PPOClip())

    assert asked_by(monkeypatch, "linear_policy", lambda: linear(count)) == []
    monkeypatch.undo()
    cuda_on_cpu.emulate(monkeypatch)
    assert asked_by(monkeypatch, "linear_policy", lambda: linear(None)) == [
        "aten::_local_scalar_dense"
    ]
    monkeypatch.undo()
    cuda_on_cpu.emulate(monkeypatch)
    logits = torch.randn(9, 40).to(dtype).requires_grad_()

    def given():
        return po.policy_loss(logits, batches.tokens(batch), po.PPOClip())

    assert asked_by(monkeypatch, "logits_policy", given) == []


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 10_001])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, F16], ids=batches.dtype_name)
def test_scale_elements_is_the_product_rounded_once(dtype, size):
    """Whole packets, the tail, and memory that does not start at a multiple of 16 bytes."""
    grad = torch.randn(size + 1, generator=torch.Generator().manual_seed(0)).to(dtype)
    for start in (0, 1):
        part = grad[start : start + size].clone() if start == 0 else grad.clone()[1:]
        want = (part.float() * torch.tensor(-0.37)).to(dtype)
        host_cluster.host_scale(part, -0.37)
        same_bits(f"from element {start}", part, want)


def test_the_binding_refuses_what_is_not_on_one_device(monkeypatch):
    monkeypatch.undo()  # the real functions
    x, one = torch.zeros(4), torch.ones(1)
    with pytest.raises(ValueError, match="grad: expected a tensor on a CUDA device"):
        _C.cuda_scale_by_upstream(x, one)
    with pytest.raises(ValueError, match="logits: expected a tensor on a CUDA device"):
        _C.cuda_row_pass(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))

"""The Triton backend through the public API, in the interpreter: numbers, heads, gradients, chunks.

Shapes are small, the tile is a test's own (several tiles and a ragged tail), bf16 and fp16 inputs
are rounded by torch before; the interpreter truncates where a GPU rounds to bf16, so 16-bit
gradients get one ulp instead of half of one.
"""

import math

import batches
import oracle
import pytest
import torch
from compare import check_forward, check_gradient, same_bits
from row_cases import compare, outputs

import pyoffline as po
from pyoffline.calls import Rows
from pyoffline.kernels import row_pass as kernel
from pyoffline.kernels.configs import RowConfig
from pyoffline.kernels.launch import shifts

COMPOSED = po.PPOClip() + 0.1 * po.KL("k3") - 0.01 * po.Entropy() + 1e-3 * po.ZLoss()
OUTPUTS = ("logps", "entropy", "lse", "log_sum_p2")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles of 32 logits: every row has several, and a tail."""
    monkeypatch.setattr(kernel, "row_config", lambda *_: RowConfig(8, 4, 4, 1))


# what is exercised, objective, options of batches.make
HEADS = [
    ("composed", COMPOSED, {}),
    ("softcap and bias", COMPOSED, {"head": {"softcap": 3.0}, "bias": True}),
    ("scale", COMPOSED, {"head": {"logit_scale": -0.7, "temperature": 1.3}}),
    ("temperature", COMPOSED, {"temperature": True, "seed": 1}),
    ("smoothing", po.NLL(label_smoothing=0.1, z_loss=1e-2), {}),
    ("gated", po.PPOClip() + po.NLL().weighted_by("g"), {"extra": ("g",)}),
]


@pytest.mark.parametrize("name, objective, options", HEADS, ids=[h[0] for h in HEADS])
def test_N1_outputs_and_gradients_against_fp64(name, objective, options):
    reads = objective.program(False).reads
    batch = batches.make(n=9, d=16, v=77, reads=reads, **options)
    compare(batch, objective, chunk=4, upstream=0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_N1_sixteen_bit_heads(dtype):
    batch = batches.make(n=9, d=16, v=77, dtype=dtype, reads=("old", "ref", "adv"), bias=True)
    compare(batch, COMPOSED, chunk=4, upstream=1.0 if dtype == torch.bfloat16 else 2.0**16)


def test_N15_fp32_logits_of_a_bf16_head_are_overwritten_by_bf16_gradients():
    """The narrower gradient lies over its own row of logits."""
    batch = batches.make(n=9, d=16, v=77, dtype=torch.bfloat16, reads=("old", "adv"))
    truth = oracle.run(batch, po.PPOClip(), torch.float64)
    bar = oracle.run(batch, po.PPOClip(), torch.bfloat16)
    got = batches.run(batch, po.PPOClip(), "triton", logits_dtype=torch.float32)
    for k in ("loss", "logps"):
        check_forward(k, got[k], truth[k], bar[k])
    for k in ("dhidden", "dweight"):
        check_gradient(k, got[k], truth[k], bar[k])


@pytest.mark.parametrize("vocab", [1, 2, 31, 32, 33, 201])
def test_N1_ragged_vocabularies(vocab):
    g = torch.Generator().manual_seed(vocab)
    logits = 3 * torch.randn(3, vocab, generator=g)
    labels = torch.randint(0, vocab, (3,), generator=g)
    batch = batches.row_batch(labels)
    objective = po.NLL() - 0.1 * po.Entropy()
    got = batches.run_logits(logits, batch, objective, "triton")
    want = batches.run_logits(logits.double(), batch, objective, "reference")
    for k in ("loss", *OUTPUTS, "dlogits"):
        torch.testing.assert_close(got[k].double(), want[k].double(), rtol=2e-6, atol=1e-6)


EPS = torch.finfo(torch.float32).eps


def hard_rows(vocab):
    """(what, logits) of rows whose sums are hard."""
    g = torch.Generator().manual_seed(0)
    confident = torch.full((vocab,), -15.0)
    confident[7] = 0.0
    tail = -12.0 + 1e-3 * torch.randn(vocab, generator=g)
    tail[vocab // 2] = 0.0
    lonely = torch.full((vocab,), -40.0)
    lonely[7] = 0.0
    shifted = torch.randn(vocab, generator=g) + 1e6
    masked = torch.randn(vocab, generator=g)
    masked[11:] = -torch.inf
    lowest = torch.randn(vocab, generator=g)
    lowest[::3] = torch.finfo(torch.float32).min
    return {"confident": confident, "tail": tail, "lonely": lonely, "shifted": shifted} | {
        "masked": masked,
        "finfo.min": lowest,
        "ties": torch.zeros(vocab),
    }


@pytest.mark.parametrize("vocab, names", [(2051, None), (262_147, ("tail", "lonely"))])
def test_N1_hard_rows(vocab, names, monkeypatch):
    """logp within 8 eps (1 + |logp|) of fp64, and 1 - p_y of a confident row kept."""
    monkeypatch.undo()
    rows = hard_rows(vocab)
    rows = {name: rows[name] for name in names or rows}
    logits = torch.stack(list(rows.values()))
    labels = torch.full((len(rows),), 7)
    with po.use_backend("triton"):
        got = po.token_logps(logits.requires_grad_(), labels)
        got.logps.sum().backward()
    truth = logits.detach().double().log_softmax(-1)[:, 7]
    for name, g, t in zip(rows, got.logps.detach().double(), truth, strict=True):
        assert g <= 0
        assert abs(g - t) <= 8 * EPS * (1 + abs(t)) + 1e-12, name
    lonely = list(rows).index("lonely")
    rest = (vocab - 1) * math.exp(-40.0)  # fp64 log_softmax itself loses this
    assert abs(logits.grad[lonely, 7].item() - rest) <= 1e-5 * rest


SMOOTHED = po.NLL(label_smoothing=0.1) - 0.1 * po.Entropy()


def on_rows(logits, labels, stride, options):
    """(dlogits, outputs, what lies between the rows) of the row pass on rows `stride` apart."""
    n, vocab = logits.shape
    program = SMOOTHED.program(False)
    rows = Rows(labels, torch.ones(n), codes=program.codes, hyper=program.hyper, **options)
    # each at the start of its own memory, or groups would not be cut
    source, target = (torch.full((n, stride), math.nan, dtype=logits.dtype) for _ in range(2))
    source[:, :vocab] = logits
    group = 16 // logits.element_size()
    assert shifts(group, source, target) == (stride % group != 0)
    out = tuple(outputs(n, coefs=None).values())
    flag = torch.zeros(2, dtype=torch.int64)
    config = RowConfig(8, 16 // logits.element_size(), 4, 1)
    kernel.row_pass(source[:, :vocab], target[:, :vocab], rows, out, flag, config=config)
    return target[:, :vocab], out[:-1], target[:, vocab:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=batches.dtype_name)
@pytest.mark.parametrize("vocab", [1, 33, 130])
@pytest.mark.parametrize("gap", [0, 3])
def test_N7_rows_that_start_anywhere_equal_aligned_ones(gap, vocab, dtype):
    """Nine rows have every place within 16 bytes; NaN lies between them, and nothing is written
    there. One row does not count, one label is the last entry.
    """
    g = torch.Generator().manual_seed(vocab)
    logits = (3 * torch.randn(9, vocab, generator=g)).to(dtype)
    labels = torch.randint(0, vocab, (9,), generator=g)
    labels[2], labels[4], labels[5] = -100, vocab - 1, 0
    options = {"bias": torch.randn(vocab, generator=g), "class_weight": torch.rand(vocab)}
    got, stats, between = on_rows(logits, labels, vocab + gap, options)
    want, bar, _ = on_rows(logits, labels, -(-vocab // 16) * 16, options)
    assert between.isnan().all()
    assert (got[2] == 0).all()
    ulp = 3e-6 if dtype == torch.float32 else 2.0**-7
    torch.testing.assert_close(got, want, atol=1e-7, rtol=ulp)
    for a, b in zip(stats, bar, strict=True):
        torch.testing.assert_close(a, b, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N2_ignored_and_weight_zero_rows_contribute_exactly_nothing(value):
    clean = batches.make(n=9, d=8, v=40, reads=("old", "ref", "adv"))
    off = (clean["labels"] == -100) | (clean["weights"] == 0)
    dirty = dict(clean)
    for k in ("hidden", "old", "ref", "adv"):
        dirty[k] = clean[k].clone()
        dirty[k][off] = value
    a, b = (batches.run(x, COMPOSED, "triton") for x in (clean, dirty))
    for k in ("loss", *OUTPUTS, "dhidden", "dweight"):
        same_bits(k, b[k], a[k])
    assert (b["dhidden"][off] == 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_N2_N3_given_logits(value):
    """Ignored rows are never read; a NaN at a valid row shows in it and nowhere else."""
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(5, 70, generator=g), torch.tensor([3, -100, 69, 0, 5])
    batch = batches.row_batch(labels, torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0]))
    clean = batches.run_logits(logits, batch, po.NLL(), "triton")
    dirty = logits.clone()
    dirty[1], dirty[2] = value, value
    got = batches.run_logits(dirty, batch, po.NLL(), "triton")
    same_bits("dlogits", got["dlogits"], clean["dlogits"])
    for place in (0, 33, 69):
        dirty = logits.clone()
        dirty[3, place] = value
        got = batches.run_logits(dirty, batch, po.NLL(), "triton")
        assert got["loss"].isnan() and got["logps"][3].isnan() and got["dlogits"][3].isnan().all()
        others = torch.tensor([0, 1, 2, 4])
        same_bits("others", got["dlogits"][others], clean["dlogits"][others])


@pytest.mark.parametrize("label", [70, -1, -101, 2**40, -(2**40)])
def test_N6_a_bad_label_is_no_address_makes_its_row_nan_and_raises_later(label):
    g = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(4, 70, generator=g), torch.tensor([3, 69, 0, 5])
    clean = batches.run_logits(logits, batches.row_batch(labels), po.NLL(), "triton")
    labels[2] = label
    got = batches.run_logits(logits, batches.row_batch(labels), po.NLL(), "triton")
    assert got["loss"].isnan() and got["dlogits"][2].isnan().all()
    others = torch.tensor([0, 1, 3])
    same_bits("others", got["dlogits"][others], clean["dlogits"][others])
    shown = max(min(label, 2**31 - 1), -(2**31))
    with pytest.raises(IndexError, match=rf"label {shown} \(row 2"):
        po.check()
    po.check()


def test_N6_the_next_call_raises_too():
    batch = batches.make(n=3, d=8, v=40, ignored=False)
    batch["labels"][1] = 40
    assert batches.run(batch, po.NLL(), "triton")["loss"].isnan()
    with pytest.raises(IndexError, match="label 40"):
        batches.run(batch, po.NLL(), "triton")


def test_N7_strided_views_give_the_contiguous_answer_and_are_not_written():
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 2 * 75 + 3, generator=g)
    labels = torch.tensor([0, 74])
    for view in (wide[:, 1:76], wide[:, ::2][:, :75], wide[:, 3:78].t().contiguous().t()):
        before = view.clone()
        a = batches.run_logits(view, batches.row_batch(labels), po.NLL(), "triton")
        b = batches.run_logits(before, batches.row_batch(labels), po.NLL(), "triton")
        same_bits("dlogits", a["dlogits"], b["dlogits"])
        same_bits("input", view, before)


def test_N8_N9_chunks_change_nothing_but_the_order_of_a_sum():
    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    with po.chunk_rows(3):
        a = batches.run(batch, po.PPOClip(), "triton")
        b = batches.run(batch, po.PPOClip(), "triton")
    c = batches.run(batch, po.PPOClip(), "triton")
    for k in ("loss", "logps", "dhidden", "dweight"):
        same_bits(k, a[k], b[k])
        torch.testing.assert_close(a[k], c[k], rtol=1e-5, atol=1e-7)


def test_custom_objectives_run_between_the_two_halves():
    def shaped(t):
        return -torch.exp(0.5 * (t.logp - t.old)) * t.adv - 0.1 * t.entropy

    batch = batches.make(n=9, d=8, v=40, reads=("old", "adv"))
    objective = po.custom(shaped) + 0.1 * po.KL("k2", "old")
    got = batches.run(batch, objective, "triton")
    want = batches.run(batch, objective, "reference")
    for k in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(got[k], want[k], rtol=1e-5, atol=1e-7)


def test_cross_entropy_with_class_weights():
    g = torch.Generator().manual_seed(3)
    logits, weight = torch.randn(6, 77, generator=g), torch.rand(77, generator=g)
    weight[5] = 0.0
    labels = torch.tensor([1, -100, 5, 76, 0, 33])
    for reduction in ("mean", "none"):
        results = []
        for backend in ("triton", "reference"):
            z = logits.clone().requires_grad_()
            with po.use_backend(backend):
                loss = po.cross_entropy(z, labels, weight, reduction=reduction, label_smoothing=0.1)
                loss.sum().backward()
            results.append((loss.detach(), z.grad))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_linear_token_logps_backward_and_second_pass():
    batch = batches.make(n=9, d=8, v=40)
    grads = []
    for backend in ("triton", "reference"):
        x, w = (batch[k].clone().requires_grad_() for k in ("hidden", "weight"))
        with po.use_backend(backend):
            out = po.linear_token_logps(x, po.Head(w), batch["labels"])
            (out.logps.sum() + 0.3 * out.entropy.sum() - 0.2 * out.lse.sum()).backward()
        grads.append((out.logps.detach(), x.grad, w.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_N11_all_ignored_is_zero():
    batch = batches.make(n=4, d=8, v=40, ignored=False)
    batch["labels"][:] = -100
    got = batches.run(batch, po.NLL(), "triton")
    assert got["loss"] == 0 and (got["dhidden"] == 0).all() and (got["dweight"] == 0).all()

"""linear_distill_loss: values and gradients against autograd in fp64, and against TRL's own JSD
(PROMISES N1, N12)."""

import compare
import distill_cases as cases
import pytest
import torch
from batches import BACKENDS, DTYPES, HALVES, dtype_name
from distill_cases import EACH, name_of

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
TEACHERS = ("head", "logits", "top-k")
MIXED = po.JSD(0.4) + 0.5 * po.ReverseKL() + 0.3 * po.NLL(0.1, 1e-3) - 0.05 * po.Entropy()
HEADS = {
    "plain": {},
    "softcap": {"head": {"softcap": 5.0}, "t_head": {"temperature": 0.8}},
    "scales": {"head": {"logit_scale": 0.7, "temperature": 1.4}, "t_head": {"softcap": 8.0}},
    "bias": {"bias": True, "t_head": {"logit_scale": 1.2}},
}


def test_the_package_exports_one_class_for_each_row_of_the_table():
    from pyoffline.divergence_math import DIVERGENCES

    assert {d.parts()[0][0].row for d in EACH} == set(DIVERGENCES) == set(cases.CLASSES)


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("divergence", [*EACH, MIXED], ids=name_of)
def test_reference_in_fp64_is_autograd(divergence, teacher):
    for options in HEADS.values():
        batch = cases.make(dtype=torch.float64, teacher=teacher, **options)
        with po.chunk_rows(8):
            got = cases.run(batch, divergence, "reference")
        want = cases.truth(batch, divergence)
        torch.testing.assert_close(got["loss"], want["loss"], rtol=1e-10, atol=0)
        for name in ("dhidden", "dweight", "dbias"):
            if name in want:
                scale = want[name].abs().max()
                assert scale > 1e-5
                assert (got[name] - want[name]).abs().max() <= 1e-10 * scale, (name, options)


def compared(batch, divergence, backend, upstream=1.0, **head):
    """Every output of one call through the comparator."""
    got = cases.run(batch, divergence, backend, upstream, **head)
    truth = cases.truth(batch, divergence, torch.float64, upstream)
    reference = cases.truth(batch, divergence, None, upstream)
    # one scalar is one draw of the error: its bar is the error of the terms that it adds
    bar = (reference["terms"].double() - truth["terms"]).abs().sum()
    floor = compare.FLOOR_ULPS * compare.EPS32 * truth["terms"].abs().sum()
    assert got["loss"].dtype == torch.float32
    assert (got["loss"].double() - truth["loss"]).abs() <= compare.FORWARD * bar + floor
    for name in ("dhidden", "dweight", "dbias"):
        if name in truth:
            compare.check_gradient(name, got[name], truth[name], reference[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("divergence", [*EACH, MIXED], ids=name_of)
def test_N1_loss_and_gradients_within_the_error_of_pytorch(backend, dtype, divergence):
    for teacher, options in zip(TEACHERS, ("softcap", "bias", "scales"), strict=True):
        batch = cases.make(60, dtype=dtype, teacher=teacher, **HEADS[options])
        if isinstance(divergence, po.TVD) and dtype != torch.float32:
            # rounding a logit crosses a kink in PyTorch and here at different entries: no rounding
            batch = cases.make(60, 50, 50, dtype, teacher=("logits", "top-k")[teacher == "top-k"])
            batch["weight"] = torch.eye(50, dtype=dtype)
        with po.chunk_rows(24):
            compared(batch, divergence, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(24, 7, 2), (40, 64, 33), (70, 40, 2049)])
def test_N1_shapes(backend, dtype, shape):
    for teacher in TEACHERS:
        compared(cases.make(*shape, dtype, 2, teacher), po.JSD(0.5) + po.NLL(), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_N1_fp16_under_a_loss_scale_of_2_to_the_16(backend):
    for teacher in TEACHERS:
        batch = cases.make(60, dtype=torch.float16, teacher=teacher, bias=True)
        with po.chunk_rows(16):
            compared(batch, MIXED, backend, 2.0**16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_name)
def test_N1_student_and_teacher_of_other_dtypes_and_fp32_logits(backend, dtype):
    """A half student under fp32 logits beside an fp32 teacher: the narrower gradient in place."""
    batch = cases.make(60, dtype=dtype)
    batch |= {"t_hidden": batch["t_hidden"].float(), "t_weight": batch["t_weight"].float()}
    got = cases.run(batch, po.JSD(0.4), backend, logits_dtype=torch.float32)
    truth = cases.truth(batch, po.JSD(0.4), torch.float64)
    half = cases.truth(batch, po.JSD(0.4))
    single = cases.truth(
        {**batch, **{k: batch[k].float() for k in ("hidden", "weight")}}, po.JSD(0.4)
    )
    error = (single["terms"].double() - truth["terms"]).abs().sum()
    floor = compare.FLOOR_ULPS * compare.EPS32 * truth["terms"].abs().sum()
    assert (got["loss"].double() - truth["loss"]).abs() <= compare.FORWARD * error + floor
    for name in ("dhidden", "dweight"):
        compare.check_gradient(name, got[name], truth[name], half[name])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sharp", [1.0, 8.0, 40.0])
def test_N1_sharp_rows_keep_the_tail_bucket(backend, sharp):
    """The k entries hold all but e^-40 of the student: 1 - sum would leave nothing of the tail."""
    batch = cases.make(24, 16, 200, teacher="top-k", k=150, ignored=False)
    batch["weight"] = batch["weight"] * sharp
    compared(batch, po.ForwardKL(), backend)
    compared(batch, po.JSD(0.5), backend)


def test_limits_are_what_the_definitions_say():
    batch = cases.make(dtype=torch.float64)
    values = {}
    for d in (po.ForwardKL(), po.ReverseKL(), po.JSD(0.0), po.JSD(1.0), po.RenyiDivergence(1.0)):
        values[d] = cases.run(batch, d, "reference")
    for d in (po.AlphaDivergence(0.0), po.AlphaDivergence(1.0)):
        values[d] = cases.run(batch, d, "reference")
    forward, reverse = values[po.ForwardKL()], values[po.ReverseKL()]
    pairs = [
        (po.JSD(0.0), forward),
        (po.JSD(1.0), reverse),
        (po.RenyiDivergence(1.0), forward),
        (po.AlphaDivergence(1.0), forward),
        (po.AlphaDivergence(0.0), reverse),
    ]
    for d, want in pairs:
        for name in ("loss", "dhidden", "dweight"):
            assert torch.equal(values[d][name], want[name])
    for eps in (1e-6, -1e-6):  # the limits are continuous, and no digits are lost near them
        for d, want in (
            (po.RenyiDivergence(1.0 + eps), forward),
            (po.AlphaDivergence(1.0 + eps), forward),
            (po.AlphaDivergence(eps), reverse),
        ):
            for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
                near = {
                    k: v.to(dtype) if v is not None and v.is_floating_point() else v
                    for k, v in batch.items()
                    if isinstance(v, torch.Tensor)
                }
                got = cases.run({**batch, **near}, d, backend)
                assert abs(got["loss"].item() / want["loss"].item() - 1) < 2e-5
                error = (got["dhidden"].double() - want["dhidden"]).abs().max()
                assert error < 2e-5 * want["dhidden"].abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", EACH, ids=name_of)
def test_a_teacher_equal_to_the_student_has_no_divergence(backend, divergence):
    batch = cases.make(teacher="logits")
    batch["weight"] = batch["weight"].clone()
    batch["t_logits"] = batch["hidden"] @ batch["weight"].t()
    got = cases.run(batch, divergence, backend)
    assert abs(got["loss"].item()) <= 1e-6
    # TVD has its kinks there, and a logit of another product may be a bit off
    assert isinstance(divergence, po.TVD) or got["dhidden"].abs().max() <= 1e-6
    assert got["metrics"]["top1_agreement"] == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("divergence", EACH, ids=name_of)
def test_a_top_k_of_the_whole_vocabulary_is_the_full_divergence(backend, divergence):
    full = cases.make(v=40, teacher="logits")
    top = {**full, "teacher": "top-k"}
    top["t_logps"], top["ids"] = full["t_logits"].log_softmax(-1).topk(40)
    a, b = (cases.run(x, divergence + 0.2 * po.NLL(), backend) for x in (full, top))
    for name in ("loss", "dhidden", "dweight"):
        torch.testing.assert_close(a[name], b[name], rtol=2e-5, atol=2e-6)
    for name in ("teacher_entropy", "top1_agreement", "divergence"):
        torch.testing.assert_close(a["metrics"][name], b["metrics"][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gates_factors_and_custom_terms_compose(backend):
    """Gated divergences and objectives, a factor of 0, and a custom term, against the oracle."""
    batch = cases.make(60)
    g = torch.Generator().manual_seed(3)
    batch["extra"] = {n: torch.rand(60, generator=g) for n in ("a", "b")}
    batch["extra"]["a"][::2] = 0.0
    batch["extra"]["b"][2:20] = 0.0
    d = po.ForwardKL().weighted_by("a") - 0.5 * po.NLL().weighted_by("b") + 0.0 * po.TVD()
    d = (d + po.JSD(0.5)) * 2.0
    compared(batch, d, backend)
    plain = cases.make(60)
    custom = po.custom(lambda t: -torch.tanh(t.logp))
    got = cases.run(plain, po.ForwardKL() + custom, backend)
    want = _with_custom(plain)
    torch.testing.assert_close(got["loss"].double(), want[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(got["dhidden"].double(), want[1], rtol=1e-3, atol=1e-6)


def _with_custom(batch):
    h = batch["hidden"].double().requires_grad_()
    rows = ((batch["labels"] != -100) & (batch["weights"] != 0)).nonzero()[:, 0]
    s = (h @ batch["weight"].double().t()).log_softmax(-1)[rows]
    t = (batch["t_hidden"].double() @ batch["t_weight"].double().t()).log_softmax(-1)[rows]
    logp = s.gather(-1, batch["labels"][rows][:, None])[:, 0]
    value = (t.exp() * (t - s)).sum(-1) - torch.tanh(logp)
    loss = (batch["weights"][rows].double() * value).sum()
    loss.backward()
    return loss.detach(), h.grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_metrics_are_the_means_of_what_they_name(backend):
    batch = cases.make(60, teacher="logits")
    got = cases.run(batch, po.JSD(0.3) + 2.0 * po.TVD() + po.JSD(0.6), backend)["metrics"]
    rows = ((batch["labels"] != -100) & (batch["weights"] != 0)).nonzero()[:, 0]
    s = (batch["hidden"].double() @ batch["weight"].double().t()).log_softmax(-1)[rows]
    t = batch["t_logits"].double().log_softmax(-1)[rows]
    want = {
        "jsd/0": cases.jsd(po.JSD(0.3), s, t).mean(),
        "jsd/2": cases.jsd(po.JSD(0.6), s, t).mean(),
        "tvd": cases.VALUES["TVD"](None, s, t).mean(),
        "entropy": -(s.exp() * s).sum(-1).mean(),
        "teacher_entropy": -(t.exp() * t).sum(-1).mean(),
        "top1_agreement": (s.argmax(-1) == t.argmax(-1)).double().mean(),
    }
    want["divergence"] = want["jsd/0"] + want["jsd/2"] + 2 * want["tvd"]
    assert 0 < want["top1_agreement"] < 1
    for name, value in want.items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-5, atol=1e-6, msg=name)
        assert not got[name].requires_grad
    assert got["num_tokens"] == rows.numel()


TRL_BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("beta", TRL_BETAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_equal_to_trls_generalised_jsd(backend, beta, temperature):
    """TRL's own function on whole logits: batchmean over the labels that are not ignored."""
    pytest.importorskip("trl", reason="not run: trl is not installed (pip install pyoffline[dev])")
    from trl.experimental.gkd import GKDTrainer

    batch = cases.make(24, ignored=True)
    labels = batch["labels"].reshape(4, 6)
    wide = torch.float64
    x = batch["hidden"].to(wide).reshape(4, 6, -1).requires_grad_()
    student = x @ batch["weight"].to(wide).t()
    teacher = (batch["t_hidden"].to(wide) @ batch["t_weight"].to(wide).t()).reshape(4, 6, -1)
    want = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=labels, beta=beta, temperature=temperature
    )
    want.backward()
    dtype = wide if backend == "reference" else torch.float32
    h = batch["hidden"].to(dtype).reshape(4, 6, -1).requires_grad_()
    with po.use_backend(backend):
        out = po.linear_distill_loss(
            h,
            po.Head(batch["weight"].to(dtype), temperature=temperature),
            po.TeacherHead(
                batch["t_hidden"].to(dtype).reshape(4, 6, -1),
                po.Head(batch["t_weight"].to(dtype), temperature=temperature),
            ),
            po.TokenBatch(labels),
            po.JSD(beta),
        )
        out.loss.backward()
    tol = 1e-11 if dtype == wide else 2e-6
    torch.testing.assert_close(out.loss.to(wide), want.detach(), rtol=tol, atol=0)
    assert (h.grad - x.grad).abs().max() <= 2 * tol * x.grad.abs().max()


def test_cosine_distance_of_hidden_states():
    g = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, 8, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(3, 4, 8, generator=g, dtype=torch.float64)
    w = torch.rand(3, 4, generator=g, dtype=torch.float64)
    cos = (h * t).sum(-1) / (h.norm(dim=-1) * t.norm(dim=-1))
    torch.testing.assert_close(po.cosine_distill_loss(h, t), (1 - cos).mean())
    (want,) = torch.autograd.grad((w * (1 - cos)).sum(), h)
    (got,) = torch.autograd.grad(po.cosine_distill_loss(h, t, w), h)
    torch.testing.assert_close(got, want)
    w[1] = 0.0
    clean = torch.autograd.grad(po.cosine_distill_loss(h, t, w), h)[0]
    broken = h.detach().clone()
    broken[1] = torch.nan
    broken.requires_grad_()
    bad_t = t.clone()
    bad_t[1] = torch.inf
    loss = po.cosine_distill_loss(broken, bad_t, w)
    assert torch.equal(torch.autograd.grad(loss, broken)[0], clean)
    w[1, 2] = 0.5
    assert po.cosine_distill_loss(broken, bad_t, w).isnan()
    with pytest.raises(ValueError, match="another width"):
        po.cosine_distill_loss(h, t[..., :4])
    with pytest.raises(ValueError, match="weights"):
        po.cosine_distill_loss(h, t, w[:2])

"""LoRA heads through the fused losses: W + sBA is never formed, the gradients of A, B, hidden and
bias equal those of the merged head, and a frozen base weight gets none.
"""

import pytest
import torch
from torch import nn

import pyoffline as po

BACKENDS = ("reference", "cpu")
N, D, V, R = 24, 32, 101, 4
SCALE = 0.5
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def tensors(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (N, D), "a": (R, D), "b": (V, R), "weight": (V, D), "bias": (V,)}
    spread = {"hidden": 1.0, "a": 0.3, "b": 0.3, "weight": 0.2, "bias": 0.1}
    return {
        k: (torch.randn(s, generator=g) * spread[k]).to(dtype).requires_grad_(k != "weight")
        for k, s in shapes.items()
    }


def peft_model(t, dtype):
    """A PEFT model with a LoRA head that holds the tensors `t`; PEFT does the wrapping."""
    peft = pytest.importorskip("peft")

    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = nn.Linear(D, V, dtype=dtype)

        def forward(self, x):
            return self.lm_head(x)

    config = peft.LoraConfig(r=R, lora_alpha=SCALE * R, target_modules=["lm_head"])
    model = peft.get_peft_model(Body(), config)
    layer = model.base_model.model.lm_head
    with torch.no_grad():
        layer.base_layer.weight.copy_(t["weight"])
        layer.base_layer.bias.copy_(t["bias"])
        for name, x in (("lora_A", "a"), ("lora_B", "b")):
            factor = getattr(layer, name)["default"]
            factor.weight = nn.Parameter(t[x].detach().clone())
    return model, layer


def batch():
    g = torch.Generator().manual_seed(5)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[::6] = -100
    adv = torch.randn(N, generator=g)
    old = -torch.rand(N, generator=g) - 4.0
    return po.TokenBatch(labels, adv, old)


def fused(t, dtype, objective):
    model, layer = peft_model(t, dtype)
    x = t["hidden"].detach().clone().requires_grad_()
    tokens = batch()
    if isinstance(objective, po.WeightedNLL):
        tokens = po.TokenBatch(tokens.labels, tokens.advantages)
    out = po.linear_policy_loss(x, po.Head.of(layer), tokens, objective)
    out.loss.backward()
    grads = {
        "hidden": x.grad,
        "a": layer.lora_A["default"].weight.grad,
        "b": layer.lora_B["default"].weight.grad,
    }
    return out, grads, layer


def merged(t, dtype, objective):
    """Plain PyTorch on W + sBA, the loss by autograd through log_softmax."""
    leaf = {k: v.detach().to(dtype).requires_grad_() for k, v in t.items()}
    weight = leaf["weight"] + SCALE * (leaf["b"] @ leaf["a"])
    z = (leaf["hidden"] @ weight.t() + leaf["bias"]).to(torch.promote_types(dtype, torch.float32))
    tokens = batch()
    keep = tokens.labels != -100
    logp = z.log_softmax(-1).gather(-1, tokens.labels.clamp(min=0)[:, None])[:, 0]
    adv, old = tokens.advantages.to(logp.dtype), tokens.old_logps.to(logp.dtype)
    if isinstance(objective, po.WeightedNLL):
        loss = -adv * logp
    else:
        ratio = (logp - old).exp()
        loss = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)
    loss = torch.where(keep, loss, 0.0).sum() / keep.sum()
    loss.backward()
    return loss.detach(), {k: leaf[k].grad for k in ("hidden", "a", "b")}, logp.detach()


OBJECTIVES = [po.WeightedNLL(), po.PPOClip(0.2, 0.2, None)]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_lora_equals_the_merged_head_in_fp64(objective):
    t = tensors(torch.float64)
    out, grads, layer = fused(t, torch.float64, objective)
    loss, want, _ = merged(t, torch.float64, objective)
    torch.testing.assert_close(out.loss, loss, rtol=1e-10, atol=1e-12)
    for k, g in want.items():
        torch.testing.assert_close(grads[k], g, rtol=1e-9, atol=1e-12, msg=k)
    assert layer.base_layer.weight.grad is None


def errors(x, truth):
    gap = (x.double() - truth).abs()
    return gap.max().item(), gap.pow(2).mean().sqrt().item()


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
def test_n1_lora_within_two_and_three_times_the_error_of_pytorch(objective, dtype, backend):
    """logps <= 2x, gradients <= 3x the error of the same computation in plain PyTorch of that dtype
    (max and RMS), against fp64 of the same rounded inputs.
    """
    t = tensors(dtype)
    with po.use_backend(backend):
        out, grads, _ = fused(t, dtype, objective)
    _, truth, true_logps = merged(t, torch.float64, objective)
    _, plain, plain_logps = merged(t, dtype, objective)
    keep = batch().labels != -100
    pairs = [("logps", 2.0, out.stats.logps[keep], plain_logps[keep], true_logps[keep])]
    pairs += [(k, 3.0, grads[k], plain[k], truth[k]) for k in truth]
    floor = torch.finfo(torch.float32).eps
    for name, times, ours, theirs, true in pairs:
        slack = floor * true.abs().max().item()
        for mine, bar in zip(errors(ours, true), errors(theirs, true), strict=True):
            assert mine <= times * bar + slack, name


@each_backend
def test_a1_lora_a_frozen_hidden_trains_the_factors_only(backend):
    """The second epoch of a frozen body: hidden needs no gradient, A and B do."""
    t = tensors(torch.float32)
    _, layer = peft_model(t, torch.float32)
    x = t["hidden"].detach()
    with po.use_backend(backend):
        po.linear_policy_loss(x, po.Head.of(layer), batch(), po.PPOClip()).loss.backward()
    assert layer.lora_A["default"].weight.grad.abs().sum() > 0
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


@each_backend
def test_lora_no_dense_weight_is_formed(backend):
    """Nothing of the base weight's shape: neither W + sBA nor a gradient of W."""
    from torch.utils._python_dispatch import TorchDispatchMode

    shapes = []

    class Spy(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, list | tuple) else (out,):
                view = isinstance(x, torch.Tensor) and x._base is None
                if view and tuple(x.shape) in ((V, D), (D, V)):
                    shapes.append(str(func))
            return out

    t = tensors(torch.float32)
    _, layer = peft_model(t, torch.float32)
    with po.use_backend(backend), Spy():
        po.linear_policy_loss(t["hidden"], po.Head.of(layer), batch(), po.PPOClip()).loss.backward()
    assert not [s for s in shapes if "detach" not in s and s != "aten.t.default"]


@each_backend
def test_lora_linear_token_logps_has_the_same_gradients_as_the_loss(backend):
    t = tensors(torch.float32)
    tokens = batch()
    _, layer = peft_model(t, torch.float32)
    head, x = po.Head.of(layer), t["hidden"]
    params = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    with po.use_backend(backend):
        plain = po.TokenBatch(tokens.labels, tokens.advantages)
        loss = po.linear_policy_loss(x, head, plain, po.WeightedNLL()).loss
        want = torch.autograd.grad(loss, params)
        logps = po.linear_token_logps(x, head, tokens.labels).logps
        count = (tokens.labels != -100).sum()
        got = torch.autograd.grad(-(tokens.advantages * logps).sum() / count, params)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)

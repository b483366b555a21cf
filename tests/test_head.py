"""Head, Head.of on modules and PEFT models, and everything that it must refuse (PROMISES A1, N12).

The installed transformers' forwards are in test_head_models.py.
"""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from pyoffline.head import Head, backbone

V, D = 11, 6


def names(x):
    """Test ids: the words of a row, not its lambdas."""
    return str(x)[:32] if isinstance(x, (str, dict)) else ""


class TinyLM(nn.Module):
    """A causal LM without Hugging Face: an embedding, one layer, a head."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh())
        self.lm_head = nn.Linear(D, V, bias=bias)

    def forward(self, ids):
        return self.lm_head(self.model(ids))


def plain_logits(x, head):
    z = nn.functional.linear(x, head.weight, head.bias)
    for term in head.adapters:
        z = z + term.scale * (term.dropout or nn.Identity())(x) @ term.a.T @ term.b.T
    return head.logit_scale * z


def lora(peft, model=None, adapters=({},), targets=("lm_head",), **settings):
    """TinyLM under PEFT; random B and saved copies, so that every adapter shows in logits."""
    torch.manual_seed(0)
    model = TinyLM(bias=True) if model is None else model
    for i, extra in enumerate(adapters):
        config = peft.LoraConfig(**{"r": 2, "target_modules": list(targets)} | settings | extra)
        if i == 0:
            model = peft.get_peft_model(model, config)
        else:
            model.add_adapter(f"more{i}", config)
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:  # the copy, not the original
            nn.init.normal_(p)
    return model


# The plain record

W, B = torch.randn(V, D), torch.randn(V)
BAD = [  # arguments, exception, words: expected, got or what to do
    ({"weight": torch.ones(V)}, ValueError, "flat; expected"),
    ({"weight": torch.ones(2, V, D)}, ValueError, "2 dimensions"),
    ({"weight": torch.ones(V, D, dtype=torch.int64)}, TypeError, "int64"),
    ({"weight": torch.ones(V, D).to(torch.float8_e4m3fn)}, TypeError, "float8"),
    ({"weight": nn.Linear(D, V)}, TypeError, "Head.of"),
    ({"weight": None}, TypeError, "NoneType"),
    ({"weight": torch.empty(0)}, ValueError, "empty"),
    ({"weight": torch.empty(V, D, device="meta")}, ValueError, "meta"),
    ({"bias": torch.ones(D)}, ValueError, r"\(11,\)"),
    ({"bias": torch.ones(V, 1)}, ValueError, r"\(11, 1\)"),
    ({"bias": torch.empty(V, device="meta")}, ValueError, "meta"),
    ({"bias": torch.ones(V, dtype=torch.int32)}, TypeError, "int32"),
    ({"bias": 0.5}, TypeError, "float"),
    ({"softcap": 0.0}, ValueError, "None"),
    ({"softcap": -1.0}, ValueError, "-1.0"),
    ({"softcap": float("inf")}, ValueError, "inf"),
    ({"softcap": True}, TypeError, "bool"),
    ({"temperature": 0.0}, ValueError, "temperature"),
    ({"temperature": float("nan")}, ValueError, "nan"),
    ({"temperature": None}, TypeError, "NoneType"),
    ({"temperature": torch.ones(3)}, TypeError, "Tensor"),
    ({"logit_scale": 0.0}, ValueError, "not 0"),
    ({"logit_scale": float("-inf")}, ValueError, "inf"),
    ({"logits_dtype": torch.int8}, ValueError, "int8"),
    ({"logits_dtype": "float32"}, ValueError, "float32"),
    ({"vocab_parallel": object()}, NotImplementedError, "vocab"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), BAD, ids=names)
def test_arguments_without_meaning_raise(arguments, error, words):
    with pytest.raises(error, match=words):
        Head(**{"weight": W, "bias": B} | arguments)


def test_a_plain_head_returns_what_it_was_given():
    head = Head(W, B, softcap=3, temperature=0.5, logit_scale=-2, logits_dtype=torch.float64)
    got = head.tensors()
    assert got.weight is W and got.bias is B and got.adapters == ()
    assert (got.softcap, got.temperature, got.logit_scale) == (3.0, 0.5, -2.0)
    assert got.logits_dtype is torch.float64
    assert Head(W).tensors().softcap == 0.0
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):  # noqa: S301 our own
        assert torch.equal(again.tensors().weight, W) and again.tensors().softcap == 3.0


def test_import_needs_only_torch():
    names = "{'transformers', 'peft', 'triton'}"
    code = f"import sys, pyoffline.head; print({names} & set(sys.modules))"
    run = [sys.executable, "-c", code]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "set()\n"


def test_tensors_compile_in_one_graph():
    for head in (Head(W), Head.of(nn.Linear(D, V)), Head.of(TinyLM())):
        run = torch.compile(
            lambda x, head=head: plain_logits(x, head.tensors()), backend="eager", fullgraph=True
        )
        x = torch.randn(3, D)
        assert torch.equal(run(x), plain_logits(x, head.tensors()))


# The module is read at each call


def test_parameters_are_the_modules_own_at_the_time_of_the_call():
    model = TinyLM(bias=True)
    head = Head.of(model)
    assert head.tensors().weight is model.lm_head.weight
    assert head.tensors().bias is model.lm_head.bias
    model.lm_head.weight = nn.Parameter(torch.randn(V, D))
    assert head.tensors().weight is model.lm_head.weight
    model.to(torch.bfloat16)
    assert head.tensors().weight.dtype is torch.bfloat16
    model.lm_head.weight = model.model[0].weight  # tied
    assert head.tensors().weight is model.model[0].weight
    model.lm_head = nn.Linear(D, V + 1)
    assert head.tensors().weight.shape == (V + 1, D)
    linear = nn.Linear(D, V)
    assert Head.of(linear, temperature=2.0).tensors().temperature == 2.0
    assert Head.of(linear).tensors().weight is linear.weight


def test_wrappers_are_unwrapped():
    model = TinyLM()
    for wrapped in (torch.compile(model, backend="eager"), nn.DataParallel(model)):
        assert Head.of(wrapped).tensors().weight is model.lm_head.weight
        assert backbone(wrapped) is model.model


def test_copies_read_their_own_module():
    head = Head.of(TinyLM())
    for again in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):  # noqa: S301 our own
        ours, theirs = head.tensors().weight, again.tensors().weight
        assert torch.equal(ours, theirs) and ours is not theirs


def test_backbone_of_what_has_none():
    with pytest.raises(TypeError, match="base_model"):
        backbone(nn.Linear(D, V))


# PEFT


def disable(model):
    model.base_model.disable_adapter_layers()
    return model


def activate(model, names):
    model.base_model.set_adapter(names)
    return model


def merge(model):
    model.merge_adapter()
    return model


def freeze(model):
    return model.requires_grad_(False)


TWO = ({"r": 2}, {"r": 3, "lora_alpha": 7})
PEFT_CASES = [  # name, how it is made, number of LoRA terms
    ("one adapter", lambda p: lora(p), 1),
    ("scale alpha / r", lambda p: lora(p, lora_alpha=5, r=4), 1),
    ("scale alpha / sqrt(r)", lambda p: lora(p, lora_alpha=5, r=4, use_rslora=True), 1),
    (
        "two adapters, both active",
        lambda p: activate(lora(p, adapters=TWO), ["default", "more1"]),
        2,
    ),
    ("two adapters, the second active", lambda p: activate(lora(p, adapters=TWO), "more1"), 1),
    ("disabled", lambda p: disable(lora(p)), 0),
    ("merged and frozen", lambda p: freeze(merge(lora(p))), 0),
    ("frozen", lambda p: freeze(lora(p)), 1),
    ("LoRA elsewhere", lambda p: lora(p, targets=["model.1"]), 0),
    (
        "head saved as a whole",
        lambda p: lora(p, targets=["model.1"], modules_to_save=["lm_head"]),
        0,
    ),
    (
        "head saved as a whole, disabled",
        lambda p: disable(lora(p, targets=["model.1"], modules_to_save=["lm_head"])),
        0,
    ),
    ("dropout in eval mode", lambda p: lora(p, lora_dropout=0.5).eval(), 1),
]


@pytest.mark.parametrize(("name", "make", "terms"), PEFT_CASES, ids=names)
def test_peft_heads_give_pefts_logits_and_gradients(name, make, terms):
    model = make(pytest.importorskip("peft"))
    head, ids = Head.of(model).tensors(), torch.arange(8).view(2, 4)
    assert len(head.adapters) == terms
    logits = (model(ids), plain_logits(backbone(model)(ids), head))
    assert (logits[0] - logits[1]).abs().max() <= 1e-5, name
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if not trained:
        return
    up = torch.randn_like(logits[0])
    want, got = (
        torch.autograd.grad(z, trained.values(), up, allow_unused=True, retain_graph=True)
        for z in logits
    )
    for n, a, b in zip(trained, want, got, strict=True):
        assert a is not None and (a - b).abs().max() <= 1e-5, (name, n)


def test_dropout_in_training_is_returned():
    model = lora(pytest.importorskip("peft"), lora_dropout=0.5).train()
    assert Head.of(model).tensors().adapters[0].dropout.p == 0.5
    assert lora_terms(lora(pytest.importorskip("peft"))).dropout is None  # p = 0 is an Identity


def lora_terms(model):
    return Head.of(model).tensors().adapters[0]


def test_lora_factors_are_the_modules_own():
    model = lora(pytest.importorskip("peft"))
    layer, term = model.base_model.model.lm_head, lora_terms(model)
    assert term.a is layer.lora_A["default"].weight and term.b is layer.lora_B["default"].weight
    assert Head.of(layer).tensors().adapters[0].a is term.a  # the layer without its model


def test_no_head_with_learned_prompts_in_front():
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": D, "n_layer": 1, "n_head": 1, "vocab_size": V, "n_positions": 16}
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = peft.get_peft_model(gpt, config)
    assert Head.of(model).tensors().weight is gpt.lm_head.weight
    with pytest.raises(NotImplementedError, match="prompts"):
        backbone(model)


# What must never train in silence


def with_head(change):
    model = TinyLM(bias=True)
    change(model)
    return model


def weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)


def old_weight_norm(model):
    nn.utils.weight_norm(model.lm_head)


def subclassed(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.lm_head = Doubled(D, V)


def quantised(model):
    model.lm_head = torch.ao.nn.quantized.dynamic.Linear(D, V)


def replaced_forward(model):
    model.lm_head.forward = lambda x: x


def extra_parameter(model):
    model.lm_head.magnitude = nn.Parameter(torch.ones(V))


def subclass_tensor(model):
    class Packed(torch.Tensor):
        pass

    weight = torch.randn(V, D).as_subclass(Packed)
    del model.lm_head.weight
    model.lm_head.weight = weight


def deep_head(model):
    model.lm_head, inner = None, nn.Sequential(nn.LayerNorm(D), nn.Linear(D, V))
    model.tail = inner
    model.get_output_embeddings = lambda: inner[1]


def hook(kind):
    return lambda model: getattr(model.lm_head, kind)(lambda *_: None)


def of_peft(**settings):
    return lambda: lora(pytest.importorskip("peft"), **settings)


def disabled_but_merged():
    return disable(merge(freeze(of_peft()())))


def another_tuner():
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(
        TinyLM(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[])
    )


REFUSED = [  # name, model, exception, words
    ("parametrised", lambda: with_head(weight_norm), TypeError, "parametrised"),
    ("weight_norm by hook", lambda: with_head(old_weight_norm), TypeError, "_forward_pre_hooks"),
    ("forward hook", lambda: with_head(hook("register_forward_hook")), TypeError, "_forward_hooks"),
    (
        "backward hook",
        lambda: with_head(hook("register_full_backward_hook")),
        TypeError,
        "_backward_hooks",
    ),
    ("subclass with a forward", lambda: with_head(subclassed), TypeError, "Doubled"),
    ("quantised", lambda: with_head(quantised), TypeError, "quantized"),
    ("instance forward", lambda: with_head(replaced_forward), TypeError, "replaced forward"),
    ("parameter unknown", lambda: with_head(extra_parameter), NotImplementedError, "magnitude"),
    ("tensor subclass", lambda: with_head(subclass_tensor), TypeError, "Packed"),
    ("head inside a head", lambda: with_head(deep_head), TypeError, "inside another module"),
    ("DoRA", of_peft(use_dora=True), NotImplementedError, "DoRA"),
    ("LoRA with bias", of_peft(lora_bias=True), NotImplementedError, "lora_bias"),
    ("merged and trained", lambda: merge(of_peft()()), NotImplementedError, "lora_A"),
    ("disabled but merged", disabled_but_merged, NotImplementedError, "unmerge_adapter"),
    ("another tuner", another_tuner, TypeError, "ia3"),
    ("no head", lambda: nn.Sequential(nn.Linear(D, V)), TypeError, "no output embedding"),
    ("not a module", lambda: SimpleNamespace(lm_head=nn.Linear(D, V)), TypeError, "nn.Module"),
]


@pytest.mark.parametrize(("name", "make", "error", "words"), REFUSED, ids=names)
def test_an_unknown_head_raises(name, make, error, words):
    with pytest.raises(error, match=words):
        Head.of(make()).tensors()


def test_merged_adapters_may_score():
    model = merge(lora(pytest.importorskip("peft")))
    with torch.no_grad():
        assert Head.of(model).tensors().adapters == ()

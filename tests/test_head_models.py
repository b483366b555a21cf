"""Head.of and backbone against the installed transformers: tiny models, and forwards as text.

Truth is `model(input_ids).logits` in fp32. The config values are chosen so that a missing scale,
softcap or cut shows.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import torch

from pyoffline.head import Head, HeadTensors, backbone, output_table
from pyoffline.head_rules import OPS, OUTPUT_RULES

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 67,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,  # logits of size 6: a softcap or a scale that is missed is seen
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "logits_scaling": 3.0,
    "logit_scale": 0.25,
    "final_logit_softcapping": 0.7,
    "logits_soft_cap": 0.7,
    "lm_head_multiplier": 0.3,
    "logits_mup_width_multiplier": 3.0,
    "unpadded_vocab_size": 61,
}
FFN = {"ffn_dim": 32, "word_embed_proj_dim": 16}
MAMBA = {"mamba_d_ssm": 16, "mamba_n_heads": 2, "mamba_d_head": 8, "mamba_d_state": 8}
MAMBA |= {"mamba_n_groups": 1, "mamba_chunk_size": 8}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
MLA = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4}
MLA |= {"v_head_dim": 8, "head_dim": 4, "num_key_value_heads": 2, "dim_model_base": 4}

MODELS = [  # model type, what its config needs besides TINY, why it is here
    ("llama", {}, "the plain case"),
    ("llama", {"tie_word_embeddings": True}, "tied embeddings"),
    ("mistral", {}, "plain"),
    ("qwen2", {}, "plain"),
    ("qwen3", {}, "plain"),
    ("gemma", {}, "tied by default, embeddings scaled in the backbone"),
    ("gemma2", {}, "softcap"),
    ("gemma2", {"final_logit_softcapping": None}, "softcap switched off"),
    ("gemma3_text", {}, "softcap"),
    ("vaultgemma", {}, "softcap"),
    ("nanochat", {}, "softcap"),
    ("recurrent_gemma", {"block_types": ["attention"], "lru_width": 16}, "softcap, own name"),
    ("phi", {}, "bias on the head"),
    ("phi3", {}, "plain"),
    ("gpt2", GPT, "tied, base model called transformer"),
    ("gpt_neox", {}, "embed_out in older versions"),
    ("gpt_neox_japanese", {}, "head called embed_out"),
    ("biogpt", {}, "head called output_projection"),
    ("rwkv", {}, "head called head"),
    ("mamba", {}, "base model called backbone"),
    ("granite", {}, "divides by logits_scaling"),
    ("granitemoe", {}, "divides by logits_scaling, MoE"),
    ("granitemoeshared", {}, "divides by logits_scaling, MoE"),
    ("hyperclovax", {}, "multiplies by logits_scaling: Granite's name, the other way round"),
    ("cohere", {}, "multiplies by logit_scale"),
    ("cohere2", {}, "multiplies by logit_scale"),
    ("falcon_h1", MAMBA, "multiplies by lm_head_multiplier"),
    ("minicpm3", MLA, "hidden / (hidden_size / dim_model_base)"),
    ("inkling_text", {}, "hidden / logits_mup_width_multiplier, padded rows cut off"),
    ("inkling2_text", {}, "softcap, padded rows cut off"),
    ("mpt", {"d_model": 16, "n_heads": 2, "n_layers": 2}, "logit_scale in the config, never read"),
    ("olmo2", {}, "plain"),
    ("olmoe", {}, "MoE"),
    ("mixtral", {}, "MoE"),
    ("qwen3_moe", {}, "MoE"),
    ("falcon", {}, "plain"),
    ("bloom", {"n_layer": 2, "n_head": 2}, "embedding norm in the backbone"),
    ("opt", FFN, "decoder inside the base model"),
    ("stablelm", {}, "plain"),
    ("starcoder2", {}, "plain"),
]


def tiny(kind: str, extra: dict):
    """A tiny random model of `kind`; TINY's keys that the config does not have are left out."""
    config_class = transformers.CONFIG_MAPPING[kind]
    default = config_class()
    has = set(default.to_dict()) | set(getattr(default, "attribute_map", {}))
    config = config_class(**{k: v for k, v in TINY.items() if k in has} | extra)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def plain_logits(x: torch.Tensor, head: HeadTensors) -> torch.Tensor:
    """The formula of HeadTensors' docstring."""
    z = torch.nn.functional.linear(x, head.weight, head.bias)
    for term in head.adapters:
        z = z + term.scale * (term.dropout or torch.nn.Identity())(x) @ term.a.T @ term.b.T
    z = head.logit_scale * z
    if head.softcap > 0:
        z = head.softcap * torch.tanh(z / head.softcap)
    return z / head.temperature


@pytest.mark.parametrize(
    ("kind", "extra", "reason"),
    MODELS,
    ids=[f"{kind}-{i}" for i, (kind, _, _) in enumerate(MODELS)],
)
def test_logits_and_gradients_are_the_models_own(kind, extra, reason):
    model = tiny(kind, extra)
    ids = torch.randint(3, 60, (2, 8))
    want = model(input_ids=ids, use_cache=False).logits
    head = Head.of(model).tensors()
    hidden = backbone(model)(input_ids=ids, use_cache=False)[0]
    got = plain_logits(hidden, head)
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5, reason

    up = torch.randn_like(want)
    trained = dict(model.named_parameters())
    grads = [
        dict(
            zip(
                trained,
                torch.autograd.grad(z, trained.values(), up, allow_unused=True),
                strict=True,
            )
        )
        for z in (want, got)
    ]
    for name in trained:
        assert (grads[0][name] is None) == (grads[1][name] is None), (reason, name)
        if grads[0][name] is not None:
            scale = grads[0][name].abs().max().clamp(min=1.0)
            assert (grads[1][name] - grads[0][name]).abs().max() <= 2e-5 * scale, (reason, name)


REFUSED = [  # model type, what its config needs, words of the error
    ("bert", {"is_decoder": True}, "inside another module"),  # dense and norm before the decoder
    ("roberta", {"is_decoder": True}, "inside another module"),
    ("modernbert-decoder", {}, "more than one Linear"),
    ("electra", {"is_decoder": True, "embedding_size": 16}, "more than one Linear"),
]


@pytest.mark.parametrize(("kind", "extra", "words"), REFUSED)
def test_a_deep_head_is_refused(kind, extra, words):
    with pytest.raises((TypeError, NotImplementedError), match=words):
        Head.of(tiny(kind, extra))


def llama_with(**attributes):
    model = tiny("llama", {})
    for name, value in attributes.items():
        setattr(model.config, name, value)
    return model


ATTRIBUTES = [  # config attributes of a model type without a row, and whether they raise
    ({"final_logit_softcapping": 30.0}, True, "known elsewhere, not for this forward"),
    ({"final_logit_softcapping": None}, False, "off"),
    ({"logit_scale": 0.5}, True, "a factor"),
    ({"logit_scale": 1.0}, False, "a factor of 1"),
    ({"logits_softcap": 1.0}, True, "a cap of 1 is not off"),
    ({"mup_width_multiplier": 8.0}, True, "Phi-3-small"),
    ({"output_multiplier_scale": 0.1}, True, "Grok"),
    ({"use_mup_logit_scale": True}, True, "a switch that is on"),
    ({"use_mup_logit_scale": False}, False, "a switch that is off"),
    ({"dim_model_base": 256}, True, "MiniCPM under another name"),
    ({"attn_logit_softcapping": 50.0}, False, "attention's"),
    ({"router_logit_softcapping": 30.0}, False, "the router's"),
    ({"lm_head_bias": True}, False, "the module shows it"),
]


@pytest.mark.parametrize(("attributes", "raises", "reason"), ATTRIBUTES)
def test_unknown_config_attributes(attributes, raises, reason):
    model = llama_with(**attributes)
    if not raises:
        Head.of(model)
        return
    with pytest.raises(NotImplementedError, match=next(iter(attributes))) as error:
        Head.of(model)
    assert "OUTPUT_RULES" in str(error.value), reason


def test_a_row_may_be_added(monkeypatch):
    from pyoffline.head_rules import OutputRule

    model = llama_with(logit_scale=0.5)
    monkeypatch.setitem(OUTPUT_RULES, "llama", (OutputRule("multiply", "logit_scale"),))
    assert Head.of(model).tensors().logit_scale == 0.5


def test_remote_minicpm():
    """model_type minicpm is not in transformers; its remote code divides the hidden states."""
    model = llama_with(model_type="minicpm", dim_model_base=4)
    assert Head.of(model).tensors().logit_scale == 4 / 16


def test_a_bias_behind_scaled_hidden_states_is_refused():
    model = llama_with(model_type="minicpm", dim_model_base=4)
    model.lm_head = torch.nn.Linear(16, 67, bias=True)
    with pytest.raises(NotImplementedError, match="bias"):
        Head.of(model).tensors()


def test_a_multimodal_forward_decides_not_its_text_config():
    """Llava around Gemma 2 applies no softcap in transformers: no row, so it raises."""
    text = transformers.Gemma2Config(**{k: TINY[k] for k in ("vocab_size", "hidden_size")})
    model = llama_with(model_type="llava", text_config=text, get_text_config=lambda: text)
    with pytest.raises(NotImplementedError, match="final_logit_softcapping"):
        Head.of(model)


def test_the_table_prints_every_row():
    lines = output_table().split("\n")
    assert len(lines) == len(OUTPUT_RULES)
    assert all(rule.op in OPS for rules in OUTPUT_RULES.values() for rule in rules)
    assert any(line.split() == "granite logits / config.logits_scaling".split() for line in lines)


# The installed transformers as text: what every forward does around its head

HEADS = {
    "lm_head",
    "embed_out",
    "output_projection",
    "output",
    "head",
    "lm_loss",
    "proj_out",
    "cls",
}
BODIES = {"model", "transformer", "backbone", "base_model"}
EXCUSED = {  # forwards without a head call of their own: the head lies deeper, and find_head raises
    **dict.fromkeys(("musicgen", "musicgen_melody"), "a ModuleList of heads"),
    **dict.fromkeys(
        ("blip", "blip-2", "instructblip", "instructblipvideo"), "inner language model"
    ),
    **dict.fromkeys(
        ("kosmos-2", "kosmos-2.5", "llama4", "nemotron_h_omni"), "inner language model"
    ),
    "xlm": "pred_layer.proj, inside XLMPredLayer",
    "pi0": "no logits: predicts actions",
}


def is_self_call(node, names=None) -> bool:
    func = getattr(node, "func", None)
    mine = isinstance(func, ast.Attribute) and getattr(func.value, "id", None) == "self"
    return mine and bool(node.args) and (names is None or func.attr in names)


def strip_casts(node):
    while isinstance(node, ast.Call) and getattr(node.func, "attr", "") in (
        "float",
        "contiguous",
        "to",
    ):
        node = node.func.value
    return node


def names_in(node) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def oddities(cls: ast.ClassDef) -> list[str]:
    """The statements of forward that change hidden states or logits around the head call."""
    forward = next(n for n in cls.body if getattr(n, "name", "") == "forward")
    assigns = [n for n in ast.walk(forward) if isinstance(n, (ast.Assign, ast.AugAssign))]
    heads = [a for a in assigns if any(is_self_call(n, HEADS) for n in ast.walk(a.value))]
    if not heads:
        return ["no head call"]
    first = heads[0]
    call = strip_casts(first.value)
    if not is_self_call(call, HEADS):
        return [ast.unparse(first)]
    arg, out = strip_casts(call.args[0]), ast.unparse(first.targets[0])
    odd = [] if isinstance(arg, (ast.Name, ast.Attribute, ast.Subscript)) else [ast.unparse(first)]
    for a in assigns:
        targets = a.targets if isinstance(a, ast.Assign) else [a.target]
        written = set().union(*map(names_in, targets))
        if a.lineno > first.lineno and out in written and ast.unparse(strip_casts(a.value)) != out:
            odd.append(ast.unparse(a))
        if a.lineno < first.lineno and written & names_in(arg):
            arithmetic = any(isinstance(n, ast.BinOp) for n in ast.walk(a.value))
            layer = is_self_call(a.value) and not is_self_call(a.value, BODIES)
            if arithmetic or layer or isinstance(a, ast.AugAssign):
                odd.append(ast.unparse(a))
    return odd


def forwards_of_transformers() -> dict[str, ast.ClassDef]:
    """Every class of the installed modeling files whose text calls something for logits."""
    root = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    classes = {}
    for path in root.glob("*/modeling_*.py"):
        for text in re.split(r"\n(?=class )", path.read_text(encoding="utf-8")):
            name = re.match(r"class (\w+)\(", text)
            if name and "logits" in text:
                body = re.split(r"\n(?=[^\s)])", text)[0]  # up to the next top-level statement
                classes[name[1]] = ast.parse(body).body[0]
    return classes


def test_every_installed_forward_is_plain_or_has_a_row():
    from transformers.models.auto import modeling_auto as auto

    classes = forwards_of_transformers()
    names = (
        *auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items(),
        *auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items(),
    )
    checked, missing = 0, {}
    for kind, value in names:
        for name in (value,) if isinstance(value, str) else value:
            if name not in classes or not any(
                getattr(n, "name", "") == "forward" for n in classes[name].body
            ):
                missing[kind] = [f"{name}: no forward found"]
                continue
            checked += 1
            odd = oddities(classes[name])
            covered = kind in OUTPUT_RULES or kind in EXCUSED
            if odd and not covered and not transformers.CONFIG_MAPPING[kind]().is_encoder_decoder:
                missing[kind] = odd
    assert checked >= 150
    assert not missing

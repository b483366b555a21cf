"""How a module is read as a head: which Linear, which LoRA terms, which scale and softcap behind it.

Duck-typed: transformers and peft are never imported; a PEFT class is recognised by identity with the one in sys.modules.
Nothing is guessed: a wrapper, hook, config attribute or trainable parameter that is not known here raises.
`OUTPUT_RULES` says what each Hugging Face forward does between its head and its logits. Not done here: any arithmetic on
hidden or logits.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BY_HAND = (
    "build it by hand inside the wrapped forward: Head(module.weight, softcap=..., logit_scale=...)"
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA term: `logits += scale * dropout(x) @ a.T @ b.T`, before logit_scale, softcap and temperature."""

    a: Tensor  # [r, D] the Parameter itself
    b: Tensor  # [V, r] the Parameter itself
    scale: float
    dropout: nn.Module | None  # None: no dropout (p = 0, Identity, or eval mode)


class OutputRule(NamedTuple):
    """One thing that a model's forward does between its head and its logits."""

    op: str  # multiply | divide | divide_hidden | divide_hidden_by_ratio | softcap | first_rows | ignored | refuse
    attribute: str  # of the (text) config; of "refuse": what the forward does


class ReadRule(NamedTuple):
    """The rules of one model, evaluated on its config."""

    scale: float
    softcap: float | None
    rows: int | None  # logits are the first `rows` of V; None: all


SOFTCAP = OutputRule("softcap", "final_logit_softcapping")
DIVIDE = OutputRule("divide", "logits_scaling")
COHERE = OutputRule("multiply", "logit_scale")
HYPERCLOVA = OutputRule(
    "multiply", "logits_scaling"
)  # the same name as Granite's, the other way round
MUSE = (OutputRule("multiply", "output_multiplier"), SOFTCAP)
INKLING = (
    OutputRule("divide_hidden", "logits_mup_width_multiplier"),
    OutputRule("first_rows", "unpadded_vocab_size"),
)
INKLING2 = (SOFTCAP, OutputRule("first_rows", "unpadded_vocab_size"))
ASSISTANT = (
    OutputRule(
        "refuse", "projects the hidden states and may mask the vocabulary (masked_embedding)"
    ),
)
HIDDEN_HEAD = (
    OutputRule("refuse", "puts more than one Linear between the last hidden states and the logits"),
)

# config.model_type -> rules. Read from the forward of each class in transformers 5.23; tests/test_head.py reads the
# installed one again and fails on a model that is missing here. Add a row for a model of your own.
OUTPUT_RULES: dict[str, tuple[OutputRule, ...]] = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"), (SOFTCAP,)
    ),
    **dict.fromkeys(
        ("gemma4_unified", "gemma4_unified_text", "vaultgemma", "nanochat", "beam"), (SOFTCAP,)
    ),
    **dict.fromkeys(("paligemma", "mistral_large4"), (SOFTCAP,)),
    "recurrent_gemma": (OutputRule("softcap", "logits_soft_cap"),),
    **dict.fromkeys(
        ("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), (DIVIDE,)
    ),
    **dict.fromkeys(("granitemoehybrid", "granite4_vision", "granite_docling"), (DIVIDE,)),
    **dict.fromkeys(
        ("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"), (COHERE,)
    ),
    **dict.fromkeys(("hyperclovax", "hyperclovax_vision_v2"), (HYPERCLOVA,)),
    "falcon_h1": (OutputRule("multiply", "lm_head_multiplier"),),
    "minicpm3": (
        OutputRule("divide_hidden", "logits_scaling"),
        OutputRule("ignored", "dim_model_base"),
    ),
    "minicpm": (
        OutputRule("divide_hidden_by_ratio", "dim_model_base"),
    ),  # remote code: hidden_size / dim_model_base
    **dict.fromkeys(("muse_glimmer", "muse_spark"), MUSE),
    **dict.fromkeys(("inkling_text", "inkling_mm_model"), INKLING),
    **dict.fromkeys(("inkling2", "inkling2_text"), INKLING2),
    # The config has the attribute, the forward of this class does not read it.
    "gemma3": (OutputRule("ignored", "final_logit_softcapping"),),
    **dict.fromkeys(("aya_vision", "cohere2_vision"), (OutputRule("ignored", "logit_scale"),)),
    **dict.fromkeys(
        ("granite_speech", "granite_speech_plus"), (OutputRule("ignored", "logits_scaling"),)
    ),
    "mpt": (OutputRule("ignored", "logit_scale"),),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), ASSISTANT),
    "chameleon": (OutputRule("refuse", "masks the image tokens' logits"),),
    "clvp": (OutputRule("refuse", "applies final_norm between the backbone and the head"),),
    "prophetnet": (OutputRule("refuse", "predicts n-gram streams"),),
    **dict.fromkeys(("modernbert-decoder", "electra"), HIDDEN_HEAD),
}

# A config attribute that looks like something done to the logits, and those that look like it and are not.
SUSPECT = re.compile(
    r"(logit|lm_head|output|mup|unembed).*(scal|mult|cap|temp|soft|norm|clip|width|bias)"
    r"|(scal|mult|cap|temp|soft|norm|clip|width).*(logit|lm_head|output|unembed)|^mup_|dim_model_base|unpadded_vocab"
)
HARMLESS = re.compile(
    r"attn|attention|router|moe|expert|logit_scale_init_value|mup_enabled|lm_head_bias|use_mup|output_norm|z_loss"
    r"|text_output|vision|audio|image|projector|dropout|init"
)


def output_table() -> str:
    """The rules of `OUTPUT_RULES` as text, one model type a line: what its forward does between head and logits."""
    words = {
        "multiply": "logits * config.{}",
        "divide": "logits / config.{}",
        "divide_hidden": "hidden / config.{}",
        "divide_hidden_by_ratio": "hidden / (config.hidden_size / config.{})",
        "softcap": "c * tanh(logits / c), c = config.{}",
        "first_rows": "logits[..., :config.{}]",
        "ignored": "config.{} is not read",
        "refuse": "NotImplementedError: {}",
    }
    width = max(map(len, OUTPUT_RULES))
    lines = (
        f"{kind:<{width}}  " + "; ".join(words[rule.op].format(rule.attribute) for rule in rules)
        for kind, rules in sorted(OUTPUT_RULES.items())
    )
    return "\n".join(lines)


# ---- the model ----


def unwrap(model: Any) -> nn.Module:
    """The causal LM inside DDP, torch.compile, DeepSpeed, FSDP1 and PEFT wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"Head.of: expected an nn.Module, got {type(model).__name__}; for tensors use Head(weight, bias)"
        )
    while True:
        name = type(model).__name__
        if name == "OptimizedModule":
            model = model._orig_mod
        elif name in (
            "DistributedDataParallel",
            "DataParallel",
            "DeepSpeedEngine",
            "FullyShardedDataParallel",
        ):
            model = model.module
        elif callable(getattr(model, "get_base_model", None)) and hasattr(model, "peft_config"):
            model = model.get_base_model()
        else:
            return model


def find_head(lm: nn.Module) -> nn.Module:
    """The output embedding of `lm`: itself if Linear-like, `get_output_embeddings()`, or `.lm_head`; a direct child."""
    if isinstance(lm, nn.Linear) or is_peft(lm, "peft.tuners.lora.layer", "Linear"):
        return lm
    getter = getattr(lm, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    head = getattr(lm, "lm_head", None) if head is None else head
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"Head.of: {type(lm).__name__} has no output embedding (get_output_embeddings() or .lm_head); expected a causal "
            f"LM or an nn.Linear. Pass the module that makes the logits, or {BY_HAND}"
        )
    if not any(child is head for child in lm.children()):
        raise TypeError(
            f"Head.of: the output embedding of {type(lm).__name__} ({type(head).__name__}) is inside another module, which may "
            f"transform the hidden states first. Pass the inner causal LM, or the Linear itself with its own input as hidden"
        )
    return head


def backbone(model: nn.Module) -> nn.Module:
    """The module that maps input_ids to last hidden states [B, T, D] and forms no logits.

    `Head.of(model)` applied to `backbone(model)(**inputs)[0]` gives `model(**inputs).logits`. Raises TypeError where there is
    none (a bare Linear), NotImplementedError for prompt-learning PEFT models, whose prompts live outside the backbone.
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(
        getattr(c, "is_prompt_learning", False) for c in configs.values()
    ):
        raise NotImplementedError(
            f"backbone: {type(model).__name__} adds learned prompts outside its base model; call the model with "
            "output_hidden_states=True and use hidden_states[-1]"
        )
    lm = unwrap(model)
    inner = getattr(lm, "base_model", None)
    for name in ("model", "transformer", "backbone"):
        if inner is None or inner is lm:
            inner = getattr(lm, name, None)
    if not isinstance(inner, nn.Module) or inner is lm:
        raise TypeError(
            f"backbone: {type(lm).__name__} has no base_model, .model or .transformer; expected a causal LM. "
            "Call the part that makes the hidden states yourself"
        )
    return inner


def read_output_rule(lm: nn.Module) -> ReadRule:
    """What `lm.forward` does between its head and its logits, as numbers; raises where that is not in `OUTPUT_RULES`."""
    config = getattr(lm, "config", None)
    if config is None or isinstance(lm, nn.Linear):
        return ReadRule(1.0, None, None)
    kind = getattr(config, "model_type", None)
    where = f"Head.of: {type(lm).__name__} (model_type {kind!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{where} is an encoder-decoder; expected a decoder-only causal LM. Or {BY_HAND}"
        )
    text = text_config(config)
    rules = OUTPUT_RULES.get(kind, ())
    scale, softcap, rows = 1.0, None, None
    for rule in rules:
        if rule.op == "refuse":
            raise NotImplementedError(
                f"{where}: its forward {rule.attribute}; no Head does that. Train it on its own logits"
            )
        value = getattr(text, rule.attribute, getattr(config, rule.attribute, None))
        if value is None or rule.op == "ignored":
            continue
        if rule.op == "softcap":
            softcap = float(value)
        elif rule.op == "first_rows":
            rows = int(value)
        elif rule.op == "multiply":
            scale *= float(value)
        elif rule.op == "divide_hidden_by_ratio":
            scale *= float(value) / float(text.hidden_size)
        else:
            scale /= float(value)
    refuse_unknown_attributes(where, (config, text), {rule.attribute for rule in rules})
    return ReadRule(scale, softcap, rows)


def text_config(config: Any) -> Any:
    """The config of the text decoder: itself, or `get_text_config()` of a multimodal one."""
    getter = getattr(config, "get_text_config", None)
    if not callable(getter):
        return config
    try:
        return getter()
    except ValueError:  # transformers: more than one text config
        return config


def refuse_unknown_attributes(where: str, configs: tuple[Any, ...], known: set[str]) -> None:
    """Raises NotImplementedError for a set, non-neutral config attribute that looks like a transformation of logits."""
    for config in configs:
        for name, value in vars(config).items():
            if name in known or not SUSPECT.search(name) or HARMLESS.search(name):
                continue
            if (
                value is None
                or isinstance(value, (bool, str, dict, list, tuple))
                and not value
                or value in (0, 1)
            ):
                continue
            raise NotImplementedError(
                f"{where}: config.{name} = {value!r} looks like something done to the logits, and no row of "
                f"pyoffline.head_hf.OUTPUT_RULES says what. Add OUTPUT_RULES[{getattr(configs[0], 'model_type', None)!r}] = "
                f"(OutputRule(op, {name!r}),) with what forward does (op 'ignored' if nothing), or {BY_HAND}"
            )


# ---- the head module ----


class LinearParts(NamedTuple):
    """One head module, read."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...]


def read_model(model: nn.Module, *, prescaled: bool) -> LinearParts:
    """Weight, bias and LoRA terms of `model`'s head now, cut to the rows that its forward keeps."""
    lm = unwrap(model)
    head = find_head(lm)
    parts = read_linear(head, check_values=True)
    refuse_unused_parameters(head, parts)
    rule = read_output_rule(lm)
    if parts.bias is not None and prescaled and divides_hidden(lm):
        raise NotImplementedError(
            f"Head.of: {type(lm).__name__} scales its hidden states and its head has a bias, which logit_scale would scale too"
        )
    if rule.rows is None or rule.rows >= parts.weight.shape[0]:
        return parts
    adapters = tuple(Adapter(x.a, x.b[: rule.rows], x.scale, x.dropout) for x in parts.adapters)
    bias = None if parts.bias is None else parts.bias[: rule.rows]
    return LinearParts(parts.weight[: rule.rows], bias, adapters)


def divides_hidden(lm: nn.Module) -> bool:
    """Whether the scale of `lm` is applied before its head, where a bias would not be scaled."""
    rules = OUTPUT_RULES.get(getattr(getattr(lm, "config", None), "model_type", None), ())
    return any(rule.op.startswith("divide_hidden") for rule in rules)


def is_peft(module: nn.Module, where: str, name: str) -> bool:
    """Whether module's class is exactly peft's; a subclass may compute something else."""
    loaded = sys.modules.get(where)
    return loaded is not None and type(module) is getattr(loaded, name, None)


def read_linear(module: nn.Module, *, check_values: bool) -> LinearParts:
    """Reads nn.Linear, peft's LoRA Linear or modules_to_save around one; any other class raises TypeError."""
    if is_peft(module, "peft.utils.other", "ModulesToSaveWrapper"):
        return read_linear(saved_module(module), check_values=check_values)
    if is_peft(module, "peft.tuners.lora.layer", "Linear"):
        base = read_linear(module.base_layer, check_values=check_values)
        return base._replace(adapters=base.adapters + read_lora(module))
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if (
        not isinstance(module, nn.Linear)
        or kind.forward is not nn.Linear.forward
        or hasattr(module, "parametrizations")
    ):
        raise TypeError(
            f"Head.of: the head is {name}; expected nn.Linear, peft's LoRA Linear or modules_to_save around one. A quantised, "
            f"parametrised or other wrapper would be bypassed in silence: merge or remove it, or {BY_HAND}"
        )
    weight, bias = module.weight, module.bias
    if check_values:
        weight = gathered("weight", weight)
        bias = None if bias is None else gathered("bias", bias)
    refuse_hooks(module, name)
    return LinearParts(weight, bias, ())


def saved_module(wrapper: nn.Module) -> nn.Module:
    """The module that peft's ModulesToSaveWrapper.forward calls now."""
    active = wrapper.active_adapters
    if (
        wrapper.disable_adapters
        or not active
        or any(name not in wrapper.modules_to_save for name in active)
    ):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def read_lora(layer: nn.Module) -> tuple[Adapter, ...]:
    """The LoRA terms that peft's Linear.forward adds now: the active ones, none if disabled or merged."""
    if layer.disable_adapters:
        if layer.merged:
            raise NotImplementedError(
                "Head.of: the head's LoRA is disabled but merged into the weight (peft unmerges at its next forward); "
                "call model.unmerge_adapter() first"
            )
        return ()
    if layer.merged:
        return ()
    adapters = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        variant = layer.lora_variant.get(name) if hasattr(layer, "lora_variant") else None
        down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
        if variant is not None or layer.use_dora.get(name):
            label = "DoRA" if layer.use_dora.get(name) else type(variant).__name__
            raise NotImplementedError(
                f"Head.of: the head's adapter {name!r} is {label}; expected plain LoRA. Take lm_head out of target_modules"
            )
        if down.bias is not None or up.bias is not None:
            raise NotImplementedError(
                f"Head.of: the head's adapter {name!r} has a bias (lora_bias=True); expected none. Set lora_bias=False"
            )
        idle = (
            isinstance(dropout, nn.Identity)
            or not dropout.training
            or getattr(dropout, "p", None) == 0.0
        )
        for part in (down, up):
            refuse_hooks(part, f"lora factor of adapter {name!r}")
        a, b = gathered("lora_A", down.weight), gathered("lora_B", up.weight)
        adapters.append(Adapter(a, b, float(layer.scaling[name]), None if idle else dropout))
    return tuple(adapters)


# ---- what must not pass in silence ----


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises TypeError if calling `module` would run something besides F.linear that may change its output or weight."""
    if any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        return  # its hooks gather and free the weight: check_gathered sees whether they have
    hooks = [
        kind
        for kind in (
            "_forward_pre_hooks",
            "_forward_hooks",
            "_backward_hooks",
            "_backward_pre_hooks",
        )
        if getattr(module, kind, None)
    ]
    patched = module.__dict__.get("forward")
    hook = getattr(module, "_hf_hook", None)
    if patched is not None and not (type(hook).__name__ == "AlignDevicesHook" and not hook.offload):
        hooks.append(
            f"a replaced forward ({type(hook).__name__ if hook is not None else 'instance attribute'})"
        )
    if hooks:
        raise TypeError(
            f"Head.of: {name} has {', '.join(hooks)}, which a loss that reads the weight would bypass; expected none. "
            f"Remove them (weight_norm, spectral_norm: remove_*), or {BY_HAND}"
        )


def refuse_unused_parameters(head: nn.Module, parts: LinearParts) -> None:
    """Raises NotImplementedError if a trainable parameter of the head gets no gradient from `parts`."""
    if not torch.is_grad_enabled():
        return
    used = {id(t) for t in (parts.weight, parts.bias)} | {
        id(t) for x in parts.adapters for t in (x.a, x.b)
    }
    unused = [name for name, p in head.named_parameters() if p.requires_grad and id(p) not in used]
    if unused:
        raise NotImplementedError(
            f"Head.of: trainable parameters of the head that its forward does not use now: {unused}; they would get no "
            "gradient. Unmerge or enable the adapter, freeze them (requires_grad_(False)), or call under torch.no_grad()"
        )


def gathered(name: str, tensor: Tensor) -> Tensor:
    """`tensor` itself; a DTensor that needs no gradient is gathered (a collective: every rank must get here)."""
    full = getattr(tensor, "full_tensor", None)
    if callable(full) and not (tensor.requires_grad and torch.is_grad_enabled()):
        return full()
    check_gathered(name, tensor)
    return tensor


def check_gathered(name: str, tensor: Tensor) -> None:
    """Raises ValueError or TypeError, with the cause and the fix, for a parameter whose values are not all here."""
    kind = type(tensor).__name__
    got = f"head {name}: got {kind} of shape {tuple(tensor.shape)} on {tensor.device}"
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{got}, a DTensor that needs a gradient; expected a plain tensor. Call the loss inside the forward of the "
            "fully_shard-ed model with lm_head in the root unit, or after model.lm_head.unshard(); under tensor parallelism "
            "replicate the head. A frozen head or torch.no_grad() is gathered for you (full_tensor)"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"{got}, which has no values; load it first (to_empty and a checkpoint, or no device_map offload)"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"{got}, partitioned by ZeRO-3; expected it gathered. Call the loss inside the engine's forward, or in "
            "deepspeed.zero.GatheredParameters([...])"
        )
    if name == "weight" and (tensor.dim() == 1 or tensor.numel() == 0):
        raise ValueError(
            f"{got}, empty or flat; expected [V, D]. FSDP1: FSDP.summon_full_params(model), or use_orig_params with the head "
            "in the unit whose forward is running; ZeRO-3: deepspeed.zero.GatheredParameters"
        )
    if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) and not is_fake(tensor):
        raise TypeError(
            f"{got}, a Tensor subclass (quantised?); expected a plain tensor. Dequantise it"
        )


def is_fake(tensor: Tensor) -> bool:
    """Whether tensor is one of torch's own tracing subclasses (torch.compile, opcheck)."""
    return type(tensor).__name__ in ("FakeTensor", "FunctionalTensor")

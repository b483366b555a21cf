"""How a module is read as a head: which Linear, which LoRA terms, and whether its values are here.

Duck-typed: transformers and peft are never imported; a PEFT class is recognised by identity with
the one in sys.modules. Nothing is guessed: a wrapper, hook or trainable parameter that is not known
here raises. What a forward does behind its head (scale, softcap) is head_rules.py. Not done here:
any arithmetic on hidden or logits.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyoffline.head_rules import ReadRule

WRAPPERS = (
    "DistributedDataParallel",
    "DataParallel",
    "DeepSpeedEngine",
    "FullyShardedDataParallel",
)
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
# Hooks of these only gather and free parameters; check_gathered sees whether they have.
GATHERING = ("deepspeed.", "torch.distributed.fsdp.", "torch.distributed._composable")
TRACING = ("FakeTensor", "FunctionalTensor")  # torch.compile and opcheck
BY_HAND = "or build Head(weight, bias, ...) inside the wrapped forward"


@dataclass(frozen=True, eq=False)
class Adapter:
    """One LoRA term: `scale * dropout(x) @ a.T @ b.T`, added to `x @ weight.T + bias`."""

    a: Tensor  # [r, D] the Parameter itself
    b: Tensor  # [V, r] the Parameter itself
    scale: float
    dropout: nn.Module | None  # None: no dropout (p = 0, Identity, or eval mode)


class LinearParts(NamedTuple):
    """One head module, read."""

    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    adapters: tuple[Adapter, ...]


class Source(NamedTuple):
    """What a Head made by Head.of keeps."""

    model: nn.Module
    rule: ReadRule


# The model


def unwrap(model: Any) -> nn.Module:
    """The causal LM inside DDP, torch.compile, DeepSpeed, FSDP1 and PEFT wrappers."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"expected an nn.Module, got {type(model).__name__}; for tensors use Head(weight, bias)"
        )
    while True:
        name = type(model).__name__
        if name == "OptimizedModule":
            model = model._orig_mod
        elif name in WRAPPERS:
            model = model.module
        elif hasattr(model, "peft_config") and callable(getattr(model, "get_base_model", None)):
            model = model.get_base_model()
        else:
            return model


def find_head(lm: nn.Module) -> nn.Module:
    """The output embedding: `lm` itself, or its child by get_output_embeddings() or .lm_head."""
    if isinstance(lm, nn.Linear) or is_lora(lm) or is_saved_copy(lm):
        return lm
    getter = getattr(lm, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    head = getattr(lm, "lm_head", None) if head is None else head
    if not isinstance(head, nn.Module):
        raise TypeError(
            f"Head.of: {type(lm).__name__} has no output embedding (get_output_embeddings() or "
            f".lm_head); expected a causal LM or an nn.Linear. Pass the Linear itself, {BY_HAND}"
        )
    if not any(child is head for child in lm.children()):
        raise TypeError(
            f"Head.of: the output embedding of {type(lm).__name__} ({type(head).__name__}) lies "
            "inside another module, which may transform the hidden states first; expected a direct "
            "child. Pass the inner causal LM, or the Linear with its own input as hidden"
        )
    return head


def backbone(model: nn.Module) -> nn.Module:
    """The module that maps input_ids to last hidden states [B, T, D] and forms no logits.

    `Head.of(model)` applied to `backbone(model)(**inputs)[0]` gives `model(**inputs).logits`.
    Raises TypeError where there is none (a bare Linear), NotImplementedError for prompt-learning
    PEFT models, whose prompts live outside of it.
    """
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict) and any(
        getattr(config, "is_prompt_learning", False) for config in configs.values()
    ):
        raise NotImplementedError(
            f"backbone: {type(model).__name__} adds learned prompts outside its base model; call "
            "the model with output_hidden_states=True and use hidden_states[-1]"
        )
    lm = unwrap(model)
    inner = getattr(lm, "base_model", None)
    for name in ("model", "transformer", "backbone"):
        if inner is None or inner is lm:
            inner = getattr(lm, name, None)
    if not isinstance(inner, nn.Module) or inner is lm:
        raise TypeError(
            f"backbone: {type(lm).__name__} has no base_model, .model, .transformer or .backbone; "
            "expected a causal LM. Call the part that makes the hidden states yourself"
        )
    return inner


# The head module


def read_source(source: Source) -> LinearParts:
    """Weight, bias and LoRA terms as they are now, cut to the rows that the forward keeps."""
    head = find_head(unwrap(source.model))
    parts = read_linear(head)
    refuse_unused_parameters(head, parts)
    rule = source.rule
    if parts.bias is not None and rule.scales_hidden and rule.scale != 1.0:
        raise NotImplementedError(
            f"Head.of: {type(source.model).__name__} scales its hidden states and its head has a "
            "bias; logit_scale would scale the bias too. Remove the bias"
        )
    if rule.rows is None or rule.rows >= parts.weight.shape[0]:
        return parts
    adapters = tuple(Adapter(x.a, x.b[: rule.rows], x.scale, x.dropout) for x in parts.adapters)
    bias = None if parts.bias is None else parts.bias[: rule.rows]
    return LinearParts(parts.weight[: rule.rows], bias, adapters)


def read_linear(module: nn.Module, check_values: bool = True) -> LinearParts:
    """nn.Linear, peft's LoRA Linear, or modules_to_save around one; TypeError for another class.

    `check_values=False` accepts parameters whose values are elsewhere now (sharded, partitioned,
    meta).
    """
    kind = type(module)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if is_saved_copy(module):
        refuse_hooks(module, name)
        return read_linear(saved_module(module), check_values)
    if is_lora(module):
        refuse_hooks(module, name)
        base = read_linear(module.base_layer, check_values)
        return base._replace(adapters=base.adapters + read_lora(module, check_values))
    plain = isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward
    if not plain or hasattr(module, "parametrizations"):
        raise TypeError(
            f"Head.of: the head is {name}; expected nn.Linear, or peft's LoRA Linear or "
            "modules_to_save around one. A quantised, parametrised or other wrapper would be "
            f"bypassed in silence: merge or remove it, {BY_HAND}"
        )
    weight, bias = module.weight, module.bias
    if check_values:
        weight = gathered("weight", weight)
        bias = None if bias is None else gathered("bias", bias)
    refuse_hooks(module, name)
    return LinearParts(weight, bias, ())


def is_peft(module: nn.Module, where: str, name: str) -> bool:
    """Whether the class of `module` is exactly peft's; a subclass may compute something else."""
    loaded = sys.modules.get(where)
    return loaded is not None and type(module) is getattr(loaded, name, None)


def is_lora(module: nn.Module) -> bool:
    """Whether `module` is peft's LoRA around a Linear."""
    return is_peft(module, "peft.tuners.lora.layer", "Linear")


def is_saved_copy(module: nn.Module) -> bool:
    """Whether `module` is peft's wrapper for modules_to_save."""
    return is_peft(module, "peft.utils.other", "ModulesToSaveWrapper")


def saved_module(wrapper: nn.Module) -> nn.Module:
    """The module that the forward of peft's ModulesToSaveWrapper calls now."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active:
        return wrapper.original_module
    if any(name not in wrapper.modules_to_save for name in active):
        return wrapper.original_module
    return wrapper.modules_to_save[active[0]]


def read_lora(layer: nn.Module, check_values: bool) -> tuple[Adapter, ...]:
    """The LoRA terms that peft's Linear.forward adds now: none if disabled or merged."""
    if layer.disable_adapters and layer.merged:
        raise NotImplementedError(
            "Head.of: the head's LoRA is disabled but merged into the weight (peft would unmerge "
            "it at its next forward); call model.unmerge_adapter() first"
        )
    if layer.disable_adapters or layer.merged:
        return ()
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return tuple(read_adapter(layer, name, check_values) for name in names)


def read_adapter(layer: nn.Module, name: str, check_values: bool) -> Adapter:
    """One adapter of peft's LoRA Linear; raises NotImplementedError unless plain LoRA."""
    variant = getattr(layer, "lora_variant", {}).get(name)
    dora = getattr(layer, "use_dora", {}).get(name)
    if variant is not None or dora:
        label = "DoRA" if dora else type(variant).__name__
        raise NotImplementedError(
            f"Head.of: the head's adapter {name!r} is {label}; expected plain LoRA. Take the head "
            "out of target_modules"
        )
    down, up, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    factors = []
    for label, factor in (("lora_A", down), ("lora_B", up)):
        part = read_linear(factor, check_values)
        if part.bias is not None:
            raise NotImplementedError(
                f"Head.of: {label} of the head's adapter {name!r} has a bias; expected none. "
                "Set lora_bias=False"
            )
        factors.append(part.weight)
    idle = isinstance(dropout, nn.Identity) or not dropout.training
    idle = idle or getattr(dropout, "p", None) == 0.0
    return Adapter(*factors, float(layer.scaling[name]), None if idle else dropout)


# What must not pass in silence


def refuse_hooks(module: nn.Module, name: str) -> None:
    """Raises TypeError if calling `module` would run something that reading its weight does not."""
    found = [
        f"{kind}[{hook_name(hook)}]"
        for kind in HOOKS
        for hook in getattr(module, kind, {}).values()
        if not hook_name(hook).startswith(GATHERING)
    ]
    hook = getattr(module, "_hf_hook", None)
    moves_only = type(hook).__name__ == "AlignDevicesHook" and not hook.offload
    if "forward" in module.__dict__ and not moves_only:
        found.append(
            "a replaced forward" if hook is None else f"accelerate's {type(hook).__name__}"
        )
    if found:
        raise TypeError(
            f"Head.of: {name} has {', '.join(found)}, which a loss that reads the weight would "
            f"bypass; expected no hooks. Remove them (weight_norm, spectral_norm: remove_*), "
            f"{BY_HAND}"
        )


def hook_name(hook: Any) -> str:
    """The dotted name of a hook's function, through functools.partial and bound methods."""
    hook = getattr(hook, "func", hook)
    hook = hook if hasattr(hook, "__qualname__") else type(hook)
    return f"{hook.__module__}.{hook.__qualname__}"


def refuse_unused_parameters(head: nn.Module, parts: LinearParts) -> None:
    """Raises NotImplementedError if a trainable parameter of the head is not in `parts`."""
    if not torch.is_grad_enabled():
        return
    of_adapters = [factor for x in parts.adapters for factor in (x.a, x.b)]
    # Dynamo of torch 2.6 has no id(None) and no `|=` of sets
    used = {id(p) for p in (parts.weight, parts.bias, *of_adapters) if p is not None}
    unused = [name for name, p in head.named_parameters() if p.requires_grad and id(p) not in used]
    if unused:
        raise NotImplementedError(
            f"Head.of: the head has trainable parameters that its forward does not use now: "
            f"{unused}; they would get no gradient. Unmerge or enable the adapter, freeze them "
            "(requires_grad_(False)), or call under torch.no_grad()"
        )


def gathered(name: str, tensor: Tensor) -> Tensor:
    """`tensor` itself; a DTensor that needs no gradient is gathered, on every rank together."""
    full = getattr(tensor, "full_tensor", None)
    if callable(full) and not (tensor.requires_grad and torch.is_grad_enabled()):
        return full().detach()
    check_gathered(name, tensor)
    return tensor


def check_gathered(name: str, tensor: Tensor) -> None:
    """Raises ValueError or TypeError for a parameter whose values are not all here."""
    got = f"head {name}: got {type(tensor).__name__} {tuple(tensor.shape)} on {tensor.device}"
    if hasattr(tensor, "full_tensor"):
        raise ValueError(
            f"{got}, a DTensor that needs a gradient; expected a plain tensor. FSDP2: call the "
            "loss inside the forward of the fully_shard-ed model with the head in its root unit, "
            "or after model.lm_head.unshard(). Tensor parallel: leave the head out of the plan. (A "
            "frozen head, or any under torch.no_grad(), is gathered by full_tensor() here.)"
        )
    if tensor.device.type == "meta":
        raise ValueError(
            f"{got}, which has no values; expected a real device. Load it first (to_empty() and a "
            "checkpoint), and do not offload the head (device_map)"
        )
    if hasattr(tensor, "ds_id") and tensor.numel() == 0:
        raise ValueError(
            f"{got}, partitioned by ZeRO-3; expected it gathered. Call the loss inside the "
            "engine's forward, or under deepspeed.zero.GatheredParameters([head.weight, ...])"
        )
    if tensor.numel() == 0 or (name == "weight" and tensor.dim() == 1):
        raise ValueError(
            f"{got}, empty or flat; expected [V, D]. FSDP1: call the loss inside the forward of "
            "the unit that holds the head, or under FSDP.summon_full_params(model)"
        )
    if type(tensor) not in (Tensor, nn.Parameter) and type(tensor).__name__ not in TRACING:
        raise TypeError(
            f"{got}, a Tensor subclass (quantised?); expected a plain tensor. Dequantise it first"
        )

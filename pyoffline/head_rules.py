"""THE TABLE of what Hugging Face forwards do between head and logits: scale, softcap, cut.

Read from the forward of each class in transformers 5.23; tests/test_head.py reads the installed one
again. A config attribute that looks like such a thing and is not in the table raises. Nothing is
computed on tensors here.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import nn


class OutputRule(NamedTuple):
    """One thing that a forward does between its head and its logits."""

    op: str  # a key of OPS
    attribute: str  # of the text config, or of the config; "refuse": what the forward does in words


class ReadRule(NamedTuple):
    """The rules of one model, evaluated on its config."""

    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None  # logits are the first `rows` of V; None: all
    scales_hidden: bool = False  # scale is applied before the head, so a bias is not scaled


OPS = {
    "multiply": "logits * config.{}",
    "divide": "logits / config.{}",
    "divide_hidden": "hidden / config.{}",
    "divide_hidden_by_ratio": "hidden / (config.hidden_size / config.{})",
    "softcap": "c * tanh(logits / c), c = config.{}",
    "first_rows": "logits[..., :config.{}]",
    "ignored": "config.{} is not read",
    "refuse": "NotImplementedError: {}",
}

SOFTCAP = OutputRule("softcap", "final_logit_softcapping")
DIVIDE = OutputRule("divide", "logits_scaling")
COHERE = OutputRule("multiply", "logit_scale")
HYPERCLOVA = OutputRule("multiply", "logits_scaling")  # Granite's name, the other way round
MUSE = OutputRule("multiply", "output_multiplier")
MUP_WIDTH = OutputRule("divide_hidden", "logits_mup_width_multiplier")
UNPADDED = OutputRule("first_rows", "unpadded_vocab_size")
ASSISTANT = OutputRule("refuse", "projects the hidden states and may mask the vocabulary")
DEEP_HEAD = OutputRule("refuse", "puts more than one Linear between hidden states and logits")


def rows_of(kinds: str, *rules: OutputRule) -> dict[str, tuple[OutputRule, ...]]:
    """One row of OUTPUT_RULES for each model type in `kinds`, separated by spaces."""
    return dict.fromkeys(kinds.split(), rules)


# config.model_type -> rules. Add a row for a model of your own before Head.of(model).
OUTPUT_RULES: dict[str, tuple[OutputRule, ...]] = {
    **rows_of("gemma2 gemma3_text gemma3n gemma3n_text gemma4 gemma4_text", SOFTCAP),
    **rows_of("gemma4_unified gemma4_unified_text vaultgemma nanochat beam", SOFTCAP),
    **rows_of("paligemma mistral_large4 mistral_large4_text", SOFTCAP),
    **rows_of("recurrent_gemma", OutputRule("softcap", "logits_soft_cap")),
    **rows_of("xlstm", OutputRule("softcap", "output_logit_soft_cap")),
    **rows_of("granite granite_swa granitemoe granitemoe_swa granitemoeshared", DIVIDE),
    **rows_of("granitemoehybrid granite4_vision granite_docling", DIVIDE),
    **rows_of("cohere cohere2 cohere2_moe cohere_compass cohere_compass_text", COHERE),
    **rows_of("hyperclovax hyperclovax_vision_v2", HYPERCLOVA),
    **rows_of("falcon_h1", OutputRule("multiply", "lm_head_multiplier")),
    **rows_of("minicpm3", OutputRule("divide_hidden_by_ratio", "dim_model_base")),
    **rows_of("minicpm", OutputRule("divide_hidden_by_ratio", "dim_model_base")),  # remote code
    **rows_of("muse_glimmer muse_spark", MUSE, SOFTCAP),
    **rows_of("inkling_text inkling_mm_model", MUP_WIDTH, UNPADDED),
    **rows_of("inkling2 inkling2_text", SOFTCAP, UNPADDED),
    # The (text) config has the attribute, and the forward of this class does not read it.
    **rows_of("gemma3", OutputRule("ignored", "final_logit_softcapping")),
    **rows_of("aya_vision cohere2_vision mpt", OutputRule("ignored", "logit_scale")),
    **rows_of("granite_speech granite_speech_plus", OutputRule("ignored", "logits_scaling")),
    # No Head can say what these do.
    **rows_of("gemma4_assistant gemma4_unified_assistant", ASSISTANT),
    **rows_of("modernbert-decoder electra", DEEP_HEAD),
    **rows_of("chameleon", OutputRule("refuse", "masks the logits of the image tokens")),
    **rows_of("clvp_decoder", OutputRule("refuse", "applies final_norm before the head")),
    **rows_of("diffusion_gemma", OutputRule("refuse", "denoises blocks of tokens")),
    **rows_of("prophetnet", OutputRule("refuse", "predicts n-gram streams")),
}

# A config attribute that looks like something done to the logits ...
SUSPECT = re.compile(
    r"(logit|lm_head|output|mup|unembed).*(scal|mult|cap|temp|soft|norm|clip|width|bias)"
    r"|(scal|mult|cap|temp|soft|norm|clip|width).*(logit|lm_head|output|unembed)"
    r"|^mup_|_mup$|dim_model_base|unpadded_vocab"
)
# ... and what is not: attention, routers, other modalities, a bias that the module shows.
HARMLESS = re.compile(
    r"attn|attention|router|moe_|expert|vision|audio|image|logit_scale_init_value|lm_head_bias"
)


def output_table() -> str:
    """`OUTPUT_RULES` as text, one model type a line."""
    width = max(map(len, OUTPUT_RULES))
    return "\n".join(
        f"{kind:<{width}}  {'; '.join(OPS[rule.op].format(rule.attribute) for rule in rules)}"
        for kind, rules in sorted(OUTPUT_RULES.items())
    )


def read_output_rule(lm: nn.Module) -> ReadRule:
    """What `lm.forward` does between its head and its logits, as numbers.

    Raises NotImplementedError where no Head can do the same, and for a set config attribute that
    looks like such a thing but is in no row. A module without `.config` does nothing.
    """
    config = getattr(lm, "config", None)
    if config is None or isinstance(lm, nn.Linear):
        return ReadRule()
    kind = getattr(config, "model_type", None)
    where = f"Head.of: {type(lm).__name__} (model_type {kind!r})"
    if getattr(config, "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{where} is an encoder-decoder; expected a decoder-only causal LM. Give its decoder's "
            "hidden states to Head(lm_head.weight, ...), built inside the wrapped forward"
        )
    text = text_config(config)
    found = ReadRule()
    rules = OUTPUT_RULES.get(kind, ())
    for rule in rules:
        found = apply_rule(where, found, rule, config, text)
    refuse_unknown_attributes(where, kind, (config, text), {rule.attribute for rule in rules})
    return found


def apply_rule(where: str, found: ReadRule, rule: OutputRule, config: Any, text: Any) -> ReadRule:
    """`found` with one more rule; an attribute that is None or absent changes nothing."""
    if rule.op == "refuse":
        raise NotImplementedError(
            f"{where}: its forward {rule.attribute}; no Head does that. Train it on its own logits"
        )
    if rule.op not in OPS:
        raise ValueError(f"OUTPUT_RULES: expected an op of {sorted(OPS)}, got {rule.op!r}")
    value = getattr(text, rule.attribute, getattr(config, rule.attribute, None))
    if value is None or rule.op == "ignored":
        return found
    if rule.op == "softcap":
        return found._replace(softcap=float(value))
    if rule.op == "first_rows":
        return found._replace(rows=int(value))
    factor = float(value)
    if rule.op == "divide_hidden_by_ratio":
        factor = float(text.hidden_size) / factor
    scale = found.scale * factor if rule.op == "multiply" else found.scale / factor
    scales_hidden = found.scales_hidden or rule.op.startswith("divide_hidden")
    return found._replace(scale=scale, scales_hidden=scales_hidden)


def text_config(config: Any) -> Any:
    """The config of the text decoder: itself, or `get_text_config()` of a multimodal one."""
    getter = getattr(config, "get_text_config", None)
    if not callable(getter):
        return config
    try:
        return getter()
    except ValueError:  # transformers: several text configs; then the model is no plain causal LM
        return config


def refuse_unknown_attributes(
    where: str, kind: str | None, configs: tuple[Any, ...], known: set[str]
) -> None:
    """Raises NotImplementedError for a suspect attribute that no rule knows and that is on."""
    for config in configs:
        for name, value in vars(config).items():
            suspect = SUSPECT.search(name) and not HARMLESS.search(name) and name not in known
            if not suspect or is_neutral(name, value):
                continue
            raise NotImplementedError(
                f"{where}: config.{name} = {value!r} looks like something done to the logits, and "
                "no row of pyoffline.head_rules.OUTPUT_RULES says what. Read the model's forward "
                f"and add OUTPUT_RULES[{kind!r}] = (OutputRule(op, {name!r}),), op one of "
                f"{sorted(OPS)}"
            )


def is_neutral(name: str, value: Any) -> bool:
    """Whether the attribute is off: None, False, empty, 0, or a factor of 1 (not a cap of 1)."""
    if value is None or value is False or (hasattr(value, "__len__") and len(value) == 0):
        return True
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value == 0 or (value == 1 and not re.search("cap|clip|soft", name))

"""The language-model head as a record: hidden [.., D] -> logits [.., V].

z = softcap * tanh(logit_scale * (x W^T + b + LoRA) / softcap) / temperature

`Head` holds the parameters or, from `Head.of(model)`, the module that owns them; `Head.tensors()`
reads them for one call. How a module is read (PEFT, hooks, shards) is head_hf.py, what Hugging Face
forwards do behind their heads is head_rules.py. No logits are computed here; hidden's shape and
dtype are checked by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyoffline import head_hf
from pyoffline.head_hf import Adapter, Source, backbone
from pyoffline.head_rules import output_table, read_output_rule

__all__ = ["Adapter", "Head", "HeadTensors", "backbone", "output_table"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class HeadTensors:
    """What one call reads: the module's own Parameters, never copies.

    `z = logit_scale * (x @ weight.T + bias + sum(t.scale * t.dropout(x) @ t.a.T @ t.b.T))` over the
    adapters t, then `softcap * tanh(z / softcap)` where softcap > 0, then `z / temperature`.
    """

    weight: Tensor  # [V, D] fp16, bf16, fp32 or fp64
    bias: Tensor | None  # [V]
    adapters: tuple[Adapter, ...]  # LoRA terms, added before logit_scale
    softcap: float  # 0.0 = none
    temperature: float
    logit_scale: float
    logits_dtype: torch.dtype | None  # None: the dtype of weight


@dataclass(frozen=True, eq=False)
class Head:
    """A linear head from hidden x [.., D] to logits z [.., V].

    `z = softcap * tanh(logit_scale * (x @ weight.T + bias) / softcap) / temperature`

    Shapes: weight [V, D], bias [V] or None, floating dtypes, one device. `softcap` None means no
    tanh. `logits_dtype` is the dtype that logits are rounded to (None: weight's). Allocates
    nothing; holds the tensors that it is given.

    Use `Head.of(model)` for a module that is wrapped, sharded or cast after this line: a Parameter
    captured here and replaced later trains nothing.

    Raises TypeError and ValueError that state expected, got and what to do; `vocab_parallel` raises
    NotImplementedError.
    """

    weight: Tensor | None  # [V, D]; None only in a head made by Head.of
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    logits_dtype: torch.dtype | None = None
    vocab_parallel: Any = None
    _source: Source | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.vocab_parallel is not None:
            raise NotImplementedError(
                "Head(vocab_parallel): vocabulary-parallel heads are not implemented; expected "
                f"None, got {type(self.vocab_parallel).__name__}. Gather the shards into one "
                "[V, D] weight"
            )
        if self._source is None:
            check_weight_and_bias(self.weight, self.bias)
        elif self.weight is not None or self.bias is not None:
            raise ValueError(
                "Head: a head made by Head.of reads weight and bias from its module; expected both "
                "None, got a tensor. Use Head(weight, bias) for tensors of your own"
            )
        check_scalars(self)

    @staticmethod
    def of(
        model: nn.Module, *, temperature: float = 1.0, logits_dtype: torch.dtype | None = None
    ) -> Head:
        """The head of a causal LM (Hugging Face, PEFT, or with `.lm_head`) or of an `nn.Linear`.

        Keeps the module: weight, bias and LoRA factors are read at each `tensors()`, inside the
        wrapped forward, so `.to()`, a replaced Parameter, tied embeddings and a switched adapter
        are followed. Scale and softcap are read here from `model.config` by the table that
        `print(output_table())` shows.

        Raises TypeError or NotImplementedError where the model's forward does something between its
        head and its logits that is not in the table, or the head is wrapped in something unknown
        (DoRA, quantised, parametrised, hooked).
        """
        lm = head_hf.unwrap(model)
        head_hf.read_linear(head_hf.find_head(lm), check_values=False)
        rule = read_output_rule(lm)
        return Head(
            None,
            softcap=rule.softcap,
            temperature=temperature,
            logit_scale=rule.scale,
            logits_dtype=logits_dtype,
            _source=Source(model, rule),
        )

    def tensors(self) -> HeadTensors:
        """The tensors of this call; every trainable head parameter is in them as itself.

        Raises ValueError for a weight that is not all here (ZeRO-3, FSDP, meta), TypeError for an
        unknown wrapper.
        """
        weight, bias, adapters = self.weight, self.bias, ()
        if self._source is not None:
            weight, bias, adapters = head_hf.read_source(self._source)
            check_weight_and_bias(weight, bias)
        return HeadTensors(
            weight=weight,
            bias=bias,
            adapters=adapters,
            softcap=float(self.softcap or 0.0),
            temperature=float(self.temperature),
            logit_scale=float(self.logit_scale),
            logits_dtype=self.logits_dtype,
        )


def check_weight_and_bias(weight: Any, bias: Any) -> None:
    """Raises TypeError or ValueError unless weight is [V, D] floating and bias None or [V]."""
    if not isinstance(weight, Tensor):
        remedy = (
            "use Head.of(module)" if isinstance(weight, nn.Module) else "pass the head's weight"
        )
        raise TypeError(
            f"Head(weight): expected a [V, D] tensor, got {type(weight).__name__}; {remedy}"
        )
    head_hf.check_gathered("weight", weight)
    if weight.dim() != 2:
        raise ValueError(
            f"Head(weight): expected 2 dimensions [V, D], got shape {tuple(weight.shape)}; "
            "pass W as F.linear takes it"
        )
    if bias is not None:
        check_bias(weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES:
            raise TypeError(
                f"Head({name}): expected fp16, bf16, fp32 or fp64, got {tensor.dtype}; "
                "cast or dequantise it"
            )


def check_bias(weight: Tensor, bias: Any) -> None:
    """Raises TypeError or ValueError unless bias is [V] beside weight [V, D]."""
    if not isinstance(bias, Tensor):
        raise TypeError(
            f"Head(bias): expected None or a [V] tensor, got {type(bias).__name__}; "
            "for no bias pass None"
        )
    head_hf.check_gathered("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"Head(bias): expected shape {tuple(weight.shape[:1])} (V of weight), got "
            f"{tuple(bias.shape)}; one number per row of weight"
        )
    if bias.device != weight.device:
        raise ValueError(
            f"Head(bias): expected device {weight.device} as weight, got {bias.device}; "
            "move one of them"
        )


def check_scalars(head: Head) -> None:
    """Raises TypeError or ValueError for a scalar of the head that has no meaning."""
    if head.softcap is not None:
        check_number("softcap", head.softcap, "None or a number > 0", "None is no softcap")
    check_number("temperature", head.temperature, "a number > 0", "1.0 changes nothing")
    check_number("logit_scale", head.logit_scale, "a number, not 0", "1.0 changes nothing")
    if head.logits_dtype is not None and head.logits_dtype not in DTYPES:
        raise ValueError(
            f"Head(logits_dtype): expected None or one of {DTYPES}, got {head.logits_dtype!r}; "
            "None rounds logits to weight's dtype"
        )


def check_number(name: str, value: Any, expected: str, remedy: str) -> None:
    """Raises TypeError or ValueError unless value is a finite Python number of the right sign."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(
            f"Head({name}): expected {expected} (a Python float), got {type(value).__name__} "
            f"{value!r}; {remedy}"
        )
    fits = value != 0 if name == "logit_scale" else value > 0
    if not (abs(value) < math.inf and fits):
        raise ValueError(f"Head({name}): expected {expected}, finite, got {value!r}; {remedy}")

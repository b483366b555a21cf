"""The language-model head as a record: hidden [.., D] -> logits [.., V].

z = softcap * tanh(logit_scale * (x W^T + b + LoRA) / softcap) / temperature

`Head` holds the parameters or, from `Head.of(model)`, the module that owns them; `Head.tensors()` reads them for one call.
How a module is read (Hugging Face, PEFT, hooks, shards) is in head_hf.py. No logits are computed here, and hidden's shape
and dtype are checked by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pyoffline import head_hf
from pyoffline.head_hf import Adapter, backbone, output_table

__all__ = ["Adapter", "Head", "HeadTensors", "backbone", "output_table"]

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, eq=False)
class HeadTensors:
    """What one call reads, as `Head.tensors()` found it. Parameters are the module's own objects, never copies.

    `z = (logit_scale * (x @ weight.T + bias + sum(a.scale * a.dropout(x) @ a.a.T @ a.b.T)))`, then
    `softcap * tanh(z / softcap)` where softcap > 0, then `z / temperature`.
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
    """A linear head: `z = softcap * tanh(logit_scale * (x @ weight.T + bias) / softcap) / temperature`.

    Shapes: weight [V, D], bias [V] or None, floating dtypes, one device. `softcap` None means no tanh. `logits_dtype` is
    the dtype that logits are rounded to (None: weight's). Allocates nothing; holds the tensors that it is given.

    Use `Head.of(model)` for a module that is wrapped, sharded or cast after this line: a Parameter captured here and
    replaced later trains nothing.

    Raises TypeError and ValueError that state expected, got and what to do; `vocab_parallel` raises NotImplementedError.
    """

    weight: Tensor | None  # [V, D]; None only in a head made by Head.of
    bias: Tensor | None = None  # [V]
    softcap: float | None = None
    temperature: float = 1.0
    logit_scale: float = 1.0
    logits_dtype: torch.dtype | None = None
    vocab_parallel: Any = None
    _module: nn.Module | None = field(default=None, repr=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.vocab_parallel is not None:
            raise NotImplementedError(
                "Head(vocab_parallel=...): vocabulary-parallel heads are not implemented; expected None, got "
                f"{type(self.vocab_parallel).__name__}. Gather the weight shards into one [V, D] tensor first."
            )
        if self._module is None:
            check_weight_and_bias(self.weight, self.bias)
        elif self.weight is not None or self.bias is not None:
            raise ValueError(
                "a head made by Head.of reads weight and bias from its module; expected both None, got a tensor. "
                "Use Head(weight, bias) for tensors of your own."
            )
        check_scalars(self)

    @staticmethod
    def of(
        model: nn.Module, *, temperature: float = 1.0, logits_dtype: torch.dtype | None = None
    ) -> Head:
        """The head of a Hugging Face causal LM, a PEFT model, a model with `.lm_head`, or a bare `nn.Linear`.

        Keeps the module: weight, bias and LoRA factors are read at each `tensors()`, inside the wrapped forward, so `.to()`,
        a replaced Parameter, tied embeddings and a switched adapter are followed. Scale and softcap are read here from
        `model.config` by the table that `print(output_table())` shows.

        Raises TypeError or NotImplementedError where the model's forward does something between its head and its logits that
        is not in the table, or the head is wrapped in something unknown (DoRA, quantised, parametrised, hooked).
        """
        lm = head_hf.unwrap(model)
        head_hf.read_linear(head_hf.find_head(lm), check_values=False)
        rule = head_hf.read_output_rule(lm)
        return Head(
            None,
            softcap=rule.softcap,
            temperature=temperature,
            logit_scale=rule.scale,
            logits_dtype=logits_dtype,
            _module=model,
        )

    def tensors(self) -> HeadTensors:
        """The tensors of this call; every trainable head parameter is in them as itself.

        Raises ValueError for a weight that is not all here (ZeRO-3, FSDP, meta), TypeError for an unknown wrapper.
        """
        weight, bias, adapters = self.weight, self.bias, ()
        if self._module is not None:
            weight, bias, adapters = head_hf.read_model(
                self._module, prescaled=self.logit_scale != 1.0
            )
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
    """Raises TypeError or ValueError unless weight is [V, D] floating and bias None or [V] beside it."""
    if isinstance(weight, nn.Module):
        raise TypeError(
            f"Head(weight): expected a [V, D] tensor, got the module {type(weight).__name__}; use Head.of(module)"
        )
    if not isinstance(weight, Tensor):
        raise TypeError(
            f"Head(weight): expected a [V, D] tensor, got {type(weight).__name__}; pass the head's weight"
        )
    head_hf.check_gathered("weight", weight)
    if weight.dim() != 2:
        raise ValueError(
            f"Head(weight): expected 2 dimensions [V, D], got shape {tuple(weight.shape)}; pass W as F.linear takes it"
        )
    if weight.dtype not in LOGITS_DTYPES:
        raise TypeError(
            f"Head(weight): expected fp16, bf16, fp32 or fp64, got {weight.dtype}; dequantise it first"
        )
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"Head(bias): expected None or a [V] tensor, got {type(bias).__name__}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(
            f"Head(bias): expected shape {tuple(weight.shape[:1])} (V of weight), got {tuple(bias.shape)}"
        )
    if bias.dtype not in LOGITS_DTYPES:
        raise TypeError(f"Head(bias): expected fp16, bf16, fp32 or fp64, got {bias.dtype}; cast it")
    if bias.device != weight.device:
        raise ValueError(
            f"Head(bias): expected device {weight.device} as weight, got {bias.device}; move one of them"
        )


def check_scalars(head: Head) -> None:
    """Raises TypeError or ValueError for a softcap, temperature, logit_scale or logits_dtype that has no meaning."""
    rules = (
        (
            "softcap",
            head.softcap,
            lambda x: x > 0,
            "None or a finite number > 0",
            "None turns it off",
        ),
        (
            "temperature",
            head.temperature,
            lambda x: x > 0,
            "a finite number > 0",
            "use 1.0 for no temperature",
        ),
        (
            "logit_scale",
            head.logit_scale,
            lambda x: x != 0,
            "a finite number, not 0",
            "use 1.0 for no scale",
        ),
    )
    for name, value, fits, expected, remedy in rules:
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(
                f"Head({name}): expected {expected} as a Python float, got {type(value).__name__} {value!r}; {remedy}"
            )
        if not (math.isfinite(value) and fits(value)):
            raise ValueError(f"Head({name}): expected {expected}, got {value!r}; {remedy}")
    if head.logits_dtype is not None and head.logits_dtype not in LOGITS_DTYPES:
        raise ValueError(
            f"Head(logits_dtype): expected None or one of {LOGITS_DTYPES}, got {head.logits_dtype!r}"
        )

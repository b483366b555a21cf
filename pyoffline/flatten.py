"""From the public records to the ops' flat tensors: checks, broadcasts, default weights.

The only place where the shapes of the public API are interpreted. A tensor that nothing reads is
an error that names it. Not here: any loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline import checks, ops
from pyoffline.calls import stats_dtype
from pyoffline.compose import Objective
from pyoffline.coupled_units import check_sequence_ids
from pyoffline.flatten_coupled import check_sequences_read
from pyoffline.head import HeadTensors
from pyoffline.program import Program
from pyoffline.records import TOKEN_FIELDS, TokenBatch


@dataclass(frozen=True, eq=False)
class FlatTokens:
    """[N] vectors in the op's dtypes."""

    labels: Tensor
    weights: Tensor
    old: Tensor | None
    mu: Tensor | None
    ref: Tensor | None
    adv: Tensor | None
    temperature: Tensor | None
    extras: list[Tensor]
    gates: str
    ignore_index: int

    @property
    def valid(self) -> Tensor:
        """[N] bool: positions that count."""
        return (self.labels != self.ignore_index) & (self.weights != 0)


@dataclass(frozen=True, eq=False)
class FlatHead:
    """hidden [N, D] and the head's tensors, one dtype, with the gradients that are wanted."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    adapter_hidden: Tensor | None
    adapter_weight: Tensor | None
    scalars: Tensor
    logits_dtype: int
    needs: int

    @property
    def arithmetic(self) -> torch.dtype:
        """What a backend must compute in: fp64 logits need fp64, whatever hidden is."""
        fp64 = ops.DTYPES[self.logits_dtype] == torch.float64
        return torch.float64 if fp64 else self.hidden.dtype

    @property
    def linear(self):
        return (self.hidden, self.weight, self.bias, self.adapter_hidden, self.adapter_weight)


def _autocast(device: str, *tensors):
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def _adapter(head: HeadTensors, hidden: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """LoRA as a second pair of GEMM operands; W + sBA is never formed.

    u = scale * dropout(x) A^T [N, r] and B [V, r], the adapters side by side in r.
    """
    if not head.adapters:
        return None, None
    parts, factors = [], []
    for adapter in head.adapters:
        x = hidden if adapter.dropout is None else adapter.dropout(hidden)
        parts.append(F.linear(x, adapter.a.to(x.dtype)) * adapter.scale)
        factors.append(adapter.b.to(hidden.dtype))
    return torch.cat(parts, -1), torch.cat(factors, -1)


def flatten_head(hidden: Tensor, head: HeadTensors) -> FlatHead:
    """Check and flatten hidden [..., D] and the head."""
    checks.floating("hidden", hidden)
    checks.floating("head.weight", head.weight)
    checks.same_device("head.weight", head.weight, hidden.device)
    checks.linear_shapes(hidden, head.weight)
    hidden, weight = _autocast(hidden.device.type, hidden, head.weight)
    checks.same_dtype(hidden, weight)
    flat = hidden.reshape(-1, hidden.shape[-1])
    adapter_hidden, adapter_weight = _adapter(head, flat)
    bias = None if head.bias is None else head.bias.to(stats_dtype(flat.dtype)).contiguous()
    parts = (flat, weight, bias, adapter_hidden, adapter_weight)
    needs = 0
    if torch.is_grad_enabled():
        needs = sum(1 << i for i, x in enumerate(parts) if x is not None and x.requires_grad)
    rounding = head.logits_dtype or flat.dtype
    if flat.dtype == torch.float64:
        rounding = torch.float64
    scalars = [head.softcap, head.logit_scale, head.temperature]
    scalars = torch.tensor(scalars, dtype=torch.float64, device="cpu")
    return FlatHead(*parts, scalars, ops.DTYPES.index(rounding), needs)


def vector(name: str, x, shape, device, dtype: torch.dtype) -> Tensor | None:
    """A per-token tensor of the labels' shape as a detached [N] vector in the op's dtype."""
    if x is None:
        return None
    checks.floating(name, x)
    checks.same_device(name, x, device)
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected the labels' shape {tuple(shape)}, got {tuple(x.shape)}")
    return x.detach().to(dtype).reshape(-1).contiguous()


def _advantages(tokens: TokenBatch, shape, device, dtype) -> Tensor | None:
    x = tokens.advantages
    if x is None or not isinstance(x, Tensor) or tuple(x.shape) == tuple(shape):
        return vector("advantages", x, shape, device, dtype)
    checks.floating("advantages", x)
    checks.same_device("advantages", x, device)
    if x.dim() == 1 and tokens.sequence_ids is not None:
        ids = tokens.sequence_ids.reshape(-1).long()
        if device.type == "cpu" and not torch.compiler.is_compiling():
            check_sequence_ids(ids)
            count = int(ids[-1]) + 1 if ids.numel() else 0
            if x.shape[0] != count:
                raise ValueError(
                    f"advantages: expected the labels' shape {tuple(shape)} or one for each of "
                    f"{count} sequences, got {tuple(x.shape)}"
                )
        return x.detach().to(dtype)[ids]
    if x.dim() == 1 and len(shape) > 1 and x.shape[0] == shape[0]:
        column = x.detach().to(dtype).reshape(-1, *[1] * (len(shape) - 1))
        return column.expand(shape).reshape(-1)
    raise ValueError(
        f"advantages: expected the labels' shape {tuple(shape)} (per token) or one per sequence "
        f"[S] (S = leading rows, or distinct sequence_ids), got {tuple(x.shape)}"
    )


def _sequence_ids(tokens: TokenBatch, shape, device) -> None:
    ids = tokens.sequence_ids
    if ids is None:
        return
    checks.tensor("sequence_ids", ids)
    if ids.dtype not in checks.INTEGERS or tuple(ids.shape) != tuple(shape):
        raise ValueError(
            f"sequence_ids: expected integers of the labels' shape {tuple(shape)}, got {ids.dtype} "
            f"{tuple(ids.shape)}"
        )
    checks.same_device("sequence_ids", ids, device)


def check_all_read(tokens: TokenBatch, program: Program, owner) -> None:
    """Nothing given is dropped in silence, nothing read is missing."""
    elsewhere = program.optional | {name for names in program.one_of for name in names}
    for field, short in TOKEN_FIELDS.items():
        given = getattr(tokens, field) is not None
        if given and short not in program.reads | elsewhere:
            raise ValueError(
                f"tokens.{field} is given but {owner} does not read it. Leave it out, or add a "
                "term that does (0.0 * po.KL(...) reads it for metrics only)"
            )
        required = short in program.reads and (short != "adv" or program.needs_adv)
        if required and not given:
            raise ValueError(f"{owner} reads tokens.{field}, which is missing from the TokenBatch")
    extra = {} if tokens.extra is None else tokens.extra
    if not isinstance(extra, Mapping):
        raise TypeError(f"tokens.extra: expected a dict of tensors, got {type(extra).__name__}")
    for name in program.gates:
        if name not in extra:
            raise ValueError(
                f"{owner} reads tokens.extra[{name!r}], which is missing; extra has {sorted(extra)}"
            )
    for name in extra:
        if name not in program.gates:
            raise ValueError(f"tokens.extra[{name!r}] is given but {owner} does not read it")


def _default_weights(labels: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    counted = (labels != ignore_index).to(dtype)
    return counted / counted.sum().clamp(min=1.0)


def flatten_tokens(
    tokens: TokenBatch, shape, device, dtype: torch.dtype, program: Program
) -> FlatTokens:
    """Check and flatten a TokenBatch against the shape of hidden[..., 0] or logits[..., 0]."""
    labels = checks.labels(tokens.labels, shape, device).reshape(-1).contiguous()
    checks.integer("tokens.ignore_index", tokens.ignore_index)
    _sequence_ids(tokens, shape, device)

    def flat(field):
        return vector(f"tokens.{field}", getattr(tokens, field), shape, device, dtype)

    weights = flat("weights")
    if weights is None:
        weights = _default_weights(labels, tokens.ignore_index, dtype)
    extra = tokens.extra or {}
    made = FlatTokens(
        labels,
        weights,
        flat("old_logps"),
        flat("behavior_logps"),
        flat("ref_logps"),
        _advantages(tokens, shape, device, dtype),
        flat("temperature"),
        [vector(f"tokens.extra[{n!r}]", extra[n], shape, device, dtype) for n in program.gates],
        ",".join(program.gates),
        tokens.ignore_index,
    )
    if made.temperature is not None:
        checks.temperatures("tokens.temperature", made.temperature, made.valid)
    _check_count(tokens.n_valid, made)
    return made


def _check_count(n_valid, made: FlatTokens) -> None:
    """On a CPU what the caller says of the number of rows is compared with it."""
    if n_valid is not None and not isinstance(n_valid, Tensor):
        checks.integer("tokens.n_valid", n_valid)
    if n_valid is None or made.labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    count = int(made.valid.sum())
    if count != n_valid:
        raise ValueError(f"tokens.n_valid is {n_valid}, but {count} positions count")


def objective_program(objective, tokens: TokenBatch) -> Program:
    """The flat program of an objective for this batch. TypeError, ValueError: they do not fit."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"objective: expected an objective such as po.PPOClip(), got {type(objective).__name__}"
        )
    if not isinstance(tokens, TokenBatch):
        raise TypeError(f"tokens: expected a po.TokenBatch, got {type(tokens).__name__}")
    program = objective.program(tokens.behavior_logps is not None)
    check_all_read(tokens, program, objective)
    check_sequences_read(tokens, program, objective)
    return program

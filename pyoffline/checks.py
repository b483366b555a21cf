"""Errors of the public functions: what was expected, what came, what to do, with the values."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32)


def tensor(name: str, x, rank: int | None = None) -> Tensor:
    """`x` is a dense tensor (of `rank` dimensions)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense tensor, got layout {x.layout}; call .to_dense()"
        )
    if rank is not None and x.dim() != rank:
        raise ValueError(f"{name}: expected {rank} dimensions, got shape {tuple(x.shape)}")
    return x


def floating(name: str, x) -> Tensor:
    """`x` is a float tensor of a supported dtype."""
    if tensor(name, x).dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    return x


def labels(x, shape, device) -> Tensor:
    """Integer labels of this shape on this device, as int64."""
    tensor("labels", x)
    if x.dtype not in INTEGERS:
        raise TypeError(f"labels: expected int64 (or int32), got {x.dtype}; call .long()")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(
            f"labels: expected shape {tuple(shape)} (one per position of hidden or logits), got "
            f"{tuple(x.shape)}. Labels are aligned with hidden; po.shift_labels makes them"
        )
    same_device("labels", x, device)
    return x.long()


def integer(name: str, x):
    """`x` is an int (under tracing: a symbolic one)."""
    # a tuple here and wherever else a compiled call may pass: Dynamo of torch 2.6 knows no `A | B`
    if isinstance(x, bool) or not isinstance(x, (int, torch.SymInt)):
        raise TypeError(f"{name}: expected an int, got {type(x).__name__} {x!r}")
    return x


_GUARDS_FIELDS = torch.__version__ < (2, 11)  # 2.11 is the oldest that was seen to do without


def read_lazily(record) -> None:
    """Dynamo of torch 2.6 and 2.7 guards every field of a frozen dataclass, read or not, and so
    compiles once per value: there the instance hides that it is one.
    """
    if _GUARDS_FIELDS:
        object.__setattr__(record, "__dataclass_params__", None)


def temperatures(name: str, x: Tensor, counted: Tensor) -> None:
    """Positive where a row counts (on a CPU; a GPU is not asked). A NaN is left to show itself."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bad = counted & (x <= 0)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"{name}: expected numbers > 0, row {row} holds {float(x[row])}; 1.0 changes nothing"
        )


def gate_name(x) -> str:
    """`x` can name an extra tensor: the ops take the names as one comma-separated string."""
    if not isinstance(x, str):
        raise TypeError(f"expected the name of an extra tensor, got {x!r}")
    if not x or "," in x:
        raise ValueError(f"extra[{x!r}]: expected a name, not empty and without a comma")
    return x


def same_device(name: str, x: Tensor, device) -> None:
    """`x` lies on `device`."""
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {x.device}")


def linear_shapes(hidden: Tensor, weight: Tensor) -> None:
    """hidden [..., D] fits weight [V, D]."""
    tensor("hidden", hidden)
    if hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        vocab, width = weight.shape
        got = tuple(hidden.shape)
        hint = ""
        if hidden.dim() and hidden.shape[-1] == vocab:
            hint = "; these look like logits: use the function without `linear_`"
        raise ValueError(
            f"hidden: expected [..., {width}] to fit the head's weight [{vocab}, {width}], "
            f"got {got}{hint}"
        )
    if weight.numel() == 0:
        raise ValueError(f"head: weight has shape {tuple(weight.shape)}; V and D must be positive")


def same_dtype(hidden: Tensor, weight: Tensor) -> None:
    """Hidden and weight share a dtype (autocast has been applied already)."""
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden is {hidden.dtype} and the head's weight {weight.dtype}: expected one dtype. "
            "Cast one of them, or run under torch.autocast"
        )

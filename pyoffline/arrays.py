"""Masked and grouped arrays: what aggregate, advantages, corrections and diagnostics share.

A masked place is replaced by 0 before any arithmetic, so what it holds cannot leak. Sums run in
float64. Nothing here syncs with the host. Groups and packed sequences are summed with index_add: on
a GPU its float64 order of addition is free unless torch.use_deterministic_algorithms is on. Not
here: any formula of reinforcement learning.
"""

import torch
from torch import Tensor


def as_mask(mask, shape=None, name="mask"):
    """`mask` as a bool tensor (nonzero = valid).

    TypeError for floats, ValueError for a shape other than `shape`.
    """
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name}: expected a bool tensor, got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        raise TypeError(
            f"{name}: expected bool or an integer dtype, got {mask.dtype}; pass {name}.bool()"
        )
    if shape is not None and tuple(mask.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(mask.shape)}")
    return mask.bool()


def dense_ids(ids, name="group_ids"):
    """Ranks of `ids` among its distinct values: `ids.unique(return_inverse=True)[1]`, no sync.

    `ids` is any integer tensor, in any order; the result is int64 of the same shape, below
    `ids.numel()`.
    """
    if (
        not isinstance(ids, Tensor)
        or ids.dtype == torch.bool
        or ids.is_floating_point()
        or ids.is_complex()
    ):
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise TypeError(f"{name}: expected an integer tensor, got {got}")
    ordered, order = ids.reshape(-1).sort(stable=True)
    rank = torch.zeros_like(order)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, rank).reshape(ids.shape)


def result_dtype(*tensors):
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def clean(x, valid, name):
    """x in float64, detached, 0 where not valid."""
    if not isinstance(x, Tensor) or x.is_complex():
        raise TypeError(
            f"{name}: expected a real tensor, got {getattr(x, 'dtype', type(x).__name__)}"
        )
    if x.shape != valid.shape:
        raise ValueError(f"{name}: expected shape {tuple(valid.shape)}, got {tuple(x.shape)}")
    return torch.where(valid, x.detach().double(), 0.0)


class Groups:
    """Statistics over the valid rows of each group, handed back to every row; columns are apart."""

    def __init__(self, index, valid):
        self.index, self.valid = index, valid
        self.size = self.sum(torch.ones_like(valid, dtype=torch.float64))

    def sum(self, x):
        x = torch.where(self.valid, x, 0.0)
        return torch.zeros_like(x).index_add_(0, self.index, x)[self.index]

    def max(self, x):
        x = torch.where(self.valid, x, -torch.inf)
        index = self.index.reshape(-1, *[1] * (x.dim() - 1)).expand_as(x)
        return torch.full_like(x, -torch.inf).scatter_reduce_(0, index, x, "amax")[self.index]

    def min(self, x):
        return -self.max(-x)

    def mean(self, x):
        return self.sum(x) / self.size.clamp(min=1)

    def std(self, x):
        return (self.sum((x - self.mean(x)) ** 2) / (self.size - 1).clamp(min=1)).sqrt()

    def equal(self, x):
        """True where nothing can be compared: one valid row, or the same finite number in all."""
        peak = self.max(x)
        return (peak == self.min(x)) & peak.isfinite()


def places(mask):
    """Where each valid token goes when holes are squeezed out; the others: T, which is dropped."""
    return (mask.cumsum(-1) - 1).masked_fill(~mask, mask.shape[1])


def compact(x, place):
    out = x.new_zeros(x.shape[0], x.shape[1] + 1)
    return out.scatter_(1, place, x)[:, :-1]


def expand(x, place):
    return torch.cat([x, torch.zeros_like(x[:, :1])], 1).gather(1, place) if x.shape[1] else x


def discounted_suffix(x, decay):
    """sum_{k>=t} decay^(k-t) x_k along rows; by doubling: log2(T) passes, pairwise error."""
    step = 1
    while step < x.shape[1] and decay**step > 0:
        x = torch.cat([x[:, :-step] + decay**step * x[:, step:], x[:, -step:]], 1)
        step *= 2
    return x


def log_ratio(logps, other, mask):
    """`logps - other` in float64, detached, 0 where masked; all three of one shape."""
    return clean(logps, mask, "logps") - clean(other, mask, "the other logps")

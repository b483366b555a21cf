"""What a coupled objective reads and returns: per-token vectors of whole units (sequences, pairs,
groups, the batch), sums over them, and the row of the table that says what is coupled.

A coupled objective is one function `fn(c: Coupled) -> CoupledLoss` on vectors of n tokens, the same
for every backend: they are tiny next to the GEMMs, so all of them are fp64. Coefficients are closed
forms that branch per token. Sums are segmented and in a fixed order: a NaN in one sequence (or
group) stays there. Not here: the functions (`sequence_math.py`, ...), chunks (`coupled_loop.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class CoupledLoss:
    """`loss` [n] or [S], `a` = dL/dlogp [n]; `c` = dL/dlse and `b` = dL/dentropy [n] or None.

    All are multiplied by omega (or the token weights) already; the loss of a call is the sum of all
    units' losses. `metrics`: name -> vector of any length; its mean over all units is reported.
    """

    loss: Tensor
    a: Tensor
    c: Tensor | None = None
    b: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Coupled:
    """Whole units, n >= 1 tokens that count and S sequences, all float vectors fp64.

    Tokens of a sequence are adjacent and in order; a sequence without a token that counts is not
    here, unless the other half of its pair is (then lengths is 0). `omega` [S]: a sequence's share
    of its unit's weight: the weight of a sequence is omega_i, of a pair or a group the sum over its
    sequences. `params`: the hyper-parameters as floats (None is inf).
    """

    logp: Tensor  # [n]
    entropy: Tensor
    lse: Tensor
    log_sum_p2: Tensor
    weights: Tensor  # [n] token weights
    seq: Tensor  # [n] int64, 0..S-1
    lengths: Tensor  # [S] int64, tokens that count
    omega: Tensor  # [S]
    old: Tensor | None = None  # [n]
    mu: Tensor | None = None
    ref: Tensor | None = None
    adv: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)
    rewards: Tensor | None = None  # [S]
    targets: Tensor | None = None
    ref_sums: Tensor | None = None
    group: Tensor | None = None  # [S] int64, 0..G-1
    chosen: Tensor | None = None  # [P] int64, local sequence indices
    rejected: Tensor | None = None
    params: tuple[float, ...] = ()

    def sum(self, x: Tensor) -> Tensor:
        """[n] -> [S]: sum over each sequence's tokens, 0 for an empty one."""
        return torch.segment_reduce(x, "sum", lengths=self.lengths, unsafe=True)

    def mean(self, x: Tensor) -> Tensor:
        """[n] -> [S]: mean over each sequence's tokens, 0 for an empty one."""
        return self.sum(x) / self.lengths.clamp(min=1)

    def spread(self, v: Tensor) -> Tensor:
        """[S] -> [n]: a sequence's value at each of its tokens."""
        return v[self.seq]

    def first(self, x: Tensor) -> Tensor:
        """[n] -> [S]: the value at each sequence's first token, 0 for an empty one."""
        start = (self.lengths.cumsum(0) - self.lengths).clamp(max=x.shape[0] - 1)
        return torch.where(self.lengths > 0, x[start], 0.0)

    def adv_of_sequence(self) -> Tensor:
        """[S]: the advantage of each sequence, that of its first token."""
        return self.first(self.adv)

    def suffix_sum(self, x: Tensor) -> Tensor:
        """[n] -> [n]: sum over this and the later tokens of the sequence, by doubling."""
        n, step, longest = x.shape[0], 1, int(self.lengths.max())
        while step < longest:
            same = self.seq[step:] == self.seq[: n - step]
            tail = torch.where(same, x[: n - step] + x[step:], x[: n - step])
            x = torch.cat([tail, x[n - step :]])
            step *= 2
        return x

    def pairs(self) -> tuple[Tensor, Tensor]:
        """(chosen [P], rejected [P]): local indices of sequences i and i + S/2 of the batch."""
        return self.chosen, self.rejected

    def pair_omega(self) -> Tensor:
        """[P]: the weight of each pair."""
        return self.omega[self.chosen] + self.omega[self.rejected]

    def group_omega(self) -> Tensor:
        """[G]: the weight of each group."""
        return self.group_sum(self.omega)

    def group_size(self) -> Tensor:
        """[G] fp64: sequences of each group."""
        return torch.bincount(self.group).double()

    def group_spread(self, v: Tensor) -> Tensor:
        """[G] -> [S]: a group's value at each of its sequences."""
        return v[self.group]

    def _grouped(self, v: Tensor, how: str) -> Tensor:
        order = torch.argsort(self.group, stable=True)
        lengths = torch.bincount(self.group)
        return torch.segment_reduce(v[order], how, lengths=lengths, unsafe=True)

    def group_sum(self, v: Tensor) -> Tensor:
        """[S] -> [G]."""
        return self._grouped(v, "sum")

    def group_max(self, v: Tensor) -> Tensor:
        """[S] -> [G]; NaN where the group holds one."""
        return self._grouped(v, "max")

    def group_logsumexp(self, v: Tensor) -> Tensor:
        """[S] -> [G]: log sum exp, exact for any offset; -inf for a group of -inf."""
        peak = self.group_max(v)
        peak = torch.where(peak.isinf(), 0.0, peak)
        return peak + self.group_sum(torch.exp(v - self.group_spread(peak))).log()

    def group_softmax(self, v: Tensor) -> Tensor:
        """[S] -> [S]: softmax within the group."""
        return torch.exp(v - self.group_spread(self.group_logsumexp(v)))


@dataclass(frozen=True)
class CoupledRow:
    """One coupled objective: its number, its function, and what must be whole for it.

    Args:
        unit: what must be whole before a coefficient is known: sequence, pair, group or batch.
        weighs: what the default weights average over; "token" reads `c.weights`, the others
            `c.omega`, "chosen" (tokens of chosen sequences) their product.
        reads: token inputs (old, mu, ref, adv) and sequence inputs (rewards, group_ids, targets,
            ref_sums) that must be given.
        optional: read where given.
        one_of: of each tuple exactly one must be given.
        pairs: it reads `c.pairs()`.
        logp_only: b and c are None (a frozen head then needs two GEMMs only).
    """

    code: int  # 101 and up: token-local rows have the numbers below
    fn: Callable[[Coupled], CoupledLoss]
    unit: str
    weighs: str
    reads: tuple[str, ...] = ()
    params: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    one_of: tuple[tuple[str, ...], ...] = ()
    metrics: tuple[str, ...] = ()
    pairs: bool = False
    logp_only: bool = True

    @property
    def name(self) -> str:
        return self.fn.__name__


def common_unit(units) -> str:
    """The smallest unit that holds all of these."""
    kinds = set(units) - {"sequence"}
    if not kinds:
        return "sequence"
    return kinds.pop() if len(kinds) == 1 else "batch"

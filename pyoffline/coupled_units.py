"""Which rows and sequences belong to which unit: the order in which a coupled call walks its rows.

Rows that count are sorted so that a unit's rows are adjacent (a stable permutation, folded into the
gather that compaction does anyway). Weights of sequences are formed here once, over the whole call.
Not here: the objectives, chunks.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyoffline.calls import RowOutputs, Rows
from pyoffline.coupled import Coupled
from pyoffline.program import coupled_rows, unit_of


@dataclass(frozen=True, eq=False)
class CoupledInputs:
    """What a coupled call adds to `Rows`: the sequences [S] and the flat program."""

    sequence_ids: Tensor  # [N] int64, 0..S-1, non-decreasing
    codes: tuple[int, ...]
    hyper: Tensor  # [K, 8] fp64 on the CPU
    rewards: Tensor | None = None  # [S]
    group_ids: Tensor | None = None
    targets: Tensor | None = None
    ref_sums: Tensor | None = None
    omega: Tensor | None = None

    @property
    def pairs(self) -> bool:
        return any(row.pairs for row in coupled_rows(self.codes))

    def given(self) -> dict[str, Tensor]:
        """The [S] tensors that are there."""
        names = ("rewards", "group_ids", "targets", "ref_sums", "omega")
        return {n: getattr(self, n) for n in names if getattr(self, n) is not None}


def check_sequence_ids(ids: Tensor) -> None:
    """0..S-1 without gaps and non-decreasing; ValueError naming the first position that is not."""
    step = torch.diff(ids, prepend=ids.new_full((1,), 0))
    bad = (step < 0) | (step > 1)
    if ids.numel() and (bool(bad.any()) or int(ids[0]) != 0):
        at = int(bad.nonzero()[0]) if bool(bad.any()) else 0
        before = f" after {int(ids[at - 1])}" if at else " at the start"
        raise ValueError(
            f"sequence_ids: expected 0..S-1, non-decreasing and without gaps; position {at} "
            f"holds {int(ids[at])}{before}. Ignored tokens carry their sequence's id too"
        )


def sequence_count(inputs: CoupledInputs) -> int:
    """S, after checking the ids and the [S] tensors against each other."""
    ids = inputs.sequence_ids
    check_sequence_ids(ids)
    count = int(ids[-1]) + 1 if ids.numel() else 0
    for name, x in inputs.given().items():
        if x.shape[0] != count:
            raise ValueError(
                f"sequences.{name}: expected one value for each of {count} sequences, got "
                f"{x.shape[0]}"
            )
    if inputs.pairs and count % 2:
        raise ValueError(
            f"preference objectives read pairs: expected an even number of sequences (chosen, then "
            f"their rejected), got {count}"
        )
    return count


@dataclass(frozen=True, eq=False)
class Layout:
    """n rows that count, in the order of their units; S' sequences of units that count.

    `order` [n]: row of the call; `seq` [n]: sequence, by its place in `members` [S'], the sequences
    of the call; `lengths` [S']; `group` [S'] 0..G-1 or None; `half`: P where there are pairs.
    `rows` and `sequences`: how many of each unit. `natural`: order is 0..N-1.
    """

    order: Tensor
    seq: Tensor
    members: Tensor
    lengths: Tensor
    group: Tensor | None
    half: int
    rows: list[int]
    sequences: list[int]
    natural: bool


def make_layout(inputs: CoupledInputs, counted: Tensor) -> Layout:
    """Sort the rows that count by unit, then sequence, then position."""
    total = sequence_count(inputs)
    unit, half = unit_of(inputs.codes), total // 2 if inputs.pairs else 0
    index = counted.nonzero()[:, 0]
    ids = inputs.sequence_ids[index]
    lengths = torch.bincount(ids, minlength=total)
    alive = lengths > 0
    if half:
        alive = (alive[:half] | alive[half:]).repeat(2)
    members = alive.nonzero()[:, 0]
    group = None
    if inputs.group_ids is not None:
        group = torch.unique(inputs.group_ids[members], return_inverse=True)[1]
    if half:
        key = (members % half) * 2 + members // half
    else:
        key = members if group is None or unit == "sequence" else group
    place = torch.argsort(key, stable=True)
    members = members[place]
    group = None if group is None else group[place]
    rank = torch.empty_like(lengths)
    rank[members] = torch.arange(members.numel(), device=members.device)
    seq = rank[ids]
    order = torch.argsort(seq, stable=True)
    keys = {"sequence": members, "pair": members % max(half, 1), "group": group}
    owner = keys.get(unit, torch.zeros_like(members))
    _, sequences = torch.unique_consecutive(owner, return_counts=True)
    lengths = lengths[members]
    rows = torch.segment_reduce(lengths.double(), "sum", lengths=sequences, unsafe=True)
    index = index[order]
    natural = index.numel() == counted.numel() and bool((index[1:] > index[:-1]).all())
    rows, sequences = rows.long().tolist(), sequences.tolist()
    return Layout(index, seq[order], members, lengths, group, half, rows, sequences, natural)


_KINDS = ("sequence", "pair", "group")


class Units:
    """The vectors of a coupled call in the order of its units, fp64, and all kinds' weights."""

    def __init__(self, rows: Rows, inputs: CoupledInputs):
        self.inputs = inputs
        self.layout = make_layout(inputs, rows.counts())
        order, members = self.layout.order, self.layout.members
        self.count = order.numel()
        # what the kernels read: labels and temperature, no weight and no program
        bare = replace(rows, weights=None, old=None, mu=None, ref=None, adv=None, extras={})
        self.rows = bare.map(lambda x: x[order])
        names = ("old", "mu", "ref", "adv")
        picked = {n: getattr(rows, n) for n in names if getattr(rows, n) is not None}
        self.tokens = {n: x[order].double() for n, x in picked.items()}
        self.extras = {n: x[order].double() for n, x in rows.extras.items()}
        given = inputs.given()
        self.sequences = {
            n: x[members].double() for n, x in given.items() if n not in ("group_ids", "omega")
        }
        even = torch.full((self.count,), 1.0 / max(self.count, 1), dtype=torch.float64)
        even = even.to(order.device)
        self.weights = even if rows.weights is None else rows.weights[order].double()
        weighted = rows.weights is not None
        self.omega = self._omegas(weighted) | {"chosen": self._chosen(weighted)}

    def _omegas(self, weighted: bool) -> dict[str, Tensor]:
        """Each sequence's share [S'] of its unit's weight, for every kind of unit."""
        at, one = self.layout, torch.ones(self.layout.members.numel(), dtype=torch.float64)
        one = one.to(at.members.device)
        if self.inputs.omega is not None:
            own = self.inputs.omega[at.members].double()
            return dict.fromkeys(_KINDS, own)
        if weighted:
            own = torch.segment_reduce(self.weights, "sum", lengths=at.lengths, unsafe=True)
            return dict.fromkeys(_KINDS, own)
        alive = (at.lengths > 0).sum()
        out = {"sequence": one / alive, "pair": one / max(one.numel(), 1)}
        if at.group is not None:
            sizes = torch.bincount(at.group)
            out["group"] = 1.0 / (sizes[at.group].double() * sizes.numel())
        return out

    def _chosen(self, weighted: bool) -> Tensor:
        """[S'] 0 for a rejected sequence, for a chosen one the factor that makes its tokens'
        default weights 1/(tokens of all chosen ones); weights that are given stay.
        """
        at = self.layout
        chosen = at.members < at.half
        tokens = torch.where(chosen, at.lengths, 0).sum().clamp(min=1)
        factor = 1.0 if weighted else self.count / tokens.double()
        return torch.where(chosen, factor, 0.0).double()

    def coupled(self, rows: slice, sequences: slice, stats: RowOutputs) -> Coupled:
        """The record of whole units: these rows, these sequences, the statistics of these rows."""
        at = self.layout
        group = None if at.group is None else at.group[sequences]
        if group is not None:
            group = torch.unique(group, return_inverse=True)[1]
        chosen = rejected = None
        if at.half:
            second = at.members[sequences] >= at.half
            chosen, rejected = (~second).nonzero()[:, 0], second.nonzero()[:, 0]
        return Coupled(
            logp=stats.logps.double(),
            entropy=stats.entropy.double(),
            lse=stats.lse.double(),
            log_sum_p2=stats.log_sum_p2.double(),
            weights=self.weights[rows],
            seq=at.seq[rows] - sequences.start,
            lengths=at.lengths[sequences],
            omega=self.omega["sequence"][sequences],
            extras={n: x[rows] for n, x in self.extras.items()},
            group=group,
            chosen=chosen,
            rejected=rejected,
            **{n: x[rows] for n, x in self.tokens.items()},
            **{n: x[sequences] for n, x in self.sequences.items()},
        )

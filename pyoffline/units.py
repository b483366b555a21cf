"""What must lie in one micro-batch for an objective: a row, a pair (chosen and rejected), a group
(all rows of a prompt), and what each of them weighs.

An item of a training set is one unit, so that samplers, data-parallel shards and the resumption of
a run never cut through one; `per_device_train_batch_size` counts units. Not here: the objectives,
the aggregation of token losses (step_weights.py).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyoffline.divergences import Divergence
from pyoffline.objectives import ROW_OF_CODE
from pyoffline.program import Program

UNITS = ("row", "pair", "group")


def program_of(objective, has_mu: bool = False) -> Program:
    """The flat program of an objective; of a divergence what it reads beside the teacher."""
    program = objective.program(has_mu)
    return program.objective if isinstance(objective, Divergence) else program


def reads_reference(objective) -> bool:
    """Whether reference log-probs are read: per token, or either so or as sums."""
    program = program_of(objective)
    return "ref" in program.reads.union(*program.one_of)


def coupled_rows(objective) -> tuple:
    """Rows of the coupled table that an objective is made of; empty for a token-local one."""
    return program_of(objective).coupled


def unit_of(objective) -> str:
    """One of UNITS. ValueError for an objective that needs pairs and groups at once."""
    rows = coupled_rows(objective)
    found = {"pair" for row in rows if row.pairs} | {"group" for row in rows if row.unit == "group"}
    if len(found) > 1:
        raise ValueError("the objective mixes terms on pairs and terms on groups")
    return found.pop() if found else "row"


def weighs_of(objective) -> frozenset[str]:
    """What the coupled rows' default weights average over: "token", "sequence", "pair", ..."""
    return frozenset(row.weighs for row in coupled_rows(objective))


def refuse_mixed_weights(objective, aggregation: str) -> None:
    """ValueError where aggregation "auto" has no one meaning for the parts of an objective."""
    weighs, program = weighs_of(objective), program_of(objective)
    local = any(code in ROW_OF_CODE for code in program.codes[0::3])
    if aggregation == "auto" and "chosen" in weighs and (local or "token" in weighs):
        raise ValueError(
            "the objective takes one mean over the chosen tokens and another over all of them: set "
            "trainer.aggregation to the mode that all its token losses should have"
        )


def make_units(samples: Sequence, unit: str) -> list:
    """Items of a training set: samples, or tuples of them.

    Pairs lie one after the other; rows of a group come in file order, wherever they stand.
    """
    if unit == "pair":
        return list(zip(samples[0::2], samples[1::2], strict=True))
    if unit == "group":
        groups: dict = {}
        for sample in samples:
            groups.setdefault(sample.columns["group"], []).append(sample)
        return [tuple(group) for group in groups.values()]
    return list(samples)


def flatten_units(items: Sequence, unit: str) -> tuple[list, list[int]]:
    """Samples in the order of the batch (all chosen, then all rejected), and the unit of each."""
    if unit == "row":
        return list(items), list(range(len(items)))
    if unit == "pair":
        index = list(range(len(items)))
        return [c for c, _ in items] + [r for _, r in items], index + index
    pairs = [(sample, i) for i, item in enumerate(items) for sample in item]
    return [s for s, _ in pairs], [i for _, i in pairs]


def unit_weights(
    batches: list[dict],
    counts: list[Tensor],  # of each batch: [S] tokens of its sequences
    weighs: frozenset[str],
    reduce: Callable[[Tensor], Tensor],
    world_size: int,
) -> list[Tensor]:
    """omega [S] of each micro-batch: the mean over the sequences, pairs or groups of the step.

    A pair weighs the sum over its two sequences, a group the sum over its sequences, so that
    sequences and pairs share one omega. Sequences without a token do not count.
    """
    live = [(c > 0).double() for c in counts]
    if "group" in weighs and weighs & {"sequence", "pair"}:
        raise ValueError("terms that average over groups cannot be mixed with terms over sequences")
    if "group" not in weighs:
        total = reduce(torch.stack([x.sum() for x in live]).sum())
        return [x / total.clamp(min=1) * world_size for x in live]
    shares, total = [], torch.zeros((), dtype=torch.float64, device=counts[0].device)
    for batch, x in zip(batches, live, strict=True):
        _, index = batch["group_ids"].unique(return_inverse=True)
        size = torch.zeros_like(x).index_add_(0, index, x)
        shares.append(x / size[index].clamp(min=1))
        total = total + (size > 0).sum()
    total = reduce(total)
    return [x / total.clamp(min=1) * world_size for x in shares]

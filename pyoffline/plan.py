"""The chunk plan: how many rows of logits exist at a time, and what overrides it.

By a memory budget, not by a ratio of V to D: the fixed traffic of a chunk (the fp32 dweight
accumulator is read and written, the weight read twice) costs about 363/C of the GEMM time on a
GPU, so chunks are as large as the budget allows and equally sized. Not here: running anything.
"""

import bisect
import itertools
import math
from dataclasses import dataclass, replace

import torch

from pyoffline.overrides import Override

MIB = 1 << 20
# At most 1 GiB on a GPU, 512 MiB on a CPU. There the GEMMs' own panels take up to 64 MiB beside the
# chunk, so that both stay within 512.
DEFAULT_BUDGET = {"cpu": 448 * MIB, "cuda": 1024 * MIB}
# Rows of a chunk in deterministic mode: every GEMM has this shape whatever the batch.
DETERMINISTIC_ROWS = 256
# Chunks are cut at multiples of this where there is more than one: full tiles for the GEMMs.
ROW_MULTIPLE = 16
# A plan list of this only: the overrides in force when the op runs. (Never an empty list: torch's
# autograd glue takes it for a list of tensors.)
READ_AT_RUN = -1

_rows = Override("chunk_rows", 0)
_budget = Override("memory_budget", 0)
_deterministic = Override("deterministic", False)


def _positive(name: str, n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ValueError(f"{name}: expected a positive integer, got {n!r}")
    return n


def chunk_rows(n: int):
    """Context manager: at most `n` rows of logits at a time, whatever the budget."""
    return _rows.set(_positive("chunk_rows", n))


def memory_budget(nbytes: int):
    """Context manager: at most `nbytes` bytes for one chunk of logits.

    The default is 448 MiB on a CPU and 1 GiB on a GPU. A chunk has at least one row.
    """
    return _budget.set(_positive("memory_budget", nbytes))


def deterministic():
    """Context manager: every GEMM at one fixed chunk shape, no autotune.

    The last chunk is zero-padded, so that a row's log-prob does not depend on the batch, its
    position or the number of chunks.
    `torch.use_deterministic_algorithms(True)` turns it on too.
    """
    return _deterministic.set(True)


def is_deterministic() -> bool:
    """Whether `deterministic()` or torch's own switch is on."""
    return _deterministic.get() or torch.are_deterministic_algorithms_enabled()


@dataclass(frozen=True)
class PlanSettings:
    """The overrides in force, as plain integers that a custom op can carry: 0 means default."""

    rows: int
    budget: int
    deterministic: bool
    n_valid: int = -1  # rows that count, where the caller knows: a GPU then need not be asked


def current_settings() -> PlanSettings:
    """What the context managers say now."""
    return PlanSettings(_rows.get(), _budget.get(), is_deterministic())


def plan_list(n_valid: int | None = None, rows: int = 0) -> list[int]:
    """The overrides as a custom op carries them, with what the call itself knows.

    That is the number of rows that count, and at most `rows` rows a chunk. A compiled graph carries
    no overrides and reads them when it runs: a context variable is nothing to guard on.
    """
    known = [] if n_valid is None and not rows else [-1 if n_valid is None else n_valid]
    known += [rows] if rows else []
    if torch.compiler.is_compiling():
        return [READ_AT_RUN, *known]
    s = current_settings()
    return [s.rows, s.budget, int(s.deterministic), *known]


def settings_of(plan: list[int]) -> PlanSettings:
    """`plan_list` back into its record."""
    at_run = plan[0] == READ_AT_RUN
    s = current_settings() if at_run else PlanSettings(plan[0], plan[1], bool(plan[2]))
    known = plan[1 if at_run else 3 :]
    if len(known) > 1:
        s = replace(s, rows=min(s.rows or known[1], known[1]))
    return replace(s, n_valid=known[0]) if known else s


@dataclass(frozen=True)
class ChunkPlan:
    """`rows` per chunk; `padded`: the last chunk is zero-padded to `rows`."""

    n: int
    rows: int
    padded: bool

    @property
    def bounds(self) -> list[tuple[int, int]]:
        return [(i, min(i + self.rows, self.n)) for i in range(0, self.n, self.rows)]


def _largest(vocab: int, itemsize: int, settings: PlanSettings, device: str) -> int:
    budget = settings.budget or DEFAULT_BUDGET.get(device, DEFAULT_BUDGET["cuda"])
    return max(1, budget // max(1, vocab * itemsize))


def _fixed_rows(largest: int, settings: PlanSettings) -> int:
    return settings.rows or min(DETERMINISTIC_ROWS, largest)


def plan_chunks(
    n: int, vocab: int, itemsize: int, settings: PlanSettings, device: str
) -> ChunkPlan:
    """Rows per chunk for `n` rows of `vocab` logits of `itemsize` bytes."""
    largest = _largest(vocab, itemsize, settings, device)
    if settings.deterministic:
        return ChunkPlan(n, _fixed_rows(largest, settings), True)
    if settings.rows:
        return ChunkPlan(n, settings.rows, False)
    if n <= largest:
        return ChunkPlan(n, max(n, 1), False)
    chunks = math.ceil(n / largest)
    rows = math.ceil(n / chunks)
    rounded = math.ceil(rows / ROW_MULTIPLE) * ROW_MULTIPLE
    return ChunkPlan(n, rounded if rounded <= largest else rows, False)


@dataclass(frozen=True)
class Block:
    """Whole units `[units]`, rows `[start, stop)`: a chunk where `fits`, else one longer unit."""

    units: tuple[int, int]
    start: int
    stop: int
    fits: bool


@dataclass(frozen=True)
class UnitPlan:
    """Chunks cut at unit borders, of at most `rows` rows; `padded`: each zero-padded to `rows`."""

    blocks: tuple[Block, ...]
    rows: int
    padded: bool

    def parts(self, block: Block) -> list[tuple[int, int]]:
        """Chunks of a block's rows: one, or equal ones that cut a long unit."""
        return self.split(block.start, block.stop)

    def split(self, start: int, stop: int, most: int = 0) -> list[tuple[int, int]]:
        """Chunks of these rows, as equal as may be, of at most `most` (default: the plan's)."""
        size, most = max(1, stop - start), most or self.rows
        rows = self.rows if self.padded else math.ceil(size / math.ceil(size / most))
        return [(i, min(i + rows, stop)) for i in range(start, stop, rows)]


def _pack(sizes: list[int], rows: int) -> list[Block]:
    """Consecutive units into as few blocks of at most `rows` rows as can be; a longer one alone."""
    ends = list(itertools.accumulate(sizes))
    blocks, first, start = [], 0, 0
    while first < len(sizes):
        last = max(bisect.bisect_right(ends, start + rows), first + 1)
        stop = ends[last - 1]
        blocks.append(Block((first, last), start, stop, stop - start <= rows))
        first, start = last, stop
    return blocks


def plan_units(
    sizes: list[int], vocab: int, itemsize: int, settings: PlanSettings, device: str
) -> UnitPlan:
    """Chunks for units of these many rows, in order: as few as the budget allows, and as equal."""
    largest = _largest(vocab, itemsize, settings, device)
    if settings.deterministic:
        rows = _fixed_rows(largest, settings)
        return UnitPlan(tuple(_pack(sizes, rows)), rows, True)
    largest = settings.rows or largest
    blocks = _pack(sizes, largest)
    low, high = max((s for s in sizes if s <= largest), default=largest), largest
    while low < high:
        middle = (low + high) // 2
        if len(_pack(sizes, middle)) <= len(blocks):
            high = middle
        else:
            low = middle + 1
    return UnitPlan(tuple(_pack(sizes, high)), largest, False)

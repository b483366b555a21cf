"""The one timer: variants run in turn within each round, ratios are taken within a round.

A machine that slows down for a second slows a whole round, so the ratio of two variants of one
round keeps its meaning where their separate means do not. Not here: what is run.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from pyoffline.benchmarks.device import Stopwatch, by_clock


@dataclass(frozen=True)
class Variant:
    """`run` is timed; `before` (dropping the last gradients) is not."""

    name: str
    run: Callable[[], object]
    before: Callable[[], None] | None = None


@dataclass(frozen=True)
class Ratio:
    """Time over the time of the base in the same round; `low` and `high` are the extremes."""

    median: float
    low: float
    high: float
    rounds: tuple[float, ...]

    def as_dict(self) -> dict:
        return {
            "median": self.median,
            "low": self.low,
            "high": self.high,
            "rounds": list(self.rounds),
        }


def time_once(variant: Variant, stopwatch: Stopwatch) -> float:
    """Seconds of one run."""
    if variant.before is not None:
        variant.before()
    return stopwatch(variant.run)


def interleave(
    variants: list[Variant],
    rounds: int,
    stopwatch: Stopwatch | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round; odd rounds run in the opposite order.

    The order alternates so that no variant always inherits the caches and the clock frequency that
    the same neighbour leaves behind.
    """
    stopwatch = stopwatch or by_clock()
    seconds: dict[str, list[float]] = {variant.name: [] for variant in variants}
    if len(seconds) != len(variants):
        raise ValueError(f"names of variants must differ, got {[v.name for v in variants]}")
    for number in range(rounds):
        order = variants if number % 2 == 0 else variants[::-1]
        for variant in order:
            seconds[variant.name].append(time_once(variant, stopwatch))
            if progress is not None:
                last = seconds[variant.name][-1]
                progress(f"round {number + 1}/{rounds}  {variant.name}: {last:.4f} s")
    return seconds


def paired(seconds: list[float], base: list[float]) -> Ratio:
    """The ratio of each round, their median and extremes."""
    if len(seconds) != len(base) or not base:
        raise ValueError(f"paired rounds: got {len(seconds)} and {len(base)} times")
    rounds = tuple(a / b for a, b in zip(seconds, base, strict=True))
    return Ratio(statistics.median(rounds), min(rounds), max(rounds), rounds)

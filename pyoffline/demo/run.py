"""The demo, both parts, and where everything is at the end.

Not here: the parts (numbers.py, learning.py).
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from pyoffline.demo.behaviour import LearningSettings
from pyoffline.demo.learning import run_learning
from pyoffline.demo.numbers import NumbersSettings, run_numbers

PARTS = ("numbers", "learning", "all")


@dataclass(frozen=True)
class DemoSettings:
    """`figures`: a folder for numbers.png and learning.png; None leaves them beside their data."""

    output: Path = Path("demo-output")
    figures: Path | None = None
    part: str = "all"
    numbers: NumbersSettings = field(default_factory=NumbersSettings)
    learning: LearningSettings = field(default_factory=LearningSettings)


def run_demo(settings: DemoSettings) -> list[Path]:
    """Run the parts that were asked for; returns the paths of their figures."""
    made = []
    for name, run in (("numbers", run_numbers), ("learning", run_learning)):
        if settings.part not in (name, "all"):
            continue
        figure = settings.figures and settings.figures / f"{name}.png"
        before = _processor_s()
        print(f"\n=== {name} ===", flush=True)
        part = replace(getattr(settings, name), output=settings.output / name, figure=figure)
        made.append(run(part))
        print(f"processor time {_processor_s() - before:.0f} s", flush=True)
    print("\nfigures")
    for path in made:
        print(f"  {path.resolve()}")
    return made


def _processor_s() -> float:
    """User and system time of this process and of its children that ended."""
    return sum(os.times()[:4])

"""The figure of the demo's first part: two loss curves, their difference, peak memory and step
time, and memory over the context length.

Not here: any number that is not in the runs' metrics.jsonl or in the points of context.py.
"""

import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median

STOCK, OURS, INK, GRID = "#7a9cc6", "#d1495b", "#1f2933", "#e4e7eb"
BUSY = 0.7  # share of the wall clock below which the machine was not ours


@dataclass(frozen=True)
class Run:
    """What one metrics.jsonl says. Memory in MiB, times in seconds."""

    losses: list[float]
    steps: list[int]
    step_time: float  # wall clock, median, the first two steps left out
    step_cpu: float  # processor time over threads, median of the same steps
    base: float  # resident before the first step
    peak: float

    @staticmethod
    def read(path: Path) -> "Run":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        begin = next(r for r in rows if r["event"] == "train_begin")
        train = [r for r in rows if r["event"] == "train"]
        steps = train[2:] or train
        return Run(
            [float(r["loss"]) for r in train],
            [r["step"] for r in train],
            median(r["step_time_s"] for r in steps),
            median(r["step_cpu_s"] for r in steps) / begin["threads"],
            begin["rss_mib"],
            max(r["peak_rss_mib"] for r in rows),
        )


def busy(stock: Run, ours: Run) -> bool:
    """Whether other programs took so much of the processors that wall clocks say little."""
    return any(run.step_cpu < BUSY * run.step_time for run in (stock, ours))


def summary(stock: Run, ours: Run) -> dict[str, float]:
    """The figure's numbers: ratios stock / pyoffline, differences of the losses step by step."""
    differences = [abs(a - b) for a, b in zip(stock.losses, ours.losses, strict=True)]
    return {
        "first_loss_stock": stock.losses[0],
        "first_loss_pyoffline": ours.losses[0],
        "final_loss_stock": stock.losses[-1],
        "final_loss_pyoffline": ours.losses[-1],
        "max_difference": max(differences),
        "step_time_stock_s": stock.step_time,
        "step_time_pyoffline_s": ours.step_time,
        "step_cpu_stock_s": stock.step_cpu,
        "step_cpu_pyoffline_s": ours.step_cpu,
        "busy": busy(stock, ours),
        "speedup": stock.step_time / ours.step_time,
        "cpu_speedup": stock.step_cpu / ours.step_cpu,
        "peak_stock_mib": stock.peak,
        "peak_pyoffline_mib": ours.peak,
        "step_memory_stock_mib": stock.peak - stock.base,
        "step_memory_pyoffline_mib": ours.peak - ours.base,
        "memory_ratio": (stock.peak - stock.base) / max(ours.peak - ours.base, 1.0),
    }


STYLE = {
    "font.size": 11,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
}


@contextlib.contextmanager
def styled():
    """matplotlib.pyplot without a display, in the demo's style."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context(STYLE):
        yield plt


def save(plt, fig, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path)
    plt.close(fig)


def draw(stock: Run, ours: Run, subtitle: str, path: Path, contexts=((), 0)) -> None:
    """Write the PNG. `contexts`: the points of context.py and their limit in MiB; without points
    the panel is left out.
    """
    points, limit_mib = contexts
    height = 11.2 if points else 7.4
    inches = lambda x: x / height  # noqa: E731
    with styled() as plt:
        fig = plt.figure(figsize=(12, height), dpi=160, facecolor="white")
        grid = fig.add_gridspec(
            3 if points else 2,
            2,
            width_ratios=(1.75, 1),
            left=0.075,
            right=0.965,
            top=1 - inches(1.37),
            bottom=inches(0.63),
            hspace=0.42,
            wspace=0.2,
        )
        _losses(fig.add_subplot(grid[0, 0]), stock, ours)
        _difference(fig.add_subplot(grid[1, 0]), stock, ours)
        _memory(fig.add_subplot(grid[0, 1]), stock, ours)
        _time(fig.add_subplot(grid[1, 1]), stock, ours)
        if points:
            _contexts(fig.add_subplot(grid[2, :]), points, limit_mib)
        headline = title(summary(stock, ours))
        fig.text(0.028, 1 - inches(0.41), headline, fontsize=16, weight="bold", va="center")
        fig.text(0.028, 1 - inches(0.74), subtitle, fontsize=10.5, color="#52606d", va="center")
        save(plt, fig, path)


def _contexts(axis, points, limit_mib: int) -> None:
    limit = limit_mib / 1024
    axis.axhline(limit, color=INK, lw=1.4, ls=(0, (5, 3)))
    lengths = sorted({p.length for p in points})
    axis.text(lengths[0], limit * 1.02, f"limit of the process: {limit:g} GiB", va="bottom")
    for name, colour in (("stock", STOCK), ("pyoffline", OURS)):
        fits = [(p.length, p.peak_mib / 1024) for p in points if p.loss == name and p.fits]
        misses = [p.length for p in points if p.loss == name and not p.fits]
        if fits:
            axis.plot(*zip(*fits, strict=True), color=colour, lw=2.4, marker="o", ms=7)
            axis.annotate(
                name,
                fits[-1],
                xytext=(0, -18),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight="bold",
            )
        for length in misses:
            start = fits[-1:] or [(length, limit)]
            axis.plot(*zip(*start, (length, limit), strict=True), color=colour, lw=1.6, ls=":")
            axis.plot([length], [limit], color=colour, marker="X", ms=12, mec="white")
            axis.annotate(
                f"{name} does not fit",
                (length, limit),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                color=colour,
                weight="bold",
            )
    axis.set_xscale("log", base=2)
    axis.set_xlim(lengths[0] / 1.12, lengths[-1] * 1.25)
    axis.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axis.set_ylim(0, limit * 1.22)
    axis.set_ylabel("peak memory (GiB)")
    axis.set_xlabel("context length (tokens), one sequence a step")
    axis.set_title("How much context fits: peak memory of a training process")
    axis.grid(axis="y", color=GRID)
    axis.set_axisbelow(True)


def title(numbers: dict[str, float]) -> str:
    """The result in one line, from the numbers alone."""
    same = numbers["max_difference"]
    curve = (
        f"Same loss curve (within {same:.0e})"
        if same < 1e-3
        else f"Loss curves differ by up to {same:.1g}"
    )
    ratio, noisy = numbers["memory_ratio"], numbers["busy"]
    speed = numbers["cpu_speedup" if noisy else "speedup"]
    memory = (
        f"{ratio:.1f}× less memory for a step"
        if ratio >= 1
        else f"{1 / ratio:.1f}× more memory for a step"
    )
    time = f"{speed:.2f}× faster" if speed >= 1 else f"{1 / speed:.2f}× slower"
    return f"{curve}, {memory}, {time}{' (CPU time)' if noisy else ''}"


def _losses(axis, stock: Run, ours: Run) -> None:
    axis.plot(
        stock.steps, stock.losses, color=STOCK, lw=6, solid_capstyle="round", label="stock loss"
    )
    axis.plot(ours.steps, ours.losses, color=OURS, lw=1.8, label="pyoffline")
    axis.set_title("Training loss, both runs")
    axis.set_ylabel("cross entropy (nats)")
    axis.legend(frameon=False, loc="upper right")
    axis.grid(axis="y", color=GRID)
    _step_axis(axis, stock)


def fp32_step(value: float) -> float:
    """The distance from `value` to the next fp32 number."""
    return 2.0 ** (math.floor(math.log2(abs(value))) - 23) if value else 0.0


def _difference(axis, stock: Run, ours: Run) -> None:
    ulps = [fp32_step(x) if math.isfinite(x) else 0.0 for x in stock.losses]
    gaps = [b - a for a, b in zip(stock.losses, ours.losses, strict=True)]
    power = math.floor(math.log10(max(*map(abs, gaps), *ulps)))
    ulps, gaps = ([x / 10.0**power for x in values] for values in (ulps, gaps))
    low = [-u for u in ulps]
    axis.fill_between(stock.steps, low, ulps, color=GRID, lw=0, label="± one fp32 step of the loss")
    axis.plot(stock.steps, gaps, color=OURS, lw=1.2, marker="o", ms=4, label="pyoffline − stock")
    top = 2.2 * max(*map(abs, gaps), *ulps)
    axis.set_ylim(-top, top)
    axis.set_title("Their difference at each step")
    axis.set_ylabel(f"difference ($10^{{{power}}}$ nats)")
    axis.set_xlabel("optimiser step")
    axis.legend(frameon=False, loc="upper right", ncols=2, fontsize=10)
    axis.grid(axis="y", color=GRID, lw=0.6)
    axis.set_axisbelow(True)
    _step_axis(axis, stock)


def _step_axis(axis, run: Run) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlim(run.steps[0], run.steps[-1])
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.margins(x=0.01)


def _bars(axis, values: list[float], texts: list[str], top: float) -> None:
    axis.set_xlim(0, top * 1.3)
    axis.set_yticks([1, 0], ["stock", "pyoffline"])
    axis.set_ylim(-0.6, 1.6)
    axis.tick_params(length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=GRID)
    axis.set_axisbelow(True)
    for y, value, text in zip((1, 0), values, texts, strict=True):
        axis.text(value + top * 0.02, y, text, va="center", fontsize=11, weight="bold")


def _memory(axis, stock: Run, ours: Run) -> None:
    rows = ((1, stock, STOCK), (0, ours, OURS))
    for y, run, colour in rows:
        axis.barh(y, run.base, color="#dfe3e8", height=0.55)
        axis.barh(y, run.peak - run.base, left=run.base, color=colour, height=0.55)
    _bars(
        axis,
        [r.peak for _, r, _ in rows],
        [f"{r.peak:,.0f} MiB" for _, r, _ in rows],
        max(stock.peak, ours.peak),
    )
    axis.set_title("Peak memory of the process")
    axis.set_xlabel("MiB (grey: before the first step)")


def _time(axis, stock: Run, ours: Run) -> None:
    noisy = busy(stock, ours)
    runs = ((1, stock, STOCK), (0, ours, OURS))
    values = [run.step_cpu if noisy else run.step_time for _, run, _ in runs]
    for (y, _, colour), value in zip(runs, values, strict=True):
        axis.barh(y, value, color=colour, height=0.55)
    _bars(axis, values, [f"{v:.2f} s" for v in values], max(values))
    axis.set_title("Time of one optimiser step")
    unit = "CPU s / threads, busy machine" if noisy else "seconds"
    axis.set_xlabel(f"{unit}, median")

"""The figure of the demo's second part: accuracy against KL from the behaviour policy.

Left every method, right the corner where the best ones are. The line is the most accuracy that any
policy can have at a KL (policy.frontier). Not here: any number that is not in results.jsonl.
"""

import itertools
import math
from pathlib import Path

from pyoffline.demo.figure import GRID, INK, save, styled

# Okabe and Ito's colours, one for the methods on the PowerIS curve; a marker for each method.
FAMILY = "#0072B2"
COLOURS = ("#7f7f7f", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
MARKERS = "osD^vP*Xhp<>"
LEFT_EDGE = 0.02  # nats: the log axis begins here
MUTED = "#52606d"


def draw(rows, base, frontier, subtitle: str, path: Path) -> None:
    """Write the PNG. `rows`: learning.Row of each method; `base`: the behaviour policy's Result;
    `frontier`: (KL, accuracy) tensors.
    """
    end = float(frontier[0][-1])
    close = [r for r in rows if r.kl < 1.5 * end and r.accuracy > (1 + base.accuracy) / 2]
    styles = make_styles(rows)
    with styled() as plt:
        fig = plt.figure(figsize=(13, 6.6), dpi=150, facecolor="white")
        grid = fig.add_gridspec(1, 2, left=0.055, right=0.865, top=0.79, bottom=0.1, wspace=0.44)
        left, right = fig.add_subplot(grid[0]), fig.add_subplot(grid[1])
        _frontier(left, frontier)
        _points(left, rows, styles)
        _behaviour(left, base)
        _wide_axes(left, rows)
        far = [r for r in rows if r not in close]
        _labels(left, [(r, styles[r.method.key]) for r in far])
        shown = close or rows
        _frontier(right, frontier)
        _curve(right, rows)
        _points(right, shown, styles)
        _near_axes(right, shown, end)
        _labels(right, [(r, styles[r.method.key]) for r in shown])
        if close:
            _mark(left, right)
        fig.text(0.02, 0.945, title(rows, base), fontsize=15.5, weight="bold", va="center")
        fig.text(0.02, 0.895, subtitle, fontsize=10.5, color=MUTED, va="center")
        save(plt, fig, path)


def make_styles(rows) -> dict[str, dict]:
    """Colour and marker of each method, by key."""
    others = itertools.cycle(COLOURS)
    return {
        r.method.key: {
            "color": next(others) if r.method.alpha is None else FAMILY,
            "marker": MARKERS[i % len(MARKERS)],
        }
        for i, r in enumerate(rows)
    }


def title(rows, base) -> str:
    """The result in one line, from the numbers alone."""
    after = [r.accuracy for r in rows]
    return (
        f"Right answers to unseen problems: {base.accuracy:.0%} before, "
        f"{min(after):.0%} to {max(after):.0%} after, by method"
    )


def _frontier(axis, frontier) -> None:
    kl, accuracy = (x.tolist() for x in frontier)
    kl, accuracy = [*kl, 1e3], [*accuracy, accuracy[-1]]
    axis.plot(kl, accuracy, color=INK, lw=1.3, zorder=1)
    axis.fill_between(kl, accuracy, 1.2, color=GRID, alpha=0.55, lw=0, zorder=0)


def _points(axis, rows, styles) -> None:
    for row in rows:
        style = styles[row.method.key]
        axis.errorbar(
            max(row.kl, LEFT_EDGE),
            row.accuracy,
            xerr=row.kl_std,
            yerr=row.accuracy_std,
            ms=9,
            mec="white",
            mew=0.8,
            elinewidth=1.4,
            capsize=2.5,
            zorder=3,
            ls="none",
            **style,
        )


def _curve(axis, rows) -> None:
    """PowerIS over alpha, from SFT on correct answers (0) to importance sampling (1)."""
    family = sorted((r for r in rows if r.method.alpha is not None), key=lambda r: r.method.alpha)
    axis.plot([r.kl for r in family], [r.accuracy for r in family], color=MUTED, lw=1, zorder=2)


def _behaviour(axis, base) -> None:
    axis.axhline(base.accuracy, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axis.annotate(
        f"behaviour policy (KL 0): {base.accuracy:.2f}",
        (0.3, base.accuracy),
        xycoords=axis.get_yaxis_transform(),
        xytext=(0, -5),
        textcoords="offset points",
        va="top",
        color=MUTED,
        fontsize=10,
    )


def _wide_axes(axis, rows) -> None:
    axis.set_xscale("log")
    top = max([2.0, *(r.kl + r.kl_std for r in rows)])
    axis.set_xlim(LEFT_EDGE, 1.35 * top)
    ticks = [t for t in (0.03, 0.1, 0.3, 1, 3, 10, 30, 100) if LEFT_EDGE <= t <= 1.35 * top]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    low = min(r.accuracy - r.accuracy_std for r in rows)
    axis.set_ylim(max(0.0, math.floor(10 * low - 0.5) / 10), 1.03)
    axis.set_title("Every method")
    axis.set_ylabel("held-out accuracy (probability of the right answer)")
    axis.set_xlabel("KL from the behaviour policy (nats an answer, log scale)")
    words = "grey: beyond\nany policy"
    axis.text(0.03, 0.965, words, transform=axis.transAxes, color=MUTED, va="top")


def _near_axes(axis, rows, end: float) -> None:
    kls = [r.kl + s * r.kl_std for r in rows for s in (-1, 1)]
    accuracies = [r.accuracy + s * r.accuracy_std for r in rows for s in (-1, 1)]
    wide, high = (max(kls) - min(kls)) or 0.1, (max(accuracies) - min(accuracies)) or 0.1
    axis.set_xlim(min(kls) - 0.12 * wide, max(*kls, end) + 0.12 * wide)
    axis.set_ylim(min(accuracies) - 0.1 * high, min(1.02, max(accuracies) + 0.35 * high))
    axis.set_title("The best corner (line: PowerIS, α 0 to 1)")
    axis.set_xlabel("KL from the behaviour policy (nats an answer)")


def _mark(left, right) -> None:
    """The right panel's region, as a frame in the left one."""
    from matplotlib.patches import Rectangle

    (x0, x1), (y0, y1) = right.get_xlim(), right.get_ylim()
    frame = Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=INK, lw=1, ls=":", zorder=4)
    left.add_patch(frame)
    left.annotate(
        "right panel",
        (x1, y0),
        xytext=(0, -3),
        textcoords="offset points",
        ha="right",
        va="top",
        color=INK,
        fontsize=10,
    )


def _labels(axis, rows) -> None:
    """Names in a column at the right of the axis, each with a thin line to its point."""
    if not rows:
        return
    to_axes = axis.transData + axis.transAxes.inverted()
    places = [
        (to_axes.transform((max(row.kl, LEFT_EDGE), row.accuracy))[1], row, style)
        for row, style in rows
    ]
    places.sort(key=lambda place: place[0])
    heights = spread_out([y for y, _, _ in places], gap=0.055)
    for height, (_, row, style) in zip(heights, places, strict=True):
        axis.annotate(
            row.method.label,
            (max(row.kl, LEFT_EDGE), row.accuracy),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=style["color"],
            weight="bold",
            fontsize=10,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": style["color"], "lw": 0.7, "relpos": (0, 0.5)},
        )


def spread_out(heights: list[float], gap: float) -> list[float]:
    """The heights, sorted, moved up as little as keeps them `gap` apart, and together down to 1."""
    out: list[float] = []
    for height in heights:
        out.append(max(height, out[-1] + gap) if out else height)
    for i in reversed(range(len(out))):
        limit = out[i + 1] - gap if i + 1 < len(out) else 1.0
        out[i] = min(out[i], limit)
    return out

"""One figure of many records: a line per op and shape, a mark per measurement; time over the floor
on the left, extra memory on the right. Not here: a record alone, in bars (plot.py).
"""

from pathlib import Path

from pyoffline.benchmarks.plot import BAR_LINE, OURS, PEER, bars, place

# (how a variant's name starts, colour, marker); the first that fits
MARKS = (
    ("pyoffline, ", "#8fc1e3", "o"),
    ("pyoffline", OURS, "o"),
    ("row pass", OURS, "o"),
    ("torch eager", PEER, "s"),
    ("torch.compile", PEER, "^"),
    ("", "#6e6e6e", "D"),
)


def lines_of(records: list[dict]) -> dict[tuple, list[tuple]]:
    """(op, shape, dtype) -> (name, ratio, MiB) of all its measurements, in the order of the op."""
    found: dict[tuple, list[tuple]] = {}
    for record in sorted(records, key=lambda r: (r["op"], r["dtype"], r["shape"][2], r["shape"])):
        key = (record["op"], tuple(record["shape"]), record["dtype"])
        found.setdefault(key, []).extend(bars(record))
    return {key: lines for key, lines in found.items() if lines}


def _mark(axis, name: str, value: float, y: int, seen: dict):
    prefix, colour, marker = next(m for m in MARKS if name.startswith(m[0]))
    ours = prefix.startswith(("pyoffline", "row"))
    style = {"color": colour, "marker": marker, "s": 46, "zorder": 3 if ours else 2}
    label = "pyoffline" if prefix == "row pass" else name
    seen.setdefault(label, axis.scatter([value], [y], edgecolors="white", linewidths=0.6, **style))


def _panels(left, right, found: dict) -> dict:
    seen: dict = {}
    for y, lines in enumerate(found.values()):
        for name, ratio, extra in lines:
            if ratio is not None:
                _mark(left, name, ratio, y, seen)
            if extra is not None:
                _mark(right, name, extra, y, seen)
    return seen


def draw_overview(records: list[dict], path: Path) -> None:
    """Write the figure; ImportError where matplotlib is absent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = lines_of(records)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 0.36 * len(found) + 2), sharey=True, layout="constrained"
    )
    seen = _panels(left, right, found)
    names = [f"{op}  {n:,} × {d:,} × {v:,}  {dtype}" for op, (n, d, v), dtype in found]
    left.set_yticks(range(len(names)), names, fontsize=9)
    left.set_ylim(len(names) - 0.5, -0.5)
    left.axvline(1.0, color=BAR_LINE, linewidth=1, zorder=1)
    left.set_xlabel("time over the bare GEMMs (line at 1), less is better", fontsize=9)
    right.set_xlabel("peak memory beyond inputs and gradients, MiB, less is better", fontsize=9)
    for axis in (left, right):
        axis.set_xlim(left=0)
        axis.grid(axis="y", color="#e6e6e6", zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=5, frameon=False)
    title = "One mark a measurement (median of its paired rounds), N × D × V"
    figure.suptitle(f"{title}; {place(records)}", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)

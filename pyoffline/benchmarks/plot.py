"""A bar chart of records: time over the floor and extra memory, ours and peers, one row per op and
shape. Not here: many records in one figure (overview.py).
"""

from pathlib import Path

from pyoffline.benchmarks.shapes import MIB

OURS, PEER, BAR_LINE = "#1b6ca8", "#b8b8b8", "#c0392b"


def bars(record: dict) -> list[tuple[str, float | None, float | None]]:
    """(name, ratio to the floor, extra MiB) of everything that ran; the floor is the line at 1."""
    times = {
        line["name"]: line["ratio"]["median"]
        for line in [*record.get("variants", []), *record.get("peers", [])]
        if "ratio" in line and line["name"] != "floor"
    }
    extra = {
        line["name"]: line["extra_nbytes"] / MIB
        for line in record.get("memory", [])
        if "extra_nbytes" in line
    }
    return [(name, times.get(name), extra.get(name)) for name in dict.fromkeys([*times, *extra])]


def _panel(axis, names, values, unit: str, digits: str) -> None:
    shown = [v or 0.0 for v in values]
    colours = [OURS if name.startswith(("pyoffline", "row pass")) else PEER for name in names]
    axis.barh(range(len(names)), shown, color=colours)
    top = max(shown, default=0.0) or 1.0
    for i, value in enumerate(values):
        text = "not run" if value is None else f"{value:{digits}}{unit}"
        axis.text((value or 0.0) + 0.01 * top, i, text, va="center", fontsize=9)
    axis.set_xlim(0, 1.25 * top)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)


def place(records: list[dict]) -> str:
    """Where and when the first record was taken."""
    device = records[0].get("device")
    if not device:
        return ""
    return f"{device['model']}, {records[0]['threads']} threads, {records[0]['date'][:10]}"


def draw(records: list[dict], path: Path) -> None:
    """Write the figure; ImportError where matplotlib is absent."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kept = [(r, bars(r)) for r in records]
    kept = [(r, lines) for r, lines in kept if lines]
    if not kept:
        raise ValueError("--plot: no record holds a time or a memory figure")
    heights = [len(lines) + 2 for _, lines in kept]
    figure, axes = plt.subplots(
        len(kept),
        2,
        figsize=(13, 0.42 * sum(heights) + 0.8),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for (record, lines), (left, right) in zip(kept, axes, strict=True):
        names = [name for name, _, _ in lines]
        _panel(left, names, [t for _, t, _ in lines], "x", ".2f")
        _panel(right, names, [m for _, _, m in lines], " MiB", ".0f")
        left.set_yticks(range(len(names)), names, fontsize=9)
        right.set_yticks([])
        n, d, v = record["shape"]
        title = f"{record['op']}  N={n} D={d} V={v} {record['dtype']}"
        left.set_title(title, loc="left", fontsize=10, fontweight="bold")
        base = "its GEMMs" if record["op"] == "row_pass" else "the bare GEMMs (line at 1)"
        left.set_xlabel(f"time over {base}, less is better", fontsize=9)
        right.set_xlabel("peak memory beyond inputs and gradients, less is better", fontsize=9)
        if record["op"] != "row_pass":
            left.axvline(1.0, color=BAR_LINE, linewidth=1)
        limits = [m["bar_nbytes"] / MIB for m in record.get("memory", []) if "bar_nbytes" in m]
        if limits:
            right.axvline(max(limits), color=BAR_LINE, linewidth=1, linestyle="--")
            words = f"bar of the default budget: {max(limits):.0f} MiB (dashed)"
            right.set_title(words, loc="left", fontsize=9, color=BAR_LINE)
        right.set_visible(any(m is not None for _, _, m in lines))
    figure.suptitle(place(records), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)

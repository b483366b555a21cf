"""The two figures of `mode_seeking.py`; no numbers of its own."""

from pathlib import Path

INK, GRID, SHADE = "#1f2933", "#e4e7eb", "#d9dee4"
COLOURS = {"RenyiRWR": "#d1495b", "AlphaELBO": "#2e86ab", "JSD": "#6a994e", "PowerIS": "#edae49"}


def _plain(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=10, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8)


def _densities(ax, x, target, by, title: str, parameter: str) -> None:
    """Fitted densities per unit of x, dark for a large parameter, over the target."""
    import matplotlib as mpl

    step = float(x[1] - x[0])
    ax.fill_between(x, target / step, color=SHADE, label="target $\\pi^*$", zorder=1)
    colours = mpl.colormaps["viridis_r"]
    for at, p in by.items():
        kind = "--" if at in (0.0, 1.0) else "-"
        name = f"{parameter} = {at:g}"
        ax.plot(x, p / step, kind, color=colours(0.05 + 0.9 * at), linewidth=1.4, label=name)
    _plain(ax, title, "answer x", "density")
    ax.set_ylim(0, 1.12)
    ax.set_xlim(float(x[0]), float(x[-1]))
    ax.legend(fontsize=7, frameon=False, loc="upper left")


def draw_modes(path: Path, x, target, curves, modes) -> None:
    """What each objective fits, over its parameter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = (0.0, 0.2, 0.4, 0.5, 0.7, 0.9)
    betas = (0.0, 0.3, 0.7, 0.9, 1.0)
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    renyi = {a: p for a, p in curves["RenyiRWR"].items() if a in shown}
    elbo = {a: p for a, p in curves["AlphaELBO"].items() if a in (0.1, 0.4, 0.7, 0.8, 1.0)}
    divergence = {b: p for b, p in curves["JSD"].items() if b in betas}
    _densities(axes[0, 0], x, target, renyi, "RenyiRWR: $f(w) = w^\\alpha$", "$\\alpha$")
    _densities(axes[0, 1], x, target, elbo, "AlphaELBO", "$\\alpha$")
    title = "JSD($\\beta$): 0 forward KL, 1 reverse KL"
    _densities(axes[1, 0], x, target, divergence, title, "$\\beta$")
    ax = axes[1, 1]
    for name, colour in COLOURS.items():
        points = modes[name]
        style = {"marker": "o", "linestyle": "-"}
        if name == "PowerIS":  # lies on RenyiRWR
            style = {"marker": "x", "linestyle": "none", "zorder": 3}
        ax.plot(
            list(points),
            [m["width"] for m in points.values()],
            color=colour,
            markersize=4,
            label=name,
            **style,
        )
    for at, what in ((0.55, "narrow mode"), (0.75, "wide mode")):
        ax.axhline(at, color=INK, linewidth=0.7, linestyle=":")
        ax.text(0.0, at + 0.03, f"width of the {what}", fontsize=7, color=INK)
    _plain(ax, "Width of the fit: the switch is a jump", "$\\alpha$ (JSD: $\\beta$)", "std of x")
    ax.set_ylim(0, 2.6)
    ax.legend(fontsize=8, frameon=False, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_estimates(path: Path, bias: list[dict], ranks: list[dict]) -> None:
    """The optimism of single-sample RWR, and how prefix ratios rank."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for lam, colour in zip((0.25, 0.5, 1.0), ("#2e86ab", "#edae49", "#d1495b"), strict=True):
        rows = [r for r in bias if r["lam"] == lam]
        n = [r["n"] for r in rows]
        left.errorbar(
            n,
            [r["measured"] for r in rows],
            [2 * r["error"] for r in rows],
            fmt="o",
            markersize=4,
            color=colour,
            label=f"measured, $\\lambda$ = {lam:g}",
        )
        left.plot(n, [r["formula"] for r in rows], color=colour)
        left.axhline(rows[0]["lasting"], color=colour, linewidth=0.8, linestyle=":")
    left.set_xscale("log", base=2)
    left.set_xticks([4, 16, 64], ["4", "16", "64"])
    title = "Optimism of one noisy reward (line: rwr_bias, dotted: N = inf)"
    _plain(left, title, "answers per prompt N", "log mean weight / exact weight")
    left.legend(fontsize=7, frameon=False, ncols=1, loc="center right", bbox_to_anchor=(1.0, 0.6))
    n = [r["n"] for r in ranks]
    right.plot(n, [1 - r["agreement"] for r in ranks], "o-", color="#d1495b", markersize=4)
    right.plot(n, [r["error"] for r in ranks], "s-", color="#2e86ab", markersize=4)
    right.plot(n, [ranks[0]["error"] * (n[0] / k) ** 0.5 for k in n], ":", color=INK)
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    names = ["pairs of prefixes in wrong order", "rms error of the log ratios", "$1/\\sqrt{n}$"]
    right.legend(names, fontsize=7, frameon=False)
    _plain(right, "Prefix ratios from sampled completions", "completions n", "")
    figure.savefig(path, dpi=130)
    plt.close(figure)

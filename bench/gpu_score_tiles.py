"""Tiles of the scoring product (kernels/configs.py) against one GEMM of the same shape.

Each tile's log-probs are compared with the library's tile before the clock; product and GEMM, which
stores its logits, alternate; median of paired rounds. The order found here is what `SCORE_TILES`
should follow. Needs a GPU.
"""

import argparse
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import torch

from pyoffline.benchmarks.device import by_events
from pyoffline.benchmarks.provenance import provenance
from pyoffline.calls import Rows
from pyoffline.gpu_rows import float32_rows
from pyoffline.kernels.configs import ScoreConfig, score_config
from pyoffline.kernels.score_rows import Scoring

SHAPES = ((4096, 4096, 128256), (8192, 896, 151936))  # N, D, V


def candidates(tile: ScoreConfig) -> dict[str, ScoreConfig]:
    """The library's tile and its neighbours. Two programs: of half the columns and warps, so that
    one folds beside the other's product.
    """
    halved = replace(tile, block_v=tile.block_v // 2, warps=tile.warps // 2, parts=2)
    return {
        "library": tile,
        "two programs": halved,
        "one part": replace(tile, parts=1),
        "four stages": replace(tile, stages=4),
        "groups of 8": replace(tile, group_n=8),
        "groups of 32": replace(tile, group_n=32),
    }


def scoring(hidden, weight, labels, tile) -> Scoring:
    """A block of rows whose statistics alone are wanted."""
    outputs = [torch.empty(len(labels), device=hidden.device) for _ in range(5)]
    is_top1 = torch.empty(len(labels), dtype=torch.uint8, device=hidden.device)
    flag = torch.zeros(2, dtype=torch.int64, device=hidden.device)
    rows, out = float32_rows(Rows(labels)), (*outputs, is_top1, None, None)
    return Scoring(hidden, weight, rows, out, flag, hidden.dtype, tile)


def measure(shape: tuple[int, int, int], device: str, rounds: int) -> list[dict]:
    """Every tile on one shape: milliseconds of the product and of the GEMM, and their ratio."""
    torch.manual_seed(0)
    n, d, v = shape
    hidden = torch.randn(n, d, device=device).bfloat16()
    weight = (torch.randn(v, d, device=device) / d**0.5).bfloat16()
    labels = torch.randint(0, v, (n,), device=device)
    logits, expected, records = torch.empty(n, v, dtype=hidden.dtype, device=device), None, []
    for name, tile in candidates(score_config(hidden, 8, True)).items():
        block = scoring(hidden, weight, labels, tile)
        block.multiply()
        block.finish()
        logps = block.outputs[1].clone()
        expected = logps if expected is None else expected
        if not (logps - expected).abs().max() <= 0.02:  # a few roundings of bf16 logits near 1
            raise SystemExit(f"not measured: {name} is wrong")
        runs = (block.multiply, lambda: torch.mm(hidden, weight.t(), out=logits))
        pairs = [[1e3 * by_events(run) for run in runs] for _ in range(rounds)]
        records.append(
            {
                "shape": shape,
                "name": name,
                "tile": asdict(tile),
                "ms": statistics.median(p[0] for p in pairs),
                "gemm_ms": statistics.median(p[1] for p in pairs),
                "of_gemm": statistics.median(p[0] / p[1] for p in pairs),
            }
        )
    return records


def main() -> None:
    """Measure every shape; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records there, after each shape")
    parser.add_argument(
        "--rounds", type=int, default=11, help="paired rounds (default: %(default)s)"
    )
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("not run: torch sees no GPU")
    records = []
    for shape in SHAPES:
        for record in measure(shape, "cuda", options.rounds):
            records.append(record)
            print(
                f"{shape!s:22} {record['name']:13}{record['ms']:8.3f} ms, GEMM "
                f"{record['gemm_ms']:7.3f} ms, {record['of_gemm']:.3f}x"
            )
        if options.json:
            options.json.write_text(json.dumps(provenance("cuda") | {"tiles": records}, indent=1))


if __name__ == "__main__":
    main()

"""`pyoffline bench`: the command's arguments and what it runs. Heavy imports happen in `run`."""

import argparse
from pathlib import Path

DESCRIPTION = """\
Times the losses against the floor (the bare matrix products at full N, the fastest vendor call)
and against plain PyTorch and other libraries, and measures their peak memory. Checks before it
times. A bar that fails is printed as FAIL and makes the exit code 1.

examples:
  pyoffline bench                           PPO-clip at 1024,896,151936 in bf16, with peers
  pyoffline bench --op all --shape all --dtype bf16 fp32 --save
  pyoffline bench --shape 16384,896,151936 --no-time --no-peers       memory is flat in N
  pyoffline bench --device cuda --op all --save                       on a GPU, both GPU backends
  pyoffline bench --load bench/results/cpu/*.json --plot bench.png    draw what was measured
"""
DEFAULT_OP = "linear_policy_loss"
DEFAULT_SHAPE = {"cpu": "1024,896,151936", "cuda": "4096,4096,128256"}
MANY = 6  # records in bars, one above the other; more are drawn as an overview
DEFAULT_FOLDER = {"cpu": "bench/results/cpu", "cuda": "bench/results/gpu"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `pyoffline bench`."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default %(default)s"
    )
    parser.add_argument(
        "--op",
        nargs="+",
        default=[DEFAULT_OP],
        metavar="NAME",
        help="linear_policy_loss (default), frozen_head, linear_cross_entropy, scoring, "
        "linear_token_logps, linear_distill_loss, row_pass, or all",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="N,D,V",
        help=f"default {DEFAULT_SHAPE['cpu']}, on a GPU {DEFAULT_SHAPE['cuda']}; "
        "all: every shape that has a bar there",
    )
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=("bf16", "fp32"))
    parser.add_argument(
        "--budget",
        nargs="*",
        type=int,
        default=[128],
        metavar="MiB",
        help="chunk budgets beside the default one (default: 128)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="paired rounds (default %(default)s)")
    parser.add_argument("--no-time", action="store_true", help="memory only")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--no-peers", action="store_true", help="ours and the floor only")
    parser.add_argument(
        "--peer-limit",
        type=float,
        default=180.0,
        metavar="S",
        help="skip a peer that is predicted to take longer (default %(default)s s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write the records there")
    parser.add_argument(
        "--save",
        nargs="?",
        const="",
        metavar="FOLDER",
        help=f"write FOLDER/<date>-<op>.json (default folder {DEFAULT_FOLDER['cpu']}, on a GPU "
        f"{DEFAULT_FOLDER['cuda']})",
    )
    parser.add_argument("--plot", metavar="FILE.png", help="draw times and memory")
    parser.add_argument("--load", nargs="+", metavar="FILE", help="measure nothing, read records")


def _choose(names: list[str], allowed, what: str) -> list[str]:
    if "all" in names:
        return list(allowed)
    for name in names:
        if name not in allowed:
            raise ValueError(f"{what}: expected one of {', '.join(allowed)} or all; got {name!r}")
    return names


def measure(args) -> list[dict]:
    """Run what the arguments name; every record is printed as soon as it is there."""
    from pyoffline.benchmarks import device, ops, report, row_pass
    from pyoffline.benchmarks.provenance import provenance
    from pyoffline.benchmarks.runner import Settings, run_case
    from pyoffline.benchmarks.shapes import SHAPES, Shape

    if args.rounds < 1 or any(budget < 1 for budget in args.budget):
        raise ValueError("--rounds and --budget: expected positive numbers")
    names = _choose(args.op, ops.NAMES, "--op")
    texts = args.shape or [DEFAULT_SHAPE[args.device]]
    shapes = SHAPES[args.device] if "all" in texts else [Shape.parse(text) for text in texts]
    device.require(args.device)
    settings = Settings(
        rounds=args.rounds,
        budgets=tuple(args.budget),
        time=not args.no_time,
        memory=not args.no_memory,
        peers=not args.no_peers,
        peer_limit_s=args.peer_limit,
        device=args.device,
    )
    records = []
    for name in names:
        for shape in shapes:
            for dtype in args.dtype:
                origin = provenance(args.device)  # before: the load average is then not our own
                if name == ops.ROW_PASS:
                    found = row_pass.run(shape, dtype, settings)
                else:
                    found = run_case(ops.CASES[name], shape, dtype, settings)
                records.append({**origin, **found})
                print(report.render(records[-1]), flush=True)
                keep(args, records)
    return records


def keep(args, records: list[dict]) -> None:
    """Write what there is so far: a run that is cut off keeps its finished records."""
    from pyoffline.benchmarks import report

    if args.json:
        report.write(Path(args.json), records)
    if args.save is not None:
        report.save(Path(args.save or DEFAULT_FOLDER[args.device]), records[-1:])


def run(args) -> int:
    """The command; 1 when a bar or a check failed."""
    from pyoffline.benchmarks import overview, plot, report

    if args.load:
        records = [r for name in args.load for r in report.read(Path(name))]
        for record in records:
            print(report.render(record))
    else:
        records = measure(args)
    if args.plot:
        draw = plot.draw if len(records) <= MANY else overview.draw_overview
        draw(records, Path(args.plot))
        print(f"wrote {args.plot}")
    failed = report.failures(records)
    if failed:
        print(f"{failed} bar(s) or check(s) failed")
    return 1 if failed else 0

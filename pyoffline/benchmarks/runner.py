"""Runs one case at one shape: check, floor, timed rounds, peers, memory; returns a plain record
for the report.

Nothing is timed before the check has passed. Peers get one round (on a GPU all), paired with a
floor of the same round, and are skipped with the reason where a small run predicts more than
`peer_limit_s`. Not here: printing.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pyoffline as po
from pyoffline.benchmarks import device, memory
from pyoffline.benchmarks.cases import Case
from pyoffline.benchmarks.check import check
from pyoffline.benchmarks.floor import Floor
from pyoffline.benchmarks.providers import Provider
from pyoffline.benchmarks.shapes import DTYPES, MIB, Inputs, Shape, make_inputs, memory_bar
from pyoffline.benchmarks.timer import Variant, interleave, paired, time_once
from pyoffline.plan import DEFAULT_BUDGET

PEER_ROWS_DIVISOR, PEER_ROWS_MIN = 16, 64
FLOOR = "floor"


def to_stderr(text: str) -> None:
    """Progress goes to stderr, the report to stdout."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


@dataclass(frozen=True)
class Settings:
    """What to run. `budgets` in MiB come beside the default budget."""

    rounds: int = 5
    budgets: tuple[int, ...] = (128,)
    time: bool = True
    memory: bool = True
    peers: bool = True
    peer_limit_s: float = 180.0
    device: str = "cpu"
    progress: Callable[[str], None] = to_stderr


def budget_of(mib: int | None):
    """The context of a chunk budget; None is the library's default."""
    return po.memory_budget(mib * MIB) if mib else contextlib.nullcontext()


def variant_name(budget: int | None, backend: str = "auto") -> str:
    """The library, with the backend where several are measured and the budget where one is set."""
    name = "pyoffline" if backend == "auto" else f"pyoffline {backend}"
    return f"{name}, {budget} MiB" if budget else name


def variants_of_ours(case: Case, settings: Settings) -> list[tuple[str, str, int | None]]:
    """(name, backend, budget) of everything of ours that runs."""
    return [
        (variant_name(budget, backend), backend, budget)
        for backend in device.ours(settings.device, case.name)
        for budget in (None, *settings.budgets)
    ]


def peers_of(case: Case, settings: Settings) -> list[Provider]:
    """The peers that are asked for on this device."""
    return [p for p in case.peers if settings.device in p.kinds] if settings.peers else []


def run_case(case: Case, shape: Shape, dtype: str, settings: Settings) -> dict:
    """Keys: op, shape, dtype, then `checks, floor, variants, peers` when timed and `memory`."""
    record = {
        "op": case.name,
        "shape": [shape.n, shape.d, shape.v],
        "dtype": dtype,
        "gemms": list(case.floor),
        "flop": case.flop(shape),
        "rounds": settings.rounds,
    }
    if settings.time:
        record.update(_time(case, shape, dtype, settings))
    failed = [c for c in record.get("checks", []) if not c["passed"]]
    if settings.memory and not failed:
        record["memory"] = _memory(case, shape, dtype, settings, record.get("peers", []))
    return record


def _time(case: Case, shape: Shape, dtype: str, settings: Settings) -> dict:
    say = settings.progress
    say(f"{case.name} {shape} {dtype}: inputs and check")
    inputs = make_inputs(shape, DTYPES[dtype], device=device.place(settings.device))
    checks = []
    for backend in device.ours(settings.device, case.name):
        with po.use_backend(backend):
            checks += check(case, inputs, backend)
    found = {"checks": [c.as_dict() for c in checks], "clipped": inputs.clipped()}
    if not all(c.passed for c in checks):
        return {**found, "variants": [], "peers": []}
    floor = Floor(shape, DTYPES[dtype], inputs)
    floor.choose(case.floor, say)
    case.prepare(inputs)
    found["floor"] = floor.describe()
    found["variants"] = time_ours(case, shape, dtype, settings, floor, inputs)
    peers = peers_of(case, settings)
    found["peers"] = [time_peer(case, p, settings, floor, inputs) for p in peers]
    return found


def floor_variants(floor: Floor, gemms) -> list[Variant]:
    """One per product, so that each one's speed is known; their sum is the floor."""
    return [Variant(f"{FLOOR} {g}", lambda g=g: floor.run(g)) for g in gemms]


def floor_seconds(seconds: dict[str, list[float]]) -> list[float]:
    """The sum of the products in each round."""
    parts = [times for name, times in seconds.items() if name.startswith(FLOOR + " ")]
    return [sum(times) for times in zip(*parts, strict=True)]


def time_ours(case, shape, dtype, settings, floor, inputs) -> list[dict]:
    """The floor and ours at every budget, interleaved."""
    variants = floor_variants(floor, case.floor)
    step, ours = case.step(case.ours, inputs), variants_of_ours(case, settings)

    def run(backend, budget):
        with po.use_backend(backend), budget_of(budget):
            return step()

    for name, *how in ours:
        variants.append(Variant(name, lambda how=how: run(*how), inputs.clear_grads))
    stopwatch = device.stopwatch(settings.device)
    if settings.device != "cpu":  # kernels are compiled, memory is reserved
        interleave(variants, 1, stopwatch)
    seconds = interleave(variants, settings.rounds, stopwatch, settings.progress)
    inputs.clear_grads()
    base = floor_seconds(seconds)
    found = [entry(FLOOR, base, base, len(case.floor) * shape.gemm_flop)]
    found[0]["products"] = {
        g: {"seconds": seconds[f"{FLOOR} {g}"], "gflop_s": rate(shape, seconds[f"{FLOOR} {g}"])}
        for g in case.floor
    }
    bar = case.bar(shape, dtype, settings.device)
    for name, backend, budget in ours:
        line = entry(name, seconds[name], base, case.flop(shape), bar)
        plan = plan_of(case, shape, dtype, budget, settings.device)
        found.append({**line, "backend": backend, **plan})
    return found


def rate(shape: Shape, seconds: list[float]) -> float:
    """GFLOP/s of a product at its median time."""
    return shape.gemm_flop / _median(seconds) / 1e9


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else sum(ordered[middle - 1 : middle + 1]) / 2


def entry(name: str, seconds, base, flop: float, bar: float | None = None) -> dict:
    """A line of the report: times, ratio of paired rounds, bar and verdict."""
    ratio = paired(seconds, base)
    return {
        "name": name,
        "seconds": list(seconds),
        "median_s": _median(seconds),
        "ratio": ratio.as_dict(),
        "bar": bar,
        "passed": None if bar is None else ratio.median <= bar,
        "gflop_s": flop / _median(seconds) / 1e9,
        "percent_of_limit": 100 / ratio.median,
    }


def plan_of(case: Case, shape: Shape, dtype: str, budget: int | None, kind: str = "cpu") -> dict:
    """Chunks of a call, and the bytes beyond inputs and gradients that `explain` predicts."""
    with budget_of(budget):
        plan = po.explain(
            *(shape.n, shape.d, shape.v, DTYPES[dtype]),
            train_head=case.grads[1],
            device=kind,
            teacher=DTYPES[dtype] if "teacher" in case.floor else None,
        )
    return {
        "chunks": plan.chunks,
        "chunk_rows": plan.chunk_rows,
        "explain_nbytes": plan.extra_nbytes,
    }


def does_not_fit(provider: Provider, shape: Shape, kind: str = "cpu") -> str | None:
    """The reason, where the peer's logits would not fit into the free memory."""
    needs = provider.logit_nbytes * shape.n * shape.v
    free = device.free_nbytes(kind)
    return f"needs {needs / MIB:.0f} MiB, {free / MIB:.0f} MiB are free" if needs > free else None


def time_peer(case: Case, provider: Provider, settings: Settings, floor, inputs: Inputs) -> dict:
    """One round beside the floor, or the reason why not."""
    found = {"name": provider.name, "note": provider.note}
    shape = floor.shape
    try:
        call = provider.load()
        reason = does_not_fit(provider, shape, settings.device)
        stopwatch = device.stopwatch(settings.device)
        if reason is None:
            predicted = predict_s(case, call, inputs, shape, stopwatch)
            settings.progress(f"{provider.name}: predicted {predicted:.1f} s")
            whole = predicted * (2 if provider.compiles else 1)
            if whole > settings.peer_limit_s:
                reason = f"predicted {whole:.0f} s, the limit is {settings.peer_limit_s:.0f} s"
        if reason is not None:
            return {**found, "skipped": reason}
        step = case.step(call, inputs)
        if provider.compiles or settings.device != "cpu":
            inputs.clear_grads()
            step()
        variants = [*floor_variants(floor, case.floor), Variant("peer", step, inputs.clear_grads)]
        rounds = 1 if settings.device == "cpu" else settings.rounds
        seconds = interleave(variants, rounds, stopwatch)
        inputs.clear_grads()
    # A peer may fail in any way of its own (no compiler, no memory); the report says which.
    except Exception as error:
        inputs.clear_grads()
        words = str(error).strip().splitlines() or [type(error).__name__]
        return {**found, "skipped": words[0][:200]}
    line = entry(provider.name, seconds["peer"], floor_seconds(seconds), case.flop(shape))
    settings.progress(f"{provider.name}: {line['median_s']:.3f} s")
    return {**found, **line}


def predict_s(case: Case, call, inputs: Inputs, shape: Shape, stopwatch) -> float:
    """Seconds at full N from the second run on few rows, in proportion."""
    rows = min(shape.n, max(PEER_ROWS_MIN, shape.n // PEER_ROWS_DIVISOR))
    few = inputs.take(slice(0, rows))
    case.prepare(few)
    step = Variant("small", case.step(call, few), few.clear_grads)
    time_once(step, stopwatch)
    return time_once(step, stopwatch) * shape.n / rows


def _memory(case: Case, shape: Shape, dtype: str, settings: Settings, peers: list) -> list[dict]:
    on_cpu = settings.device == "cpu"
    if on_cpu and not memory.supported():
        return [{"name": "all", "skipped": "the peak cannot be reset here (no clear_refs)"}]
    job = {"op": case.name, "shape": str(shape), "dtype": dtype, "device": settings.device}
    measure = memory.measure_fresh if on_cpu else memory.measure_or_say_why
    found = []
    for name, backend, budget in variants_of_ours(case, settings):
        line = measure({**job, "provider": "ours", "budget": budget, "backend": backend})
        if "extra_nbytes" in line:
            # a budget is for the chunk: what the bar allows beside it stays
            less = 0 if budget is None else DEFAULT_BUDGET[settings.device] - budget * MIB
            bar = memory_bar(shape, settings.device) - less
            line["bar_nbytes"], line["passed"] = bar, line["extra_nbytes"] <= bar
        plan = plan_of(case, shape, dtype, budget, settings.device)
        found.append({"name": name, **line, **plan})
        settings.progress(f"memory {name}: {line}")
    skipped = {p["name"]: p["skipped"] for p in peers if "skipped" in p}
    for provider in peers_of(case, settings):
        reason = skipped.get(provider.name) or does_not_fit(provider, shape, settings.device)
        line = {"skipped": reason}
        if reason is None:
            line = measure({**job, "provider": provider.name, "budget": None})
        found.append({"name": provider.name, **line})
        settings.progress(f"memory {provider.name}: {line}")
    return found

"""The row pass (logits become dlogits in place) against the three products of the same chunk.

Bytes: reads s and writes s per logit of s bytes (a row stays in the second-level cache between its
sweeps); FLOP are not the limit. The limit is a copy of the chunk in the same round, which moves
the same bytes. Each round is one chunk as the loss runs it: logits GEMM, row pass, dhidden GEMM,
dweight GEMM onto the accumulator, then the copy. Not here: the kernels (csrc/cpu, csrc/cuda,
kernels).
"""

import importlib

import torch

import pyoffline as po
from pyoffline.benchmarks import device
from pyoffline.benchmarks.runner import Settings, budget_of, entry
from pyoffline.benchmarks.shapes import BARS, CLIP, DTYPES, Inputs, Shape, make_inputs
from pyoffline.benchmarks.timer import Variant, interleave

BAR = 0.10  # DESIGN.md section 4: of its GEMMs, in bf16, on a CPU
COPY_BAR = 90.0  # DESIGN.md section 7: % of a device copy's bandwidth, on a GPU
KERNELS = {
    "auto": ("pyoffline.cpu", "CpuKernels"),
    "triton": ("pyoffline.triton_backend", "TritonKernels"),
    "cuda": ("pyoffline.cuda_backend", "CudaKernels"),
}
PRODUCTS = ("logits", "dhidden", "dweight")


def ppo_rows(inputs: Inputs):
    """The rows of PPO-clip as a backend gets them."""
    from pyoffline.calls import Rows
    from pyoffline.flatten import flatten_tokens, objective_program

    tokens = po.TokenBatch(inputs.labels, advantages=inputs.advantages, old_logps=inputs.old)
    program = objective_program(po.PPOClip(CLIP, CLIP), tokens)
    flat = flatten_tokens(tokens, inputs.labels.shape, inputs.labels.device, torch.float32, program)
    return Rows(
        flat.labels,
        weights=flat.weights,
        old=flat.old,
        adv=flat.adv,
        codes=tuple(program.codes),
        hyper=program.hyper,
    )


def chunk_variants(
    inputs: Inputs, rows: int, dtype: torch.dtype, backend: str = "auto"
) -> list[Variant]:
    """The steps of one chunk, and a copy of its size."""
    from pyoffline.calls import LinearCall, Needs, RowOutputs
    from pyoffline.chunk_loop import WeightGrad
    from pyoffline.plan import current_settings

    module, name = KERNELS[backend]
    k = getattr(importlib.import_module(module), name)()
    part = inputs.take(slice(0, rows))
    table = ppo_rows(part)
    needs = Needs(hidden=True, weight=True)
    call = LinearCall(part.hidden, part.weight, table, needs, current_settings(), dtype)
    vocab = part.weight.shape[0]
    logits = k.buffer(rows, vocab, dtype, part.hidden.device)
    copy = torch.empty_like(logits).fill_(1.0)
    out = RowOutputs.zeros(rows, torch.float32, part.hidden.device)
    grad = WeightGrad(k, part.weight, 2, 1.0)
    grad.acc.zero_()
    grad.first = False
    return [
        Variant("logits", lambda: k.logits(call, part.hidden, None, logits)),
        Variant("row pass", lambda: k.row_pass(logits, table, out, dtype, 1.0)),
        Variant("dhidden", lambda: k.dhidden(logits, part.weight)),
        Variant("dweight", lambda: k.add_dweight(logits, part.hidden, grad, False)),
        Variant("copy", lambda: copy.copy_(logits)),
    ]


def run_chunk(
    inputs: Inputs, shape: Shape, dtype: str, how: tuple[str, int | None], settings: Settings
) -> dict:
    """One backend's and budget's chunk: share of the products, GB/s of the row pass and of the
    copy.
    """
    backend, budget = how
    kind = settings.device
    with budget_of(budget):
        plan = po.explain(shape.n, shape.d, shape.v, DTYPES[dtype], device=kind)
    rows = plan.chunk_rows
    variants = chunk_variants(inputs, rows, DTYPES[dtype], backend)
    for variant in variants:  # page faults and thread pools; in order, each reads the one before
        variant.run()
    seconds = {v.name: [] for v in variants}
    for number in range(settings.rounds):
        settings.progress(f"row_pass {rows} rows: round {number + 1}/{settings.rounds}")
        # never reversed: the row pass needs fresh logits
        for name, times in interleave(variants, 1, device.stopwatch(kind)).items():
            seconds[name] += times
    products = [sum(times) for times in zip(*(seconds[p] for p in PRODUCTS), strict=True)]
    barred = dtype == "bf16" and shape in BARS[kind]
    name = f"row pass, {rows} rows" if backend == "auto" else f"row pass {backend}, {rows} rows"
    bar = BAR if barred and kind == "cpu" else None
    line = entry(name, seconds["row pass"], products, 0.0, bar)
    nbytes = 2 * rows * shape.v * DTYPES[dtype].itemsize
    copied = sorted(seconds["copy"])[settings.rounds // 2]
    line.pop("gflop_s")
    line["gb_s"] = nbytes / line["median_s"] / 1e9
    line["copy_gb_s"] = nbytes / copied / 1e9
    line["percent_of_limit"] = 100 * copied / line["median_s"]
    if barred and kind != "cpu":
        line["copy_bar"], line["passed"] = COPY_BAR, line["percent_of_limit"] >= COPY_BAR
    line["chunk_rows"], line["backend"] = rows, backend
    line["products"] = {p: seconds[p] for p in PRODUCTS}
    line["copy_seconds"] = seconds["copy"]
    return line


def run(shape: Shape, dtype: str, settings: Settings) -> dict:
    """A record like those of `runner.run_case`."""
    inputs = make_inputs(shape, DTYPES[dtype], device=device.place(settings.device))
    lines = []
    for backend in device.ours(settings.device):
        for budget in (None, *settings.budgets):
            lines.append(run_chunk(inputs, shape, dtype, (backend, budget), settings))
    from pyoffline import _C

    return {
        "op": "row_pass",
        "shape": [shape.n, shape.d, shape.v],
        "dtype": dtype,
        "gemms": list(PRODUCTS),
        "flop": 3 * shape.gemm_flop,
        "rounds": settings.rounds,
        "isa": _C.isa(),
        "checks": [],
        "variants": lines,
        "peers": [],
    }

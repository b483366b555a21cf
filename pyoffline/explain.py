"""Predicted peak memory, chunk plan and GEMM floor of a fused linear call, before running it."""

from dataclasses import dataclass

import torch

from pyoffline.calls import stats_dtype
from pyoffline.chunk_loop import grad_dtype
from pyoffline.plan import MIB, current_settings, plan_chunks

PER_ROW_BYTES = 64  # row scalars, labels and their compacted copies
# What MKL keeps after a product, measured at C = 256 and 1024, D = 256 to 2048.
# Half precision (Ice Lake, 2026-11-21): two fp32 copies of a panel's operands, beside the panel of
# fp32 logits itself (widths of csrc/cpu/panel.h); on one thread one copy.
# fp32: packing blocks of a thread, whatever V: (bytes, bytes per column of D, columns at most).
SGEMM_BLOCKS = {
    "intel": (9 * MIB, 5 * 1024, None),  # Ice Lake, 2026-11-21; none on one thread
    "amd": (2.7 * MIB, 2.3 * 1024, 1024),  # Zen 4, 2026-11-28
}


def _info() -> dict:
    """What the C++ products are; nothing without the extension."""
    try:
        from pyoffline import _C
    except ImportError:
        return {"panels": {"logits": 0, "dhidden": 0}, "tiles": False, "cpu": "other"}
    return _C.gemm_info()


def _sgemm_nbytes(hidden: int, cpu: str) -> int:
    threads = torch.get_num_threads()
    block, per_column, most = SGEMM_BLOCKS.get(cpu, SGEMM_BLOCKS["amd"])
    if cpu == "intel" and threads == 1:
        return 0
    return int(threads * (block + per_column * min(hidden, most or hidden)))


def _tile_nbytes(rows: int, hidden: int, vocab: int, panels: dict) -> tuple[int, int]:
    """(dhidden of a chunk before its cast, the panels: scratch.h keeps those of each product)."""
    from pyoffline import _C

    threads = torch.get_num_threads()
    strips = _C.tile_gemm_nbytes(0, 0, threads)
    columns = rows if rows <= panels["turned_rows"] else vocab
    logits = _C.tile_gemm_nbytes(columns, hidden, threads)
    dhidden = _C.tile_gemm_nbytes(hidden, min(vocab, panels["tile_dhidden"]), threads)
    dweight = _C.tile_gemm_nbytes(hidden, rows, threads) - strips
    return rows * hidden * 4, max(logits, dhidden) + dweight


def _gemm_nbytes(
    rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: str
) -> tuple[int, int]:
    """(scratch of one product, what stays beside dweight: kept by the library, or the scratch of
    its product).
    """
    part = rows * hidden * stats_dtype(dtype).itemsize  # dhidden of a chunk before its cast
    if device != "cpu" or dtype == torch.float64:
        return part, 0
    info = _info()
    if dtype == torch.float32:
        return part, _sgemm_nbytes(hidden, info["cpu"])
    panels = info["panels"]
    if dtype == torch.bfloat16 and info["tiles"]:
        return _tile_nbytes(rows, hidden, vocab, panels)
    copies = rows * panels["dhidden"] + panels["logits"] * hidden + rows * hidden
    copies *= 8 if torch.get_num_threads() > 1 else 4
    return max(part, rows * panels["logits"] * 4), copies


@dataclass(frozen=True)
class Explanation:
    """Sizes in bytes, work in FLOP; `extra_nbytes` is beyond the inputs and their gradients. Print
    it.
    """

    n_tokens: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    chunk_rows: int
    chunks: int
    chunk_nbytes: int
    accumulator_nbytes: int
    gemm_nbytes: int
    extra_nbytes: int
    gradient_nbytes: int
    full_logits_nbytes: int
    gemms: int
    flop: int

    def __str__(self) -> str:
        mib = {k: v / MIB for k, v in vars(self).items() if k.endswith("nbytes")}
        return "\n".join(
            (
                f"{self.n_tokens} tokens, hidden {self.hidden}, vocabulary {self.vocab}, "
                f"{self.dtype}",
                f"  chunks        {self.chunks} of {self.chunk_rows} rows, "
                f"{mib['chunk_nbytes']:.0f} MiB of logits at a time "
                f"(all of them would be {mib['full_logits_nbytes']:.0f} MiB)",
                f"  extra memory  {mib['extra_nbytes']:.0f} MiB at the peak, of which "
                f"{mib['accumulator_nbytes']:.0f} MiB fp32 accumulator of dweight "
                f"and {mib['gemm_nbytes']:.0f} MiB inside the GEMMs",
                f"  gradients     {mib['gradient_nbytes']:.0f} MiB",
                f"  floor         {self.gemms} GEMMs, {self.flop / 1e12:.3f} TFLOP",
            )
        )


def explain(
    n_tokens: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    train_head: bool = True,
    device: str = "cpu",
    teacher: torch.dtype | None = None,
) -> Explanation:
    """Chunk plan, peak extra memory [bytes] and GEMM work [FLOP] of `linear_policy_loss` with
    gradients.

    `n_tokens` counts the tokens that take part; `train_head=False`: a frozen head, two GEMMs and
    no [V, D]. `teacher`: the dtype of a TeacherHead of the student's width in
    `linear_distill_loss`; one more GEMM, and its chunk of logits beside the student's.
    """
    for name, value in (("n_tokens", n_tokens), ("hidden", hidden), ("vocab", vocab)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"explain: {name} must be a positive integer, got {value!r}")
    for name, value in (("dtype", dtype), ("teacher", teacher)):
        if not (isinstance(value, torch.dtype) or (name == "teacher" and value is None)):
            raise TypeError(f"explain: {name} must be a torch.dtype, got {value!r}")
    size, beside = dtype.itemsize, 0 if teacher is None else teacher.itemsize
    plan = plan_chunks(n_tokens, vocab, size + beside, current_settings(), device)
    rows = plan.rows if plan.padded else min(plan.rows, n_tokens)
    chunks = len(plan.bounds)
    total = stats_dtype(dtype).itemsize
    separate = grad_dtype(dtype).itemsize != total
    accumulator = vocab * hidden * total if train_head and separate and chunks > 1 else 0
    chunk = rows * (vocab * (size + beside) + hidden * beside)
    dweight = vocab * hidden * grad_dtype(dtype).itemsize if train_head else 0
    scratch, kept = _gemm_nbytes(rows, hidden, vocab, dtype, device)
    if accumulator or chunks == 1:
        # dweight is first touched by the last product, when the scratch of the others is free
        scratch = max(0, scratch - dweight)
    gemms = (3 if train_head else 2) + (teacher is not None)
    return Explanation(
        n_tokens,
        hidden,
        vocab,
        dtype,
        rows,
        chunks,
        chunk,
        accumulator,
        scratch + kept,
        chunk + accumulator + scratch + kept + n_tokens * PER_ROW_BYTES,
        n_tokens * hidden * grad_dtype(dtype).itemsize + dweight,
        n_tokens * vocab * size,
        gemms,
        2 * gemms * n_tokens * hidden * vocab,
    )

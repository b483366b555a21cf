"""Predicted peak memory, chunk plan and GEMM floor of a fused linear call, before running it."""

from dataclasses import dataclass

import torch

from pyoffline.calls import stats_dtype
from pyoffline.chunk_loop import grad_dtype
from pyoffline.plan import MIB, current_settings, plan_chunks

PER_ROW_BYTES = 64  # row scalars, labels and their compacted copies
# What MKL keeps after a product, measured at C = 256 and 1024, D = 256 and 1024 (2026-11-21).
# Half precision: two fp32 copies of a panel's operands, beside the panel of fp32 logits itself
# (widths of csrc/cpu/panel.h). fp32: packing blocks of a thread, whatever V (less below C = 100).
# On one thread it keeps one copy, and no blocks.
SGEMM_NBYTES, SGEMM_NBYTES_PER_COLUMN = 9 * MIB, 5 * 1024


def _panels() -> dict[str, int]:
    """Panel widths of the C++ products; none of them without the extension."""
    try:
        from pyoffline import _C
    except ImportError:
        return {"logits": 0, "dhidden": 0}
    return _C.gemm_info()["panels"]


def _gemm_nbytes(rows: int, hidden: int, dtype: torch.dtype, device: str) -> tuple[int, int]:
    """(scratch of one product, what the vendor library keeps)."""
    part = rows * hidden * stats_dtype(dtype).itemsize  # dhidden of a chunk before its cast
    if device != "cpu" or dtype == torch.float64:
        return part, 0
    threads = torch.get_num_threads()
    if dtype == torch.float32:
        block = SGEMM_NBYTES + SGEMM_NBYTES_PER_COLUMN * hidden
        return part, threads * block if threads > 1 else 0
    panels = _panels()
    copies = rows * panels["dhidden"] + panels["logits"] * hidden + rows * hidden
    return max(part, rows * panels["logits"] * 4), (8 if threads > 1 else 4) * copies


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
    scratch, kept = _gemm_nbytes(rows, hidden, dtype, device)
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

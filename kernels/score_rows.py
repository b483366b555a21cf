"""Scoring: row statistics and losses of a linear head whose logits are never stored.

Two kernels. `score_tiles_kernel`: a program takes BLOCK_N rows and a fixed span of V, multiplies
tile by tile, rounds each logit to the logits' dtype as a stored one is, folds it into its row's
sums (`score_sums.py`), and writes SUMS numbers per row and span. `score_finish_kernel`: a program
per row joins the spans in ascending order and ends the row as the row pass does (`row_finish.py`).
Spans depend on V and the tile only: a row's result depends neither on its place, nor on other rows,
nor on the chip's size. Coordinates are those of `row_sums.py`. Traffic, FLOP, expected times:
README.md. Both serve the GEMM epilogue of a training pass too (`epilogue_rows.py`). Not here:
gradients, adapters on the head.

Tiles come through tensor descriptors (TMA) where the chip has them, else through pointers; one
source, by a constexpr. Offsets of tiles are 64-bit, inside a stored tile 32-bit.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from pyoffline.kernels.configs import FMA, ROW_UNIT, ScoreConfig, epilogue_config, score_config
from pyoffline.kernels.launch import alignment, device_of
from pyoffline.kernels.row_factors import write_factors, write_zero_factors
from pyoffline.kernels.row_finish import (
    checked_label,
    evaluate_row,
    load_or,
    row_transform,
    statistics,
    write_row,
)
from pyoffline.kernels.row_sums import LOG2_E, bent
from pyoffline.kernels.score_sums import (
    empty_state,
    fold_logits,
    halves,
    join_lanes,
    join_spans,
    products_at,
)
from pyoffline.objectives import TABLE

# m, ones, tail, sum e w, tail of squares, y of the label (in its span only), sum u (y - m), sum u:
# 32 bytes, a sector
SUMS = 8
LABEL_FIELD: tl.constexpr = tl.constexpr(5)
FINISH_SPANS = 64  # spans that a program of the second kernel joins at a time
STORE_UNIT: tl.constexpr = tl.constexpr(ROW_UNIT)
LOGITS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def load_tile(
    matrix, first, lines, k, dim, stride,
    TMA: tl.constexpr, EVEN: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of a row-major matrix: rows from `first` (TMA) or `lines` (pointers, clamped), BLOCK_D
    columns from k; 0 past dim. stride: int64 elements.
    """
    if TMA:
        tile = matrix.load([first, k])
    else:
        offs_d = k + tl.arange(0, BLOCK_D)
        ptrs = matrix + lines.to(tl.int64)[:, None] * stride + offs_d[None, :]
        if EVEN:
            tile = tl.load(ptrs)
        else:
            tile = tl.load(ptrs, mask=offs_d[None, :] < dim, other=0.0)
    return tile


@triton.jit
def rounded(x, LOGITS: tl.constexpr, PTX: tl.constexpr):
    """fp32 numbers as the logits' dtype holds them. PTX: two by one instruction, where Triton's own
    conversion takes one each, in the pipeline of the exponentials.
    """
    if PTX and LOGITS == tl.bfloat16:
        y = tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, -65536;}",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    elif PTX and LOGITS == tl.float16:
        y = tl.inline_asm_elementwise(
            "{.reg .b32 t; .reg .b16 l, h; cvt.rn.f16x2.f32 t, $3, $2; mov.b32 {l, h}, t;"
            " cvt.f32.f16 $0, l; cvt.f32.f16 $1, h;}",
            "=r,=r,r,r", [x], dtype=tl.float32, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x.to(LOGITS).to(tl.float32)
    return y


@triton.jit
def fold_tile(
    acc, first, state, slope2, sign, inner, vocab, bias_ptr, class_weight_ptr, exps,
    LOGITS: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_GAP: tl.constexpr,
    BLOCK_V: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Add a tile of products to the rows' sums, in PARTS parts of its columns, one after another:
    fewer registers. exps: () or (a pointer, rows from there, offsets, rows inside): store exp(z -
    offset) there.
    """
    if PARTS == 1:
        offs_v = first + tl.arange(0, BLOCK_V)
        mask_v = offs_v < vocab
        entries = tl.where(mask_v, offs_v, 0)
        bias = 0.0
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + entries)[None, :]
        y = rounded(acc, LOGITS, PTX)
        y = bent(y, bias, sign[:, None], inner, bias_ptr is not None, BENDS, SIGNED)
        if first + BLOCK_V > vocab:
            y = tl.where(mask_v[None, :], y, float("-inf"))
        if len(exps) > 0:
            corner, below, offset, inside = exps
            e = tl.exp2((y - offset[:, None]) * slope2[:, None]).to(corner.dtype.element_ty)
            # whole groups of 32 bytes: the row's padding takes what lies past V
            fits = offs_v // STORE_UNIT * STORE_UNIT < vocab
            mask = inside[:, None] & fits[None, :]
            tl.store(corner + (below[:, None] + offs_v[None, :]), e, mask=mask)
        u = 0.0
        if WANT_GAP:
            u = tl.where(mask_v, load_or(class_weight_ptr, entries, 1.0), 0.0)
        state = fold_logits(y, u, state, slope2, WANT_GAP, LANES)
    else:
        parts = halves(acc)
        for i in tl.static_range(2):
            state = fold_tile(
                parts[i], first + i * (BLOCK_V // 2), state, slope2, sign, inner, vocab, bias_ptr,
                class_weight_ptr, exps, LOGITS, BENDS, SIGNED, WANT_GAP, BLOCK_V // 2, PARTS // 2,
                LANES, PTX,
            )  # fmt: skip
    return state


@triton.jit
def store_label_logits(
    acc, first, label_ptrs, is_here, ptrs, sign, inner, bias_ptr,
    LOGITS: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y of the labels in a tile of products. Labels are read again: for most tiles one register of
    a thread is enough to know that there are none.
    """
    label = tl.load(label_ptrs)
    x = rounded(products_at(acc, (label - first).to(tl.int32), PARTS), LOGITS, False)
    bias = 0.0
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + label, mask=is_here, other=0.0)
    tl.store(ptrs, bent(x, bias, sign, inner, bias_ptr is not None, BENDS, SIGNED), mask=is_here)


@triton.jit
def tile_of_program(n_rows, n_spans, BLOCK_N: tl.constexpr, GROUP_N: tl.constexpr):
    """(first row, span): GROUP_N row tiles go through the spans together, so that a tile of the
    weight is read from memory once for GROUP_N * BLOCK_N rows.
    """
    row_tiles = tl.cdiv(n_rows, BLOCK_N)
    pid = tl.program_id(0)
    width = GROUP_N * n_spans
    first = pid // width * GROUP_N
    size = tl.minimum(row_tiles - first, GROUP_N)
    place = pid % width
    return (first + place % size) * BLOCK_N, place // size


SIZES = ["stride_hidden", "stride_weight", "n_rows", "vocab", "dim", "stride_exps"]


@triton.jit(do_not_specialize=SIZES)
def score_tiles_kernel(
    hidden, weight, stride_hidden, stride_weight, n_rows, vocab, dim,
    labels_ptr, temperature_ptr, bias_ptr, class_weight_ptr, head, sums_ptr, exps, stride_exps,
    LOGITS: tl.constexpr, BENDS: tl.constexpr, SIGNED: tl.constexpr, WANT_GAP: tl.constexpr,
    TMA: tl.constexpr, EVEN: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
    GROUP_N: tl.constexpr, PARTS: tl.constexpr, LANES: tl.constexpr, PTX: tl.constexpr,
    FIELDS: tl.constexpr,
):  # fmt: skip
    """The product of one row tile and one span of V, folded into sums.

    hidden, weight: descriptors with TMA, else pointers. Strides and dim in units of UNIT elements,
    so that the compiler knows the alignment. sums [N, spans, FIELDS] fp32; the last two fields only
    with WANT_GAP. exps: (), or (exp(z - offset) [N, V], offset [N] in units of y), or these and
    late [N]: then tiles without a late row do nothing, and no sums are written. stride_exps: of its
    rows, in units of STORE_UNIT elements.
    """
    AGAIN: tl.constexpr = len(exps) == 3
    dim = dim * UNIT
    n_spans = tl.cdiv(vocab, SPAN)
    first_row, span = tile_of_program(n_rows, n_spans, BLOCK_N, GROUP_N)
    rows = first_row + tl.arange(0, BLOCK_N)
    inside = rows < n_rows
    lines = tl.where(inside, rows, 0)  # rows past the end are multiplied and never stored
    label = tl.load(labels_ptr + lines)
    label = tl.where((label < 0) | (label >= vocab), -1, label).to(tl.int32)
    sign, inner, slope = row_transform(head, temperature_ptr, lines, BENDS)
    zero = tl.zeros([BLOCK_N], tl.float32)
    slope2 = slope * LOG2_E + zero
    sign = sign + zero
    state = empty_state(BLOCK_N, LANES)
    sums_ptr += (first_row.to(tl.int64) * n_spans + span) * FIELDS
    sums_ptrs = sums_ptr + tl.arange(0, BLOCK_N) * (n_spans * FIELDS)
    begin = span * SPAN
    end = min(begin + SPAN, vocab)
    columns = tl.arange(0, BLOCK_V)
    stored = ()
    if len(exps) > 0:
        # 32 bits from the tile's first row on: fewer registers than pointers
        corner = exps[0] + first_row.to(tl.int64) * stride_exps * STORE_UNIT
        below = tl.arange(0, BLOCK_N) * (stride_exps * STORE_UNIT)
        stored = (corner, below, tl.load(exps[1] + lines), inside)
    if AGAIN:
        late = tl.load(exps[2] + lines, mask=inside, other=0)
        end = tl.where(tl.max(late, axis=0) > 0, end, begin)
    for first in range(begin, end, BLOCK_V):
        entries = tl.where(first + columns < vocab, first + columns, 0)
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for k in range(0, dim, BLOCK_D):
            x = load_tile(
                hidden, first_row, lines, k, dim, stride_hidden.to(tl.int64) * UNIT,
                TMA, EVEN, BLOCK_D,
            )  # fmt: skip
            w = load_tile(
                weight, first, entries, k, dim, stride_weight.to(tl.int64) * UNIT,
                TMA, EVEN, BLOCK_D,
            )  # fmt: skip
            acc = tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)
        if not AGAIN:
            is_here = (label >= first) & (label < first + BLOCK_V)
            if tl.max(is_here.to(tl.int32), axis=0) > 0:  # most tiles hold the label of no row
                store_label_logits(
                    acc, first, labels_ptr + lines, inside & is_here, sums_ptrs + LABEL_FIELD, sign,
                    inner, bias_ptr, LOGITS, BENDS, SIGNED, PARTS,
                )  # fmt: skip
        state = fold_tile(
            acc, first, state, slope2, sign, inner, vocab, bias_ptr, class_weight_ptr, stored,
            LOGITS, BENDS, SIGNED, WANT_GAP, BLOCK_V, PARTS, LANES, PTX,
        )  # fmt: skip
    if not AGAIN:
        sums = join_lanes(state, slope2, WANT_GAP)
        for i in tl.static_range(5):
            tl.store(sums_ptrs + i, sums[i], mask=inside)
        if WANT_GAP:
            tl.store(sums_ptrs + 6, sums[5], mask=inside)
            tl.store(sums_ptrs + 7, sums[6], mask=inside)


@triton.jit(do_not_specialize=["vocab", "n_spans", "ignore_index", "stride_coefs"])
def score_finish_kernel(
    sums_ptr, vocab, n_spans, labels_ptr, ignore_index, weights_ptr, given_ptrs, gate_ptrs,
    temperature_ptr, sum_u_ptr, head, hyper, outputs, stride_coefs, flag_ptr, factors,
    CODES: tl.constexpr, BENDS: tl.constexpr, WANT_GAP: tl.constexpr, SPAN: tl.constexpr,
    FIELDS: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    """One row: its spans joined, its statistics and its objective. SPAN: entries of V of a span.
    factors: () or what `row_factors.write_factors` reads and writes.
    """
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    weight = load_or(weights_ptr, row, 1.0)
    if (label != ignore_index) & (weight != 0.0):
        _, _, slope = row_transform(head, temperature_ptr, row, BENDS)
        at, poison = checked_label(label, vocab, row, flag_ptr)
        spans_ptr = sums_ptr + row.to(tl.int64) * n_spans * FIELDS
        sums = join_spans(spans_ptr, n_spans, slope * LOG2_E, WANT_GAP, FIELDS, SPANS)
        y_label = tl.load(spans_ptr + at // SPAN * FIELDS + LABEL_FIELD) + poison
        sum_u = load_or(sum_u_ptr, 0, vocab * 1.0)
        d, logp, entropy, lse, gap, log_sum_p2, is_top1, _, _ = statistics(
            sums, slope, y_label, vocab, sum_u
        )
        scalars = (logp, entropy, lse, gap)
        loss, a, b, c, e = evaluate_row(
            row, scalars, poison, given_ptrs, gate_ptrs, hyper, CODES
        )  # fmt: skip
        stats = (logp, entropy + poison, lse + poison, log_sum_p2 + poison, is_top1, gap + poison)
        write_row(outputs, row, stride_coefs, stats, loss, (a, b, c, e))
        if len(factors) > 0:
            scale = weight * head[1] / load_or(temperature_ptr, row, head[2])
            write_factors(factors, row, a, c, sums[0], slope, d, logp, scale)
    else:
        zeros = (0.0, 0.0, 0.0, 0.0)
        write_row(outputs, row, stride_coefs, (0.0, 0.0, 0.0, 0.0, False, 0.0), 0.0, zeros)
        if len(factors) > 0:
            write_zero_factors(factors, row)


def operands(hidden, weight, config: ScoreConfig):
    """The tensors, or their descriptors."""
    if not config.tma:
        return hidden, weight
    blocks = ((hidden, config.block_n), (weight, config.block_v))
    return tuple(TensorDescriptor.from_tensor(x, [n, config.block_d]) for x, n in blocks)


def sums_nbytes(vocab: int) -> int:
    """Bytes per row between the two kernels."""
    return 4 * SUMS * triton.cdiv(vocab, ScoreConfig.span)


class Scoring:
    """The launches of one block of rows. hidden [N, D], weight [V, D], unit stride in D; rows:
    calls.Rows, fp32 and contiguous, without coefs; outputs and flag as in `row_pass`; logits are
    rounded to logits_dtype; stores: `multiply` will be given exps. Allocates 32 bytes per row and
    span of V.
    """

    def __init__(
        self, hidden, weight, rows, outputs, flag, logits_dtype, config=None, stores=False
    ):
        (self.count, dim), self.vocab = hidden.shape, weight.shape[0]
        self.hidden, self.weight, self.rows = hidden, weight, rows
        self.outputs, self.flag, self.logits_dtype = outputs, flag, logits_dtype
        head, terms = rows.head, rows.codes[0::3]
        self.scalars = (head.softcap, head.logit_scale, head.temperature)
        self.want_gap = TABLE["smoothing"].code in terms or outputs[6] is not None
        self.negative = rows.temperature is not None or head.logit_scale / head.temperature < 0
        self.unit = min(alignment(hidden, weight), dim & -dim)
        plain = not (head.softcap or self.negative or self.want_gap)
        choose = epilogue_config if stores else score_config
        self.config = config or choose(hidden, self.unit, plain)
        spans = triton.cdiv(self.vocab, self.config.span)
        self.sums = torch.empty(
            self.count, spans, SUMS, dtype=torch.float32, device=hidden.device
        )  # fmt: skip

    def multiply(self, exps=(), stride_exps=0):
        """The product, folded into the sums; exps: see the kernel."""
        hidden, weight, rows, config, unit = (
            self.hidden, self.weight, self.rows, self.config, self.unit
        )  # fmt: skip
        dim, spans = hidden.shape[1], self.sums.shape[1]
        x, w = operands(hidden, weight, config)
        score_tiles_kernel[(triton.cdiv(self.count, config.block_n) * spans,)](
            x, w, hidden.stride(0) // unit, weight.stride(0) // unit, self.count, self.vocab,
            dim // unit, rows.labels, rows.temperature, rows.bias,
            rows.class_weight if self.want_gap else None, self.scalars, self.sums, exps,
            stride_exps,
            LOGITS=LOGITS[self.logits_dtype], BENDS=rows.head.softcap != 0, SIGNED=self.negative,
            WANT_GAP=self.want_gap, TMA=config.tma, EVEN=dim % config.block_d == 0, UNIT=unit,
            PRECISION=config.precision, BLOCK_N=config.block_n, BLOCK_V=config.block_v,
            BLOCK_D=config.block_d, SPAN=config.span, GROUP_N=config.group_n, PARTS=config.parts,
            LANES=config.lanes, PTX=config.ptx, FIELDS=SUMS, num_warps=config.warps,
            num_stages=config.stages, **FMA,
        )  # fmt: skip

    def finish(self, factors=()):
        """Statistics and objective of each row; factors: see the kernel."""
        rows, outputs, spans = self.rows, self.outputs, self.sums.shape[1]
        sum_u = None if rows.class_weight is None else rows.class_weight.sum().reshape(1)
        score_finish_kernel[(self.count,)](
            self.sums, self.vocab, spans, rows.labels, rows.ignore_index, rows.weights,
            (rows.old, rows.mu, rows.ref, rows.adv), tuple(rows.extras.values()), rows.temperature,
            sum_u, self.scalars,
            () if rows.hyper is None else tuple(rows.hyper.float().flatten().tolist()),
            outputs, 0 if outputs[7] is None else outputs[7].stride(0), self.flag, factors,
            CODES=tuple(rows.codes), BENDS=rows.head.softcap != 0, WANT_GAP=self.want_gap,
            SPAN=self.config.span, FIELDS=SUMS, SPANS=FINISH_SPANS, num_warps=1, **FMA,
        )  # fmt: skip


def score_rows(hidden, weight, rows, outputs, flag, logits_dtype, config=None):
    """Run both kernels; arguments as for `Scoring`."""
    if hidden.shape[0] == 0:
        return
    with device_of(hidden):
        block = Scoring(hidden, weight, rows, outputs, flag, logits_dtype, config)
        block.multiply()
        block.finish()

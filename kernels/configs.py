"""Launch configurations, fixed: no autotune anywhere, so the same bits on every run (PROMISES N9).

A thread of the row pass holds four groups of 16 bytes per tile: 64 bytes in flight, 32 bf16 or 16
fp32 values; two or one where an entry takes more registers (`groups_per_thread`). Not measured yet
on a device: chosen from the register limit (128 per thread at 512 threads), the 16-byte load, and
the L2 rule of README.md; `make triton-table` prints what the compiler makes of them and
tests/test_triton_compile.py keeps that table.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch

GROUPS_PER_THREAD = 4
ROW_UNIT = 16  # elements: rows of the library's own [C, V] buffer start, and are padded, to these
# Every launch says that a product and a sum may become one FMA: Triton 3.9 warns where it is left
# open, and 3.10 changes what that means.
FMA = {"enable_fp_fusion": True}
# (largest vocabulary, warps of 32 threads, programs that one SM holds at 128 registers a thread, a
# gradient's; statistics alone have 64)
ROW_WARPS = ((4096, 4, 4), (None, 16, 1))
# Part of L2 that the rows in flight may fill: the rest is for weights, bias and the other stream.
L2_SHARE = 0.8


# A program of more terms than this is long: it keeps many numbers of a row at once.
MANY_TERMS = 8


@dataclass(frozen=True)
class RowConfig:
    """lanes x group logits per tile; `per_sm` programs fit on one multiprocessor, which leaves
    `registers` to a thread: said at the launch, since ptxas may take more, or fewer and spill.
    """

    lanes: int
    group: int
    warps: int
    per_sm: int
    registers: int | None = None  # None: AMD, whose compiler has no such option

    @property
    def options(self) -> dict:
        """What a launch says beside its arguments."""
        limit = {} if self.registers is None else {"maxnreg": self.registers}
        return {"num_warps": self.warps, **limit, **FMA}


def registers_of(threads: int, per_sm: int, warp_size: int) -> int | None:
    """Registers of a thread where so many programs share NVIDIA's 65,536."""
    return None if warp_size == 64 else min(255, 65_536 // (threads * per_sm))


@dataclass(frozen=True)
class RowNeeds:
    """What takes registers in a row pass: rows that start off 16 bytes; rows read and written entry
    by entry (an address and a mask each); more of an entry than its logit (a bias or a class weight
    beside it, a softcap); the sums of smoothing; the terms of the program. Rows that are read once,
    for statistics, take less: two programs run where a gradient has one.
    """

    is_shifted: bool = False
    is_split: bool = False
    is_wide: bool = False
    wants_gap: bool = False
    terms: int = 0
    is_read_once: bool = False


def groups_per_thread(vocab: int, needs: RowNeeds) -> int:
    """Groups of 16 bytes that a thread holds at once, by tests/triton_table.json: with four label
    smoothing spilled 760 bytes, and rows of few logits took 255 registers, so that two programs
    were on a multiprocessor in place of four.
    """
    if needs.is_split:
        return 1
    is_wide = needs.is_wide or needs.wants_gap or needs.terms > MANY_TERMS
    if is_wide or needs.is_read_once or vocab <= ROW_WARPS[0][0]:
        return GROUPS_PER_THREAD // 2
    return GROUPS_PER_THREAD


def row_config(
    vocab: int, itemsize: int, warp_size: int = 32, needs: RowNeeds = RowNeeds()
) -> RowConfig:
    """Tile and warps for rows of this many logits of this many bytes. Shifted fp32 rows take two
    programs of half the threads (one of all spilled on sm_100); split rows, smoothing and long
    programs half the threads, for 255 registers (Triton 3.6 needs up to 227 for smoothing).
    """
    warps, per_sm = next((w, p) for limit, w, p in ROW_WARPS if limit is None or vocab <= limit)
    if needs.is_split or needs.wants_gap or needs.terms > MANY_TERMS:
        warps //= 2
    elif needs.is_shifted and itemsize == 4:
        warps, per_sm = warps // 2, per_sm * 2
    threads = 32 * warps
    lanes = threads * groups_per_thread(vocab, needs)
    doubled = needs.is_read_once and not (needs.is_wide or needs.wants_gap)
    registers = registers_of(threads, per_sm * (2 if doubled else 1), warp_size)
    return RowConfig(lanes, 16 // itemsize, threads // warp_size, per_sm, registers)


def pair_config(vocab: int, itemsize: int, warp_size: int = 32) -> RowConfig:
    """For the sweeps over two rows: one group of 16 bytes (of the wider row) a thread, since each
    entry is ten values, and half the warps, so that a thread may have 128 registers (with four
    groups every divergence spilled on NVIDIA, with all warps some did).
    """
    config = row_config(vocab, itemsize, warp_size)
    warps = config.warps // 2
    return replace(config, lanes=warps * warp_size, warps=warps, per_sm=2 * config.per_sm)


def programs_in_flight(row_nbytes: int, config: RowConfig, sms: int, l2_nbytes: int) -> int:
    """As many rows at once as L2 keeps for their second sweep, at least one per multiprocessor. Of
    0 bytes (rows that are read once, for statistics): twice what registers allow a gradient.
    """
    if row_nbytes == 0:
        return 2 * sms * config.per_sm
    fit = int(L2_SHARE * l2_nbytes / row_nbytes)
    return max(sms, min(fit, sms * config.per_sm))


def bytes_per_logit(vocab: int, itemsize: int, sms: int, l2_nbytes: int, warp_size=32) -> float:
    """Memory traffic of the row pass in place: one read, one write, and what L2 loses between."""
    row_nbytes = vocab * itemsize
    config = row_config(vocab, itemsize, warp_size)
    rows = programs_in_flight(row_nbytes, config, sms, l2_nbytes)
    lost = max(0.0, 1.0 - L2_SHARE * l2_nbytes / (rows * row_nbytes))
    return itemsize * (2.0 + lost)


@dataclass(frozen=True)
class ScoreConfig:
    """Tile of the scoring product, rows x vocabulary x hidden. `tma`: operands come through tensor
    descriptors; `parts`: a tile's columns are folded in so many parts, for fewer registers;
    `group_n` row tiles go through the vocabulary together, a program through `span` entries of it;
    `lanes`: threads that hold a row of a product, each two neighbours of every 2 * lanes columns; 1
    where they do not (Triton 3.7 then adds up wrong lanes: only the emulator shows it);
    `ptx`: the chip is NVIDIA's.
    """

    block_n: int
    block_v: int
    block_d: int
    warps: int
    stages: int
    parts: int = 1
    tma: bool = False
    precision: str = "ieee"
    group_n: int = 16
    span: int = 1024
    lanes: int = 1
    ptx: bool = True


# On sm_90 and later a tile without descriptors has one stage: with more, and cp.async, Triton 3.7.0
# puts no fence between a copy and the tensor cores that read it (its issue 10537; tests/emulated).
# (family, bytes of an element, whether the head is plain: no softcap, temperatures of rows, class
# weights or smoothing, which want registers) -> the largest tile that keeps every sum in registers,
# by tests/triton_table.json, and by Triton 3.6. No tile is measured yet. fp32 products without
# tensor cores.
SCORE_TILES = {
    ("sm_100", 2, True): ScoreConfig(128, 256, 64, 8, 3, parts=4, tma=True),
    ("sm_100", 2, False): ScoreConfig(128, 128, 64, 8, 3, parts=2, tma=True),
    ("sm_90", 2, True): ScoreConfig(128, 256, 64, 8, 3, parts=2, tma=True, lanes=4),
    ("sm_90", 2, False): ScoreConfig(128, 128, 64, 8, 3, tma=True, lanes=4),
    ("sm_80", 2, True): ScoreConfig(128, 128, 64, 8, 3, lanes=16),
    ("sm_80", 2, False): ScoreConfig(128, 128, 64, 8, 3, parts=8),
    ("unaligned", 2, True): ScoreConfig(64, 128, 32, 8, 1, parts=8),
    ("unaligned", 2, False): ScoreConfig(64, 128, 32, 8, 1, parts=8),
    ("nvidia", 4, True): ScoreConfig(64, 128, 16, 8, 3, parts=4),
    ("nvidia", 4, False): ScoreConfig(64, 128, 16, 8, 2, parts=8),
    ("amd", 2, True): ScoreConfig(128, 128, 64, 8, 2, ptx=False),
    ("amd", 2, False): ScoreConfig(128, 128, 64, 8, 2, parts=2, ptx=False),
    ("amd", 4, True): ScoreConfig(128, 128, 32, 8, 2, parts=2, ptx=False),
    ("amd", 4, False): ScoreConfig(128, 128, 32, 8, 2, parts=8, ptx=False),
}
# The same product when its epilogue stores a tile too (`epilogue_rows.py`): bf16, no softcap.
# (family, whether rows have no temperatures) -> a tile. On sm_90 two programs fit a multiprocessor,
# so that one folds while the other multiplies; with temperatures one of twice the warps.
EPILOGUE_TILES = {
    ("sm_100", True): ScoreConfig(128, 128, 64, 8, 3, parts=2, tma=True),
    ("sm_100", False): ScoreConfig(128, 128, 64, 8, 3, parts=2, tma=True),
    ("sm_90", True): ScoreConfig(128, 128, 64, 4, 3, parts=2, tma=True, lanes=4),
    ("sm_90", False): ScoreConfig(128, 128, 64, 8, 3, tma=True, lanes=4),
    ("sm_80", True): ScoreConfig(128, 128, 64, 8, 3, parts=2, lanes=16),
    ("sm_80", False): ScoreConfig(128, 128, 64, 8, 3, parts=8),
    ("unaligned", True): ScoreConfig(64, 128, 32, 8, 1, parts=8),
    ("unaligned", False): ScoreConfig(64, 128, 32, 8, 1, parts=8),
    ("amd", True): ScoreConfig(128, 128, 64, 8, 2, parts=4, ptx=False),
    ("amd", False): ScoreConfig(128, 128, 64, 8, 2, parts=4, ptx=False),
}
# fp32 products where torch's are TF32, on NVIDIA's chips.
TF32_TILES = {
    "sm_90": ScoreConfig(128, 128, 32, 8, 3, parts=4, tma=True, precision="tf32", lanes=4),
    "sm_80": ScoreConfig(64, 128, 16, 8, 3, parts=4, precision="tf32"),
    "unaligned": ScoreConfig(64, 128, 16, 8, 1, parts=4, precision="tf32"),
}
INTERPRETER_TILE = ScoreConfig(16, 16, 16, 4, 2, span=32, lanes=2, ptx=False)


def score_family(major: int | None, itemsize: int, unit: int) -> str:
    """Rows of SCORE_TILES for a chip: compute capability `major`, None for AMD. Rows of the
    operands start at multiples of `unit` elements: descriptors and copies want 16 bytes.
    """
    if major is None:
        return "amd"
    if itemsize == 4:
        return "nvidia"
    if unit * itemsize % 16:
        return "unaligned"
    return "sm_100" if major >= 10 else "sm_90" if major >= 9 else "sm_80"


def tf32_family(major: int, unit: int) -> str:
    """Rows of TF32_TILES."""
    if major < 9:
        return "sm_80"
    return "unaligned" if unit * 4 % 16 else "sm_90"


def _major(hidden: torch.Tensor) -> int | None:
    """Compute capability, None for AMD."""
    is_amd = torch.version.hip is not None
    return None if is_amd else torch.cuda.get_device_capability(hidden.device)[0]


def _family(hidden: torch.Tensor, unit: int) -> str:
    return score_family(_major(hidden), hidden.element_size(), unit)


def score_config(hidden: torch.Tensor, unit: int, plain: bool) -> ScoreConfig:
    """The tile for hidden states on their device; fp32 products are TF32 where torch's own are, as
    the logits of a training pass then are.
    """
    if hidden.device.type == "cpu":
        return INTERPRETER_TILE
    family, size = _family(hidden, unit), hidden.element_size()
    if family == "nvidia" and multiplies_in_tf32():
        return TF32_TILES[tf32_family(_major(hidden), unit)]
    return SCORE_TILES[family, size, plain]


def multiplies_in_tf32() -> bool:
    """Whether torch's fp32 products on CUDA are TF32."""
    flags = torch.backends.cuda.matmul
    try:
        return flags.allow_tf32
    except RuntimeError:  # torch 2.9 and later, where it was set through fp32_precision
        return flags.fp32_precision == "tf32"


def epilogue_config(hidden: torch.Tensor, unit: int, plain: bool) -> ScoreConfig:
    """The tile of a product whose epilogue stores."""
    if hidden.device.type == "cpu":
        return INTERPRETER_TILE
    return EPILOGUE_TILES[_family(hidden, unit), plain]


@cache
def device_limits(index: int) -> tuple[int, int, int]:
    """(multiprocessors, bytes of L2, threads of a warp) of a GPU."""
    p = torch.cuda.get_device_properties(index)
    return p.multi_processor_count, p.L2_cache_size, p.warp_size

"""Bugs in the GPU kernels, which the interpreter or the emulator of PTX must see.

Our own others: `more_mutations.py`.
"""

from mutation_table import one

EMULATED = "tests/test_emulated_gpu.py::test_on_an_emulated_gpu"
ROW_PASS, PROMISES = (
    EMULATED + "[90-emulated/test_row_pass.py-]",
    EMULATED + "[90-test_gpu_numbers.py-n4 or n6 or (n10 and bfloat16) or masked]",
)
SCORING = EMULATED + "[90-emulated/test_score.py-]"
BARRIERS = "tests/test_emulated_barriers.py::test_no_barrier_can_be_left_out"
INTERPRETED = "tests/test_triton.py::test_in_the_interpreter"
TABLE = "tests/test_triton_compile.py::test_the_table_is_of_the_kernels_as_they_are"

KERNELS = (
    one(
        145,
        "triton: the label's entry is stored while other warps still write the row",
        "kernels/row_pass.py",
        "    tl.debug_barrier()\n    tl.store(g_ptr + label",
        "    tl.store(g_ptr + label",
        ROW_PASS,
    ),
    one(
        146,
        "triton: a narrower gradient overwrites logits that other warps have yet to read",
        "kernels/row_pass.py",
        "        tl.debug_barrier()\n    if MASKED:",
        "        pass\n    if MASKED:",
        ROW_PASS,
    ),
    one(
        147,
        "triton: an entry of -inf is multiplied with its exponential of 0",
        "kernels/row_sums.py",
        "tl.sum(e * tl.maximum(w, FLOOR), axis=1)",
        "tl.sum(e * w, axis=1)",
        PROMISES,
    ),
    one(
        148,
        "triton: a row's offset is formed in 32 bits",
        "kernels/row_pass.py",
        "start = tl.cast(row, tl.int64) * stride_logits * UNIT",
        "start = row * stride_logits * UNIT",
        INTERPRETED + "[test_guards.py]",
    ),
    one(
        149,
        "triton: infinite constants take the sweep of finite ones",
        "kernels/row_pass.py",
        'if largest == float("inf"):',
        "if largest < 0.0:",
        ROW_PASS,
    ),
    one(
        150,
        "triton: a tile of scoring comes by copies that no fence parts from its product",
        "kernels/configs.py",
        '("unaligned", 2, True): ScoreConfig(64, 128, 32, 8, 1, parts=8)',
        '("unaligned", 2, True): ScoreConfig(64, 128, 32, 8, 2, parts=8)',
        SCORING,
    ),
    one(
        151,
        "triton: a kernel is not the one that the table is of",
        "kernels/scale_by_upstream.py",
        "LANES, WARPS = 1024, 16",
        "LANES, WARPS = 1024, 8",
        TABLE,
    ),
    one(
        152,
        "cuda: a block may end before its peers have read its sums",
        "csrc/cuda/row_algorithm.h",
        "    g_.wait();  // a block's slots live until every peer has read them\n",
        "",
        BARRIERS + "[sm_90a-40000-dtype0-grad0-None-idle0]",
    ),
    one(
        153,
        "cuda: a row is read before its copies have arrived",
        "csrc/cuda/row_slots.h",
        "    g_.wait_copies();\n",
        "",
        BARRIERS + "[sm_80-3000-dtype2-grad2-None-idle2]",
    ),
    one(
        154,
        "triton: where a lane's maximum falls behind, what equals it is forgotten",
        "kernels/score_sums.py",
        "tl.where(is_top, tail, d * r)",
        "tl.where(is_top, tail, tail * r)",
        INTERPRETED + "[test_score.py]",
    ),
    one(
        155,
        "triton: two logits that are rounded together change places",
        "kernels/score_rows.py",
        "cvt.rn.bf16x2.f32 t, $3, $2;",
        "cvt.rn.bf16x2.f32 t, $2, $3;",
        SCORING,
    ),
    one(
        156,
        "triton: the label in the last column of a tile of scoring is not found",
        "kernels/score_rows.py",
        "(label < first + BLOCK_V)",
        "(label < first + BLOCK_V - 1)",
        INTERPRETED + "[test_score.py]",
    ),
)

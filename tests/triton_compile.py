"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made.

    python tests/triton_compile.py > tests/triton_table.json      (make triton-table)

Each entry: kernel variant x target -> registers, shared memory, spills, 16-byte accesses, and for
the scoring product the matrix instructions and tile copies. The variants are those that the library
runs: tile and warps from kernels/configs.py, per dtype. Not here: the comparison
(test_triton_compile.py).
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

import pyoffline as po
from pyoffline.divergence_math import DIVERGENCES
from pyoffline.kernels import epilogue_rows, scale_by_upstream, score_rows
from pyoffline.kernels.configs import (
    EPILOGUE_TILES,
    FMA,
    SCORE_TILES,
    pair_config,
    row_config,
    score_family,
)
from pyoffline.kernels.distill_row_pass import distill_kernel
from pyoffline.kernels.row_pass import row_pass_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
DTYPES = {"bf16": 2, "fp16": 2, "fp32": 4}
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Instructions of the scoring product: matrix products, and copies of 16 bytes or whole tiles.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "mfma": "v_mfma",
    "tma": r"cp\.async\.bulk\.tensor",
    "copies": r"cp\.async\.cg\.shared\.global",
}
COMPOSED = po.PPOClip() + 0.04 * po.KL("k3", "old") - 1e-3 * po.Entropy()
FLOAT = "*fp32"


def _row_pass(dtype, chip, objective=None, grad=None, coefs=False, stats=True, options=(), unit=16):
    """(kernel, arguments, options) of a row pass on 151,936 logits; unit: rows start at multiples
    of so many elements.
    """
    shifted = unit * DTYPES[dtype] < 16
    config = row_config(151_936, DTYPES[dtype], chip.warp_size, shifted)
    program = objective.program(False) if objective else None
    codes = tuple(program.codes) if program else ()
    terms, reads = codes[0::3], program.reads if program else ()
    given = tuple(FLOAT if name in reads else None for name in ("old", "mu", "ref", "adv"))
    args = {
        "logits_ptr": f"*{dtype}",
        "dlogits_ptr": f"*{grad}" if grad else None,
        **dict.fromkeys(("stride_logits", "stride_dlogits", "n_rows", "vocab"), "i32"),
        "labels_ptr": "*i64",
        "ignore_index": "i32",
        "weights_ptr": FLOAT if program else None,
        "given_ptrs": given,
        "gate_ptrs": (),
        "coefs_ptr": FLOAT if coefs else None,
        "temperature_ptr": FLOAT if "temperature" in options else None,
        "bias_ptr": FLOAT if "bias" in options else None,
        "class_weight_ptr": None,
        "sum_u_ptr": None,
        "grad_scale_ptr": FLOAT if dtype == "fp16" and grad else None,
        "head": ("fp32",) * 3,
        "hyper": ("fp32",) * (8 * len(terms)),
        "outputs": (FLOAT,) * 5 + ("*u8", None, None) if stats else (None,) * 8,
        "stride_coefs": "i32",
        "flag_ptr": "*i64",
        "CODES": codes,
        "BENDS": "softcap" in options,
        "SIGNED": "temperature" in options,
        "WANT_PT": coefs or 26 in terms,
        "WANT_U": coefs or 28 in terms,
        "WANT_P2": stats,
        "WANT_GAP": 28 in terms,
        "UNIT": unit,
        "LANES": config.lanes,
        "GROUP": config.group,
        "CUT": int(shifted),
        "SHIFTS": shifted,
    }
    return row_pass_kernel, args, {"num_warps": config.warps}


def _distill(dtype, chip, codes):
    """A distillation row pass; codes: of its divergences."""
    config = pair_config(151_936, DTYPES[dtype], chip.warp_size)
    pointers = ("logits_ptr", "teacher_ptr", "dlogits_ptr")
    sizes = ("stride_logits", "stride_teacher", "stride_dlogits", "n_rows", "vocab")
    args = {
        **dict.fromkeys(pointers, f"*{dtype}"),
        **dict.fromkeys(sizes, "i32"),
        "labels_ptr": "*i64",
        "ignore_index": "i32",
        "weights_ptr": FLOAT,
        "coefs_ptr": FLOAT,
        "stride_coefs": "i32",
        "gate_ptrs": (),
        **dict.fromkeys(("temperature_ptr", "bias_ptr", "bias_t_ptr", "grad_scale_ptr"), None),
        "head": ("fp32",) * 3,
        "head_t": ("fp32",) * 3,
        "numbers": ("fp32",) * (5 * len(codes)),
        "outputs": (FLOAT, FLOAT, FLOAT, "*u8"),
        "stride_values": "i32",
        "CODES": tuple(x for code in codes for x in (code, -1)),
        "BENDS": False,
        "BENDS_T": False,
        "UNIT": 16,
        "LANES": config.lanes,
        "GROUP": config.group,
        "CUT": 0,
    }
    return distill_kernel, args, {"num_warps": config.warps}


def _scale(dtype, chip):
    args = {"grad_ptr": f"*{dtype}", "upstream_ptr": FLOAT, "size": "i32"}
    args |= {"LANES": scale_by_upstream.LANES, "GROUP": 16 // DTYPES[dtype]}
    kernel = scale_by_upstream.scale_by_upstream_kernel
    return kernel, args, {"num_warps": scale_by_upstream.WARPS * 32 // chip.warp_size}


def _score_tiles(dtype, chip, unit=16, options=(), precision="ieee", exps=()):
    """The scoring product; `unit`: rows start at multiples of so many elements; less than 16: they
    end inside a tile too. exps: pointers of the epilogue.
    """
    major = chip.arch // 10 if chip.backend == "cuda" else None
    family = score_family(major, DTYPES[dtype], unit)
    config = EPILOGUE_TILES[family] if exps else SCORE_TILES[family, DTYPES[dtype], not options]
    config = replace(config, precision=precision)
    both = {"hidden": config.block_n, "weight": config.block_v}
    shape = {k: f"tensordesc<{dtype}[{n}, {config.block_d}]>" for k, n in both.items()}
    args = {
        **(shape if config.tma else dict.fromkeys(both, f"*{dtype}")),
        **dict.fromkeys(("stride_hidden", "stride_weight", "n_rows", "vocab", "dim"), "i32"),
        "labels_ptr": "*i64",
        "temperature_ptr": FLOAT if "temperature" in options else None,
        "bias_ptr": FLOAT if "bias" in options else None,
        "class_weight_ptr": FLOAT if "class weights" in options else None,
        "head": ("fp32",) * 3,
        "sums_ptr": FLOAT,
        "exps": exps,
        "stride_exps": "i32",
        "LOGITS": score_rows.LOGITS[TORCH[dtype]],
        "BENDS": "softcap" in options,
        "SIGNED": "temperature" in options,
        "WANT_GAP": "class weights" in options,
        "TMA": config.tma,
        "EVEN": unit == 16,
        "UNIT": unit,
        "PRECISION": config.precision,
        "BLOCK_N": config.block_n,
        "BLOCK_V": config.block_v,
        "BLOCK_D": config.block_d,
        "SPAN": config.span,
        "GROUP_N": config.group_n,
        "PARTS": config.parts,
        "FIELDS": score_rows.SUMS,
    }
    kernel = score_rows.score_tiles_kernel
    return kernel, args, {"num_warps": config.warps, "num_stages": config.stages}


def _label_logits(chip):
    args = dict.fromkeys(("hidden_ptr", "weight_ptr"), "*bf16")
    args |= dict.fromkeys(("stride_hidden", "stride_weight", "vocab", "dim"), "i32")
    args |= {"labels_ptr": "*i64", "ignore_index": "i32", "weights_ptr": FLOAT}
    args |= {"bias_ptr": None, "temperature_ptr": None}
    args |= {"head": ("fp32",) * 3, "offset_ptr": FLOAT, "LANES": epilogue_rows.OFFSET_LANES}
    return epilogue_rows.label_logits_kernel, args, {"num_warps": 4}


def _score_finish(chip, factors=()):
    """The second kernel of scoring, with the composed objective."""
    program = COMPOSED.program(False)
    args = {
        "sums_ptr": FLOAT,
        **dict.fromkeys(("vocab", "n_spans"), "i32"),
        "labels_ptr": "*i64",
        "ignore_index": "i32",
        "weights_ptr": FLOAT,
        "given_ptrs": (FLOAT, None, None, FLOAT),
        "gate_ptrs": (),
        "temperature_ptr": None,
        "sum_u_ptr": None,
        "head": ("fp32",) * 3,
        "hyper": ("fp32",) * (8 * len(program.codes[0::3])),
        "outputs": (FLOAT,) * 5 + ("*u8", None, None),
        "stride_coefs": "i32",
        "flag_ptr": "*i64",
        "factors": factors,
        "CODES": tuple(program.codes),
        "BENDS": False,
        "WANT_GAP": False,
        "SPAN": 1024,
        "FIELDS": score_rows.SUMS,
        "SPANS": score_rows.FINISH_SPANS,
    }
    return score_rows.score_finish_kernel, args, {"num_warps": 1}


def variants():
    """name -> function of the chip."""
    out = {}
    for d in DTYPES:
        out[f"row_pass ppo+kl+entropy {d}"] = lambda c, d=d: _row_pass(d, c, COMPOSED, grad=d)
        out[f"scale_by_upstream {d}"] = lambda c, d=d: _scale(d, c)
        out[f"score_tiles {d}"] = lambda c, d=d: _score_tiles(d, c)
    for name, row in DIVERGENCES.items():
        out[f"distill {name} bf16"] = lambda c, row=row: _distill("bf16", c, (row.code,))
    out["distill jsd fp32"] = lambda c: _distill("fp32", c, (DIVERGENCES["jsd"].code,))
    out["row_pass statistics bf16"] = lambda c: _row_pass("bf16", c)
    out["row_pass coefs bf16"] = lambda c: _row_pass(
        "bf16", c, grad="bf16", coefs=True, stats=False
    )
    out["row_pass ppo+kl+entropy fp32 to bf16"] = lambda c: _row_pass(
        "fp32", c, COMPOSED, grad="bf16"
    )
    for d in ("bf16", "fp32"):
        out[f"row_pass ppo+kl+entropy shifted {d}"] = lambda c, d=d: _row_pass(
            d, c, COMPOSED, grad=d, unit=1
        )
    head = ("bias", "softcap", "temperature")
    out["row_pass all of the head bf16"] = lambda c: _row_pass(
        "bf16", c, COMPOSED, grad="bf16", options=head
    )
    head = (*head, "class weights")
    for d in ("bf16", "fp32"):
        out[f"score_tiles all of the head {d}"] = lambda c, d=d: _score_tiles(d, c, options=head)
        out[f"score_tiles unaligned {d}"] = lambda c, d=d: _score_tiles(d, c, unit=1, options=head)
        out[f"score_tiles uneven {d}"] = lambda c, d=d: _score_tiles(d, c, unit=8)
    out["score_tiles tf32"] = lambda c: _score_tiles(
        "fp32", c, precision="tf32" if c.backend == "cuda" else "ieee"
    )
    out["score_finish ppo+kl+entropy"] = _score_finish
    out["score_finish with factors"] = lambda c: _score_finish(c, (FLOAT,) * 3 + ("*i32",))
    out["label_logits bf16"] = _label_logits
    exps = {"": ("*bf16", FLOAT), " again": ("*bf16", FLOAT, "*i32")}
    for kind, pointers in exps.items():
        out[f"score_tiles epilogue{kind} bf16"] = lambda c, p=pointers: _score_tiles(
            "bf16", c, exps=p
        )
    for kind, unit in (("", 16), (" unaligned", 1)):
        out[f"score_tiles epilogue temperature{kind} bf16"] = lambda c, u=unit: _score_tiles(
            "bf16", c, unit=u, options=("bias", "temperature"), exps=exps[""]
        )
    return out


def _source(kernel, args):
    """An ASTSource: pointers are aligned to 16 bytes, what is no type is a constant."""
    constants, attrs = {}, {}

    def leaf(value, path, name):
        if isinstance(value, tuple) and not name.isupper():
            return tuple(leaf(x, (*path, i), name) for i, x in enumerate(value))
        if isinstance(value, str) and not name.isupper():
            if value.startswith("*"):
                attrs[path] = [["tt.divisibility", 16]]
            return value
        constants[path] = value
        return "constexpr"

    signature = {name: leaf(v, (i,), name) for i, (name, v) in enumerate(args.items())}
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)


def _nvidia(compiled, arch: int) -> dict:
    tool = get_ptxas(arch).path  # which of its own Triton takes differs between versions
    ptx = compiled.asm["ptx"]
    target = re.search(r"\.target (\S+?)[,\s]", ptx)[1]
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [tool, "-v", f"--gpu-name={target}", str(source), "-o", f"{folder}/cubin"]
        done = subprocess.run(command, capture_output=True, text=True)
        log = done.stdout + done.stderr
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{log}")
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spills": spills + int(re.search(r"(\d+) bytes stack frame", log)[1]),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64", ptx)),
        "wide_stores": len(re.findall(r"st\.global\S*\.v4\.b32|st\.global\S*\.v2\.b64", ptx)),
        "local": len(re.findall(r"\b(?:ld|st)\.local", ptx)),
        "wide_offsets": len(
            re.findall(r"mul\.wide|mad\.wide|mul\.lo\.[su]64|mad\.lo\.[su]64", ptx)
        ),
    }


def _amd(compiled) -> dict:
    asm = compiled.asm["amdgcn"]

    def field(name):
        return int(re.search(rf"\.{name}:\s*(\d+)", asm)[1])

    return {
        "registers": field("vgpr_count"),
        "spills": field("vgpr_spill_count") + field("private_segment_fixed_size"),
        "wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", asm)),
        "wide_stores": len(re.findall(r"(?:global|buffer)_store_dwordx4", asm)),
    }


def compile_one(name: str, target: str) -> dict:
    """What the compiler makes of one variant for one target."""
    chip = TARGETS[target]
    kernel, args, options = variants()[name](chip)
    compiled = triton.compile(_source(kernel, args), target=chip, options=options | FMA)
    facts = _nvidia(compiled, chip.arch) if chip.backend == "cuda" else _amd(compiled)
    if kernel is score_rows.score_tiles_kernel:
        text = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
        counts = {k: len(re.findall(pattern, text)) for k, pattern in INSTRUCTIONS.items()}
        facts |= {k: n for k, n in counts.items() if n}
    return {"warps": options["num_warps"], "shared": compiled.metadata.shared, **facts}


def table() -> dict:
    """Every variant for every target."""
    return {
        "triton": triton.__version__,
        "kernels": {n: {t: compile_one(n, t) for t in TARGETS} for n in variants()},
    }


if __name__ == "__main__":
    facts = [compile_one(*pair.split("|")) for pair in sys.argv[1:]] or table()
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")

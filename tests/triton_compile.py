"""Compiles the Triton kernels ahead of time, without a GPU, and reads what the compiler made.

    python tests/triton_compile.py                (the table, by make triton-table; entries of the
                                                   committed one stay where their fingerprint does)
    python tests/triton_compile.py "NAME|TARGET" ...              (those, as a list)
    python tests/triton_compile.py --fingerprints                 (what would be compiled)

A variant (triton_variants.py) is a call of a wrapper: it runs with a recorder in the place of the
kernel, as on the target in question, and what it launches is compiled: the constants, types,
alignments, tile and warps are the library's own. The table: variant x target -> registers, shared
memory, spills, 16-byte accesses, for the scoring product its matrix instructions and tile copies,
and a fingerprint of what was compiled. Not here: the comparison (test_triton_compile.py).
"""

import contextlib
import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton
from sass_loops import spills_in_loops
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor
from triton_fingerprint import fingerprint
from triton_variants import variants

from pyoffline.kernels import (
    configs,
    distill_row_pass,
    epilogue_rows,
    launch,
    row_pass,
    scale_by_upstream,
    score_rows,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
KERNELS = (
    (row_pass, "row_pass_kernel"),
    (distill_row_pass, "distill_kernel"),
    (scale_by_upstream, "scale_by_upstream_kernel"),
    (score_rows, "score_tiles_kernel"),
    (score_rows, "score_finish_kernel"),
    (epilogue_rows, "label_logits_kernel"),
)
SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}
# Instructions of the scoring product: matrix products, asynchronous copies, whole tiles.
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"mma\.sync",
    "mfma": "v_mfma",
    "tma": r"cp\.async\.bulk\.tensor",
    "copies": r"cp\.async\.c[ag]\.shared\.global",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: its kernel, the arguments by name, and the launch's own (num_warps, ...)."""

    kernel: object
    args: dict
    options: dict


class Recorder:
    """In the place of a kernel: notes its launches."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def record(*args, **named):
            names = self.kernel.arg_names
            given = dict(zip(names, args, strict=False)) | named
            args = {name: given.pop(name) for name in names}
            self.found.append(Launch(self.kernel, args, given))

        return record


def launches(call, chip) -> list[Launch]:
    """What a call on meta tensors would launch on a chip."""
    found, major = [], chip.arch // 10 if chip.backend == "cuda" else None

    put = [(module, name, Recorder(getattr(module, name), found)) for module, name in KERNELS]
    for module in (row_pass, distill_row_pass, scale_by_upstream):
        put.append((module, "warp_size", lambda _: chip.warp_size))
    put.append((launch, "device_limits", lambda _: (132, 50 << 20, chip.warp_size)))
    put.append((configs, "_major", lambda hidden: major))
    with contextlib.ExitStack() as stack:
        for module, name, value in put:
            stack.enter_context(mock.patch.object(module, name, value))
        call()
    return found


def source_of(found: Launch) -> tuple[dict, dict, dict]:
    """(signature, constants, attributes) as Triton's binder makes them of these arguments."""
    constants, attrs = {}, {}
    fixed = {p.name for p in found.kernel.params if p.is_constexpr}
    unspecialised = {p.name for p in found.kernel.params if p.do_not_specialize}

    def leaf(value, path, name):
        if name in fixed or value is None:
            constants[path] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(leaf(x, (*path, i), name) for i, x in enumerate(value))
        if isinstance(value, TensorDescriptor):
            return f"tensordesc<{SHORT[value.base.dtype]}{list(value.block_shape)}>"
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
                attrs[path] = [["tt.divisibility", 16]]
            return f"*{SHORT[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        assert type(value) is int and name in unspecialised, f"{name} recompiles with its value"
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"

    signature = {name: leaf(v, (i,), name) for i, (name, v) in enumerate(found.args.items())}
    return signature, constants, attrs


def launch_of(name: str, target: str) -> Launch:
    """The launch of a variant on a target."""
    call, at, _ = variants()[name]
    found = launches(call, TARGETS[target])[at]
    assert name.startswith(found.kernel.__name__.removesuffix("_kernel")), name
    return found


def cuobjdump(what: str, code: bytes) -> str:
    """What the tool says of machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _nvidia(compiled) -> dict:
    """By the machine code itself: registers and spills depend on the options that Triton gives
    ptxas, and these on its version.
    """
    ptx, code = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump("-res-usage", code))
    spilled = int(usage[2])  # bytes of stack
    looped = {"looped_spills": spills_in_loops(cuobjdump("-sass", code))} if spilled else {}
    return {
        "registers": int(usage[1]),
        "spills": spilled,
        **looped,
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


def compile_launch(found: Launch, target: str) -> dict:
    """What the compiler makes of a launch for one target."""
    chip, kernel = TARGETS[target], found.kernel
    signature, constants, attrs = source_of(found)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attrs)
    compiled = triton.compile(source, target=chip, options=found.options)
    facts = _nvidia(compiled) if chip.backend == "cuda" else _amd(compiled)
    if kernel is score_rows.score_tiles_kernel:
        text = compiled.asm["ptx" if chip.backend == "cuda" else "amdgcn"]
        counts = {k: len(re.findall(pattern, text)) for k, pattern in INSTRUCTIONS.items()}
        facts |= {k: n for k, n in counts.items() if n}
    return {"warps": found.options["num_warps"], "shared": compiled.metadata.shared, **facts}


def fingerprint_of(found: Launch) -> str:
    return fingerprint(found.kernel, source_of(found), found.options)


def compile_one(name: str, target: str) -> dict:
    """The entry of the table."""
    found = launch_of(name, target)
    return {"fingerprint": fingerprint_of(found), **compile_launch(found, target)}


def fingerprints() -> dict:
    """name -> target -> fingerprint: what the table must hold."""
    listed = variants().items()
    return {n: {t: fingerprint_of(launch_of(n, t)) for t in row[2]} for n, row in listed}


def write_table(kept: dict) -> None:
    """Every variant for each of its targets, an entry a line; kept: an earlier table, whose entries
    stay where the fingerprint and Triton are the same.
    """
    known = kept["kernels"] if kept.get("triton") == triton.__version__ else {}

    def entry(name, target):
        found = launch_of(name, target)
        old = known.get(name, {}).get(target, {})
        if old.get("fingerprint") == fingerprint_of(found):
            return old
        return {"fingerprint": fingerprint_of(found), **compile_launch(found, target)}

    rows = []
    for name, (_, _, chips) in variants().items():
        lines = (f"   {json.dumps(t)}: {json.dumps(entry(name, t))}" for t in chips)
        rows.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
    version = json.dumps(triton.__version__)
    kernels = ",\n".join(rows)
    sys.stdout.write(f'{{\n "triton": {version},\n "kernels": {{\n{kernels}\n }}\n}}\n')


if __name__ == "__main__":
    if sys.argv[1:] == ["--fingerprints"]:
        sys.stdout.write(json.dumps(fingerprints()) + "\n")
    elif sys.argv[1:]:
        facts = [compile_one(*pair.split("|")) for pair in sys.argv[1:]]
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        committed = Path(__file__).with_name("triton_table.json")
        write_table(json.loads(committed.read_text()) if committed.exists() else {})

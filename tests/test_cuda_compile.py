"""Every CUDA kernel compiles for every architecture, without spills or local memory, and its
registers and static shared memory are those of cuda_resources.json ([registers, shared bytes]).

With it: facts of the code that traffic and correctness rest on. The kernels run on a GPU only.
"""

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLE = json.loads((Path(__file__).parent / "cuda_resources.json").read_text())
ARCHS = tuple(TABLE["kernels"])

NVCC = shutil.which("nvcc")
if not NVCC:
    pytest.skip("no nvcc: not run", allow_module_level=True)


def _name(mangled: str) -> str:
    """row_kernel<float, bf16> as it stands in the table."""
    types = re.search(r"row_kernelI(f|N\S*?E)(f|S\w*_|N\S*?E)?E", mangled)
    names = re.findall(r"4bf16|3f16", types.group(0))
    first = "f32" if types.group(1) == "f" else names[0].lstrip("34")
    if types.group(2) == "f":
        return f"{first}_f32"
    return f"{first}_{names[-1].lstrip('34')}"


@functools.cache
def compiled(arch: str) -> tuple[dict, str, Path]:
    """({kernel: facts}, PTX, cubin) of one architecture: one compilation a session."""
    folder = Path(tempfile.mkdtemp(prefix="pyoffline-nvcc-"))
    flags = ["-O3", "-std=c++17", f"-arch={arch}", "-Xptxas", "-v", "--keep", "--keep-dir", folder]
    source, cubin = ROOT / "csrc/cuda/row_pass.cu", folder / "out.cubin"
    done = subprocess.run(
        [NVCC, *flags, "-cubin", str(source), "-o", str(cubin)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    kernels, name = {}, None
    for line in done.stderr.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = _name(match.group(1))
            kernels[name] = {}
        for key, pattern in (
            ("stack", r"(\d+) bytes stack frame"),
            ("stores", r"(\d+) bytes spill stores"),
            ("loads", r"(\d+) bytes spill loads"),
            ("registers", r"Used (\d+) registers"),
        ):
            if name and (match := re.search(pattern, line)):
                kernels[name][key] = int(match.group(1))
        if name and "Used" in line:
            match = re.search(r"(\d+) bytes smem", line)
            kernels[name]["shared"] = int(match.group(1)) if match else 0
    [ptx] = folder.glob("*.ptx")
    return kernels, ptx.read_text(), cubin


@pytest.mark.parametrize("arch", ARCHS)
def test_no_spills_and_the_registers_of_the_table(arch):
    kernels, _, _ = compiled(arch)
    want = TABLE["kernels"][arch]
    assert kernels.keys() == want.keys()
    for name, facts in kernels.items():
        assert facts["stack"] == facts["stores"] == facts["loads"] == 0, (name, facts)
        # 1024 threads a multiprocessor: more registers would cost a block of four
        assert facts["registers"] <= 64, (name, facts)
    release = subprocess.run([NVCC, "--version"], capture_output=True, text=True).stdout
    if f"release {TABLE['toolkit']}," not in release:
        pytest.skip(f"the table is of CUDA {TABLE['toolkit']}: its numbers not compared")
    got = {name: [facts["registers"], facts["shared"]] for name, facts in kernels.items()}
    assert got == want


@pytest.mark.parametrize("arch", ARCHS)
def test_wide_accesses_and_offsets(arch):
    """Copies and stores of 16 bytes, 64-bit row offsets, clusters where the chip has them."""
    _, ptx, _ = compiled(arch)
    parts = re.split(r"\.entry ", ptx)[1:]
    bodies = {_name(part.split("(")[0]): part for part in parts}
    assert bodies.keys() == TABLE["kernels"][arch].keys()
    for name, body in bodies.items():
        assert "cp.async.cg.shared.global" in body and "], 16;" in body, name
        assert re.search(r"ld(\.shared)?\.v4", body), name
        narrowing = name in ("f32_bf16", "f32_f16")
        assert re.search(r"st\.global\.v2" if narrowing else r"st\.global\.v4", body), name
        assert "mul.lo.s64" in body and ".local" not in body, name
        assert ("barrier.cluster" in body) == (arch != "sm_80"), name
        assert ("mapa" in body) == (arch != "sm_80"), name
        assert "ex2.approx.ftz" in body and "ld.global.nc" not in body, name


def _disassembler() -> str | None:
    """cuobjdump of the toolkit, or of Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    spec = importlib.util.find_spec("triton")
    inside = spec and Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside and inside.exists() else None


@pytest.mark.parametrize("arch", ARCHS)
def test_the_machine_code_copies_16_bytes_and_uses_no_local_memory(arch):
    if not (tool := _disassembler()):
        pytest.skip("no cuobjdump: not run")
    _, _, cubin = compiled(arch)
    sass = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True).stdout
    parts = re.split(r"Function : ", sass)[1:]
    assert len(parts) == len(TABLE["kernels"][arch])
    for part in parts:
        assert "LDGSTS.E.BYPASS.128" in part and "LDS.128" in part
        assert not re.search(r"\b(STL|LDL)\b", part), part[:200]


@pytest.mark.parametrize("arch", ARCHS)
def test_the_upstream_kernel_reads_and_writes_16_bytes_and_spills_nothing(arch, tmp_path):
    source, out = ROOT / "csrc/cuda/scale_by_upstream.cu", tmp_path / "out.ptx"
    flags = ["-O3", "-std=c++17", f"-arch={arch}", "-ptx", str(source), "-o", str(out)]
    done = subprocess.run([NVCC, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parts = re.split(r"\.entry ", out.read_text())[1:]
    assert len(parts) == 3  # float, bf16, f16
    for part in parts:
        assert "st.global.v4" in part and "ld.global.v4" in part and ".local" not in part

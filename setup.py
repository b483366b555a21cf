"""Builds pyoffline._C: C++ always, CUDA where nvcc and sources are found. Needs no torch.

Every instruction set is its own source file with its own flags, so that the rest of the library
runs on any CPU of the architecture (the choice is made at run time). PYOFFLINE_CUDA=0 never calls
nvcc, =1 makes a missing or failing nvcc an error; unset, a failing nvcc build warns and the CPU
library is built. PYOFFLINE_CXXFLAGS is appended to the compiler's and linker's flags (sanitizers).
Metadata is in pyproject.toml. Not here: the choice of a backend (pyoffline/backends.py).
"""

import os
import platform
import shlex
import shutil
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Listed by hand: find_packages() would install `kernels` over the package of that name that
# transformers imports.
PACKAGES = [
    "pyoffline",
    "pyoffline.benchmarks",
    "pyoffline.demo",
    "pyoffline.integrations",
    "pyoffline.kernels",
]
# A tracked link leads from pyoffline/kernels to kernels; builds read the folder itself, because a
# checkout without link support turns the link into a text file.
PACKAGE_DIR = {"pyoffline.kernels": "kernels"}

# No flag that assumes finite numbers: NaN and inf must show.
CXX_FLAGS = ["-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
ISA_FLAGS = {
    "distill_avx2.cpp": AVX2,
    "distill_avx512.cpp": AVX512,
    "row_pass_avx2.cpp": AVX2,
    "row_pass_avx512.cpp": AVX512,
}
EXTRA_FLAGS = shlex.split(os.environ.get("PYOFFLINE_CXXFLAGS", ""))
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# Machine code for A100, H100/H200 and B200; the rest gets the PTX of the last but one.
NVCC_TARGETS = {
    "compute_80": "sm_80",
    "compute_90a": "sm_90a",
    "compute_100a": "sm_100a",
    "compute_90": "compute_90",
}


def relative(paths):
    return sorted(path.relative_to(ROOT).as_posix() for path in paths)


def cpp_sources():
    sources = relative([*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    return [s for s in sources if IS_X86 or Path(s).name not in ISA_FLAGS]


def find_nvcc():
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")


def nvcc_output(nvcc, *args):
    # nvcc is the user's own compiler and the arguments are this file's.
    result = subprocess.run([nvcc, *args], check=True, capture_output=True, text=True)  # noqa: S603
    return result.stdout + result.stderr


def nvcc_targets(nvcc):
    """-gencode flags for those of NVCC_TARGETS that this toolkit knows."""
    known = nvcc_output(nvcc, "--list-gpu-arch").split()
    return [
        f"-gencode=arch={arch},code={code}"
        for arch, code in NVCC_TARGETS.items()
        if arch.removesuffix("a") in known
    ]


def cudart_folder(nvcc):
    """The folder of libcudart_static.a: nvcc may be a wrapper, so it is asked where it lives."""
    plan = nvcc_output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
    [top] = [line.split("=", 1)[1] for line in plan.splitlines() if line.startswith("#$ TOP=")]
    target = f"{platform.machine().lower()}-linux"
    for folder in ("lib64", f"targets/{target}/lib", "targets/sbsa-linux/lib", "lib"):
        if (Path(top) / folder / "libcudart_static.a").exists():
            return str((Path(top) / folder).resolve())
    raise FileNotFoundError(f"there is no libcudart_static.a under {top}")


def stale(target, inputs):
    """Whether an object must be built again. Other flags than usual always do."""
    target = Path(target)
    if EXTRA_FLAGS or not target.exists():
        return True
    return target.stat().st_mtime < max(Path(source).stat().st_mtime for source in inputs)


class BuildExt(build_ext):
    """Compiles each source with the flags of its instruction set, several at a time."""

    def build_extension(self, ext):
        self.compiler.src_extensions.append(".cu")
        compile_one = self.compiler.compile

        def compile_all(sources, *, extra_postargs=None, **kwargs):
            def job(source):
                [target] = self.compiler.object_filenames([source], output_dir=self.build_temp)
                # bind_cuda.cpp has another text with CUDA than without
                is_fixed = Path(source).name != "bind_cuda.cpp"
                if is_fixed and not stale(target, [source, *ext.depends, __file__]):
                    return [target]
                flags = ISA_FLAGS.get(Path(source).name, [])
                return compile_one(
                    [source], extra_postargs=[*(extra_postargs or []), *flags], **kwargs
                )

            with ThreadPoolExecutor(self.parallel or os.cpu_count()) as pool:
                return [obj for objs in pool.map(job, sources) for obj in objs]

        self.compiler.compile = compile_all
        try:
            self.add_cuda(ext)
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one

    def add_cuda(self, ext):
        """Adds nvcc's objects to the link, or says why there are none."""
        wish = os.environ.get("PYOFFLINE_CUDA", "")
        sources = relative(ROOT.glob("csrc/cuda/*.cu"))
        nvcc = find_nvcc()
        if wish == "0" or (wish != "1" and not (nvcc and sources)):
            return
        if not (nvcc and sources):
            lacks = "nvcc on PATH or in CUDA_HOME" if sources else "sources in csrc/cuda"
            raise RuntimeError(f"PYOFFLINE_CUDA=1, but there is no {lacks}")
        try:
            objects = [self.compile_cuda(nvcc, source, ext.depends) for source in sources]
            folder = cudart_folder(nvcc)
        except (subprocess.CalledProcessError, OSError) as error:
            if wish == "1":
                raise
            warnings.warn(f"pyoffline is built without CUDA: {error}", stacklevel=2)
            return
        ext.extra_objects.extend(objects)
        ext.define_macros.append(("PYOFFLINE_WITH_CUDA", "1"))
        ext.library_dirs.append(folder)
        ext.libraries.extend(["cudart_static", "dl", "rt"])

    def compile_cuda(self, nvcc, source, depends):
        target = Path(self.build_temp) / f"{source}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        if stale(target, [source, *depends, __file__]):
            jobs = f"--threads={self.parallel or os.cpu_count()}"
            flags = [*NVCC_FLAGS, *nvcc_targets(nvcc), jobs]
            # The user's own compiler again; its messages go to the terminal.
            subprocess.run([nvcc, *flags, "-c", source, "-o", str(target)], check=True)  # noqa: S603
        return str(target)


def extension():
    return Pybind11Extension(
        "pyoffline._C",
        sources=cpp_sources(),
        depends=relative([*ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/*/*.h")]),
        cxx_std=17,
        extra_compile_args=[*CXX_FLAGS, *EXTRA_FLAGS],
        extra_link_args=["-fopenmp", *EXTRA_FLAGS],
    )


def packages():
    """Those of PACKAGES that this checkout has."""
    folders = {name: ROOT / PACKAGE_DIR.get(name, name.replace(".", "/")) for name in PACKAGES}
    return [name for name, folder in folders.items() if any(folder.glob("*.*"))]


setup(
    packages=packages(),
    package_dir=PACKAGE_DIR,
    package_data={"pyoffline.kernels": ["README.md"]},
    ext_modules=[extension()],
    cmdclass={"build_ext": BuildExt},
)

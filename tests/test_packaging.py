"""The sdist and the wheel: what is in them, and that they work in a fresh environment.

The wheel is built from the sdist, as an installer without our wheels would do it. The fresh
environment sees this one's torch through a .pth file; pyoffline must come from the wheel. The trap
under test: `kernels` is also a package that transformers imports (kernels/README.md).
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NEEDED = ("build", "pybind11", "setuptools", "wheel")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not run: needs {MISSING}"),
    pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not run: needs a git checkout"),
]


def run(*command, cwd, **more):
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, **more
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The files that git knows or would add, links kept, nothing built."""
    names = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    target = tmp_path_factory.mktemp("checkout")
    for name in names:
        source = ROOT / name
        if source.is_symlink() or source.exists():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    return target


@pytest.fixture(scope="module")
def built(checkout, tmp_path_factory):
    """(sdist, wheel)."""
    out = tmp_path_factory.mktemp("dist")
    env = {**os.environ, "PYOFFLINE_CUDA": "0"}
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=checkout, env=env)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def python(built, tmp_path_factory):
    """The interpreter of a fresh environment with the wheel in it."""
    home = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    fresh = home / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", fresh)
    run(*pip, "install", "-q", "--no-deps", "--no-index", built[1], cwd=home)
    site = Path(
        run(fresh, "-c", "import sysconfig as s; print(s.get_path('purelib'))", cwd=home).strip()
    )
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return fresh


def sources(*suffixes):
    files = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines()
    return {name for name in files if name.endswith(suffixes) and (ROOT / name).exists()}


def test_sdist_has_every_source(built):
    with tarfile.open(built[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {n for n in sources(".h", ".cpp", ".cu") if n.startswith("csrc/")}
    wanted |= {n for n in sources(".py") if n.startswith(("pyoffline/", "kernels/"))}
    assert wanted - names == set()
    assert {"pyproject.toml", "setup.py", "LICENSE", "README.md"} <= names


def test_wheel_top_level_is_pyoffline_alone(built):
    with zipfile.ZipFile(built[1]) as archive:
        names = archive.namelist()
        metadata = archive.read(next(n for n in names if n.endswith("METADATA"))).decode()
        entry = archive.read(next(n for n in names if n.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"pyoffline"}
    assert not [n for n in names if n.endswith((".h", ".cpp", ".cu"))]
    installed = {n for n in names if n.endswith(".py")}
    wanted = {n for n in sources(".py") if n.startswith("pyoffline/")}
    wanted |= {"pyoffline/" + n for n in sources(".py") if n.startswith("kernels/")}
    assert wanted == installed
    assert [n for n in names if n.startswith("pyoffline/_C.") and n.endswith(".so")]
    assert "pyoffline = pyoffline.cli:main" in entry
    assert "License-Expression: Apache-2.0" in metadata
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    plain = {line.split()[1].split(">")[0] for line in required if "extra ==" not in line}
    assert plain == {"torch", "numpy"}


WORKS = """
import sys, torch, pyoffline, pyoffline.kernels
from pyoffline import _C
logps = torch.empty(2)
_C.row_pass(torch.zeros(2, 50), torch.zeros(2).long(), logps=logps)
assert logps.isfinite().all()
print(pyoffline.__file__)
"""


def test_the_wheel_works_elsewhere(python, tmp_path):
    where = Path(run(python, "-c", WORKS, cwd=tmp_path).strip())
    assert where.is_relative_to(python.parents[1])


@pytest.mark.parametrize("with_transformers", [False, True])
def test_the_repository_root_on_the_path_hides_nothing(python, checkout, with_transformers):
    """`-c` puts the folder it starts in first on sys.path: here a checkout with its `kernels`."""
    if with_transformers and importlib.util.find_spec("transformers") is None:
        pytest.skip("not run: transformers is not installed")
    code = "import sys, os; sys.path.append(os.getcwd()); sys.path.remove('')\n" + WORKS
    if with_transformers:
        code = "import transformers, transformers.integrations.hub_kernels\n" + code
    where = run(python, "-c", code, cwd=checkout).strip()
    assert Path(where).is_relative_to(python.parents[1])


def test_kernels_is_no_regular_package(checkout):
    assert not (checkout / "kernels" / "__init__.py").exists()
    assert (checkout / "pyoffline" / "kernels").is_symlink()
    assert (checkout / "pyoffline" / "kernels").readlink() == Path("../kernels")


def test_a_link_that_became_a_file_still_installs(checkout, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    (copy / "pyoffline" / "kernels").unlink()
    (copy / "pyoffline" / "kernels").write_text("../kernels")
    run(sys.executable, "setup.py", "-q", "build_py", "--build-lib", tmp_path / "out", cwd=copy)
    got = {p.name for p in (tmp_path / "out" / "pyoffline" / "kernels").iterdir()}
    assert got == {p.name for p in (copy / "kernels").iterdir() if p.suffix in (".py", ".md")}


def test_cuda_by_force_without_nvcc_says_so(checkout):
    env = {**os.environ, "PYOFFLINE_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=checkout,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "PYOFFLINE_CUDA=1, but there is no" in done.stderr

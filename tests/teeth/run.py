"""The suite's teeth: puts bugs back into a copy of the tree and looks whether tests fail.

`python tests/teeth/run.py [--only 1,101] [--json PATH]` (`make teeth`). First the named tests pass
on the unmutated copy; then, for each mutation, its text is replaced, the objects that include a
changed C++ file are compiled again, the mutated library passes a smoke test, and at least one named
test must fail by assertion: a crash, an error at import or at collection, and a time-out count as
not caught. Exit code 1 when a runnable one is not caught, or fewer than 29 of the 30 historical
ones where all can run. Not here: the mutations (`mutations.py`, `more_mutations.py`).
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from kernel_mutations import KERNELS  # noqa: E402
from more_mutations import MORE  # noqa: E402
from mutation_table import ROOT, Mutation, apply, problems  # noqa: E402
from mutations import HISTORICAL  # noqa: E402

TEST_SECONDS, BUILD_SECONDS, BASELINE_SECONDS = 300, 900, 1800
LEFT_OUT = {"build", "dist", "node_modules"}
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)


def copy_tree(target: Path) -> None:
    """What the tests and the build read, with the objects of the last build; no bytecode."""
    for path in sorted(ROOT.iterdir()):
        if path.name[0] == "." or path.name in LEFT_OUT or path.suffix == ".egg-info":
            continue
        if path.is_dir() and not path.is_symlink():
            skip = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(path, target / path.name, symlinks=True, ignore=skip)
        else:
            shutil.copy2(path, target / path.name, follow_symlinks=False)
    for name in ("temp.*", "lib.*"):
        for path in ROOT.glob(f"build/{name}"):
            shutil.copytree(path, target / "build" / path.name)


def environment(folder: Path) -> dict[str, str]:
    """What the copy's own processes see."""
    return {
        "PYTHONPATH": os.pathsep.join([str(folder), str(folder / "tests" / "teeth")]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "PYOFFLINE_CUDA": "0",
    }


class Extension:
    """The built extension of the copy: compile what a change touches, and put it back."""

    def __init__(self, folder: Path, stash: Path):
        self.folder, self.stash = folder, stash
        self.kept: list[tuple[Path, Path]] = []

    def build(self) -> tuple[int, str]:
        """(exit code, the end of the output) of the build."""
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.folder,
            env=os.environ | environment(self.folder),
            capture_output=True,
            text=True,
            timeout=BUILD_SECONDS,
            check=False,
        )
        return done.returncode, (done.stdout + done.stderr)[-4000:]

    def sources_of(self, changed: Path) -> list[Path]:
        """The .cpp files that are `changed` or include it, directly or not."""
        files = [p for kind in ("h", "cpp") for p in (self.folder / "csrc").rglob(f"*.{kind}")]
        users: dict[Path, set[Path]] = {p.resolve(): set() for p in files}
        for path in files:
            for name in INCLUDE.findall(path.read_text()):
                users.setdefault((path.parent / name).resolve(), set()).add(path.resolve())
        found, todo = set(), [changed.resolve()]
        while todo:
            path = todo.pop()
            if path not in found:
                found.add(path)
                todo += users.get(path, ())
        return sorted(p for p in found if p.suffix == ".cpp")

    def rebuild(self, changed: Path) -> tuple[int, str]:
        """Compile again what `changed` touches; `restore` puts the former objects back."""
        names = {
            p.relative_to(self.folder.resolve()).with_suffix(".o").as_posix()
            for p in self.sources_of(changed)
        }
        objects = list(self.folder.glob("build/temp.*/csrc/**/*.o"))
        old = [p for p in objects if any(p.as_posix().endswith("/" + name) for name in names)]
        assert len(old) == len(names), f"objects of {changed.name}: {len(old)} of {len(names)}"
        old += [*self.folder.glob("pyoffline/_C*.so"), *self.folder.glob("build/lib.*/**/_C*.so")]
        for i, path in enumerate(old):
            self.kept.append((path, self.stash / str(i)))
            shutil.move(path, self.stash / str(i))
        return self.build()

    def restore(self) -> None:
        for path, kept in self.kept:
            path.unlink(missing_ok=True)
            shutil.move(kept, path)
        self.kept = []


def module_of(file: str) -> str:
    """What the smoke test imports besides the package."""
    path = Path(file)
    is_ours = path.suffix == ".py" and path.parts[0] == "pyoffline"
    return ".".join(path.with_suffix("").parts) if is_ours else "pyoffline"


def preload() -> None:
    """What every test session imports, once: sessions are forks of this process."""
    import pytest  # noqa: F401
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(ImportError):
        from transformers import LlamaForCausalLM, Trainer  # noqa: F401


def session(tests, folder: Path, environment: dict) -> None:
    """The child: pytest on the copy. Does not return."""
    code = 70
    try:
        os.setsid()
        output = os.open(folder / "teeth_output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1), os.dup2(output, 2)
        os.chdir(folder)
        os.environ.update(environment)
        sys.path[:0] = [str(folder), str(folder / "tests" / "teeth")]
        sys.dont_write_bytecode = True
        import pytest

        plugins = ["-p", "no:cacheprovider", "-p", "teeth_report"]
        code = int(pytest.main(["-q", "--tb=no", *plugins, *tests]))
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def wait(child: int, seconds: int) -> int | None:
    """Exit code of a child (negative: the signal), or None after `seconds`, when it is killed. Time
    in which this process is suspended does not count.
    """
    for _ in range(seconds * 20):
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def run_tests(tests, folder: Path, module: str, seconds: int) -> tuple[list[dict], str, int | None]:
    """The rows of the plugin, the end of the output, the exit code."""
    report = folder / "teeth_report.jsonl"
    report.unlink(missing_ok=True)
    names = {"TEETH_REPORT": str(report), "TEETH_MODULE": module}
    child = os.fork()
    if child == 0:
        session(tests, folder, environment(folder) | names)
    code = wait(child, seconds)
    rows = [json.loads(s) for s in report.read_text().splitlines()] if report.is_file() else []
    return rows, (folder / "teeth_output.txt").read_text(errors="replace")[-4000:], code


def verdict(mutation: Mutation, folder: Path) -> tuple[str, str]:
    """(caught | not caught, by what or why) of a mutation that is in the copy."""
    module = module_of(mutation.file)
    rows, output, code = run_tests(mutation.tests, folder, module, TEST_SECONDS)
    if not any("smoke" in row for row in rows):
        return "not caught", f"the smoke test fails: {output.strip()[-300:]}"
    for row in rows:
        if row.get("caught"):
            return "caught", f"{row['test']}: {row['error']}"
    if code is None:
        return "not caught", f"no end after {TEST_SECONDS} s"
    if code < 0 or not any("exit" in row for row in rows):
        return "not caught", f"the tests crash (exit code {code})"
    broken = [r for r in rows if r.get("outcome") == "failed"]
    if broken:
        return "not caught", f"fails, not by assertion: {broken[0]['test']}: {broken[0]['error']}"
    if code != 0:
        return "not caught", f"the tests do not run: {output.strip()[-300:]}"
    return "not caught", f"all {len(rows) - 2} tests pass"


def try_one(mutation: Mutation, folder: Path, extension: Extension) -> tuple[str, str]:
    """Put the bug in, look, take it out."""
    path = folder / mutation.file
    before, times = path.read_text(), path.stat()
    path.write_text(apply(mutation, folder))
    try:
        if path.suffix in (".h", ".cpp"):
            # the objects to compile are the removed ones, not all that depend on a newer header
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            code, output = extension.rebuild(path)
            if code != 0:
                return "not caught", f"does not compile: {output.strip()[-300:]}"
        return verdict(mutation, folder)
    finally:
        path.write_text(before)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        extension.restore()


def prepare(folder: Path, extension: Extension, mutations) -> str:
    """Why the unmutated copy is no base, or nothing."""
    code, output = extension.build()
    if code != 0:
        return f"the copy does not build:\n{output}"
    tests = list(dict.fromkeys(t for m in mutations for t in m.tests))
    if not tests:
        return ""
    rows, output, code = run_tests(tests, folder, "pyoffline", BASELINE_SECONDS)
    skipped = [r["test"] for r in rows if r.get("outcome") == "skipped"]
    if code != 0:
        failed = [r for r in rows if r.get("outcome") == "failed"]
        return f"named tests fail on the unmutated copy: {failed}\n{output}"
    return f"named tests are skipped here: {skipped}" if skipped else ""


def summary(rows: list[dict]) -> tuple[str, bool]:
    """(one line a kind, whether the teeth are what was promised)."""
    lines, good = [], True
    for kind, chosen in (
        ("historical", [r for r in rows if r["number"] < 100]),
        ("our own", [r for r in rows if r["number"] >= 100]),
    ):
        count = {s: sum(r["status"] == s for r in chosen) for s in ("caught", "not caught")}
        idle = len(chosen) - sum(count.values())
        lines.append(
            f"{kind}: {count['caught']} caught, {count['not caught']} not caught, {idle} not run, "
            f"of {len(chosen)}"
        )
        # one of thirty may slip where all can run; where some cannot, none of the others
        may_slip = 1 if kind == "historical" and idle == 0 and len(chosen) == 30 else 0
        good &= count["not caught"] <= may_slip
    return "\n".join(lines), good


def git(*words: str) -> str:
    """What git says, or nothing."""
    program = shutil.which("git")
    if program is None:
        return ""
    done = subprocess.run([program, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def provenance() -> dict:
    """What a row was measured on."""
    import torch

    commit = git("rev-parse", "HEAD") or "unknown"
    return {
        "commit": commit + (" and changes" if git("status", "--porcelain") else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


def write(path: Path, rows: list[dict], origin: dict) -> None:
    """The table as JSON. Rows that were not run this time stay as they were."""
    known = {m.number for m in (*HISTORICAL, *MORE, *KERNELS)}
    kept = json.loads(path.read_text())["mutations"] if path.is_file() else []
    table = {r["number"]: r for r in kept if r["number"] in known}
    table |= {r["number"]: r | origin for r in rows}
    ordered = [table[n] for n in sorted(table)]
    record = {"summary": summary(ordered)[0].splitlines(), "mutations": ordered}
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="re-inject bugs and count which the suite catches")
    parser.add_argument("--only", help="numbers of mutations, separated by commas")
    parser.add_argument("--json", type=Path, help="where to write the table as JSON")
    options = parser.parse_args(argv)
    only = {int(n) for n in options.only.split(",")} if options.only else None
    table = [m for m in (*HISTORICAL, *MORE, *KERNELS) if only is None or m.number in only]
    rotten = [f"{m.number}: {p}" for m in table for p in problems(m, ROOT)]
    if rotten or not table:
        sys.stderr.write("\n".join(rotten or ["no such mutation"]) + "\n")
        return 2
    rows, origin = [], provenance()
    with tempfile.TemporaryDirectory(prefix="pyoffline-teeth-") as temporary:
        folder, stash = Path(temporary) / "tree", Path(temporary) / "stash"
        folder.mkdir(), stash.mkdir()
        copy_tree(folder)
        preload()
        extension = Extension(folder, stash)
        wrong = prepare(folder, extension, table)
        if wrong:
            sys.stderr.write(wrong + "\n")
            return 2
        for m in table:
            start = time.monotonic()
            status = ("not run", m.not_run) if m.not_run else try_one(m, folder, extension)
            row = {"number": m.number, "name": m.name, "file": m.file, "status": status[0]}
            row |= {"by": status[1].replace(temporary, ""), "note": m.note}
            rows.append(row)
            seconds = time.monotonic() - start
            sys.stdout.write(
                f"{m.number:>4}  {row['status']:<10} {seconds:5.0f} s  {m.name}  |  {row['by']}\n"
            )
            sys.stdout.flush()
    text, good = summary(rows)
    sys.stdout.write(text + "\n")
    if options.json:
        write(options.json, rows, origin)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

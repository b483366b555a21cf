"""The folder of a run: complete folders only, the newest of them, and one run at a time.

A folder is written whole under `.partial/`, every file is flushed to the disk, `complete.json` (the
size and SHA-256 of each file) is written last, and one rename puts it in its place. A process that
is killed anywhere leaves the older folder, or the new one; a file that was cut or changed later is
refused by name. Not here: what a checkpoint holds (checkpoint.py).
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

PARTIAL, MANIFEST, LOCK = ".partial", "complete.json", ".lock"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
CHECKPOINT = re.compile(r"checkpoint-(\d+)")
BLOCK = 2**20


class CheckpointError(OSError):
    """A checkpoint could not be written; the older ones are untouched."""


class DamagedCheckpointError(CheckpointError):
    """The checkpoint to start from is not what was written. Nothing was started."""


class OtherRunError(CheckpointError):
    """Another model, optimizer, objective or data than the checkpoint's. Nothing was started."""


class FolderInUseError(CheckpointError):
    """The run's folder cannot be written, or another run writes there. Nothing was started."""


@contextlib.contextmanager
def whole_folder(final: Path):
    """Yields `.partial/<name>` to write into; on success it is completed and renamed to `final`.

    An older folder of that name goes only after the new one is complete. On an exception what was
    written is removed and `final` stays as it was.
    """
    partial = final.parent / PARTIAL / final.name
    _remove(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
        complete(partial, final)
    except BaseException:
        _remove(partial)
        with contextlib.suppress(OSError):  # another folder is being written
            partial.parent.rmdir()
        raise


def complete(partial: Path, final: Path) -> None:
    """Flush, sign and rename a written folder."""
    files = sorted(p for p in partial.rglob("*") if p.is_file())
    sums = {str(p.relative_to(partial)): [p.stat().st_size, sha256(p)] for p in files}
    for path in files:
        _flush(path)
    manifest = partial / MANIFEST
    temporary = manifest.with_name(MANIFEST + ".tmp")
    temporary.write_text(json.dumps({"files": sums}, indent=1), encoding="utf-8")
    _flush(temporary)
    temporary.replace(manifest)
    _flush(partial)
    # Between the two renames the new folder is complete where it is, and `newest` looks there too.
    old = partial.with_name(f"old-{final.name}")
    _remove(old)
    if final.exists():
        final.rename(old)
    partial.rename(final)
    _flush(final.parent)
    _remove(old)
    with contextlib.suppress(OSError):  # another folder is being written
        partial.parent.rmdir()


def newest(run: Path, but: Path | None = None) -> Path | None:
    """The complete checkpoint with the most steps in `run`, but `but`, or None; by sizes alone."""
    found = []
    for parent in (run, run / PARTIAL):
        for path in parent.iterdir() if parent.is_dir() else ():
            match = CHECKPOINT.fullmatch(path.name)
            if match and path != but and not problems(path, contents=False):
                found.append((int(match[1]), path))
    return max(found)[1] if found else None


def unusable(run: Path) -> dict[Path, list[str]]:
    """Checkpoints that `newest` passes over, and why."""
    found = [p for p in sorted(run.glob("checkpoint-*")) if CHECKPOINT.fullmatch(p.name)]
    return {p: wrong for p in found if (wrong := problems(p, contents=False))}


def problems(folder: Path, contents: bool = True) -> list[str]:
    """What is wrong with a folder of `whole_folder`; `contents`: files are read and summed."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return [f"no {MANIFEST}: it was not finished, or something else wrote it"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [f"{MANIFEST} cannot be read: {error}"]
    found = []
    for name, (size, digest) in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{name} has {path.stat().st_size} bytes, it was written with {size}")
        elif contents and sha256(path) != digest:
            found.append(f"{name} was changed after it was written (SHA-256 differs)")
    pickles = sorted(p.name for p in folder.rglob("*") if p.suffix in PICKLES)
    if pickles:
        found.append(f"it holds {', '.join(pickles)}: this library writes no pickles, loads none")
    return found


def check(folder: Path) -> Path:
    """`folder`, read and compared with its sums. DamagedCheckpointError lists what is wrong."""
    wrong = problems(folder)
    if wrong:
        text = "\n  ".join([f"{folder}: this checkpoint is not used", *wrong])
        other = newest(folder.parent, but=folder)
        more = f", and the run goes on from {other.name}" if other else ""
        raise DamagedCheckpointError(f"{text}\n  delete or move the folder{more}")
    return folder


def rotate(run: Path, limit: int | None, best: Path | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest or the best one."""
    if not limit:
        return
    numbered = sorted((int(m[1]), p) for p in run.iterdir() if (m := CHECKPOINT.fullmatch(p.name)))
    spare = [p for _, p in numbered[:-1] if best is None or p.resolve() != best.resolve()]
    for path in spare[: max(len(numbered) - limit, 0)]:
        # out of the way in one rename: a half-deleted checkpoint never has its name
        gone = run / PARTIAL / f"old-{path.name}"
        gone.parent.mkdir(exist_ok=True)
        _remove(gone)
        path.rename(gone)
        _remove(gone)
        with contextlib.suppress(OSError):
            gone.parent.rmdir()


@contextlib.contextmanager
def sole_run(folder: Path):
    """Holds the run's folder while it trains. FolderInUseError: held already, or not writable."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+")
    except OSError as error:
        why = error.strerror or error
        raise FolderInUseError(f"trainer.output_dir {folder} cannot be written: {why}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FolderInUseError(
                f"trainer.output_dir {folder}: another run is writing there; wait for it, or choose"
                " another folder"
            ) from None
        yield


def recover(run: Path) -> None:
    """Put a checkpoint that was complete but not renamed in its place; remove other remains."""
    partial = run / PARTIAL
    for path in partial.iterdir() if partial.is_dir() else ():
        final = run / path.name
        done = CHECKPOINT.fullmatch(path.name) and not problems(path, contents=False)
        if done and not final.exists():
            path.rename(final)
    _remove(partial)


def sha256(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            total.update(block)
    return total.hexdigest()


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _flush(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)

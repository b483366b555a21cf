"""Rows of a JSONL or Parquet file with their line numbers; a bad line is a text, not an end.

Not here: what a row must hold (data.py). Nothing but JSON and Parquet is read: no pickle, no
scripts.
"""

import json
from collections.abc import Iterator
from pathlib import Path


class UnreadableFileError(ValueError):
    """The file itself cannot be read, or is of another kind. Nothing was started."""


Row = tuple[int, dict | None, str | None]  # line (from 1), the row, or why there is none


def read_rows(path: Path) -> Iterator[Row]:
    """Yield (line, row, error); blank lines of JSONL are passed over.

    UnreadableFileError: not a file, an unknown kind, or the disk says no.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise UnreadableFileError(
            f"{path}: {what}; expected a JSONL (.jsonl) or Parquet (.parquet) file"
        )
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    raise UnreadableFileError(
        f"{path}: expected a name that ends in .jsonl or .parquet, got {path.suffix or 'no suffix'}"
    )


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            yield from _json_rows(file)
    except OSError as error:
        why = error.strerror or error
        raise UnreadableFileError(f"{path}: cannot be read: {why}") from None


def _json_rows(file) -> Iterator[Row]:
    for line, raw in enumerate(file, 1):
        if not raw.strip():
            continue
        try:
            text = raw.decode("utf-8")
            text = text.removeprefix("\ufeff") if line == 1 else text  # a byte-order mark
            row = json.loads(text, object_pairs_hook=_each_once)
        except UnicodeDecodeError as error:
            yield line, None, f"not UTF-8 at byte {error.start + 1} of the line"
        except json.JSONDecodeError as error:
            yield line, None, f"not JSON: {error.msg} at column {error.colno}"
        except RecursionError:
            yield line, None, "not JSON that can be read: nested too deep"
        except TwiceError as error:
            yield line, None, str(error)
        except ValueError as error:  # an integer of more than 4,300 digits
            yield line, None, f"not JSON that can be read: {error}"
        else:
            good = isinstance(row, dict)
            yield (
                line,
                row if good else None,
                None if good else f"expected an object, got {type(row).__name__}",
            )


class TwiceError(ValueError):
    """A key given twice in one object, where JSON takes the last one without a word."""


def _each_once(items: list[tuple]) -> dict:
    row = dict(items)
    if len(row) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise TwiceError(f"the key {twice!r} is given twice")
    return row


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row, None
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UnreadableFileError(f"{path}: not a readable Parquet file: {error}") from None

"""Rows of a JSONL or Parquet file, one at a time, each with its line number; a bad line is an error
text, not an end.

Not here: what a row must hold (data.py). Nothing but JSON and Parquet is read: no pickle, no
scripts.
"""

import json
from collections.abc import Iterator
from pathlib import Path

Row = tuple[int, dict | None, str | None]  # line (from 1), the row, or why there is none


def read_rows(path: Path) -> Iterator[Row]:
    """Yield (line, row, error). Blank lines of a JSONL file are passed over. ValueError: not a
    file, unknown kind.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected JSONL (.jsonl) or Parquet (.parquet)")
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix in (".jsonl", ".ndjson"):
        return _jsonl(path)
    raise ValueError(
        f"{path}: expected a name that ends in .jsonl or .parquet, got {path.suffix or 'no suffix'}"
    )


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8"))
            except UnicodeDecodeError as error:
                yield line, None, f"not UTF-8 at byte {error.start + 1} of the line"
            except json.JSONDecodeError as error:
                yield line, None, f"not JSON: {error.msg} at column {error.colno}"
            except RecursionError:
                yield line, None, "not JSON that can be read: nested too deep"
            else:
                good = isinstance(row, dict)
                yield (
                    line,
                    row if good else None,
                    None if good else f"expected an object, got {type(row).__name__}",
                )


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
        raise ValueError(f"{path}: not a readable Parquet file: {error}") from None

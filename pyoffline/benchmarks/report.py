"""Records as tables on stdout and as JSON files.

A record is what `runner.run_case` returns plus provenance. Ratios are medians of paired rounds
with their extremes; a bar's verdict is `pass` or `FAIL`. Not here: measuring, drawing (`plot.py`).
"""

import json
from pathlib import Path

from pyoffline.benchmarks.shapes import MIB

SCHEMA = 1
NOISY = 1.15  # longest over shortest round of the floor
TIME_COLUMNS = (
    "variant",
    "chunks",
    "time ms",
    "ratio to floor",
    "min..max",
    "bar",
    "verdict",
    "GFLOP/s",
    "% of floor",
)
ROW_COLUMNS = (
    "variant",
    "time ms",
    "ratio to GEMMs",
    "min..max",
    "bar",
    "verdict",
    "GB/s",
    "copy GB/s",
    "% of copy",
)
MEMORY_COLUMNS = (
    "variant",
    "extra MiB",
    "explain MiB",
    "bar MiB",
    "verdict",
    "gradients MiB",
    "baseline RSS MiB",
    "peak RSS MiB",
)


def table(columns, rows) -> str:
    """Aligned text: the first column left, the others right; a row of two texts spans."""
    rows = [[str(cell) for cell in row] for row in rows]
    whole = [row for row in rows if len(row) == len(columns)]
    widths = [max(len(row[i]) for row in [columns, *whole]) for i in range(len(columns))]
    first = max([widths[0], *(len(row[0]) for row in rows)])

    def line(cells):
        rest = "  ".join(f"{c:>{w}}" for c, w in zip(cells[1:], widths[1:], strict=True))
        return f"{cells[0]:<{first}}  {rest}".rstrip()

    lines = [line(columns), "-" * len(line(columns))]
    for row in rows:
        lines.append(line(row) if len(row) == len(columns) else f"{row[0]:<{first}}  {row[1]}")
    return "\n".join(lines)


def verdict(line: dict) -> str:
    """pass, FAIL, or - where there is no bar."""
    passed = line.get("passed")
    return "-" if passed is None else "pass" if passed else "FAIL"


def _bar(value, digits: str) -> str:
    return "-" if value is None else f"<= {value:{digits}}"


def _ratio(line: dict) -> list[str]:
    ratio = line["ratio"]
    return [f"{ratio['median']:.3f}", f"{ratio['low']:.3f}..{ratio['high']:.3f}"]


def time_rows(record: dict) -> list[list[str]]:
    """One row per variant and peer."""
    rows = []
    for line in [*record.get("variants", []), *record.get("peers", [])]:
        if "skipped" in line:
            rows.append([line["name"], f"skipped: {line['skipped']}"])
            continue
        rows.append(
            [
                line["name"],
                line.get("chunks", "-"),
                f"{line['median_s'] * 1e3:.1f}",
                *_ratio(line),
                _bar(line["bar"], ".2f"),
                verdict(line),
                f"{line['gflop_s']:.0f}",
                f"{line['percent_of_limit']:.0f}",
            ]
        )
    return rows


def row_pass_rows(record: dict) -> list[list[str]]:
    """The row pass: share of the products and bandwidth."""
    return [
        [
            line["name"],
            f"{line['median_s'] * 1e3:.1f}",
            *_ratio(line),
            f">= {line['copy_bar']:.0f} %" if "copy_bar" in line else _bar(line["bar"], ".2f"),
            verdict(line),
            f"{line['gb_s']:.2f}",
            f"{line['copy_gb_s']:.2f}",
            f"{line['percent_of_limit']:.0f}",
        ]
        for line in record["variants"]
    ]


def memory_rows(record: dict) -> list[list[str]]:
    """Peak memory beyond inputs and gradients."""
    rows = []

    def mib(line, key):
        return f"{line[key] / MIB:.0f}" if key in line else "-"

    for line in record.get("memory", []):
        if "extra_nbytes" not in line:
            rows.append([line["name"], f"skipped: {line.get('skipped')}"])
            continue
        bar = f"<= {mib(line, 'bar_nbytes')}" if "bar_nbytes" in line else "-"
        middle = [mib(line, "extra_nbytes"), mib(line, "explain_nbytes"), bar, verdict(line)]
        tail = [mib(line, f"{k}_nbytes") for k in ("gradient", "baseline", "peak")]
        rows.append([line["name"], *middle, *tail])
    return rows


def _head(record: dict) -> list[str]:
    n, d, v = record["shape"]
    lines = [f"== {record['op']}  N={n} D={d} V={v} {record['dtype']}"]
    device, versions = record.get("device"), record.get("versions")
    if device:
        units = " ".join(k for k, on in device["flags"].items() if on)
        names = ("torch", "cuda", "triton", "mkl", "numpy", "pyoffline", "pyoffline_git")
        known = ", ".join(f"{k} {versions[k]}" for k in names if versions.get(k))
        cores = "multiprocessors" if device.get("kind") == "gpu" else "cores"
        driver = f", driver {device['driver']}" if device.get("driver") else ""
        lines.append(f"{device['model']}, {device['cores']} {cores} ({units}){driver}")
        lines.append(f"{record['threads']} threads, {known}, {record['date']}")
    return lines


def _by(check: dict) -> str:
    backend = check.get("backend", "auto")
    return "" if backend == "auto" else f"{backend:<7}"


def _checks(record: dict) -> list[str]:
    lines = []
    for c in record.get("checks", []):
        worst = f"max {c['max_ratio']:.2f}, RMS {c['rms_ratio']:.2f}, limit {c['limit']:.0f}"
        word = "pass" if c["passed"] else "FAIL, nothing is timed"
        lines.append(
            f"check {_by(c)}{c['name']:<8} {c['chunks']} chunk(s): error / torch's {worst}  {word}"
        )
    if "clipped" in record:
        lines.append(f"rows whose PPO gradient is clipped away: {100 * record['clipped']:.1f} %")
    return lines


def _floor(record: dict) -> list[str]:
    lines = []
    for gemm, found in record.get("floor", {}).items():
        others = ", ".join(f"{k} {v:.0f}" for k, v in found["gflop_s"].items())
        lines.append(f"floor {gemm:<8} {found['chosen']}  (GFLOP/s: {others})")
    base = next((v for v in record.get("variants", []) if v["name"] == "floor"), None)
    if base:
        low, high = min(base["seconds"]), max(base["seconds"])
        noise = "  (NOISY: measure again on a quiet machine)" if high > NOISY * low else ""
        lines.append(f"floor rounds  {low:.3f}..{high:.3f} s{noise}")
    return lines


def render(record: dict) -> str:
    """The whole report of one record."""
    lines = _head(record) + _checks(record) + _floor(record)
    if record["op"] == "row_pass":
        lines += ["", table(ROW_COLUMNS, row_pass_rows(record))]
    elif "variants" in record:
        lines += ["", table(TIME_COLUMNS, time_rows(record))]
        notes = {f"{p['name']}: {p['note']}" for p in record["peers"] if p.get("note")}
        ran = [p for p in record["peers"] if "skipped" not in p]
        lines += ["peers: one round each, paired with a floor of that round"] if ran else []
        lines += sorted(notes)
    if record.get("memory"):
        lines += ["", table(MEMORY_COLUMNS, memory_rows(record))]
    return "\n".join(lines) + "\n"


def failures(records: list[dict]) -> int:
    """How many bars and checks failed."""
    return sum(
        line.get("passed") is False
        for record in records
        for key in ("checks", "variants", "memory")
        for line in record.get(key, [])
    )


def document(records: list[dict]) -> dict:
    """What a JSON file holds."""
    return {"schema": SCHEMA, "records": records}


def write(path: Path, records: list[dict]) -> None:
    """Write records as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document(records), indent=1) + "\n")


def read(path: Path) -> list[dict]:
    """Records of a file that `write` made; ValueError for another schema."""
    found = json.loads(path.read_text())
    if found.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {found.get('schema')}")
    return found["records"]


def _key(record: dict) -> tuple:
    return (record["op"], tuple(record["shape"]), record["dtype"])


def merge(old: list[dict], new: list[dict]) -> list[dict]:
    """A new record replaces the old one of the same op, shape and dtype, part by part.

    A run of the memory alone keeps the times of the old record, and the other way round; a part
    that comes from an older run keeps its own provenance under `earlier`.
    """
    merged = {_key(r): r for r in old}
    for record in new:
        before = merged.get(_key(record))
        missing = ("variants", "memory")
        if before is not None and any(k in before and k not in record for k in missing):
            kept = {k: v for k, v in before.items() if k not in record}
            origin = {k: before.get(k) for k in ("date", "versions", "load_average")}
            record = {**kept, **record, "earlier": {"parts": sorted(kept), **origin}}
        merged[_key(record)] = record
    return list(merged.values())


def save(folder: Path, records: list[dict]) -> list[Path]:
    """One file per day and op: FOLDER/<date>-<op>.json, merged with what it holds."""
    by_file: dict[Path, list[dict]] = {}
    for record in records:
        path = folder / f"{record['date'][:10]}-{record['op']}.json"
        by_file.setdefault(path, []).append(record)
    for path, new in by_file.items():
        write(path, merge(read(path) if path.exists() else [], new))
    return list(by_file)

"""Bandwidth of the CUDA row pass on given logits, against a device copy of the same bytes.

Bytes: one read and one write of each logit (statistics alone: one read). The check against fp64
comes before the clock; copy and kernel alternate; median of paired rounds. Needs a GPU.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from pyoffline import _C
from pyoffline.benchmarks.device import by_events
from pyoffline.benchmarks.provenance import provenance

SHAPES = (
    (8192, 32000),
    (4096, 128256),
    (4096, 151936),
    (2048, 262147),
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def require(ok, what: str) -> None:
    """No number without a right result."""
    if not ok:
        raise SystemExit(f"not measured: {what}")


def measure(rows: int, vocab: int, name: str, with_grad: bool, rounds: int) -> dict:
    """One shape: GB/s of the kernel and of the copy, and their ratio."""
    logits = torch.randn(rows, vocab, device="cuda").to(DTYPES[name])
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    coefs = torch.zeros(4, rows, device="cuda")
    coefs[0] = -1.0
    stats = {
        n: torch.full((rows,), float("nan"), device="cuda")
        for n in ("logps", "entropy", "lse", "log_sum_p2")
    }
    dlogits = torch.full_like(logits, float("nan")) if with_grad else None
    copy = torch.empty_like(logits)

    def kernel():
        stream = torch.cuda.current_stream().cuda_stream
        _C.cuda_row_pass(logits, labels, dlogits=dlogits, coefs=coefs, stream=stream, **stats)

    kernel()
    truth = logits[:4].double().log_softmax(-1)
    logps = truth.gather(-1, labels[:4, None])[:, 0]
    require((stats["logps"][:4].double() - logps).abs().max() <= 1e-5, "logps are wrong")
    if with_grad:
        want = truth.exp().scatter_add(-1, labels[:4, None], -torch.ones_like(truth[:, :1]))
        require((dlogits[:4].double() - want).abs().max() <= 5e-3, "dlogits are wrong")
        require(not dlogits.isnan().any(), "an element was not written")
    nbytes = logits.nbytes * (2 if with_grad else 1)
    pairs = []
    for _ in range(rounds):
        pairs.append([1e3 * by_events(f) for f in (kernel, lambda: copy.copy_(logits))])
    ms = statistics.median(p[0] for p in pairs)
    copied = statistics.median(2 * logits.nbytes / p[1] / 1e6 for p in pairs)
    ratio = statistics.median((nbytes / p[0]) / (2 * logits.nbytes / p[1]) for p in pairs)
    return {
        "rows": rows,
        "vocab": vocab,
        "dtype": name,
        "gradient": with_grad,
        "ms": ms,
        "gb_s": nbytes / ms / 1e6,
        "copy_gb_s": copied,
        "of_copy": ratio,
    }


def main() -> None:
    """Measure every shape, dtype and mode; print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the records there")
    parser.add_argument(
        "--rounds", type=int, default=21, help="paired rounds (default: %(default)s)"
    )
    options = parser.parse_args()
    if reason := _C.cuda_why_not(torch.cuda.current_device() if torch.cuda.is_available() else 0):
        raise SystemExit(f"not run: {reason}")
    records = []
    for rows, vocab in SHAPES:
        for name in DTYPES:
            for with_grad in (True, False):
                record = measure(rows, vocab, name, with_grad, options.rounds)
                records.append(record)
                mode = "fwd+bwd" if with_grad else "fwd"
                print(
                    f"{rows:6} {vocab:7} {name} {mode:8}{record['ms']:8.3f} ms "
                    f"{record['gb_s']:7.0f} GB/s {100 * record['of_copy']:5.1f} % of a copy"
                )
    if options.json:
        options.json.write_text(json.dumps(provenance("cuda") | {"rows": records}, indent=1))


if __name__ == "__main__":
    main()

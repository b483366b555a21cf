"""Launches of the Triton kernels through Triton's own binder, compiler and launcher, without a GPU:
its driver library is `cpp/driver_stub.c`, the tensors are the CPU's, and no kernel runs.

    python tests/triton_launch.py FOLDER      (the folder that holds the stand-in; one JSON line)

What neither the interpreter nor a compilation ahead of time goes through: argument types as the
launcher reads them (tuples, None, descriptors), values that recompile. test_triton_launch.py runs
and judges it.
"""

import ctypes
import dataclasses
import json
import os
import sys
from pathlib import Path

os.environ["TRITON_LIBCUDA_PATH"] = sys.argv[1]
STUB = ctypes.CDLL(str(Path(sys.argv[1]) / "libcuda.so.1"), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from triton.backends.nvidia.driver import CudaDriver  # noqa: E402
from triton.runtime import driver  # noqa: E402

import pyoffline as po  # noqa: E402
from pyoffline.calls import HeadScalars, RowOutputs, Rows  # noqa: E402
from pyoffline.divergence_math import DIVERGENCES  # noqa: E402
from pyoffline.gpu_rows import NOTHING, float32_rows  # noqa: E402
from pyoffline.kernels import configs, epilogue_rows, score_rows  # noqa: E402
from pyoffline.kernels.distill_row_pass import distill_row_pass  # noqa: E402
from pyoffline.kernels.row_pass import row_pass, row_pass_kernel  # noqa: E402
from pyoffline.kernels.scale_by_upstream import scale_by_upstream  # noqa: E402
from pyoffline.triton_backend import _outputs  # noqa: E402

BF16 = torch.bfloat16
FLAG = torch.zeros(2, dtype=torch.int64)
HEAD = HeadScalars(0.0, 1.0, 1.0)
PPO = po.PPOClip() + 0.04 * po.KL("k3", "old")


def hopper() -> CudaDriver:
    """Triton's driver of an H100 that is always there."""
    found = CudaDriver()
    found.get_device_capability = lambda device=0: (9, 0)
    found.get_current_device = lambda: 0
    found.get_current_stream = lambda device=0: 0
    return found


def rows_of(n, objective=PPO, **given) -> Rows:
    program = objective.program(False)
    names = ("old", "mu", "ref", "adv")
    inputs = {k: torch.rand(n) if k in program.reads else None for k in names}
    labels, extras = torch.zeros(n, dtype=torch.int64), dict.fromkeys(program.gates, torch.rand(n))
    rows = Rows(labels, weights=torch.rand(n), extras=extras, head=HEAD, **inputs)
    own = {"codes": tuple(program.codes), "hyper": program.hyper}
    return float32_rows(dataclasses.replace(rows, **(own | given)))


def outputs_of(n):
    return _outputs(RowOutputs.zeros(n, torch.float32, torch.device("cpu"), True))


def pass_rows(n=5, vocab=4112, dtype=BF16, grad=None, objective=PPO, **given):
    logits = torch.rand(n, vocab + -vocab % 16).to(dtype)[:, :vocab]
    dlogits = logits if grad is None else logits.view(grad)[:, :vocab]
    row_pass(logits, dlogits, rows_of(n, objective, **given), outputs_of(n), FLAG)


def pass_given_coefs():
    """The backward of token log-probs on rows of an odd length."""
    logits, rows = torch.rand(5, 4099), rows_of(5, codes=(), hyper=None, coefs=torch.rand(4, 5))
    row_pass(logits, torch.empty_like(logits), rows, _outputs(NOTHING), FLAG, torch.ones(()))


def score(dtype=BF16, dim=72, epilogue=False, **given):
    hidden, weight, rows = torch.rand(70, dim).to(dtype), torch.rand(3000, dim).to(dtype), None
    unit = min(dim & -dim, 16)
    family = configs.score_family(9, hidden.element_size(), unit)
    rows, out = rows_of(70, **given), outputs_of(70)
    if epilogue:
        exps = torch.empty(70, 3008, dtype=BF16)[:, :3000]
        tile = configs.EPILOGUE_TILES[family, rows.temperature is None]
        epilogue_rows.epilogue_rows(hidden, weight, rows, out, FLAG, exps, tile)
        return
    tile = configs.SCORE_TILES[family, hidden.element_size(), rows.temperature is None]
    score_rows.score_rows(hidden, weight, rows, out, FLAG, dtype, tile)


def distill():
    student, teacher = torch.rand(5, 4112), torch.rand(5, 4112)
    rows = rows_of(5, po.NLL().weighted_by("mask"), codes=(), hyper=None, coefs=torch.rand(4, 5))
    terms = [(DIVERGENCES["jsd"].code, 0, 0.5, 0.3), (DIVERGENCES["tvd"].code, -1, 1.0, 0.0)]
    results = (torch.zeros(5), torch.zeros(2, 5), torch.zeros(5), torch.zeros(5, dtype=torch.uint8))
    narrow = student.view(BF16)[:, :4112]
    theirs = Rows(rows.labels, head=HEAD)
    distill_row_pass(student, teacher, narrow, rows, theirs, terms, results)


def other_values():
    """Sizes, strides, ids and hyper-parameters that must not recompile the first case."""
    for n, vocab, ignore in ((1, 4112, 1), (16, 8192, 0), (3, 151_936, -100), (2, 4112, 7)):
        objective = po.PPOClip(0.1 / n) + n * po.KL("k3", "old")
        pass_rows(n, vocab, objective=objective, ignore_index=ignore)


def compiled() -> int:
    """Variants of the row pass that this process has."""
    return sum(len(cache[0]) for cache in row_pass_kernel.device_caches.values())


CASES = {
    "row pass": pass_rows,
    "row pass, other values": other_values,
    "row pass, fp32 to bf16": lambda: pass_rows(dtype=torch.float32, grad=BF16, vocab=4099),
    "row pass, given coefficients": pass_given_coefs,
    "row pass, the head's options": lambda: pass_rows(
        temperature=torch.rand(5), bias=torch.rand(4112), head=HeadScalars(30.0, 1.0, 1.0)
    ),
    "scale": lambda: scale_by_upstream(torch.rand(24_577), torch.ones(())),
    "score by descriptors": score,
    "score, rows of 140 bytes": lambda: score(dim=70, temperature=torch.rand(70)),
    "score fp32": lambda: score(torch.float32, 64),
    "epilogue": lambda: score(dim=128, epilogue=True),
    "distill": distill,
}


def main() -> None:
    driver.set_active(hopper())
    found = {}
    for name, run in CASES.items():
        last = (ctypes.c_int * 3)()
        before, variants = STUB.stub_launches(last), compiled()
        run()
        count = STUB.stub_launches(last) - before
        found[name] = {"launches": count, "shape": list(last), "compiled": compiled() - variants}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()

"""The CUDA row algorithm on CPU threads (tests/cuda_host), called like `_C.row_pass`.

`row_pass(logits, labels, blocks=4, threads=None, **keywords)` takes the keywords of `_C.row_pass`,
but `threads`, which here is the size of a block, and `capacity`: packets of row memory of one block
(None: the whole row is on chip).
"""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "cuda_host"
FLAGS = ("-std=c++20", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
PAIRS = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
)

_p, _i32, _i64, _f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Term(ctypes.Structure):
    """csrc/row_args.h."""

    _fields_ = [(n, _i32) for n in ("code", "gate", "anchor")] + [
        ("scale", _f32),
        ("params", _f32 * 6),
    ]


class RowArgs(ctypes.Structure):
    """csrc/row_args.h, field by field."""

    _fields_ = [
        ("logits", _p),
        ("logits_type", _i32),
        ("logits_stride", _i64),
        ("dlogits", _p),
        ("dlogits_type", _i32),
        *((n, _i64) for n in ("dlogits_stride", "rows", "vocab")),
        *((n, _p) for n in ("bias", "class_weight", "temperature")),
        *((n, _f32) for n in ("softcap", "logit_scale", "uniform_temperature")),
        ("labels", _p),
        ("ignore_index", _i64),
        *((n, _p) for n in ("weights", "old", "mu", "ref", "adv", "extras")),
        ("n_extras", _i32),
        ("grad_scale", _f32),
        ("terms", _p),
        ("n_terms", _i32),
        ("coefs", _p),
        *((n, _p) for n in ("loss", "logps", "entropy", "lse", "gap", "log_sum_p2")),
        *((n, _p) for n in ("is_top1", "coefs_out")),
        ("threads", _i32),
    ]


class RowTask(ctypes.Structure):
    """csrc/cuda/row_group.h."""

    _fields_ = [
        ("args", RowArgs),
        ("terms", Term * 16),
        ("extras", _p * 16),
        ("scale", _p),
        ("bad_label", _p),
        ("capacity", _i32),
        *((n, ctypes.c_bool) for n in ("wants_gap", "writes_stats", "is_narrowing")),
    ]


def compiler() -> str | None:
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def build(source: str, name: str, *flags: str) -> Path:
    """Compile one source of tests/cuda_host into a scratch folder."""
    out = Path(tempfile.mkdtemp(prefix="pyoffline-cuda-host-")) / name
    subprocess.run([compiler(), *FLAGS, *flags, str(FOLDER / source), "-o", str(out)], check=True)
    return out


@functools.cache
def library() -> ctypes.CDLL:
    """The host runner, built once a session."""
    path = build("library.cpp", "library.so", "-O1", "-shared", "-fPIC")
    lib = ctypes.CDLL(str(path))
    shutil.rmtree(path.parent)
    lib.task_size.restype = _i64
    assert lib.task_size() == ctypes.sizeof(RowTask), "RowTask differs from csrc/cuda/row_group.h"
    return lib


def plan(vocab, item_size, capability=90, shared_bytes=232448):
    """(blocks, threads, capacity, shared bytes, resident) of csrc/cuda/row_plan.h."""
    out = (_i64 * 5)()
    library().host_plan(_i64(vocab), _i64(item_size), capability, _i64(shared_bytes), out)
    return tuple(out)


def host_scale(grad, factor, threads=5):
    """grad *= factor in place by csrc/cuda/scale_elements.h, as `threads` threads of a grid."""
    size = _i64(grad.numel())
    address = _p(grad.data_ptr())
    library().host_scale(address, DTYPES[grad.dtype], size, _f32(factor), _i64(threads))


def _address(x, dtype=torch.float32):
    if x is None:
        return None
    assert x.dtype == dtype and (x.dim() == 0 or x.stride(-1) == 1 or x.numel() < 2), x.dtype
    return x.data_ptr()


_FLOATS = ("bias", "class_weight", "temperature", "weights", "old", "mu", "ref", "adv", "coefs")
_OUTPUTS = ("loss", "logps", "entropy", "lse", "gap", "log_sum_p2", "coefs_out")
_SCALARS = ("softcap", "logit_scale", "uniform_temperature", "grad_scale", "ignore_index")


def task_of(logits, labels, keywords):
    """(RowTask, terms, pointers of extras) of a call with the keywords of `_C.row_pass` and
    `device_scale`, `bad_label`; the task's own capacity, terms and extras are not yet set.
    """
    task, keywords = RowTask(), dict(keywords)
    args, extras = task.args, list(keywords.pop("extras", ()))
    args.logits, args.logits_type = logits.data_ptr(), DTYPES[logits.dtype]
    args.rows, args.vocab = logits.shape
    args.logits_stride = logits.stride(0)
    dlogits = keywords.pop("dlogits", None)
    if dlogits is not None:
        args.dlogits, args.dlogits_type = dlogits.data_ptr(), DTYPES[dlogits.dtype]
        args.dlogits_stride = dlogits.stride(0)
        same = dlogits.data_ptr() == logits.data_ptr()
        task.is_narrowing = same and dlogits.dtype != logits.dtype
    args.labels = _address(labels, torch.int64)
    args.softcap, args.logit_scale, args.uniform_temperature = 0.0, 1.0, 1.0
    args.ignore_index, args.grad_scale = -100, 1.0
    for name in _SCALARS:
        if keywords.get(name) is not None:
            setattr(args, name, keywords[name])
        keywords.pop(name, None)
    outputs = [keywords.get(name) for name in _OUTPUTS[:-1]] + [keywords.get("is_top1")]
    for name in (*_FLOATS, *_OUTPUTS):
        setattr(args, name, _address(keywords.pop(name, None)))
    top = keywords.pop("is_top1", None)
    args.is_top1 = None if top is None else top.data_ptr()
    terms = _terms(list(keywords.pop("codes", ())), keywords.pop("hyper", None))
    args.n_terms, args.n_extras = len(terms), len(extras)
    smoothing = any(t.code == 28 and t.scale != 0.0 for t in terms)
    task.wants_gap = args.gap is not None or smoothing
    task.writes_stats = args.coefs is None or any(x is not None for x in outputs)
    task.scale = _address(keywords.pop("device_scale", None))
    task.bad_label = _address(keywords.pop("bad_label", None), torch.int64)
    assert not keywords, f"unknown keywords {sorted(keywords)}"
    return task, terms, (_p * len(extras))(*[_address(x) for x in extras])


def _terms(codes, hyper):
    terms = (Term * (len(codes) // 3))()
    for k in range(len(terms)):
        values = hyper[k].tolist()
        terms[k] = Term(*codes[3 * k : 3 * k + 3], values[0], (_f32 * 6)(*values[1:7]))
    return terms


def row_pass(logits, labels, *, blocks=4, threads=None, capacity=None, **keywords):
    """`_C.row_pass` on CPU tensors by a cluster of CPU threads."""
    task, terms, extras = task_of(logits, labels, keywords)
    threads = threads or (8 if blocks <= 2 else 4)
    whole = -(-task.args.vocab * logits.element_size() // 16 // blocks) + 1
    task.capacity = whole if capacity is None else capacity
    assert capacity is None or blocks == 1, "only a block on its own streams"
    code = library().host_row_pass(ctypes.byref(task), terms, extras, blocks, threads)
    assert code == 0, f"no kernel for {logits.dtype} and dlogits of {task.args.dlogits_type}"

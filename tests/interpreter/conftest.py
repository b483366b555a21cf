"""Runs Triton kernels in Triton's interpreter (TRITON_INTERPRET=1, set before the first import).

tests/test_triton.py starts a process per file of this folder; without the variable they are not
collected. Four things are changed: the debug option is on (int32 overflow and device asserts are
errors), programs run in shuffled order, bf16 is what it is on a GPU (the interpreter multiplies
bf16 matrices as the integers of their bits, and truncates to bf16), and the interpreter's own
functions are patched once per launch instead of once per device function call (a fifth of the
time).
"""

import dataclasses
import os
import random

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
else:
    import numpy
    import triton.language as tl
    from triton.runtime import interpreter

    _patched = set()  # modules patched in the current launch
    _patch_lang = interpreter._patch_lang
    _call = interpreter.GridExecutor.__call__

    def _patch_once(fn):
        core = interpreter.tl.core
        names = {m.__name__ for m in fn.__globals__.values() if m is interpreter.tl or m is core}
        if names <= _patched:
            return None
        _patched.update(names)
        return _patch_lang(fn)

    def _launch(self, *args, **kwargs):
        _patched.clear()
        builder, order = interpreter.interpreter_builder, {}
        set_index = type(builder).set_grid_idx

        def shuffled(x, y, z):
            n = builder.grid_dim[0]
            if n not in order:
                order[n] = random.Random(n).sample(range(n), n)
            set_index(builder, order[n][x], y, z)

        builder.set_grid_idx = shuffled
        try:
            with numpy.errstate(all="ignore"):
                return _call(self, *args, **kwargs)
        finally:
            _patched.clear()
            del builder.set_grid_idx

    def _from_bf16(data):
        return (data.astype(numpy.uint32) << 16).view(numpy.float32)

    def _to_bf16(data):
        """To nearest, ties to even."""
        bits = data.view(numpy.uint32).astype(numpy.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return numpy.where(numpy.isnan(data), 0x7FC0, rounded).astype(numpy.uint16)

    _cast = interpreter.InterpreterBuilder.cast_impl
    _dot = interpreter.InterpreterBuilder.create_dot
    _wide = {"bf16": (tl.float32, _from_bf16), "fp32": (tl.bfloat16, _to_bf16)}

    def _cast_bf16(self, src, dst_type):
        into, convert = _wide.get(str(src.dtype.scalar), (None, None))
        if into is None or dst_type.scalar != into:
            return _cast(self, src, dst_type)
        return interpreter.TensorHandle(convert(numpy.ascontiguousarray(src.data)), into)

    def _dot_bf16(self, a, b, d, *options):
        a, b = (_cast_bf16(self, x, tl.float32) for x in (a, b))
        return _dot(self, a, b, d, *options)

    interpreter.InterpreterBuilder.cast_impl = _cast_bf16
    interpreter.InterpreterBuilder.create_dot = _dot_bf16
    interpreter._patch_lang = _patch_once
    interpreter.GridExecutor.__call__ = _launch
    _builder = interpreter.interpreter_builder
    _builder.options = dataclasses.replace(_builder.options, debug=True)


@pytest.fixture(autouse=True)
def one_thread():
    """NumPy and torch work on a few thousand values: threads would only wait for each other."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""Arithmetic of PTX as numpy functions of whole vectors of threads.

`operation(parts)` gives (function, types of the sources, type of the result). Approximate
instructions (ex2, rcp, div.full) are off by a part of what the ISA allows, by a hash of their
argument: an emulated kernel meets its tolerance with that error, not with a perfect exponential.
fp32 FMA is rounded once, from fp64 (twice in about one of 2^29). Not here: memory, other threads.
"""

import numpy as np

DTYPES = {
    "pred": np.bool_, "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32,
    "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip
WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
EX2_ERROR = 2.0**-22.5  # the ISA: 2^-22
ULP = 2.0**-23


def bf16_of(x):
    """fp32 to the bits of bf16, to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f32_of_bf16(bits):
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_of_f16(bits):
    return np.asarray(bits).astype(np.uint16).view(np.float16).astype(np.float32)


def f16_of(x):
    return np.asarray(x, np.float32).astype(np.float16)


def flush(x):
    """Subnormal fp32 to zero of its sign."""
    tiny = np.abs(x) < np.float32(2.0**-126)
    return np.where(tiny, np.copysign(np.float32(0), x), x)


def _hash(x):
    """[-1, 1] by the bits of an fp32 vector."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    mixed = (bits * np.uint32(2654435761)) ^ (bits >> np.uint32(15))
    return (mixed.astype(np.float64) / 2.0**31) - 1.0


def _ex2(x):
    wide = np.exp2(x.astype(np.float64))
    wide = np.where(np.floor(x) == x, wide, wide * (1.0 + EX2_ERROR * _hash(x)))
    return wide.astype(np.float32)


def _rcp(x):
    wide = 1.0 / x.astype(np.float64)
    exact = np.frexp(x)[0] == 0.5
    return np.where(exact, wide, wide * (1.0 + 0.4 * ULP * _hash(x))).astype(np.float32)


def _rcp64(x):
    """The upper half of a reciprocal, 20 bits."""
    bits = np.ascontiguousarray(1.0 / x).view(np.uint64)
    return (bits & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _div_full(a, b):
    a, b = np.broadcast_arrays(np.asarray(a, np.float32), np.asarray(b, np.float32))
    wide = a.astype(np.float64) / b.astype(np.float64)
    exact = np.abs(np.frexp(b)[0]) == 0.5
    return np.where(exact, wide, wide * (1.0 + ULP * _hash(b))).astype(np.float32)


def _fma32(a, b, c):
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(np.float32)


def _fma32_down(a, b, c):
    wide = np.float64(a) * np.float64(b) + np.float64(c)
    near = wide.astype(np.float32)
    return np.where(near > wide, np.nextafter(near, np.float32(-np.inf)), near)


def _fma64(a, b, c):
    long = np.longdouble
    return (long(a) * long(b) + long(c)).astype(np.float64)


def _pair(f, kind):
    """A function of bf16 or f16 on both halves of 32 bits, rounded once."""
    if kind == "bf16x2":
        widen, narrow = f32_of_bf16, bf16_of
    else:
        widen, narrow = f32_of_f16, lambda x: f16_of(x).view(np.uint16)

    def run(*sources):
        halves = []
        for shift in (0, 16):
            parts = [
                widen((np.asarray(s) >> np.uint32(shift)) & np.uint32(0xFFFF)) for s in sources
            ]
            halves.append(narrow(f(*parts)).astype(np.uint32))
        return halves[0] | (halves[1] << np.uint32(16))

    return run


FLOATS = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide,
    "min": np.fmin, "max": np.fmax, "neg": np.negative, "abs": np.abs,
    "copysign": lambda a, b: np.copysign(b, a),
}  # fmt: skip
PROPAGATING = {"min": np.minimum, "max": np.maximum}  # .NaN
INTEGERS = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
    "or": np.bitwise_or, "xor": np.bitwise_xor, "neg": np.negative, "abs": np.abs,
    "not": np.invert,
}  # fmt: skip
COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
    "hs": np.greater_equal,
}  # fmt: skip


def _compare(name, is_float):
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if is_float and name.endswith("u"):
        f = COMPARISONS[name[:-1]]
        return lambda a, b: f(a, b) | np.isnan(a) | np.isnan(b)
    if is_float and name == "ne":
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    return COMPARISONS[name]


def _widen(x, kind):
    """16 bits, as an integer or an fp16, to fp32."""
    if kind == "bf16":
        return f32_of_bf16(x)
    return (
        np.asarray(x)
        .astype(np.float16 if x.dtype.kind == "f" else np.uint16)
        .view(np.float16)
        .astype(np.float32)
    )


def comparison(parts):
    """Of a setp: a function that gives (p, q): q the opposite, or of two halves the upper one's.
    Ordered comparisons are false for a NaN, those that end in u are true.
    """
    name, kind = parts[1], parts[-1]
    f = _compare(name, "f" in kind)
    if kind in ("bf16x2", "f16x2"):

        def both(a, b):
            halves = [
                [np.asarray(x) >> np.uint32(s) & np.uint32(0xFFFF) for x in (a, b)] for s in (0, 16)
            ]
            return tuple(f(*(_widen(x, kind[:-2]) for x in half)) for half in halves)

        return both

    def one(a, b):
        p = f(*(_widen(x, kind) for x in (a, b))) if kind in ("bf16", "f16") else f(a, b)
        return p, ~p

    return one


def _shift_left(a, b):
    bits = a.dtype.itemsize * 8
    return np.where(b < bits, a << np.minimum(b, bits - 1).astype(a.dtype), a.dtype.type(0))


def _shift_right(a, b):
    bits = a.dtype.itemsize * 8
    low = np.minimum(b, bits - 1).astype(a.dtype)
    if np.issubdtype(a.dtype, np.signedinteger):
        return a >> low
    return np.where(b < bits, a >> low, a.dtype.type(0))


def _quotient(a, b):
    a, b = np.asarray(a), np.asarray(b)
    safe = np.where(b == 0, b.dtype.type(1), b)
    q = a // safe
    return q + ((q < 0) & (q * safe != a)).astype(q.dtype)


def _field(a, b, c):
    """bfe: c bits of a from bit b."""
    bits = a.dtype.itemsize * 8
    start, size = np.minimum(b & 255, bits), np.minimum(c & 255, bits)
    wide = a.astype(object if bits == 64 else np.int64)
    value = (wide >> start.astype(np.int64)) & ((1 << size.astype(np.int64)) - 1)
    if np.issubdtype(a.dtype, np.signedinteger):
        top = 1 << np.maximum(size.astype(np.int64) - 1, 0)
        value = np.where(value & top, value - 2 * top, value)
    return value.astype(a.dtype)


def _insert(a, b, c, d):
    """bfi: the low d bits of a, into b from bit c."""
    kind = b.dtype.type
    width = b.dtype.itemsize * 8
    size = np.minimum(d & 255, width).astype(np.uint64)
    ones = np.where(
        size >= 64, ~np.uint64(0), (np.uint64(1) << (size % np.uint64(64))) - np.uint64(1)
    )
    place = kind(1) * (c & 255).astype(b.dtype)
    mask = ones.astype(b.dtype) << place
    return (b & ~mask) | ((a << place) & mask)


def _permute(a, b, selector):
    both = (np.asarray(b).astype(np.uint64) << np.uint64(32)) | np.asarray(a).astype(np.uint64)
    out = np.zeros(np.broadcast(a, b, selector).shape, np.uint32)
    for i in range(4):
        pick = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (both >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(pick & np.uint32(8), sign, byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _float_operation(name, parts, kind):
    if name == "fma" or name == "mad":
        if kind == "f64":
            return _fma64, ("f64",) * 3
        return _fma32_down if "rm" in parts else _fma32, ("f32",) * 3
    if name in ("ex2", "rcp"):
        f = {"ex2": _ex2, "rcp": _rcp64 if kind == "f64" else _rcp}[name]
        return f, (kind,)
    if name == "div" and "full" in parts:
        return _div_full, (kind, kind)
    f = FLOATS[name]
    if "NaN" in parts:
        f = PROPAGATING[name]
    return f, (kind,) * f.nin if isinstance(f, np.ufunc) else (kind, kind)


def _integer_operation(name, parts, kind):
    if name in ("mul", "mad"):
        tail = 1 if name == "mad" else 0
        if "wide" in parts:
            wide = DTYPES[WIDE[kind]]

            def multiply(a, b, *c):
                return np.multiply(a, b, dtype=wide) + (c[0] if c else wide(0))

            return multiply, (kind, kind) + (WIDE[kind],) * tail, WIDE[kind]
        if "hi" in parts:
            wide, bits = DTYPES[WIDE[kind]], DTYPES[kind]().itemsize * 8
            return (
                (lambda a, b: (np.multiply(a, b, dtype=wide) >> wide(bits)).astype(DTYPES[kind])),
                (kind, kind),
                kind,
            )
        return (
            (lambda a, b, *c: a * b + (c[0] if c else a.dtype.type(0))),
            (kind,) * (2 + tail),
            kind,
        )
    if name in ("shl", "shr"):
        f = _shift_left if name == "shl" else _shift_right
        return f, (kind, "u32"), kind
    if name == "div":
        return _quotient, (kind, kind), kind
    if name == "rem":
        return (lambda a, b: a - _quotient(a, b) * b), (kind, kind), kind
    if name == "bfe":
        return _field, (kind, "u32", "u32"), kind
    if name == "bfi":
        return _insert, (kind, kind, "u32", "u32"), kind
    if name == "prmt":
        return _permute, ("u32",) * 3, "u32"
    f = INTEGERS[name]
    return f, (kind,) * f.nin, kind


def operation(parts):
    """(function, types of the sources, type of the result) of an arithmetic opcode."""
    name, kind = parts[0], parts[-1]
    if kind in ("bf16x2", "f16x2"):
        f = PROPAGATING[name] if "NaN" in parts else FLOATS[name]
        return _pair(f, kind), (kind,) * f.nin, kind
    if kind in ("bf16", "f16"):
        raise NotImplementedError(".".join(parts))
    if kind in ("f32", "f64"):
        f, kinds = _float_operation(name, parts, kind)
        if "ftz" in parts and kind == "f32":
            return (lambda *sources: flush(f(*(flush(s) for s in sources)))), kinds, kind
        return f, kinds, kind
    return _integer_operation(name, parts, kind)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def _to_integer(x, target, how):
    info = np.iinfo(DTYPES[target])
    wide = ROUNDINGS[how](x.astype(np.longdouble))
    wide = np.where(np.isnan(wide), 0, np.clip(wide, info.min, info.max))
    return wide.astype(DTYPES[target])


def _to_half(target):
    return bf16_of if target == "bf16" else f16_of


def conversion(parts):
    """(function, type of the source, type of the result) of a cvt."""
    target, source = parts[-2], parts[-1]
    how = next((p for p in parts if p in ROUNDINGS), None)
    if target in ("bf16x2", "f16x2"):
        half = _to_half(target[:-2])

        def pack(high, low):
            bits = [half(x).view(np.uint16).astype(np.uint32) for x in (high, low)]
            return (bits[0] << np.uint32(16)) | bits[1]

        return pack, "f32", target
    floats = ("f16", "bf16", "f32", "f64")
    if target in ("bf16", "f16") and source == "f32":
        return _to_half(target), source, target
    if source == "bf16":
        return f32_of_bf16, source, target
    if source in floats and target not in floats:
        return (lambda x: _to_integer(x, target, how)), source, target
    if source in floats and target in floats:

        def change(x):
            x = flush(x) if "ftz" in parts and source == "f32" else x
            x = ROUNDINGS[how](x) if how else x
            x = x.astype(DTYPES[target])
            return np.where(x > 0, np.minimum(x, 1), 0).astype(x.dtype) if "sat" in parts else x

        return change, source, target
    return (lambda x: x.astype(DTYPES[target])), source, target

"""Random argument tuples against every function of `pyoffline._C`: none may kill the process.

`python tests/fuzz_bindings.py --count N --seed S` prints one JSON line: how many calls ran, how
many were valid, how many raised, by exception. A call may raise ValueError, TypeError or
IndexError; any other exception, a changed input or a byte written outside an output ends it with
exit code 1. About a third of the tuples are valid. Run in a subprocess by test_fuzz_bindings.py.
"""

import argparse
import collections
import json
import random
import sys

import numpy as np
import torch
from row_pass_args import CODES, Guarded

from pyoffline import _C

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL_DTYPES = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool)
EXPECTED = (ValueError, TypeError, IndexError)
SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e30, -1e30, 88.0, float("inf"), -float("inf"), float("nan"))


def floats(rng, shape, dtype=torch.float32):
    x = torch.randn(shape).to(dtype)
    if x.numel() and rng.random() < 0.3:
        flat = x.view(-1)
        flat[rng.randrange(flat.numel())] = rng.choice(SPECIAL)
    return x


def sizes(rng):
    rows = rng.choice((0, 1, 2, 3, 5, 17, 40))
    return rows, rng.choice((1, 2, 15, 16, 17, 31, 64, 100, 257, 1000))


def view_of(rng, x):
    """The same matrix with another row stride and offset."""
    if x.dim() != 2 or rng.random() < 0.6:
        return x
    wide = torch.zeros(x.shape[0], x.shape[1] + rng.randrange(1, 9), dtype=x.dtype)
    view = wide[:, 1 : 1 + x.shape[1]]
    view.copy_(x)
    return view


def spoil_tensor(rng, x):
    """Some other tensor or object in the place of x."""
    shape = tuple(x.shape)
    grown = tuple(max(0, s + rng.choice((-1, 1))) for s in shape)
    reach = rng.choice((2**20, 2**31, 2**40, 2**62))
    choices = (
        lambda: None,
        lambda: rng.choice((3, "x", [1.0], {}, 1.5, object(), np.float32(1))),
        lambda: torch.zeros(grown, dtype=x.dtype),
        lambda: torch.zeros(shape, dtype=rng.choice(ALL_DTYPES)),
        lambda: torch.zeros((*shape, 2), dtype=x.dtype)[..., 0],
        lambda: torch.zeros(shape[::-1], dtype=x.dtype).t(),
        lambda: torch.zeros((), dtype=x.dtype).expand(shape),
        lambda: torch.zeros(shape, dtype=x.dtype, device="meta"),
        lambda: torch.zeros(shape, dtype=x.dtype).to_sparse(),
        lambda: np.lib.stride_tricks.as_strided(
            np.zeros(8, np.float32), shape, [reach] * len(shape)
        ),
        lambda: np.zeros(shape, np.float32)[::-1],
        lambda: np.zeros(4 * int(np.prod(shape)) + 1, np.uint8)[1:].view(np.float32).reshape(shape),
        lambda: shrunk(torch.zeros(shape, dtype=x.dtype)),
    )
    return rng.choice(choices)()


def shrunk(x):
    """Takes half of the storage from under a tensor."""
    x.untyped_storage().resize_(x.numel() * x.element_size() // 2)
    return x


def draw_program(rng, n_extras):
    names = rng.choices(list(CODES), k=rng.choice((1, 1, 2, 3)))
    codes, hyper = [], []
    for name in names:
        anchor = rng.randint(1, 3) if name.startswith("kl") else 0
        codes += [CODES[name], rng.randint(-1, n_extras - 1), anchor]
        hyper.append(
            [rng.uniform(-1, 1), *(rng.choice((0.1, 0.5, 2.0, float("inf"))) for _ in range(7))]
        )
    return codes, torch.tensor(hyper, dtype=torch.float64)


def draw_row_pass(rng):
    """Positional and keyword arguments of a valid call, and its outputs."""
    rows, vocab = sizes(rng)
    dtype = rng.choice(FLOATS)
    labels = torch.randint(0, vocab, (rows,))
    if rows and rng.random() < 0.5:
        labels[rng.randrange(rows)] = -100
    kwargs = {"threads": rng.choice((1, 2, 3))}
    for name in ("bias", "class_weight"):
        if rng.random() < 0.3:
            kwargs[name] = floats(rng, (vocab,))
    for name in ("temperature", "weights", "adv"):
        if rng.random() < 0.4:
            kwargs[name] = floats(rng, (rows,)).abs()
    for name in ("old", "mu", "ref"):
        kwargs[name] = -floats(rng, (rows,)).abs()
    kwargs["extras"] = [floats(rng, (rows,)) for _ in range(rng.randrange(3))]
    for name, values in (
        ("softcap", (0.0, 5.0)),
        ("logit_scale", (1.0, -0.5)),
        ("grad_scale", SPECIAL),
    ):
        if rng.random() < 0.3:
            kwargs[name] = rng.choice(values)
    outputs = {}
    if rng.random() < 0.7:
        kwargs["codes"], kwargs["hyper"] = draw_program(rng, len(kwargs["extras"]))
    elif rng.random() < 0.7:
        kwargs["coefs"] = floats(rng, (4, rows))
    if ("codes" in kwargs or "coefs" in kwargs) and rng.random() < 0.8:
        outputs["dlogits"] = Guarded((rows, vocab), rng.choice(FLOATS))
    for name in ("loss", "logps", "entropy", "lse", "gap", "log_sum_p2"):
        if rng.random() < 0.5:
            outputs[name] = Guarded((rows,), torch.float32)
    if rng.random() < 0.3:
        outputs["is_top1"] = Guarded((rows,), torch.uint8)
        outputs["coefs_out"] = Guarded((4, rows), torch.float32)
    return [view_of(rng, floats(rng, (rows, vocab), dtype)), labels], kwargs, outputs


def draw_gemm(rng):
    c, v = sizes(rng)
    d = rng.choice((0, 1, 3, 16, 65))
    dtype = rng.choice(FLOATS)
    hidden, weight, dlogits = (
        view_of(rng, floats(rng, shape, dtype)) for shape in ((c, d), (v, d), (c, v))
    )
    threads = {"threads": rng.choice((1, 2))}
    name = rng.choice(("gemm_logits", "gemm_dhidden", "gemm_dweight"))
    if name == "gemm_logits":
        return name, [hidden, weight], threads, {"out": Guarded((c, v), rng.choice(FLOATS))}
    if name == "gemm_dhidden":
        outputs = {"out": Guarded((c, d), torch.float32)}
        if rng.random() < 0.5:
            outputs["kept"] = Guarded((rng.choice((0, 1, v * d, 4 * v * d + 9000)),), dtype)
            kept = {"kept_is_filled": rng.choice((False, True))}
            return name, [dlogits, weight], {**threads, **kept}, outputs
        return name, [dlogits, weight], threads, outputs
    outputs = {"acc": Guarded((v, d), torch.float32)}
    if rng.random() < 0.5:
        outputs["out"] = Guarded((v, d), rng.choice(FLOATS))
    return name, [dlogits, hidden], {**threads, "beta": rng.choice((0.0, 1.0))}, outputs


def draw_small(rng):
    rows, vocab = sizes(rng)
    dtype = rng.choice(FLOATS)
    name = rng.choice(
        ("column_sum", "weighted_sum", "scale_cast", "vector_exp", "vector_tanh", "vector_log")
    )
    if name == "column_sum":
        return (
            name,
            [floats(rng, (rows, vocab), dtype)],
            {},
            {"out": Guarded((vocab,), torch.float32)},
        )
    if name == "weighted_sum":
        return name, [floats(rng, (vocab,)), rng.choice((None, floats(rng, (vocab,))))], {}, {}
    if name == "scale_cast":
        out = Guarded((rows, vocab), rng.choice(FLOATS))
        return (
            name,
            [floats(rng, (rows, vocab), dtype)],
            {"scale": rng.choice(SPECIAL)},
            {"out": out},
        )
    return name, [floats(rng, (vocab,))], {}, {"out": Guarded((vocab,), torch.float32)}


def draw(rng):
    kind = rng.random()
    if kind < 0.6:
        return ("row_pass", *draw_row_pass(rng))
    return draw_gemm(rng) if kind < 0.85 else draw_small(rng)


def spoil(rng, args, kwargs, plain):
    """Breaks one to three arguments of a valid call in place."""
    labels = args[-1]
    if isinstance(labels, torch.Tensor) and labels.dtype == torch.int64 and labels.numel():
        if rng.random() < 0.2:
            labels[0] = rng.choice((-1, 10**6, 2**62, -(2**62)))
            return
    for _ in range(rng.choice((1, 1, 2, 3))):
        kind = rng.random()
        if kind < 0.35:
            i = rng.randrange(len(args))
            if isinstance(args[i], torch.Tensor):
                args[i] = spoil_tensor(rng, args[i])
        elif kind < 0.6 and plain:
            name = rng.choice(list(plain))
            if isinstance(plain[name], torch.Tensor):
                plain[name] = spoil_tensor(rng, plain[name])
        elif kind < 0.7 and plain and isinstance(args[0], torch.Tensor):
            plain[rng.choice(list(plain))] = args[0]  # an output over an input
        elif kwargs:
            name = rng.choice(list(kwargs))
            value = kwargs[name]
            junk = (None, -1, 10**30, float("nan"), "x", [], [1], [-5, 7, 9], (2**40, -1, 0))
            tensor = isinstance(value, torch.Tensor)
            kwargs[name] = spoil_tensor(rng, value) if tensor else rng.choice(junk)


def run_one(rng, counts):
    name, args, kwargs, outputs = draw(rng)
    plain = {key: x.tensor for key, x in outputs.items()}
    is_valid = rng.random() < 1 / 3
    if not is_valid:
        spoil(rng, args, kwargs, plain)
    given = [
        x for x in (*args, *kwargs.values()) if type(x) is torch.Tensor and x.device.type == "cpu"
    ]
    before = [(x, x.clone()) for x in given if is_valid]
    try:
        getattr(_C, name)(*args, **kwargs, **plain)
        counts["returned"] += 1
    except EXPECTED as error:
        counts[type(error).__name__] += 1
        if is_valid:
            raise AssertionError(f"a valid call of {name} raised: {error}") from error
    counts["valid"] += is_valid
    for key, x in outputs.items():
        assert x.intact(), f"{name}: {key}: wrote outside"
    for x, copy in before:
        same = torch.equal(x.contiguous().view(torch.uint8), copy.contiguous().view(torch.uint8))
        assert same, f"{name}: wrote an input"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="calls (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the arguments (default: %(default)s)"
    )
    options = parser.parse_args(argv)
    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    counts = collections.Counter()
    isas = _C.isas()
    for i in range(options.count):
        _C.set_isa(isas[i % len(isas)])
        try:
            run_one(rng, counts)
        except Exception:
            sys.stderr.write(f"call {i} of seed {options.seed}\n")
            raise
    sys.stdout.write(json.dumps({"count": options.count, "seed": options.seed, **counts}) + "\n")


if __name__ == "__main__":
    main()

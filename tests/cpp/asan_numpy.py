"""The extension module under ASan: valid and broken calls on numpy buffers, without torch.

`asan_numpy.py PATH_OF_C_SO`, started by sanitize.sh with the ASan runtime preloaded. Broken calls
may raise ValueError, TypeError or IndexError. Arrays own exactly their bytes.
"""

import importlib.util
import random
import sys

import numpy as np

FLOATS = (np.float32, np.uint16, np.float16)
NAMES = ("loss", "logps", "entropy", "lse", "gap", "log_sum_p2")


def load(path):
    spec = importlib.util.spec_from_file_location("pyoffline._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floats(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def matrix(rng, rows, cols, dtype):
    x = floats(rng, rows, cols)
    return (x.view(np.uint32) >> 16).astype(np.uint16) if dtype == np.uint16 else x.astype(dtype)


def draw(rng, pick, codes):
    rows, vocab = pick.choice((0, 1, 3, 17)), pick.choice((1, 16, 33, 1000))
    labels = rng.integers(0, vocab, rows)
    kwargs = {name: floats(rng, rows) for name in ("old", "mu", "ref", "adv", "weights")}
    kwargs["bias"] = floats(rng, vocab)
    kwargs["threads"] = pick.choice((1, 3))
    kwargs["codes"] = [codes[pick.choice(list(codes))], -1, 1]
    kwargs["hyper"] = rng.random((1, 8))
    kwargs["dlogits"] = matrix(rng, rows, vocab, pick.choice(FLOATS))
    kwargs |= {name: np.empty(rows, np.float32) for name in NAMES if pick.random() < 0.5}
    kwargs["is_top1"] = np.empty(rows, np.uint8)
    kwargs["coefs_out"] = np.empty((4, rows), np.float32)
    return [matrix(rng, rows, vocab, pick.choice(FLOATS)), labels], kwargs


def spoil(pick, args, kwargs):
    i = pick.randrange(2)
    strided = np.lib.stride_tricks.as_strided
    broken = (
        None,
        "x",
        [1.0],
        args[i][..., ::-1],
        args[i][..., :-1],
        args[i].astype(np.float64),
        strided(args[i].reshape(-1)[:1], args[i].shape, [2**40] * args[i].ndim),
    )
    if pick.random() < 0.5:
        args[i] = pick.choice(broken)
    else:
        name = pick.choice(list(kwargs))
        kwargs[name] = pick.choice((*broken, 10**30, [99, 99, 99], args[0]))


def main(path, count=4000):
    module = load(path)
    pick, rng = random.Random(0), np.random.default_rng(0)
    codes, isas = module.codes(), module.isas()
    valid = errors = 0
    for i in range(count):
        module.set_isa(isas[i % len(isas)])
        args, kwargs = draw(rng, pick, codes)
        good = pick.random() < 0.5
        if not good:
            spoil(pick, args, kwargs)
        try:
            module.row_pass(*args, **kwargs)
            valid += good
        except (ValueError, TypeError, IndexError):
            if good:
                raise
            errors += 1
    sys.stdout.write(f"asan_numpy: {count} calls, {valid} valid, {errors} errors\n")
    if valid < count // 4 or errors < count // 4:
        sys.exit("too few valid or too few broken calls")


if __name__ == "__main__":
    main(sys.argv[1])

"""The three vendor GEMMs: error against fp64 beside torch.mm's, panel and tile borders, strides,
beta, the cast on the way, and what happens where the symbols are absent. Each test runs on MKL's
products and, where the CPU multiplies bf16, on oneDNN's tile kernel."""

import subprocess
import sys

import pytest
import torch
from compare import check_forward, same_bits

from pyoffline import _C

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FOUND = _C.gemm_info()
pytestmark = pytest.mark.skipif(bool(FOUND["missing"]), reason=f"not run: {FOUND['missing']}")


@pytest.fixture(autouse=True)
def kernel(bf16_kernel):
    return bf16_kernel


# (C, D, V, why)
SHAPES = [
    (1, 1, 1, "the smallest"),
    (3, 5, 7, "odd"),
    (17, 1, 129, "inner size 1"),
    (1, 64, 1000, "one row"),
    (64, 33, 1, "one column"),
    (5, 24, 1023, "one below a panel"),
    (5, 24, 1025, "one above it"),
    (9, 31, 2047, "one below a wider panel"),
    (9, 31, 2049, "one above that"),
    (200, 96, 5000, "several panels"),
    (130, 515, 1090, "more than a block of rows, of inner size and of columns"),
    (33, 2100, 70, "a strip of many inner blocks"),
]


def operands(c, d, v, dtype, padded=False):
    g = torch.Generator().manual_seed(c + d + v)

    def matrix(rows, cols):
        x = torch.randn(rows, cols, generator=g).to(dtype)
        if not padded:
            return x
        wide = torch.full((rows, cols + 5), float("nan"), dtype=dtype)
        wide[:, 2 : 2 + cols] = x
        return wide[:, 2 : 2 + cols]

    return matrix(c, d), matrix(v, d), matrix(c, v)


def poisoned(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


def products(hidden, weight, dlogits):
    """logits, dhidden and dweight in fp32, on two threads."""
    logits, dhidden, dweight = (poisoned(*t.shape) for t in (dlogits, hidden, weight))
    _C.gemm_logits(hidden, weight, logits, threads=2)
    _C.gemm_dhidden(dlogits, weight, dhidden, threads=2)
    _C.gemm_dweight(dlogits, hidden, dweight, threads=2)
    return logits, dhidden, dweight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES], ids=[s[3] for s in SHAPES])
def test_against_fp64(shape, dtype):
    hidden, weight, dlogits = operands(*shape, dtype)
    x, w, dz = hidden.double(), weight.double(), dlogits.double()
    logits = poisoned(shape[0], shape[2], dtype=dtype)
    _C.gemm_logits(hidden, weight, logits, threads=2)
    check_forward("logits", logits, x @ w.T, hidden @ weight.T)
    dhidden = poisoned(*hidden.shape)
    _C.gemm_dhidden(dlogits, weight, dhidden, threads=2)
    check_forward("dhidden", dhidden, dz @ w, dlogits @ weight)
    dweight = poisoned(*weight.shape)
    _C.gemm_dweight(dlogits, hidden, dweight, beta=0.0, threads=2)
    check_forward("dweight", dweight, dz.T @ x, dlogits.T @ hidden)


@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_fp32_outputs_keep_the_accumulator(dtype):
    """No rounding to the operands' dtype on the way: error as of the exact product in fp32."""
    hidden, weight, dlogits = operands(37, 300, 4099, dtype)
    x, w, dz = hidden.float(), weight.float(), dlogits.float()
    logits, dhidden, dweight = (poisoned(*t.shape) for t in (dlogits, hidden, weight))
    _C.gemm_logits(hidden, weight, logits)
    _C.gemm_dhidden(dlogits, weight, dhidden)
    _C.gemm_dweight(dlogits, hidden, dweight)
    check_forward("logits", logits, x.double() @ w.double().T, x @ w.T)
    check_forward("dhidden", dhidden, dz.double() @ w.double(), dz @ w)
    check_forward("dweight", dweight, dz.double().T @ x.double(), dz.T @ x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype):
    """Padded rows give the bits of dense ones, and the padding of outputs is untouched."""
    dense, padded = operands(33, 40, 4500, dtype), operands(33, 40, 4500, dtype, padded=True)
    want, wide = poisoned(33, 4500, dtype=dtype), poisoned(33, 4507, dtype=dtype)
    _C.gemm_logits(*dense[:2], want)
    _C.gemm_logits(*padded[:2], wide[:, 3:4503])
    same_bits("logits", wide[:, 3:4503], want)
    assert wide[:, :3].isnan().all() and wide[:, 4503:].isnan().all()
    want, wide = poisoned(33, 40), poisoned(33, 44)
    _C.gemm_dhidden(dense[2], dense[1], want)
    _C.gemm_dhidden(padded[2], padded[1], wide[:, 1:41])
    same_bits("dhidden", wide[:, 1:41], want)
    assert wide[:, 0].isnan().all() and wide[:, 41:].isnan().all()
    want, wide = poisoned(4500, 40), poisoned(4500, 44)
    _C.gemm_dweight(dense[2], dense[0], want)
    _C.gemm_dweight(padded[2], padded[0], wide[:, 1:41])
    same_bits("dweight", wide[:, 1:41], want)
    assert wide[:, 0].isnan().all() and wide[:, 41:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_dweight_accumulates_and_casts(dtype):
    hidden, _, dlogits = operands(20, 48, 1300, dtype)
    once, twice = poisoned(1300, 48), poisoned(1300, 48)
    _C.gemm_dweight(dlogits, hidden, once, beta=0.0)
    _C.gemm_dweight(dlogits, hidden, twice, beta=0.0)
    cast = poisoned(1300, 48, dtype=dtype)
    _C.gemm_dweight(dlogits, hidden, twice, beta=1.0, out=cast, out_scale=0.25, threads=2)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-5)
    same_bits("out", cast, (twice * 0.25).to(dtype))
    _C.gemm_dweight(dlogits, hidden, twice, beta=-0.5)
    torch.testing.assert_close(twice, torch.zeros_like(once), rtol=0, atol=1e-4)
    alone = poisoned(1300, 48, dtype=dtype)
    _C.gemm_dweight(dlogits, hidden, None, out=alone, out_scale=0.25)
    same_bits("out without acc", alone, (once * 0.25).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_sizes(dtype):
    """No rows, no inner size, no columns: an empty sum is 0, and beta keeps what was there."""
    for c, d, v in [(0, 3, 4), (3, 0, 4), (3, 4, 0)]:
        hidden, weight, dlogits = operands(c, d, v, dtype)
        logits, dhidden, dweight = (poisoned(*t.shape) for t in (dlogits, hidden, weight))
        _C.gemm_logits(hidden, weight, logits)
        _C.gemm_dhidden(dlogits, weight, dhidden)
        _C.gemm_dweight(dlogits, hidden, dweight)
        for x in (logits, dhidden, dweight):
            assert (x == 0).all()
    acc, out = torch.ones(4, 3), poisoned(4, 3, dtype=dtype)
    _C.gemm_dweight(
        operands(0, 3, 4, dtype)[2], torch.zeros(0, 3, dtype=dtype), acc, beta=1.0, out=out
    )
    assert (acc == 1).all() and (out == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_row_stays_in_its_row(bad):
    hidden, weight, dlogits = operands(9, 33, 4200, torch.bfloat16)
    want, got = poisoned(9, 4200), poisoned(9, 4200)
    _C.gemm_logits(hidden, weight, want)
    hidden[4, 7] = bad
    _C.gemm_logits(hidden, weight, got)
    assert not got[4].isfinite().any()
    keep = torch.arange(9) != 4
    same_bits("other rows", got[keep], want[keep])
    want, got = poisoned(9, 33), poisoned(9, 33)
    _C.gemm_dhidden(dlogits, weight, want)
    dlogits[4, 17] = bad
    _C.gemm_dhidden(dlogits, weight, got)
    same_bits("other rows", got[keep], want[keep])


def test_same_bits_twice():
    hidden, weight, dlogits = operands(200, 96, 5000, torch.bfloat16)
    runs = []
    for _ in range(2):
        runs.append(products(hidden, weight, dlogits))
    for a, b in zip(*runs, strict=True):
        same_bits("rerun", a, b)


def zeros(*shape):
    return torch.zeros(shape)


# (what is wrong, function, arguments, exception)
BAD = [
    ("mixed dtypes", "gemm_logits", (zeros(2, 3).half(), zeros(4, 3), zeros(2, 4)), ValueError),
    ("inner sizes differ", "gemm_logits", (zeros(2, 3), zeros(4, 5), zeros(2, 4)), ValueError),
    ("out of another shape", "gemm_logits", (zeros(2, 3), zeros(4, 3), zeros(2, 5)), ValueError),
    ("weight transposed", "gemm_logits", (zeros(2, 3), zeros(3, 4).t(), zeros(2, 4)), ValueError),
    (
        "rows expanded",
        "gemm_logits",
        (zeros(1, 3).expand(2, 3), zeros(4, 3), zeros(2, 4)),
        ValueError,
    ),
    ("dhidden fp16", "gemm_dhidden", (zeros(2, 4), zeros(4, 3), zeros(2, 3).half()), ValueError),
    ("out is an input", "gemm_dhidden", (zeros(3, 3), *[zeros(3, 3)] * 2), ValueError),
    ("nothing to write", "gemm_dweight", (zeros(2, 4), zeros(2, 3), None), ValueError),
    ("hidden is None", "gemm_dweight", (zeros(2, 4), None, zeros(4, 3)), TypeError),
]


@pytest.mark.parametrize("case", BAD, ids=[b[0] for b in BAD])
def test_bad_arguments(case):
    _, name, arguments, error = case
    with pytest.raises(error, match=name):
        getattr(_C, name)(*arguments)


def test_beta_needs_an_accumulator():
    with pytest.raises(ValueError, match="beta"):
        _C.gemm_dweight(torch.zeros(2, 4), torch.zeros(2, 3), None, beta=1.0, out=torch.zeros(4, 3))


def test_row_strides_past_32_bits(tmp_path, kernel):
    """MKL's integers have 32 bits: refused, the sparse file never read. Tiles are packed first."""
    stride = 2**31 + 64
    path = tmp_path / "dlogits"
    with path.open("wb") as file:
        file.truncate((stride + 4) * 2)
    flat = torch.from_file(str(path), shared=True, size=stride + 4, dtype=torch.bfloat16)
    dlogits = torch.as_strided(flat, (2, 4), (stride, 1))
    weight = torch.ones(4, 3, dtype=torch.bfloat16)
    if kernel == "tiles":
        dlogits[1, 2] = 3.0
        out = poisoned(2, 3)
        _C.gemm_dhidden(dlogits, weight, out)
        assert out.tolist() == [[0.0] * 3, [3.0] * 3]
        return
    with pytest.raises(ValueError, match=r"below 2\^31"):
        _C.gemm_dhidden(dlogits, weight, torch.zeros(2, 3))


def test_absent_symbols_are_an_error_with_the_reason():
    _C.set_gemm(False)
    try:
        info = _C.gemm_info()
        assert not (info["bf16"] or info["fp16"] or info["fp32"]) and "set_gemm" in info["missing"]
        out = poisoned(2, 4)
        with pytest.raises(RuntimeError, match=r"set_gemm\(False\)"):
            _C.gemm_logits(torch.zeros(2, 3), torch.zeros(4, 3), out)
        assert out.isnan().all()
    finally:
        _C.set_gemm(True)
    _C.set_tile_gemm(True)
    assert _C.gemm_info() == FOUND


def test_tiles_do_not_depend_on_threads_rows_or_place(kernel):
    """A sum's order depends on the inner size alone: a row alone has the bits of one of many."""
    if kernel != "tiles":
        pytest.skip("MKL's products do not promise this")
    hidden, weight, dlogits = operands(300, 600, 2100, torch.bfloat16)
    logits, dhidden, dweight = products(hidden, weight, dlogits)
    for first, count in [(0, 300), (137, 1), (40, 150)]:
        rows, out = slice(first, first + count), poisoned(count, 2100)
        _C.gemm_logits(hidden[rows], weight, out, threads=1)
        same_bits("logits", out, logits[rows])
        out = poisoned(count, 600)
        _C.gemm_dhidden(dlogits[rows], weight, out, threads=3)
        same_bits("dhidden", out, dhidden[rows])
    out = poisoned(2100, 600)
    _C.gemm_dweight(dlogits, hidden, out, threads=1)
    same_bits("dweight", out, dweight)


@pytest.mark.parametrize("shape", [s[:3] for s in SHAPES], ids=[s[3] for s in SHAPES])
def test_packing_without_avx512_gives_the_same_bits(kernel, shape):
    if kernel != "tiles":
        pytest.skip("MKL packs for itself")
    hidden, weight, dlogits = operands(*shape, torch.bfloat16, padded=True)
    results = []
    try:
        for wide in (True, False):
            _C.set_wide_pack(wide)
            results.append(products(hidden, weight, dlogits))
    finally:
        _C.set_wide_pack(True)
    for with_it, without in zip(*results, strict=True):
        same_bits("packed without AVX-512", without, with_it)


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32])
def test_few_rows_have_the_bits_of_many(kernel, out_dtype):
    """Up to `turned_rows` rows logits^T = weight @ hidden^T is what is multiplied."""
    border = FOUND["panels"]["turned_rows"]
    hidden, weight, _ = operands(border + 1, 40, 203, torch.bfloat16)
    want = poisoned(border + 1, 203, dtype=out_dtype)
    _C.gemm_logits(hidden, weight, want, threads=2)
    for rows in (1, 15, 16, 17, 63, 65, 1000, border):
        wide = poisoned(rows, 208, dtype=out_dtype)
        out = wide[:, 1:204]
        _C.gemm_logits(hidden[:rows], weight, out, threads=2)
        if kernel == "tiles":
            same_bits(f"{rows} rows", out, want[:rows])
        else:
            truth = hidden[:rows].double() @ weight.double().t()
            check_forward(f"{rows} rows", out, truth, want[:rows])
        assert wide[:, 0].isnan().all() and wide[:, 204:].isnan().all()


@pytest.mark.parametrize("share", [0.0, 0.4, 0.9, 1.0, 1.1])
def test_a_kept_weight_is_packed_once(kernel, share):
    """Whatever part of the packed weight fits in `kept`: the same bits, and nothing behind it."""
    c, d, v = 20, 128, 9000  # three panels of the weight
    _, weight, dlogits = operands(c, d, v, torch.bfloat16)
    want = poisoned(c, d)
    _C.gemm_dhidden(dlogits, weight, want, threads=2)
    memory = poisoned(2 * v * d, dtype=torch.bfloat16)
    kept = memory[: int(share * v * d)]
    for is_filled in (False, True):
        out = poisoned(c, d)
        _C.gemm_dhidden(dlogits, weight, out, threads=2, kept=kept, kept_is_filled=is_filled)
        same_bits("dhidden", out, want)
        assert memory[kept.numel() :].isnan().all()
    if kernel != "tiles":
        assert memory.isnan().all()
        return
    panel = FOUND["panels"]["tile_dhidden"]
    panels = min(3, int(share * v) // panel) if share < 1.1 else 3  # the last is padded
    rows = min(panels * panel, v)
    assert kept[: rows * d].isfinite().all()
    packed = weight.clone()
    packed[rows:] *= 2  # what was kept is not read again, what was not is
    out, half = poisoned(c, d), poisoned(c, d)
    _C.gemm_dhidden(dlogits, packed, half, threads=2)
    packed[:rows] = 0
    _C.gemm_dhidden(dlogits, packed, out, threads=2, kept=kept, kept_is_filled=True)
    same_bits("dhidden of the kept weight", out, half)


def test_bad_kept_memory():
    _, weight, dlogits = operands(2, 3, 4, torch.bfloat16)
    for kept in (poisoned(4, 3, dtype=torch.bfloat16), poisoned(12), weight.view(-1)):
        out = poisoned(2, 3)
        with pytest.raises(ValueError, match="kept"):
            _C.gemm_dhidden(dlogits, weight, out, kept=kept)
        assert out.isnan().all()


def test_without_torch_the_symbols_are_absent():
    """Loaded on its own, the module works and says why it has no GEMM."""
    code = (
        "import importlib.util as u, sys; "
        "s = u.spec_from_file_location('pyoffline._C', sys.argv[1]); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.gemm_info()['missing'])"
    )
    done = subprocess.run([sys.executable, "-c", code, _C.__file__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is not imported" in done.stdout

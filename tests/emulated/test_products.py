"""The emulator's matrix instructions, on small Triton kernels: operands in every order that shared
memory can hold them in, from registers too; and that it finds what is left out of a pipeline.

Factors are multiples of 1/8: products are exact. What Triton makes of them is right on a device, so
fragments and descriptors are read here as a device reads them.
"""

import math
import os
import re

import pytest
import torch
import triton
import triton.language as tl
from emulator import triton_driver
from emulator.memory import MemoryFault
from emulator.parse import parse_module
from triton.tools.tensor_descriptor import TensorDescriptor

CHIP = int(os.environ["PYOFFLINE_EMULATE"])
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, c_ptr, A_BY_ROWS: tl.constexpr, B_BY_ROWS: tl.constexpr, AGAIN: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """c = a b^T [M, N], plus c b where AGAIN: then c is an operand in registers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    if A_BY_ROWS:
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    else:
        a = tl.trans(tl.load(a_ptr + k[:, None] * M + m[None, :]))
    if B_BY_ROWS:
        b = tl.trans(tl.load(b_ptr + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(a, b, input_precision="tf32")
    if AGAIN:
        c = tl.dot(c.to(b.dtype), tl.trans(b), c, input_precision="tf32")
    tl.store(c_ptr + m[:, None] * N + n[None, :], c)


def factors(m, n, k, dtype):
    g = torch.Generator().manual_seed(0)
    return [torch.randint(-8, 9, (rows, k), generator=g).to(dtype) / 8 for rows in (m, n)]


# kind, columns, whether A and B lie by rows, whether a second product takes the first
ORDERS = [
    ("bf16", 128, True, True, False),
    ("bf16", 32, False, False, True),
    ("fp16", 128, False, True, False),
    ("fp16", 32, True, False, True),
    ("tf32", 32, False, False, True),
]


def product(kind, n, a_by_rows, b_by_rows, again):
    """(c, what it must be)."""
    a, b = factors(64, n, 32, DTYPES[kind])
    c = torch.full((64, n), math.nan)
    given = [
        x if by_rows else x.t().contiguous() for x, by_rows in ((a, a_by_rows), (b, b_by_rows))
    ]
    _product_kernel[(1,)](*given, c, a_by_rows, b_by_rows, again, 64, n, 32)
    want = a.double() @ b.double().t()
    if again:
        want = want + want.to(a.dtype).double() @ b.double()
    return c.double(), want


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_products_in_every_order_of_the_operands(order):
    assert torch.equal(*product(*order))


def first_product():
    return product(*ORDERS[0])


@triton.jit
def _pipeline_kernel(a, b, c_ptr, dim, TMA: tl.constexpr, BLOCK: tl.constexpr):
    """c = a b^T [64, 64] in steps of BLOCK columns."""
    m, k = tl.arange(0, 64), tl.arange(0, BLOCK)
    acc = tl.zeros([64, 64], tl.float32)
    for first in range(0, dim, BLOCK):
        if TMA:
            x, w = a.load([0, first]), b.load([0, first])
        else:
            x = tl.load(a + m[:, None] * dim + first + k[None, :])
            w = tl.load(b + m[:, None] * dim + first + k[None, :])
        acc = tl.dot(x, tl.trans(w), acc)
    tl.store(c_ptr + m[:, None] * 64 + m[None, :], acc)


def pipeline():
    """(c, what it must be) of a loop that the compiler pipelines."""
    a, b = factors(64, 64, 192, torch.bfloat16)
    c, given = torch.full((64, 64), math.nan), (a, b)
    if CHIP == 90:
        given = [TensorDescriptor.from_tensor(x, [64, 32]) for x in given]
    _pipeline_kernel[(1,)](*given, c, 192, CHIP == 90, 32, num_stages=3)
    return c.double(), a.double() @ b.double().t()


# What is left out: what is computed, a pattern in the PTX and what is put in its place, what is
# raised (None: nothing, and numbers are wrong).
FAULTS = {
    80: {
        "waits for copies": (pipeline, r"cp\.async\.wait_group[^;]*;", "", "nobody has written"),
        "one copy": (pipeline, r"cp\.async\.wait_group\s+\d", "cp.async.wait_group 3", "nobody"),
        "barriers": (pipeline, r"bar\.sync\s+0;", "", "another touched"),
        "transposition": (pipeline, r"\.x4\.(trans\.)?shared", ".x4.trans.shared", None),
    },
    90: {
        "fence of the proxy": (first_product, r"fence\.proxy[^;]*;", "", "fence.proxy.async"),
        "fence of wgmma": (pipeline, r"wgmma\.fence[^;]*;", "", "wgmma.fence"),
        "groups": (pipeline, r"wgmma\.commit_group[^;]*;", "", None),
        "waits for wgmma": (pipeline, r"wgmma\.wait_group[^;]*;", "", None),
        "one group": (pipeline, r"(wgmma\.wait_group\S*) 1;", r"\1 2;", "overwritten before"),
        "waits for tiles": (pipeline, r"@!complete bra[^;]*;", "", "nobody has written"),
        "bytes of tiles": (pipeline, r"(expect_tx[^;]*), 8192;", r"\1, 8208;", "nothing completes"),
        "barriers": (pipeline, r"bar\.sync\s+0;", "", "another"),
    },
}


def test_a_pipeline_is_right_when_nothing_is_left_out():
    assert torch.equal(*pipeline())


@pytest.mark.parametrize("fault", FAULTS[CHIP])
def test_what_is_left_out_is_found(fault, monkeypatch):
    run, pattern, replacement, error = FAULTS[CHIP][fault]

    def edited(path):
        text, count = re.subn(pattern, replacement, path.read_text())
        assert count, "there is no such instruction"
        return next(iter(parse_module(text).values()))

    monkeypatch.setattr(triton_driver, "_kernel", edited)
    if error:
        with pytest.raises(MemoryFault, match=error):
            run()
    else:
        assert not torch.equal(*run())

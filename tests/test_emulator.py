"""The emulator of PTX (tests/emulator): it computes what the ISA says, and its checks fire.

Kernels here are small texts; what the library's own kernels do on it: test_emulated_gpu.py,
test_emulated_cuda.py.
"""

import struct

import numpy as np
import pytest
import torch
from emulator import alu
from emulator.machine import Deadlock, launch
from emulator.memory import GlobalMemory, MemoryFault
from emulator.parse import parse_module

HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry k(.param .u64 k_a, .param .u64 k_b, .param .u32 k_n)
{
.reg .pred %p<8>; .reg .b16 %rs<8>; .reg .b32 %r<32>; .reg .b64 %rd<16>; .reg .f32 %f<16>;
ld.param.u64 %rd1, [k_a];
ld.param.u64 %rd2, [k_b];
ld.param.u32 %r1, [k_n];
mov.u32 %r2, %tid.x;
mov.u32 %r3, %ctaid.x;
mov.u32 %r4, %ntid.x;
mad.lo.s32 %r5, %r3, %r4, %r2;
mul.wide.s32 %rd3, %r5, 4;
add.s64 %rd4, %rd1, %rd3;
add.s64 %rd5, %rd2, %rd3;
"""


def run(body, a, b, *, n=None, blocks=1, threads=64, shared=0, cluster=1, head=HEAD):
    kernel = parse_module(head + body + "\nret;\n}\n")["k"]
    memory = GlobalMemory()
    memory.allow(a)
    memory.allow(b)
    pointers = (struct.pack("<Q", x.data_ptr()) for x in (a, b))
    params = [*pointers, struct.pack("<i", a.numel() if n is None else n)]
    return launch(
        kernel, grid=(blocks, 1, 1), block=(threads, 1, 1), params=params, memory=memory,
        shared_bytes=shared, cluster=cluster,
    )  # fmt: skip


COPY = "setp.ge.s32 %p1, %r5, %r1;\n@%p1 bra $L1;\nld.global.f32 %f1, [%rd4];\n"
ADD = COPY + "add.f32 %f1, %f1, 0f3F800000;\nst.global.f32 [%rd5], %f1;\n$L1:"


def test_blocks_threads_and_a_tail():
    a, b = torch.randn(150), torch.full((200,), float("nan"))
    counts = run(ADD, a, b, blocks=3)
    assert torch.equal(b[:150], a + 1) and b[150:].isnan().all()
    assert counts.global_loaded == counts.global_stored == 600
    assert counts.by_opcode["ld.global.f32"] == 150 and counts.by_opcode["mul.wide.s32"] == 192


def test_a_read_past_a_tensor_is_a_fault_that_names_it():
    with pytest.raises(MemoryFault, match=r"lie in no tensor.*float32 \(150,\)"):
        run(ADD, torch.randn(150), torch.empty(400), n=153, blocks=3)


def test_a_write_past_a_tensor_is_a_fault_where_a_read_of_its_last_16_bytes_is_none():
    with pytest.raises(MemoryFault, match=r"lie in no tensor.*float32 \(150,\)"):
        run(ADD, torch.randn(400), torch.empty(150), n=151, blocks=3)
    a, b = torch.randn(150), torch.empty(400)
    run(ADD, a, b, n=152, blocks=3)
    assert torch.equal(b[:150], a + 1)


def test_sixteen_bytes_must_start_at_a_multiple_of_them():
    body = "ld.global.v4.f32 {%f1, %f2, %f3, %f4}, [%rd4];"
    with pytest.raises(MemoryFault, match="16 bytes not at a multiple"):
        run(body, torch.randn(400), torch.empty(4), threads=32)


EXCHANGE = """
mov.u32 %r6, memory;
shl.b32 %r7, %r2, 2;
add.s32 %r8, %r6, %r7;
st.shared.u32 [%r8], %r2;
{barrier}
sub.s32 %r9, %r4, %r2;
shl.b32 %r9, %r9, 2;
add.s32 %r9, %r9, %r6;
ld.shared.u32 %r10, [%r9+-4];
st.global.u32 [%rd5], %r10;
"""


def test_threads_of_a_block_meet_in_shared_memory():
    a, b = torch.zeros(1), torch.zeros(128, dtype=torch.int32)
    run(EXCHANGE.replace("{barrier}", "bar.sync 0;"), a, b, threads=128, shared=512)
    assert b.tolist() == list(range(127, -1, -1))


def test_a_missing_barrier_is_a_race():
    a, b = torch.zeros(1), torch.zeros(128, dtype=torch.int32)
    with pytest.raises(MemoryFault, match="a warp reads in shared memory"):
        run(EXCHANGE.replace("{barrier}", ""), a, b, threads=128, shared=512)


def test_shared_memory_that_nobody_wrote_is_not_read():
    body = "mov.u32 %r6, memory;\nld.shared.u32 %r7, [%r6];"
    with pytest.raises(MemoryFault, match="nobody has written"):
        run(body, torch.zeros(1), torch.zeros(1), shared=16)
    with pytest.raises(MemoryFault, match="of 8 bytes of shared memory"):
        run(body.replace("[%r6]", "[%r6+8]"), torch.zeros(1), torch.zeros(1), shared=8)


REMOTE = """
mov.u32 %r6, memory;
st.shared.u32 [%r6], %r3;
barrier.cluster.arrive.release.aligned;
{wait}
cvt.u64.u32 %rd6, %r6;
cvta.shared.u64 %rd7, %rd6;
xor.b32 %r7, %r3, 1;
mapa.u64 %rd8, %rd7, %r7;
ld.u32 %r8, [%rd8];
st.global.u32 [%rd5], %r8;
barrier.cluster.arrive.release.aligned;
barrier.cluster.wait.acquire.aligned;
"""


def test_blocks_of_a_cluster_read_each_others_memory():
    a, b = torch.zeros(1), torch.zeros(64, dtype=torch.int32)
    wait = "barrier.cluster.wait.acquire.aligned;"
    run(REMOTE.replace("{wait}", wait), a, b, blocks=2, threads=32, shared=16, cluster=2)
    assert b.tolist() == [1] * 32 + [0] * 32
    with pytest.raises(MemoryFault, match="what another touched"):
        run(REMOTE.replace("{wait}", ""), a, b, blocks=2, threads=32, shared=16, cluster=2)
    last = wait + "\n" + REMOTE[: REMOTE.rindex("barrier.cluster.arrive")].split("{wait}")[1]
    with pytest.raises(MemoryFault, match="a block ends before"):
        run(REMOTE.split("{wait}")[0] + last, a, b, blocks=2, threads=32, shared=16, cluster=2)


def test_branches_join_again_before_a_shuffle():
    body = """
and.b32 %r6, %r2, 1;
setp.eq.s32 %p1, %r6, 0;
mov.u32 %r7, %r2;
@%p1 bra $L1;
add.s32 %r7, %r7, 100;
$L1:
shfl.sync.bfly.b32 %r8, %r7, 1, 31, -1;
st.global.u32 [%rd5], %r8;
"""
    b = torch.zeros(64, dtype=torch.int32)
    run(body, torch.zeros(1), b)
    assert b.tolist() == [(i ^ 1) + 100 * ((i ^ 1) & 1) for i in range(64)]


def test_threads_that_wait_for_each_other_for_ever_are_a_deadlock():
    body = """
setp.lt.s32 %p1, %r2, 16;
@%p1 bra $L1;
shfl.sync.bfly.b32 %r8, %r2, 1, 31, -1;
bra.uni $L2;
$L1:
bar.sync 0;
$L2:
"""
    with pytest.raises(Deadlock, match="shfl"):
        run(body, torch.zeros(1), torch.zeros(1), threads=32)


ASYNC = """
mov.u32 %r6, memory;
shl.b32 %r7, %r2, 4;
add.s32 %r8, %r6, %r7;
mul.wide.u32 %rd6, %r7, 1;
add.s64 %rd7, %rd1, %rd6;
cp.async.cg.shared.global [%r8], [%rd7], 16;
cp.async.commit_group;
{wait}
ld.shared.f32 %f1, [%r8];
st.global.f32 [%rd5], %f1;
"""


def test_an_asynchronous_copy_is_there_after_its_wait_and_not_before():
    a, b = torch.randn(128), torch.zeros(32)
    run(ASYNC.replace("{wait}", "cp.async.wait_group 0;"), a, b, threads=32, shared=512)
    assert torch.equal(b, a[::4])
    with pytest.raises(MemoryFault, match="nobody has written"):
        run(ASYNC.replace("{wait}", "cp.async.wait_group 1;"), a, b, threads=32, shared=512)


def test_arithmetic_is_that_of_the_isa():
    nan, f32 = np.float32("nan"), np.float32
    biggest, plain, nan_too = (
        alu.operation(x.split("."))[0] for x in ("max.f32", "min.f32", "max.NaN.f32")
    )
    assert biggest(nan, f32(1)) == 1 and plain(f32(2), nan) == 2 and np.isnan(nan_too(nan, f32(1)))
    packed = alu.operation(("max", "NaN", "bf16x2"))[0]  # (1, NaN) and (2, 3)
    assert packed(np.uint32(0x7FC0_3F80), np.uint32(0x4040_4000)) == 0x7FFF_4000
    x = np.array([1.00390625, 1.01171875, -3.0, np.inf, nan, 1e-40], f32)
    want = torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)
    got = alu.bf16_of(x)
    assert (got[:4] == want[:4]).all() and got[4] == 0x7FFF and got[5] == want[5]
    for name, want in (("lt", False), ("ltu", True), ("num", False), ("nan", True), ("neu", True)):
        given = np.array([nan]), np.array([f32(1)])
        assert [x[0] for x in alu.comparison(("setp", name, "f32"))(*given)] == [want, not want]
    halves = np.array([0xFF80_3F80], np.uint32), np.uint32(0xFF80_FF80)  # (1, -inf), (-inf, -inf)
    assert [x[0] for x in alu.comparison(("setp", "eq", "bf16x2"))(*halves)] == [False, True]
    zeros = np.array([0x8000], np.uint16), np.uint16(0)
    assert alu.comparison(("setp", "eq", "bf16"))(*zeros)[0][0]
    down = alu.operation(("fma", "rm", "f32"))[0]
    assert down(f32(1), f32(1), f32(2**-30)) == 1 and down(f32(1), f32(1), f32(-(2**-30))) < 1
    shift = alu.operation(("shr", "s32"))[0]
    assert shift(np.array([-8], np.int32), np.uint32(40))[0] == -1
    product = alu.operation(("mul", "wide", "s32"))[0]
    assert product(np.array([-3], np.int32), np.array([2**30], np.int32))[0] == -3 * 2**30
    permute = alu.operation(("prmt", "b32"))[0]
    assert (
        permute(
            np.array([0x33221100], np.uint32), np.array([0x77665544], np.uint32), np.uint32(0x7610)
        )[0]
        == 0x77661100
    )


def test_the_exponential_errs_as_a_device_may_and_no_more():
    x = np.linspace(-126, 0, 200_001).astype(np.float32)
    got = alu.operation(("ex2", "approx", "ftz", "f32"))[0](x).astype(np.float64)
    error = np.abs(got / np.exp2(x.astype(np.float64)) - 1)
    assert 2.0**-23.5 < error.max() <= 2.0**-22
    whole = np.arange(-126, 1).astype(np.float32)
    assert (alu.operation(("ex2", "approx", "ftz", "f32"))[0](whole) == np.exp2(whole)).all()

"""What the threads of some blocks have and do: registers, operands, one instruction at a time.

An instruction becomes a function of the mask of active threads, which works on whole vectors. Not
here: in which order threads run (`machine.py`), arithmetic (`alu.py`), memory (`access.py`), matrix
products (`matrix.py`).
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from emulator import alu
from emulator.access import Access
from emulator.matrix import Matrix
from emulator.memory import SHARED_START, MemoryFault, SharedMemory
from emulator.parse import WIDTHS, Kernel

WARP = 32
NOTHING = ("membar", "fence", "prefetch", "griddepcontrol", "setmaxnreg", "bar.warp")


@dataclass
class Counts:
    """What a launch did. Bytes of global memory; instructions of threads, by opcode."""

    global_loaded: int = 0
    global_stored: int = 0
    by_opcode: Counter = field(default_factory=Counter)

    @property
    def instructions(self) -> int:
        return sum(self.by_opcode.values())

    def loaded(self, nbytes: int):
        self.global_loaded += nbytes

    def stored(self, nbytes: int):
        self.global_stored += nbytes


class Threads(Access, Matrix):
    """`together` blocks of one kernel. Registers are vectors over their threads, and keep what the
    blocks before have left in them.
    """

    def __init__(self, kernel: Kernel, block, cluster, together, shared_bytes):
        self.kernel, self.block_shape, self.cluster = kernel, block, cluster
        self.together = together
        self.block_threads = block[0] * block[1] * block[2]
        self.threads = together * self.block_threads
        self.warps_per_block = self.block_threads // WARP
        self.shared_bytes = kernel.shared_bytes + shared_bytes
        self.registers = {
            name: np.zeros(self.threads, np.bool_ if kind == "pred" else f"u{WIDTHS[kind]}")
            for name, kind in kernel.registers.items()
        }
        self._lay_out_params()
        ids = np.arange(self.threads)
        self.lane, self.warp = ids % WARP, ids // WARP
        self.block_of, self.local = ids // self.block_threads, ids % self.block_threads
        self.rank_of = self.block_of % cluster
        self.counts, self.executed, self.shuffles = Counts(), Counter(), {}
        self.code = [None] * len(kernel.blocks)

    def _lay_out_params(self):
        self.param_offsets, at = {}, 0
        for name, size, align in self.kernel.params:
            self.param_offsets[name] = -(-at // align) * align
            at = self.param_offsets[name] + size

    def begin(self, params, memory, races, grid, places):
        """Other blocks: places [together, 3] in the grid. Counts go on."""
        self.memory, self.races, self.grid = memory, races, grid
        self.place = np.repeat(np.asarray(places), self.block_threads, axis=0).T
        self.params = np.zeros(max(self.param_offsets.values(), default=0) + 4096, np.uint8)
        for (name, size, _), value in zip(self.kernel.params, params, strict=True):
            if len(value) != size:
                raise ValueError(f"parameter {name} has {size} bytes, {len(value)} are given")
            start = self.param_offsets[name]
            self.params[start : start + size] = np.frombuffer(value, np.uint8)
        self.shared = SharedMemory(self.together, self.shared_bytes)
        self.block_time, self.cluster_arrivals, self.cluster_waits, self.group = (
            np.zeros(self.threads, np.int32) for _ in range(4)
        )
        self.copies = []
        self.begin_matrix()

    # operands

    def operand(self, text, kind):
        """A register as a vector of this type (None: its bits), or a number."""
        if isinstance(text, tuple):
            raise TypeError(f"a list of registers in place of one: {text}")
        if text in self.registers:
            register = self.registers[text]
            if kind is None:
                return register
            want = np.dtype(alu.DTYPES[kind])
            if want.itemsize == register.dtype.itemsize:
                return register.view(want)
            return register.astype(f"u{want.itemsize}").view(want)
        if text.startswith("%"):
            return self._special(text)
        if text in self.param_offsets:
            return np.uint64(self.param_offsets[text])
        if text in self.kernel.shared:
            return np.uint64(self.kernel.shared[text] + SHARED_START)
        return _number(text, kind)

    def _special(self, name):
        axis = "xyz".find(name[-1])
        stem = name[:-2]
        if stem == "%tid":
            x, y, _ = self.block_shape
            each = (self.local % x, self.local // x % y, self.local // (x * y))
            return each[axis].astype(np.uint32)
        if stem == "%ntid":
            return np.uint32(self.block_shape[axis])
        if stem == "%ctaid":
            return self.place[axis].astype(np.uint32)
        if stem == "%nctaid":
            return np.uint32(self.grid[axis])
        one = {"%laneid": self.lane, "%cluster_ctarank": self.rank_of, "%warpid": self.warp}
        if name in one:
            return one[name].astype(np.uint32)
        if name == "%cluster_nctarank" or stem == "%cluster_nctaid":
            return np.uint32(self.cluster if axis <= 0 else 1)
        if stem == "%cluster_ctaid":
            return self.rank_of.astype(np.uint32) if axis == 0 else np.uint32(0)
        raise NotImplementedError(f"special register {name}")

    def target(self, name, kind):
        """A register as something to write values of this type to: wider ones take them whole."""
        register, want = self.registers[name], np.dtype(alu.DTYPES[kind])
        if want.kind == "b" or want.itemsize == register.dtype.itemsize:
            return register.view(want)
        return register.view(f"{'i' if want.kind == 'i' else 'u'}{register.dtype.itemsize}")

    def assign(self, name, kind, value, mask):
        if name != "_":
            _write(self.target(name, kind), value, mask)

    def fixed(self, text, kind):
        """An operand that stays the same array, or None if it must be read anew each time."""
        if text in self.registers:
            same = self.registers[text].dtype.itemsize == np.dtype(alu.DTYPES[kind]).itemsize
            return self.operand(text, kind) if same else None
        return None if text.startswith("%") else self.operand(text, kind)

    # instructions

    def build(self, one):
        """The instruction as a function of the mask of active threads (None: all)."""
        run = self._build_plain(one)
        if one.guard is None:
            return run
        name, is_negated = one.guard

        def guarded(mask):
            chosen = ~self.registers[name] if is_negated else self.registers[name]
            run(chosen.copy() if mask is None else chosen & mask)

        return guarded

    def _build_plain(self, one):
        opcode, head = one.opcode, one.parts[0]
        named = {
            "ld": self.load, "st": self.store, "cvta": self.cvta, "mapa": self.mapa,
            "shfl": self.shuffle, "redux": self.reduce_warp,
            "elect": self.elect, "trap": self._trap,
        }  # fmt: skip
        if head == "mov":
            return self._build_move(one)
        if head in named:
            return lambda mask: named[head](one, mask)
        for start, run in {
            "cp.async.bulk": self.copy_tensor, "cp.async.commit_group": self.commit_copies,
            "cp.async.wait": self.wait_copies, "cp.async": self.copy_async,
            "barrier.cluster.arrive": self._arrive, "barrier.cluster.wait": self._pass,
            "bar.sync": self._pass, "barrier.sync": self._pass, "mma.sync": self.mma,
            "wgmma.mma_async": self.wgmma, "ldmatrix": self.load_matrix,
            "stmatrix": self.store_matrix, "mbarrier": self.mbarrier,
            "wgmma.fence": self.fence_products, "wgmma.commit_group": self.commit_products,
            "wgmma.wait_group": self.wait_products, "fence.proxy.async": self.fence_proxy,
        }.items():  # fmt: skip
            if opcode.startswith(start):
                return lambda mask: run(one, mask)
        if opcode.startswith(NOTHING):
            return lambda mask: None
        return self._build_alu(one)

    def _trap(self, one, mask):
        raise MemoryFault("the kernel executed trap")

    def _pass(self, one, mask):
        """A barrier that is complete."""

    def _build_alu(self, one):
        head, kind = one.parts[0], one.parts[-1]
        if head == "setp":
            return self._build_setp(one)
        if head == "selp":
            f, kinds, result = (lambda a, b, p: np.where(p, a, b)), (kind, kind, "pred"), kind
        elif head == "cvt":
            f, source, result = alu.conversion(one.parts)
            kinds = (source,) * (len(one.operands) - 1)
        else:
            f, kinds, result = alu.operation(one.parts)
        target, read = self.target(one.operands[0], result), self._reader(one.operands[1:], kinds)
        return lambda mask: _write(target, f(*read()), mask)

    def _reader(self, operands, kinds):
        """A function that gives the operands' vectors."""
        found = [self.fixed(x, k) for x, k in zip(operands, kinds, strict=True)]
        if all(x is not None for x in found):
            return lambda: found
        return lambda: [self.operand(x, k) for x, k in zip(operands, kinds, strict=True)]

    def _build_setp(self, one):
        kind, compare = one.parts[-1], alu.comparison(one.parts)
        combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.get(
            one.parts[2]
        )
        targets = one.operands[0] if isinstance(one.operands[0], tuple) else (one.operands[0],)
        read = self._reader(one.operands[1:3], (kind, kind))

        def run(mask):
            values = compare(*read())
            if combine:
                third = self.operand(one.operands[3], "pred")
                values = tuple(combine(v, third) for v in values)
            for name, v in zip(targets, values, strict=False):
                self.assign(name, "pred", v, mask)

        return run

    def _build_move(self, one):
        kind, (target, source) = one.parts[-1], one.operands
        if isinstance(target, tuple) or isinstance(source, tuple):
            return lambda mask: self.move_parts(one, mask)
        written, read = self.target(target, kind), self._reader([source], [kind])
        return lambda mask: _write(written, read()[0], mask)

    def move_parts(self, one, mask):
        """mov with {a, b} on one side."""
        kind, (target, source) = one.parts[-1], one.operands
        width = WIDTHS[kind]
        if isinstance(target, tuple):
            value, size = np.asarray(self.operand(source, f"b{8 * width}")), width // len(target)
            for i, name in enumerate(target):
                part = value >> value.dtype.type(8 * size * i)
                self.assign(name, f"b{8 * size}", part.astype(f"u{size}"), mask)
            return
        size, value = width // len(source), np.zeros((), f"u{width}")
        for i, name in enumerate(source):
            part = np.asarray(self.operand(name, f"b{8 * size}")).astype(value.dtype)
            value = value | (part << value.dtype.type(8 * size * i))
        self.assign(target, f"b{8 * width}", value, mask)

    # threads together

    def clock_of(self, mask):
        """What memory.Trace wants to know of the active threads."""
        chosen = slice(None) if mask is None else mask
        times = (self.block_time, self.cluster_arrivals, self.block_time, self.cluster_waits)
        return (self.warp[chosen], self.block_of[chosen], *(t[chosen] for t in times))

    def _arrive(self, one, mask):
        self.cluster_arrivals[slice(None) if mask is None else mask] += 1

    def shuffle(self, one, mask):
        kind, target, numbers = one.parts[2], one.operands[0], tuple(one.operands[2:4])
        value = np.broadcast_to(self.operand(one.operands[1], "b32"), self.threads)
        found = self.shuffles.get((kind, numbers))
        if found is None:
            found = self._lanes_of(kind, *(self.operand(x, "u32") for x in numbers))
            if not any(x.startswith("%") for x in numbers):
                self.shuffles[kind, numbers] = found
        source, valid = found
        targets = target if isinstance(target, tuple) else (target,)
        self.assign(targets[0], "b32", value[source], mask)
        if len(targets) > 1:
            self.assign(targets[1], "pred", valid, mask)

    def _lanes_of(self, kind, step, clamp):
        """(thread whose value each thread gets, whether it is another of its segment)."""
        step, clamp = (np.asarray(x).astype(np.int64) for x in (step, clamp))
        segment = (clamp >> 8) & 31
        lowest = self.lane & segment
        last = lowest | (clamp & 31 & ~segment)
        if kind == "bfly":
            other, valid = self.lane ^ step, (self.lane ^ step) <= last
        elif kind == "idx":
            other = lowest | (step & 31 & ~segment)
            valid = other <= last
        elif kind == "up":
            other, valid = self.lane - step, self.lane - step >= last
        else:
            other, valid = self.lane + step, self.lane + step <= last
        return np.where(valid, self.warp * WARP + other, np.arange(self.threads)), valid

    def reduce_warp(self, one, mask):
        kind = one.parts[-1]
        value = np.broadcast_to(self.operand(one.operands[1], kind), self.threads).reshape(-1, WARP)
        f = {"min": np.minimum, "max": np.maximum, "add": np.add, "or": np.bitwise_or,
             "and": np.bitwise_and}[one.parts[2]]  # fmt: skip
        found = np.repeat(f.reduce(value, axis=1), WARP).astype(value.dtype)
        self.assign(one.operands[0], kind, found, mask)

    def elect(self, one, mask):
        """The first lane of each warp."""
        names = one.operands[0]
        self.assign(names[0], "b32", np.zeros(self.threads, np.uint32), mask)
        self.assign(names[1], "pred", self.lane == 0, mask)


def _write(target, value, mask):
    if mask is None:
        target[...] = value
    else:
        np.copyto(target, value, where=mask, casting="unsafe")


def _number(text: str, kind):
    if text.startswith(("0f", "0F")):
        value = np.array(int(text[2:], 16), np.uint32).view(np.float32)[()]
        return value if kind in ("f32", None) else value.view(alu.DTYPES[kind])
    if text.startswith(("0d", "0D")):
        return np.array(int(text[2:], 16), np.uint64).view(np.float64)[()]
    want = np.dtype(alu.DTYPES[kind or "u64"])
    if want.kind == "b":
        return np.bool_(int(text, 0))
    value = int(text.rstrip("U"), 0) % (1 << 8 * want.itemsize)
    return np.array(value, f"u{want.itemsize}").view(want)[()]

"""The asynchronous proxy of emulated threads: tensor copies, the barriers that these complete, and
what threads must have done before it touches their shared memory.

As late as a device may: a tensor copy spoils its target at once and lands when a thread waits for
its barrier. Between what threads, or their cp.async, do in shared memory and what wgmma or a
tensor copy does there is a fence.proxy.async. PTX ISA, "Tensors", "mbarrier", "Async proxy". Not
here: matrix products (`matrix.py`), tensors of other than two dimensions, stores of tiles.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from emulator.memory import GRANULE, NOBODY, PARAMS, MemoryFault, Trace

# What threads, or their cp.async, have done to bytes since a fence.proxy.async.
READ, WRITTEN, COPIED = 1, 2, 4
SPINS = 10_000  # failed waits in a row after which a phase will not complete
BARRIER = 0xBA221E2  # what a barrier's 8 bytes hold: nobody else may write there
MAP_BYTES = 128
# Where a tensor copy goes: Triton 3.7, and 3.6, whose address is the block's own all the same
OWN_BLOCK = ("shared::cta", "shared::cluster")
# CUtensorMapDataType: bytes of an element; CUtensorMapSwizzle: bytes of a line
ELEMENT_BYTES = {0: 1, 1: 2, 2: 4, 3: 4, 4: 8, 5: 8, 6: 2, 7: 4, 8: 8, 9: 2, 10: 4, 11: 4, 12: 4}
MAP_SWIZZLES = {0: 0, 1: 32, 2: 64, 3: 128}
# struct Map of tests/cpp/driver_stub.c
MAP = np.dtype([("base", "u8"), ("dims", "u8", 2), ("stride", "u8"), ("box", "u4", 2),
                ("type", "u4"), ("swizzle", "u4")])  # fmt: skip


@dataclass
class Barrier:
    """An mbarrier: arrivals of a phase, those and the bytes still to come, the phase's parity,
    whether somebody has waited in it in vain.
    """

    count: int
    pending: int
    nbytes: int = 0
    parity: int = 0
    was_asked: bool = False


@dataclass
class TileCopy:
    """A tensor copy under way; places: [rows, bytes of a row] of shared memory."""

    barrier: int
    thread: int
    tensor: np.ndarray
    at: tuple
    places: np.ndarray


def swizzled(places, line):
    """Chunks of 16 bytes permuted within lines of 32, 64, 128 bytes, by the address."""
    return places ^ ((places >> 3) & (line - 16)) if line else places


class Proxy:
    """The part of a machine that copies tiles. Needs of the machine what `Access` needs.
    `fenced_first`: what wants a fence before wgmma reads it.
    """

    fenced_first = WRITTEN | COPIED

    def begin_proxy(self):
        """Nothing is under way."""
        self.tile_copies, self.barriers, self.spins = [], {}, 0
        self.unfenced = np.zeros(self.shared.data.size // GRANULE, np.uint8)

    def end_proxy(self):
        """The kernel has ended."""
        if self.tile_copies:
            raise MemoryFault("a kernel ends while a tensor copy is under way")

    @cached_property
    def has_asynchronous_proxy(self):
        """Whether the kernel has instructions that fence.proxy.async is for."""
        every = (one.parts for block in self.kernel.blocks for one in block.body)
        return any(p[0] == "wgmma" or "bulk" in p for p in every)

    # shared memory

    def note(self, places, nbytes, how):
        """READ, WRITTEN or COPIED there: wgmma may read it, and a tensor copy write there, after a
        fence only.
        """
        if self.has_asynchronous_proxy:
            at = places.astype(np.int64)[:, None] // GRANULE
            at = at + np.arange(-(-nbytes // GRANULE))
            self.unfenced[at] = how if how == COPIED else self.unfenced[at] | how

    def fence_proxy(self, one, mask):
        """fence.proxy.async; for all stores of a thread's block, though a device promises it only
        for those that the thread sees.
        """
        blocks = np.unique(self.block_of if mask is None else self.block_of[mask])
        self.unfenced.reshape(self.together, -1)[blocks] = 0

    def touch(self, region, places, warp, thread, is_write):
        """Race check of bytes at places: by warps (one each, or one), as of a thread's barriers."""
        if not self.races:
            return
        if region.trace is None:
            region.trace = Trace(region.end - region.start)
        at = (places.reshape(-1)[::GRANULE] - region.start) // GRANULE
        warps = np.broadcast_to(np.asarray(warp)[..., None], places.shape).reshape(-1)[::GRANULE]
        which = np.zeros(self.threads, bool)
        which[thread] = True
        clock = (warps, *(np.full(at.size, v[0]) for v in self.clock_of(which)[1:]))
        touch = region.trace.write if is_write else region.trace.read
        if touch(at, clock, self.warps_per_block).any():
            raise MemoryFault(f"a copy or wgmma races for {region.label} with another warp")

    def in_block(self, places, thread, size):
        """Places of addresses in the shared memory of a thread's block."""
        block = np.full(places.size, self.block_of[thread])
        found = self.shared.place(places.reshape(-1).astype(np.uint64), block, size)
        return found.astype(np.int64).reshape(places.shape)

    def _each(self, operand, kind):
        """An operand as a vector over the threads, though it be a number."""
        return np.broadcast_to(self.operand(operand, kind), self.threads)

    def mbarrier(self, one, mask):
        if mask is not None and not mask.any():
            return
        what = one.parts[1]
        operand = next(x for x in one.operands if isinstance(x, tuple) and x[0] == "[]")
        threads = np.arange(self.threads) if mask is None else np.flatnonzero(mask)
        places = self.shared.place(self.addresses(operand, mask), self.block_of[threads], 8)
        done = np.zeros(self.threads, bool)
        for place in np.unique(places).astype(np.int64):
            users = threads[places == place]
            for warp in np.unique(self.warp[users]):
                who = int(users[self.warp[users] == warp][0])
                is_write = what in ("init", "inval")
                self.touch(self.shared.region, place + np.arange(8), warp, who, is_write)
            done[users] = self._at_barrier(what, one, int(place), users)
        if what == "try_wait":
            self.assign(one.operands[0], "pred", done, mask)

    def _at_barrier(self, what, one, place, users):
        """What users do to a barrier; for those that wait, whether the phase is complete."""
        cell = self.shared.region.views[8]
        if what == "init":
            count = int(self._each(one.operands[1], "u32")[users[0]])
            self.barriers[place] = Barrier(count, count)
            cell[place // 8] = BARRIER
            self.shared.written[place : place + 8] = True
            return False
        if place not in self.barriers or cell[place // 8] != BARRIER:
            raise MemoryFault(f"{one.text}: no barrier is there")
        if what == "inval":
            del self.barriers[place]
            self.shared.written[place : place + 8] = False
            return False
        barrier = self.barriers[place]
        argument = self._each(one.operands[-1], "u32")[users]
        if what == "arrive":
            barrier.pending -= users.size
            barrier.nbytes += int(argument.sum()) if "expect_tx" in one.parts else 0
            self._complete(barrier)
            return False
        if barrier.was_asked:  # the first try may always fail
            for copy in [c for c in self.tile_copies if c.barrier == place]:
                self._land(copy)
                barrier.nbytes -= copy.places.size
                self._complete(barrier)
            self.tile_copies = [c for c in self.tile_copies if c.barrier != place]
        barrier.was_asked = not barrier.was_asked
        passed = argument != barrier.parity
        self.spins = 0 if passed.any() else self.spins + 1
        if self.spins > SPINS:
            raise MemoryFault(f"{one.text}: a phase that nothing completes")
        return passed

    def _complete(self, barrier):
        if barrier.pending == 0 and barrier.nbytes == 0:
            barrier.pending, barrier.parity = barrier.count, 1 - barrier.parity

    def copy_tensor(self, one, mask):
        """cp.async.bulk.tensor.2d from global to shared memory: begun here, landed by a wait."""
        if one.parts[3:5] != ("tensor", "2d") or one.parts[5] not in OWN_BLOCK:
            raise NotImplementedError(one.text)
        target, source, barrier = one.operands
        for thread in range(self.threads) if mask is None else np.flatnonzero(mask):
            which = np.zeros(self.threads, bool)
            which[thread] = True
            tensor = self._map(int(self.addresses(source, which)[0]))
            at = tuple(int(self._each(x, "s32")[thread]) for x in source[3])
            width = int(tensor["box"][0]) * ELEMENT_BYTES[int(tensor["type"])]
            start = int(self.addresses(target, which)[0])
            line = MAP_SWIZZLES[int(tensor["swizzle"])]
            if start % 128 or width % 16 or (line and width > line):
                raise MemoryFault("a tile that a tensor copy cannot have")
            offsets = np.arange(int(tensor["box"][1]))[:, None] * width + np.arange(width)
            places = self.in_block(swizzled(start + offsets, line), thread, 1)
            if self.unfenced[places // GRANULE].any():
                raise MemoryFault("a tensor copy to what threads used, without fence.proxy.async")
            self.touch(self.shared.region, places, self.warp[thread], thread, True)
            self.shared.region.views[1][places] = 0xFF
            self.shared.written[places] = False
            place = self.shared.place(self.addresses(barrier, which), self.block_of[which], 8)
            self.tile_copies.append(TileCopy(int(place[0]), int(thread), tensor, at, places))

    def _map(self, address):
        start = address - PARAMS
        if start % 64 or not 0 <= start <= self.params.size - MAP_BYTES:
            raise MemoryFault("a tensor map that is no parameter")
        return self.params[start : start + MAP.itemsize].view(MAP)[0]

    def _land(self, copy):
        tensor, places, size = copy.tensor, copy.places, ELEMENT_BYTES[int(copy.tensor["type"])]
        if self.races:
            if (self.shared.region.trace.writer[places // GRANULE] != self.warp[copy.thread]).any():
                raise MemoryFault("a thread writes where a tensor copy is under way")
            self.shared.region.trace.writer[places // GRANULE] = NOBODY
        columns = copy.at[0] + np.arange(places.shape[1] // size)
        lines = copy.at[1] + np.arange(places.shape[0])
        columns_in = (columns >= 0) & (columns < int(tensor["dims"][0]))
        lines_in = np.flatnonzero((lines >= 0) & (lines < int(tensor["dims"][1])))
        data = np.zeros(places.shape, np.uint8)
        inside = np.flatnonzero(np.repeat(columns_in, size))
        if inside.size and lines_in.size:
            begin = int(tensor["base"]) + copy.at[0] * size + int(inside[0])
            starts = begin + lines[lines_in] * int(tensor["stride"])
            for region, which in self.memory.parts(starts.astype(np.uint64), inside.size):
                places_of = starts[which][:, None] + np.arange(inside.size)
                data[lines_in[which][:, None], inside] = region.views[1][places_of - region.start]
                self.touch(region, places_of, self.warp[copy.thread], copy.thread, False)
            self.counts.loaded(inside.size * lines_in.size)
        self.shared.region.views[1][places] = data
        self.shared.written[places] = True

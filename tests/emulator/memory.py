"""The memory of emulated threads: global allocations that a call may touch, shared memory of each
block, parameters; and the record of who touched what, which finds races.

An access is a vector of addresses, one for each active thread. Every access is checked: it must lie
inside one allocation and start at a multiple of its width. Not here: registers, instructions.
"""

import ctypes

import numpy as np

# Where generic addresses of shared memory and of parameters begin; block i of a cluster is at
# SHARED + i * WINDOW. No address of a process lies so high.
SHARED = 1 << 60
WINDOW = 1 << 24
PARAMS = 1 << 61
# Shared memory starts here in its own space, so that a null pointer is none of its addresses.
SHARED_START = 1024
GRANULE = 2  # bytes that the record of accesses tells apart
NOBODY, MANY = -1, -2


class MemoryFault(AssertionError):
    """An access that a device would refuse, or must not be made."""


class Region:
    """Bytes from an address on, as numpy arrays of each width, and the record of their accesses.
    Writes end at `end`, reads with the 16 bytes that it lies in: allocators of devices give whole
    multiples of them.
    """

    def __init__(self, start: int, data: np.ndarray, label: str, size: int | None = None):
        self.start, self.label = start, label
        self.end = start + (data.size if size is None else size)
        self.readable_end = start + data.size
        whole = data[: data.size // 8 * 8]
        self.views = {1: data, 2: data[: data.size // 2 * 2].view(np.uint16)}
        self.views |= {4: data[: data.size // 4 * 4].view(np.uint32), 8: whole.view(np.uint64)}
        self.trace = None

    def limit(self, is_write: bool) -> int:
        return self.end if is_write else self.readable_end

    def index(self, addresses, width):
        offsets = addresses - np.uint64(self.start)
        if width == 1:
            return offsets.astype(np.int64)
        if np.any(addresses & np.uint64(width - 1)):
            raise MemoryFault(f"an access of {width} bytes is not at a multiple of them")
        if self.start % width:
            raise MemoryFault(f"{self.label} does not start at a multiple of {width} bytes")
        return (offsets // np.uint64(width)).astype(np.int64)


class Trace:
    """Last writer and readers of each granule. `clock`: (warp, block, arrivals of the block, of the
    cluster, waits of the block, of the cluster) of the accessing threads: vectors.

    Two accesses of two warps, one of them a write, must have a barrier between: of their block, or
    of the cluster.
    """

    def __init__(self, size: int):
        n = -(-size // GRANULE)
        self.writer, self.reader = (np.full(n, NOBODY, np.int32) for _ in range(2))
        self.w_block, self.w_cluster, self.r_block, self.r_cluster = (
            np.zeros(n, np.int32) for _ in range(4)
        )
        self.owner = np.zeros(n, np.int32)  # block of the reader

    def _is_open(self, who, where, block_time, cluster_time, clock):
        """Accesses by others that no barrier separates from those of clock."""
        warp, block, _, _, block_waits, cluster_waits = clock
        same = where == block
        ordered = (same & (block_waits > block_time)) | (cluster_waits > cluster_time)
        return (who != NOBODY) & (who != warp) & ~ordered

    def read(self, at, clock, warps_per_block):
        writer = self.writer[at]
        open_ = self._is_open(
            writer, writer // warps_per_block, self.w_block[at], self.w_cluster[at], clock
        )
        warp, block, block_time, cluster_time, _, _ = clock
        reader = self.reader[at]
        stale = (reader == NOBODY) | self._is_past(at, clock)
        other = ~stale & (reader != warp)
        self.reader[at] = np.where(other, MANY, warp)
        self.owner[at] = np.where(other & (self.owner[at] != block), MANY, block)
        self.r_block[at], self.r_cluster[at] = block_time, cluster_time
        return open_

    def _is_past(self, at, clock):
        """Recorded reads that a barrier separates from those of clock."""
        same = self.owner[at] == clock[1]
        return (same & (clock[4] > self.r_block[at])) | (clock[5] > self.r_cluster[at])

    def ends(self, at, clock):
        """Reads of other blocks that no barrier separates from the end of this one."""
        foreign = (self.reader[at] != NOBODY) & (self.owner[at] != clock[1])
        return foreign & (clock[5] <= self.r_cluster[at])

    def write(self, at, clock, warps_per_block):
        warp, _, block_time, cluster_time, _, _ = clock
        writer = self.writer[at]
        open_ = self._is_open(
            writer, writer // warps_per_block, self.w_block[at], self.w_cluster[at], clock
        )
        reader = self.reader[at]
        open_ |= (reader != NOBODY) & (reader != warp) & ~self._is_past(at, clock)
        self.writer[at], self.w_block[at], self.w_cluster[at] = warp, block_time, cluster_time
        self.reader[at] = NOBODY
        return open_


class GlobalMemory:
    """Allocations that kernels may touch: `allow` each tensor of a call."""

    def __init__(self):
        self.regions, self.starts = [], np.zeros(0, np.uint64)

    def allow(self, tensor):
        """The whole storage of a CPU tensor."""
        storage = tensor.untyped_storage()
        self.allow_bytes(
            storage.data_ptr(), storage.nbytes(), f"{tensor.dtype} {tuple(tensor.shape)}"
        )

    def allow_bytes(self, start: int, size: int, label: str):
        if size == 0 or any(r.start <= start and start + size <= r.end for r in self.regions):
            return
        self.regions = [r for r in self.regions if not start <= r.start < start + size]
        array = (ctypes.c_uint8 * (-(-(start + size) // 16) * 16 - start)).from_address(start)
        self.regions.append(Region(start, np.frombuffer(array, np.uint8), label, size))
        self.regions.sort(key=lambda r: r.start)
        self.starts = np.array([r.start for r in self.regions], np.uint64)

    def forget(self):
        """No accesses yet: a launch begins after all before it have ended."""
        for region in self.regions:
            region.trace = None

    def parts(self, addresses, width, is_write=False):
        """(region, which of the addresses) of an access; they may be in several regions."""
        low, high = int(addresses.min()), int(addresses.max()) + width
        for region in self.regions:
            if region.start <= low and high <= region.limit(is_write):
                return [(region, slice(None))]
        index = np.searchsorted(self.starts, addresses, "right") - 1
        out = []
        for i in np.unique(index):
            at = np.flatnonzero(index == i)
            if i < 0 or int(addresses[at].max()) + width > self.regions[i].limit(is_write):
                wrong = int(addresses[at].max())
                raise MemoryFault(
                    f"{width} bytes at {wrong:#x} lie in no tensor of the call"
                    + (f"; next below is {self.regions[i].label}" if i >= 0 else "")
                )
            out.append((self.regions[i], at))
        return out


class SharedMemory:
    """Shared memory of the blocks that run together, filled with NaNs (0xFF); `written` tells which
    bytes a thread or copy has stored.
    """

    def __init__(self, blocks: int, size: int):
        self.size, self.blocks = size, blocks
        self.data = np.full((blocks, -(-size // 1024) * 1024 + SHARED_START), 0xFF, np.uint8)
        self.stride = self.data.shape[1]
        self.region = Region(0, self.data.reshape(-1), "shared memory")
        self.written = np.zeros(self.data.size, bool)

    def place(self, addresses, block, width):
        """Places in `region`, of addresses in the space of each thread's own block."""
        bad = (addresses < SHARED_START) | (addresses + width > SHARED_START + self.size)
        if bad.any():
            wrong = int(addresses[bad][0]) - SHARED_START
            raise MemoryFault(f"{width} bytes at {wrong} of {self.size} bytes of shared memory")
        return addresses + (block * self.stride).astype(np.uint64)

    def place_generic(self, addresses, width):
        offsets = addresses - np.uint64(SHARED)
        block = (offsets // np.uint64(WINDOW)).astype(np.int64)
        if (block >= self.blocks).any():
            raise MemoryFault("shared memory of a block that is not there")
        return self.place(offsets % np.uint64(WINDOW), block, width)

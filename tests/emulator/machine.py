"""Runs a PTX kernel on emulated threads: whole blocks, or clusters, as one vector of threads.

Threads that stand in one place run together; of several places the first in the text runs, so that
branches join again. Threads wait in an instruction that needs others (parse.SYNCS) until these have
come. Blocks of a grid run in a shuffled order, some of them at a time.

    kernel = parse_module(ptx)[name]
    memory = GlobalMemory()
    memory.allow(tensor)
    counts = launch(kernel, grid=(2, 1, 1), block=(256, 1, 1), params=[...], memory=memory)

Not here: what instructions do (`threads.py`).
"""

import random

import numpy as np
from emulator.memory import GRANULE, MemoryFault
from emulator.parse import Kernel
from emulator.threads import WARP, Counts, Threads

MOST_THREADS = 1024  # that one vector holds, unless one cluster has more
STAGES = 20_000_000  # basic blocks after which a launch has run away


class Deadlock(AssertionError):
    """All threads wait for others."""


class Machine(Threads):
    """Threads and where they stand. `pc`: the basic block that a thread is to run next."""

    def run(self):
        """From the first instruction until every thread has left."""
        self.pc = np.zeros(self.threads, np.int64)
        self.done, self.parked, self.at_barrier, self.at_cluster = (
            np.zeros(self.threads, bool) for _ in range(4)
        )
        self.ended = np.zeros(self.together, bool)
        everybody = 0  # where all stand together, or None
        for _ in range(STAGES):
            if everybody is None and self.done.all():
                return self.end_proxy()
            at, mask = self._choose(everybody)
            block = self.kernel.blocks[at]
            if block.is_sync:
                mask = self._meet(at, block.body[0], mask)
                if mask is False:
                    everybody = None
                    continue
            for instruction in self.code_of(at):
                instruction(mask)
            self.executed[at] += self.threads if mask is None else int(mask.sum())
            everybody = self._leave(at, block.end, mask)
        raise Deadlock("a kernel that does not end")

    def code_of(self, at):
        """A basic block's instructions, built when it is first run."""
        if self.code[at] is None:
            self.code[at] = [self.build(one) for one in self.kernel.blocks[at].body]
        return self.code[at]

    def _choose(self, everybody):
        """(basic block, mask) to run next; mask None: all threads."""
        if everybody is not None:
            return everybody, None
        ready = ~(self.done | self.parked)
        if not ready.any():
            if not self._release():
                self._stuck()
            ready = ~(self.done | self.parked)
        at = int(self.pc[ready].min())
        mask = ready & (self.pc == at)
        return at, (None if mask.all() else mask)

    def _meet(self, at, one, mask):
        """The threads that may execute an instruction of several, those of complete warps; False
        where nobody may: they wait. Barriers of more than a warp move their threads on themselves.
        """
        if one.parts[0] in ("bar", "barrier") and one.parts[1] != "warp":
            return self._meet_barrier(mask, one.parts[1] == "cluster")
        if mask is None:
            return None
        size = 4 * WARP if one.parts[0] == "wgmma" else WARP
        come = (self.pc == at) & ~self.done
        whole = np.repeat(come.reshape(-1, size).all(axis=1), size)
        self.parked[come] = ~whole[come]
        return (come & whole) if (come & whole).any() else False

    def _meet_barrier(self, mask, is_clusters):
        if mask is not None:
            (self.at_cluster if is_clusters else self.at_barrier)[mask] = True
            self.parked[mask] = True
            self._release()
            return False
        if not is_clusters:
            self.block_time += 1
        elif (self.cluster_arrivals > self.cluster_waits).all():
            self.cluster_waits += 1
        else:
            raise Deadlock("barrier.cluster.wait without an arrival")
        return None

    def _release(self) -> bool:
        """Moves on who waits in a barrier that all live threads have reached."""
        come = (self.at_barrier | self.done).reshape(self.together, -1).all(axis=1)
        block = np.repeat(come, self.block_threads) & self.at_barrier
        self.block_time[block] += 1
        come = (self.cluster_arrivals > self.cluster_waits) | self.done
        come = come.reshape(self.together // self.cluster, -1).all(axis=1)
        cluster = np.repeat(come, self.cluster * self.block_threads) & self.at_cluster
        self.cluster_waits[cluster] += 1
        go = block | cluster
        self.at_barrier[go] = self.at_cluster[go] = self.parked[go] = False
        self.pc[go] += 1
        return bool(go.any())

    def _stuck(self):
        places = {self.kernel.blocks[at].body[0].text for at in self.pc[self.parked]}
        raise Deadlock(f"every thread waits in one of {sorted(places)}")

    def _leave(self, at, end, mask):
        """Moves the threads on; the basic block that all of them run next, or None."""
        if end is None:
            return self._go(at + 1, mask)
        if end.guard is None:
            if end.parts[0] == "bra":
                return self._go(self.kernel.labels[end.operands[0]], mask)
            self._exit(np.ones(self.threads, bool) if mask is None else mask)
            return None
        name, is_negated = end.guard
        taken = self.registers[name] ^ is_negated
        if end.parts[0] != "bra":
            self._exit(taken if mask is None else taken & mask)
            return self._go(at + 1, ~self.done if mask is None else mask & ~taken)
        to = self.kernel.labels[end.operands[0]]
        if mask is None and taken.all():
            return to
        if mask is None and not taken.any():
            return at + 1
        places = np.where(taken, to, at + 1)
        np.copyto(self.pc, places, where=True if mask is None else mask)
        return None

    def _exit(self, leaving):
        """The shared memory of a block ends with its last thread: as if that had written it all."""
        self.done |= leaving
        trace = self.shared.region.trace
        if self.cluster == 1 or trace is None:
            return
        ended = self.done.reshape(self.together, -1).all(axis=1) & ~self.ended
        self.ended |= ended
        for block in np.flatnonzero(ended):
            last = leaving & (self.block_of == block)
            clock = tuple(v[:1] for v in self.clock_of(last if last.any() else None))
            granules = self.shared.stride // GRANULE
            at = np.arange(block * granules, (block + 1) * granules)
            if trace.ends(at, clock).any():
                raise MemoryFault("a block ends before another has read its shared memory for sure")

    def _go(self, to, mask):
        if mask is None:
            return to
        self.pc[mask] = to
        return None

    def count(self) -> Counts:
        """What was done since the last call."""
        for at, threads in self.executed.items():
            block = self.kernel.blocks[at]
            for one in block.body + ([block.end] if block.end else []):
                self.counts.by_opcode[one.opcode] += threads
        counts, self.counts = self.counts, Counts()
        self.executed.clear()
        return counts


def _machine(kernel, block, cluster, together, shared_bytes) -> Machine:
    """Built once for each shape of a launch, and kept with the kernel."""
    kept = kernel.machines
    key = (block, cluster, together)
    if key not in kept:
        kept[key] = Machine(kernel, block, cluster, together, shared_bytes)
    kept[key].shared_bytes = kernel.shared_bytes + shared_bytes
    return kept[key]


def launch(
    kernel: Kernel, *, grid, block, params, memory, shared_bytes=0, cluster=1, races=True, seed=0
) -> Counts:
    """Run a kernel on a grid. params: the bytes of each; memory: GlobalMemory with all that it may
    touch; shared_bytes: dynamic shared memory of a block; cluster: blocks along x.
    """
    memory.forget()
    places = [(x, y, z) for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])]
    clusters = [places[i : i + cluster] for i in range(0, len(places), cluster)]
    random.Random(seed).shuffle(clusters)
    each = max(1, MOST_THREADS // (block[0] * block[1] * block[2] * cluster))
    total = Counts()
    with np.errstate(all="ignore"):
        for first in range(0, len(clusters), each):
            part = [place for c in clusters[first : first + each] for place in c]
            machine = _machine(kernel, tuple(block), cluster, len(part), shared_bytes)
            machine.begin(params, memory, races, grid, part)
            machine.run()
            counts = machine.count()
            total.global_loaded += counts.global_loaded
            total.global_stored += counts.global_stored
            total.by_opcode += counts.by_opcode
    return total

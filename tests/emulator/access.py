"""Loads, stores, asynchronous copies and address arithmetic of emulated threads.

Not here: arithmetic (`alu.py`), what threads do together (`machine.py`, `matrix.py`).
"""

import numpy as np
from emulator.memory import (
    GRANULE,
    PARAMS,
    SHARED,
    SHARED_START,
    WINDOW,
    MemoryFault,
    Trace,
)
from emulator.parse import WIDTHS
from emulator.proxy import COPIED, READ, WRITTEN

SPACES = ("global", "shared", "param", "const", "local")
SIGNED = {"s8": np.int8, "s16": np.int16, "s32": np.int32}


def _shape(parts):
    """(space, values, type) of ld.global.v4.b32."""
    space = next((p for p in parts[1:] if p.split("::")[0] in SPACES), "generic").split("::")[0]
    count = next((int(p[1:]) for p in parts[1:] if p in ("v2", "v4", "v8")), 1)
    return space, count, parts[-1]


class Access:
    """The part of a machine that touches memory. Needs of the machine: `threads`, `block_of`,
    `memory`, `shared`, `params`, `operand`, `counts`, `clock_of`.
    """

    def addresses(self, operand, mask):
        """uint64 addresses of the active threads."""
        _, base, offset = operand[:3]
        if base in self.kernel.shared:
            start = SHARED_START + self.kernel.shared[base] + offset
            found = np.full(self.threads, start, np.uint64)
        elif base in self.param_offsets:
            found = np.full(self.threads, self.param_offsets[base] + offset, np.uint64)
        else:
            found = self.operand(base, None).astype(np.uint64) + np.uint64(offset % (1 << 64))
        return found if mask is None else found[mask]

    def resolve(self, space, addresses, block, width, is_write=False):
        """[(region, which, places)] of an access in a space."""
        if space == "generic":
            if (addresses >= SHARED).all() and (addresses < PARAMS).all():
                places = self.shared.place_generic(addresses, width)
                return [(self.shared.region, slice(None), places)]
            space = "global"
        if space == "shared":
            places = self.shared.place(addresses, block, width)
            return [(self.shared.region, slice(None), places)]
        parts = self.memory.parts(addresses, width, is_write)
        return [(region, at, addresses[at]) for region, at in parts]

    def _check_race(self, region, places, nbytes, mask, which, is_write):
        if not self.races:
            return
        if region.trace is None:
            region.trace = Trace(region.readable_end - region.start)
        offsets = ((places - np.uint64(region.start)) // np.uint64(GRANULE)).astype(np.int64)
        span = np.arange(max(1, nbytes // GRANULE))
        at = (offsets[:, None] + span).reshape(-1)
        clock = tuple(np.repeat(v[which], span.size) for v in self.clock_of(mask))
        touch = region.trace.write if is_write else region.trace.read
        if nbytes >= GRANULE and touch(at, clock, self.warps_per_block).any():
            kind = "writes" if is_write else "reads"
            raise MemoryFault(
                f"a warp {kind} in {region.label} what another touched since the last barrier"
            )

    def load(self, one, mask):
        space, count, kind = _shape(one.parts)
        width = WIDTHS[kind]
        names = one.operands[0] if isinstance(one.operands[0], tuple) else (one.operands[0],)
        if space == "param":
            return self._load_param(one.operands[1], names, width, kind, mask)
        if mask is not None and not mask.any():
            return None
        addresses = self.addresses(one.operands[1], mask)
        block = self.block_of if mask is None else self.block_of[mask]
        values = np.zeros((count, addresses.size), f"u{width}")
        for region, which, places in self.resolve(space, addresses, block, width * count):
            if region is self.shared.region:
                self._check_written(places, width * count)
            index = region.index(places, width)
            if np.any(places & np.uint64(width * count - 1)):
                raise MemoryFault(f"{one.text}: {width * count} bytes not at a multiple of them")
            for i in range(count):
                values[i, which] = region.views[width][index + i]
            self._check_race(region, places, width * count, mask, which, False)
            if region is self.shared.region:
                self.note(places, width * count, READ)
            else:
                self.counts.loaded(places.size * width * count)
        for name, value in zip(names, values, strict=True):
            self._set(name, value, kind, mask)
        return None

    def _check_written(self, places, nbytes):
        if not self.shared.written[places.astype(np.int64)[:, None] + np.arange(nbytes)].all():
            raise MemoryFault("shared memory is read that nobody has written")

    def _set(self, name, value, kind, mask):
        """Loaded values into a register that may be wider."""
        if name == "_":
            return
        register = self.registers[name]
        if kind in SIGNED:
            value = value.view(SIGNED[kind])
        if mask is None:
            register[:] = value.astype(register.dtype)
        else:
            register[mask] = value.astype(register.dtype)

    def _load_param(self, operand, names, width, kind, mask):
        places = self.addresses(operand, mask).astype(np.int64)
        if places.size == 0:
            return
        if places.min() < 0 or places.max() + width * len(names) > self.params.size:
            raise MemoryFault("a parameter is read past its end")
        for i, name in enumerate(names):
            at = places[:, None] + (i * width + np.arange(width))
            value = np.ascontiguousarray(self.params[at]).view(f"u{width}").reshape(-1)
            self._set(name, value, kind, mask)

    def store(self, one, mask):
        space, count, kind = _shape(one.parts)
        width = WIDTHS[kind]
        names = one.operands[1] if isinstance(one.operands[1], tuple) else (one.operands[1],)
        if mask is not None and not mask.any():
            return
        addresses = self.addresses(one.operands[0], mask)
        block = self.block_of if mask is None else self.block_of[mask]
        for region, which, places in self.resolve(space, addresses, block, width * count, True):
            index = region.index(places, width)
            if np.any(places & np.uint64(width * count - 1)):
                raise MemoryFault(f"{one.text}: {width * count} bytes not at a multiple of them")
            for i, name in enumerate(names):
                value = self.operand(name, f"b{8 * width}")
                value = value if np.ndim(value) else np.full(self.threads, value)
                value = (value if mask is None else value[mask])[which]
                region.views[width][index + i] = value.astype(f"u{width}")
            self._check_race(region, places, width * count, mask, which, True)
            self._mark(region, places, width * count)
            if region is self.shared.region:
                self.note(places, width * count, WRITTEN)

    def _mark(self, region, places, nbytes):
        if region is not self.shared.region:
            self.counts.stored(places.size * nbytes)
            return
        self.shared.written[places.astype(np.int64)[:, None] + np.arange(nbytes)] = True

    def copy_async(self, one, mask):
        """cp.async: its target is spoilt at once, and written in a wait: as early and as late as a
        device may.
        """
        if mask is not None and not mask.any():
            return
        threads = np.arange(self.threads) if mask is None else np.flatnonzero(mask)
        size = int(one.operands[2], 0)
        fill = np.full(self.threads, size)
        if len(one.operands) > 3:
            fill[:] = self.operand(one.operands[3], "u32")
        target, source = (self.addresses(one.operands[i], mask) for i in (0, 1))
        places = self.shared.place(target, self.block_of[threads], size)
        self._check_race(self.shared.region, places, size, mask, slice(None), True)
        spoilt = places.astype(np.int64)[:, None] + np.arange(size)
        self.shared.region.views[1][spoilt], self.shared.written[spoilt] = 0xFF, False
        self.copies.append((self.group[threads], threads, target, source, fill[threads], size))

    def commit_copies(self, one, mask):
        """The next copies of the active threads are of their next group."""
        self.group[slice(None) if mask is None else mask] += 1

    def wait_copies(self, one, mask):
        """All groups of the active threads but their last ones."""
        left = 0 if "wait_all" in one.parts else int(one.operands[0], 0)
        kept = []
        for group, threads, *copy, size in self.copies:
            due = group < self.group[threads] - left
            if mask is not None:
                due &= mask[threads]
            if due.any():
                self._copy(threads[due], *(x[due] for x in copy), size)
            if not due.all():
                kept.append((group[~due], threads[~due], *(x[~due] for x in copy), size))
        self.copies = kept

    def _copy(self, threads, target, source, fill, size):
        block = self.block_of[threads]
        active = np.zeros(self.threads, bool)
        active[threads] = True
        places = self.shared.place(target, block, size)
        if np.any((places | source) & np.uint64(size - 1)):
            raise MemoryFault(f"cp.async of {size} bytes not at a multiple of them")
        to = self.shared.region.views[1]
        at = places.astype(np.int64)[:, None] + np.arange(size)
        to[at] = 0
        reads = fill > 0
        if reads.any():
            for region, which in self.memory.parts(source[reads], size):
                start = source[reads][which] - np.uint64(region.start)
                offsets = start.astype(np.int64)[:, None] + np.arange(size)
                data = region.views[1][offsets]
                data[np.arange(size) >= fill[reads][which][:, None]] = 0
                rows = np.flatnonzero(reads)[which]
                to[at[rows]] = data
                self.counts.loaded(int(fill[reads][which].sum()))
                chosen = np.zeros(self.threads, bool)
                chosen[threads[rows]] = True
                self._check_race(region, source[reads][which], size, chosen, slice(None), False)
        self._check_race(self.shared.region, places, size, active, slice(None), True)
        self._mark(self.shared.region, places, size)
        self.note(places, size, COPIED)

    def cvta(self, one, mask):
        """Addresses between their own space and the generic one."""
        value = self.operand(one.operands[1], "u64")
        space = next(p for p in one.parts if p.split("::")[0] in SPACES).split("::")[0]
        if space == "shared":
            base = np.uint64(SHARED) + np.uint64(WINDOW) * self.block_of.astype(np.uint64)
            value = value - base if "to" in one.parts else value + base
        elif space == "param":
            value = value + np.uint64(PARAMS)
        self.assign(one.operands[0], "u64", value, mask)

    def mapa(self, one, mask):
        """The same place in another block of the cluster."""
        value = self.operand(one.operands[1], "u64")
        rank = np.asarray(self.operand(one.operands[2], "u32")).astype(np.int64)
        asked = np.broadcast_to(rank, self.threads)
        if np.any((asked if mask is None else asked[mask]) >= self.cluster):
            raise MemoryFault("mapa of a block that the cluster has not")
        step = (rank - self.rank_of) * WINDOW
        self.assign(one.operands[0], "u64", value + step.astype(np.uint64), mask)

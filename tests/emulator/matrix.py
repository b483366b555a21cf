"""Matrix products of emulated warps: ldmatrix, stmatrix, mma, wgmma.

A wgmma reads shared memory when it is issued and again in the wait of its group, must find the
same, and writes its registers only then: as late as a device may. Products are summed in fp64 and
rounded once per instruction. Fragments and descriptors: PTX ISA, "Matrix multiply-accumulate" and
"wgmma". Not here: tcgen05, integer and fp8 products, tile copies (`proxy.py`).
"""

from dataclasses import dataclass

import numpy as np
from emulator.alu import f32_of_bf16, f32_of_f16
from emulator.memory import GRANULE, MemoryFault
from emulator.proxy import READ, WRITTEN, Proxy, swizzled

LANES, GROUP = 32, 128  # threads of a warp, of a warp group
DESCRIPTOR_SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a line


@dataclass
class Product:
    """A wgmma under way: its warp groups' first threads and commit groups, whether it adds, where A
    and B lie in shared memory (nowhere: in registers), what it has read there.
    """

    one: object
    first: np.ndarray
    number: np.ndarray
    adds: np.ndarray
    places: tuple
    read: tuple

    def part(self, which):
        pairs = (tuple(x[which] for x in each) for each in (self.places, self.read))
        return Product(self.one, self.first[which], self.number[which], self.adds[which], *pairs)


def _values(bits, kind):
    """fp64 values of raw operands."""
    if kind == "bf16":
        return f32_of_bf16(bits).astype(np.float64)
    if kind == "f16":
        return f32_of_f16(bits).astype(np.float64)
    # tf32: the low 13 bits of the fraction are not read
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _rounded(a, b, c):
    """[., M, K] by [., K, N] on c."""
    return (a @ b + c).astype(np.float32)


def _by_rows(registers):
    """Operand A of a warp, raw [warps, 16, K], from its four registers [warps, 32, 4, values]."""
    warps, _, _, e = registers.shape
    parts = registers.reshape(warps, 8, 4, 2, 2, e)  # row, column, half of K, half of the rows
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 8 * e)


def _offsets(descriptor, rows, k, size, is_transposed):
    """Bytes of element (row, column of K) from the start of a matrix that a descriptor names."""
    leading, stride = (((int(descriptor) >> at) & 0x3FFF) << 4 for at in (16, 32))
    line = DESCRIPTOR_SWIZZLES[int(descriptor) >> 62]
    each, width = 16 // size, line or 16  # elements of 16 bytes
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not is_transposed:
        along = leading if line == 0 else 16
        return r % 8 * width + r // 8 * stride + c // each * along + c % each * size
    near, far = (leading, stride) if line else (stride, leading)
    run = width // size  # rows that lie beside each other
    return r % run * size + r // run * near + c % 8 * width + c // 8 * far


def _shape_of(one):
    """(N, K) of m64n128k16."""
    n, k = next(p for p in one.parts if p.startswith("m64n"))[4:].split("k")
    return int(n), int(k)


class Matrix(Proxy):
    """The part of a machine that multiplies matrices. Needs of the machine what `Access` needs."""

    def begin_matrix(self):
        """Nothing is under way."""
        self.begin_proxy()
        self.products = []
        self.product_number = np.zeros(self.threads, np.int32)
        self.is_fenced = np.zeros(self.threads, bool)  # wgmma.fence since the last group

    def _rows_of_warps(self, operand, count, mask):
        """(bool of the threads that give addresses, places of their rows of 16 bytes)."""
        given = self.lane < 8 * count
        given = given if mask is None else given & mask
        places = self.shared.place(self.addresses(operand, given), self.block_of[given], 16)
        if np.any(places & np.uint64(15)):
            raise MemoryFault("a row of ldmatrix or stmatrix does not start at 16 bytes")
        return given, places

    def load_matrix(self, one, mask):
        names = one.operands[0] if isinstance(one.operands[0], tuple) else (one.operands[0],)
        given, places = self._rows_of_warps(one.operands[1], len(names), mask)
        if places.size == 0:
            return
        index = places.astype(np.int64)[:, None] + np.arange(16)
        if not self.shared.written[index].all():
            raise MemoryFault("shared memory is read that nobody has written")
        self._check_race(self.shared.region, places, 16, given, slice(None), False)
        self.note(places, 16, READ)
        rows = self.shared.region.views[1][index].view(np.uint16)
        tiles = rows.reshape(-1, len(names), 8, 8)
        if "trans" in one.parts:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        values = tiles.view(np.uint32).reshape(-1, len(names), LANES)
        for i, name in enumerate(names):
            self._set(name, values[:, i].reshape(-1), "b32", mask)

    def store_matrix(self, one, mask):
        names = one.operands[1] if isinstance(one.operands[1], tuple) else (one.operands[1],)
        given, places = self._rows_of_warps(one.operands[0], len(names), mask)
        if places.size == 0:
            return
        values = [self.operand(x, "b32").reshape(-1, LANES) for x in names]
        tiles = np.stack(values, axis=1).view(np.uint16).reshape(-1, len(names), 8, 8)
        if "trans" in one.parts:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        rows = tiles.view(np.uint8).reshape(-1, 8 * len(names), 16)
        chosen = given.reshape(-1, LANES)[:, : 8 * len(names)]
        self.shared.region.views[1][places.astype(np.int64)[:, None] + np.arange(16)] = rows[chosen]
        self._check_race(self.shared.region, places, 16, given, slice(None), True)
        self._mark(self.shared.region, places, 16)
        self.note(places, 16, WRITTEN)

    # mma

    def _raw(self, names, each):
        """Registers as [warps, 32, registers, values of a register]."""
        bits = np.stack([self.operand(x, "b32").reshape(-1, LANES) for x in names], axis=-1)
        return bits[..., None] if each == 1 else bits.view(np.uint16).reshape(*bits.shape, 2)

    def mma(self, one, mask):
        """m16n8k16 of 16 bits, m16n8k8 of tf32, as every warp: D [16, 8] = A B + C."""
        kind, each = one.parts[-2], 1 if one.parts[-2] == "tf32" else 2
        if kind not in ("bf16", "f16", "tf32") or one.parts[3] != f"m16n8k{8 * each}":
            raise NotImplementedError(one.text)
        target, *sources = one.operands
        a = _values(_by_rows(self._raw(sources[0], each)), kind)
        b = self._raw(sources[1], each).reshape(-1, 8, 4, 2, each)  # column, row, half of K
        b = _values(b.transpose(0, 3, 2, 4, 1).reshape(-1, 8 * each, 8), kind)
        c = [np.broadcast_to(self.operand(x, "f32"), self.threads) for x in sources[2]]
        c = np.stack(c, axis=-1).reshape(-1, 8, 4, 2, 2)
        d = _rounded(a, b, c.transpose(0, 3, 1, 2, 4).reshape(-1, 16, 8))
        parts = d.reshape(-1, 2, 8, 4, 2).transpose(1, 4, 0, 2, 3).reshape(4, -1)
        for name, value in zip(target, parts, strict=True):
            self.assign(name, "f32", value, mask)

    # wgmma

    def wgmma(self, one, mask):
        """Of complete warp groups: what it reads is kept until its group is waited for."""
        threads = np.arange(self.threads) if mask is None else np.flatnonzero(mask)
        if not self.is_fenced[threads].all():
            raise MemoryFault("a group of wgmma without a wgmma.fence before it")
        first = threads[::GROUP]
        adds = np.broadcast_to(self.operand(one.operands[3], "pred"), self.threads)[first]
        (n, k), size = _shape_of(one), 4 if "tf32" in one.parts else 2
        a, b, flags = one.operands[1], one.operands[2], [*one.operands[6:], "0", "0"]
        is_from_registers = isinstance(a, tuple)
        if is_from_registers:
            flags, places = ["0", *flags], np.zeros((len(first), 0, 0), np.int64)
        else:
            places = self._places_of(a, first, (64, k, size, flags[0] == "1"))
        places = (places, self._places_of(b, first, (n, k, size, flags[1] == "1")))
        product = Product(one, first, self.product_number[first], adds, places, ())
        product.read = self._operands_of(product)
        self._touch_operands(product)
        self.products.append(product)

    def _places_of(self, operand, first, shape):
        """[groups, rows, K]: where in shared memory the elements that descriptors name are."""
        found, size = [], shape[2]
        for thread, descriptor in zip(first, self.operand(operand, "u64")[first], strict=True):
            if (int(descriptor) >> 49) & 7:
                raise NotImplementedError("a descriptor with a base offset")
            start = (int(descriptor) & 0x3FFF) << 4
            line = DESCRIPTOR_SWIZZLES[int(descriptor) >> 62]
            places = swizzled(start + _offsets(descriptor, *shape), line)
            found.append(self.in_block(places, thread, size))
            self._check_visible(found[-1])
        return np.stack(found)

    def _operands_of(self, product):
        """Raw A [groups, 64, K] and B [groups, N, K], as they are now."""
        size, found = 4 if "tf32" in product.one.parts else 2, []
        for places in product.places:
            found.append(self.shared.region.views[size][places // size])
        if product.places[0].size == 0:
            raw = _by_rows(self._raw(product.one.operands[1], 4 // size))
            warps = (product.first // LANES)[:, None] + np.arange(4)
            found[0] = raw[warps].reshape(len(warps), 64, -1)
        return tuple(found)

    def _check_visible(self, places):
        """What a wgmma reads is written and fenced."""
        if not self.shared.written[places].all():
            raise MemoryFault("wgmma reads shared memory that nobody has written")
        if (self.unfenced[places // GRANULE] & self.fenced_first).any():
            raise MemoryFault("wgmma reads what threads wrote, without a fence.proxy.async")

    def _touch_operands(self, product):
        """Race check of what a wgmma reads: a warp its rows of A, all of them B."""
        size = 4 if "tf32" in product.one.parts else 2
        for places, is_own in zip(product.places, (True, False), strict=True):
            for thread, part in zip(product.first, places, strict=True):
                spread, warp = part[..., None] + np.arange(size), thread // LANES
                own = warp + np.arange(part.shape[0])[:, None] // 16 + 0 * part
                for each in (own,) if is_own else (warp, warp + 1):  # two readers stand for many
                    self.touch(self.shared.region, spread, each, thread, False)

    def fence_products(self, one, mask):
        self.is_fenced[slice(None) if mask is None else mask] = True

    def commit_products(self, one, mask):
        chosen = slice(None) if mask is None else mask
        self.product_number[chosen] += 1
        self.is_fenced[chosen] = False

    def wait_products(self, one, mask):
        """All groups of the active threads but their last ones."""
        left, kept = int(one.operands[0]), []
        for each in self.products:
            due = each.number < self.product_number[each.first] - left
            due &= True if mask is None else mask[each.first]
            for is_due in (True, False):
                part = due if is_due else ~due
                if part.any():
                    (self._finish if is_due else kept.append)(each.part(part))
        self.products = kept

    def _finish(self, product):
        one, first = product.one, product.first
        again = self._operands_of(product)
        if any((x != y).any() for x, y in zip(product.read, again, strict=True)):
            raise MemoryFault("an operand of a wgmma is overwritten before its group is waited for")
        self._touch_operands(product)
        kind = one.parts[-1]
        a, b = (_values(x, kind) for x in product.read)
        n, _ = _shape_of(one)
        a = a * float(one.operands[4]) * float(one.operands[5])
        threads = first[:, None] + np.arange(GROUP)
        old = np.stack([self.operand(x, "f32")[threads] for x in one.operands[0]], axis=-1)
        # warp, row, column, then 8 columns, half of the rows, value
        old = old.reshape(-1, 4, 8, 4, n // 8, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6)
        c = np.where(product.adds[:, None, None], old.reshape(-1, 64, n), np.float32(0))
        d = _rounded(a, b.swapaxes(1, 2), c).reshape(-1, 4, 2, 8, n // 8, 4, 2)
        parts = d.transpose(4, 2, 6, 0, 1, 3, 5).reshape(n // 2, -1)
        for name, value in zip(one.operands[0], parts, strict=True):
            self.registers[name][threads.reshape(-1)] = value.view(np.uint32)

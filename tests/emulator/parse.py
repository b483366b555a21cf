"""PTX text to kernels: parameters, variables, registers, and basic blocks of instructions.

What Triton and nvcc emit, no more: one function a kernel, no calls. A block ends where control may
leave it, and before and after an instruction that waits for other threads (`SYNCS`), which stands
alone. Not here: what instructions do.
"""

import re
from dataclasses import dataclass, field

# Instructions that all threads of a mask, block or cluster execute together, or wait in.
SYNCS = (
    "bar.sync", "barrier.sync", "bar.warp", "barrier.cluster.wait", "shfl", "redux", "vote",
    "elect", "mma", "ldmatrix", "stmatrix", "wgmma.mma_async", "mbarrier.try_wait",
)  # fmt: skip
WIDTHS = {"pred": 1, "b8": 1, "u8": 1, "s8": 1, "b16": 2, "u16": 2, "s16": 2, "f16": 2, "bf16": 2}
WIDTHS |= dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2"), 4)
WIDTHS |= dict.fromkeys(("b64", "u64", "s64", "f64"), 8)


@dataclass
class Instruction:
    """`guard`: (predicate register, whether it is negated) or None; `parts`: the opcode at its
    dots; operands: registers, numbers, labels and symbols as text, tuples for {a, b}, and
    ("[]", base, offset, ...) for [base + offset].
    """

    text: str
    guard: tuple | None
    parts: tuple
    operands: list

    @property
    def opcode(self) -> str:
        return ".".join(self.parts)


@dataclass
class Block:
    """Instructions, then `end`: a bra, ret or exit, or None to fall through."""

    body: list = field(default_factory=list)
    end: Instruction | None = None
    is_sync: bool = False


@dataclass
class Kernel:
    """params: (name, bytes, alignment); shared: {name: offset}, the dynamic array last, at
    `shared_bytes`; constants: {name: bytes}; registers: {name: type}; machines: what
    `machine.launch` keeps of each shape.
    """

    name: str
    params: list
    registers: dict
    shared: dict
    shared_bytes: int
    constants: dict
    blocks: list
    labels: dict
    machines: dict = field(default_factory=dict)


def _without_comments(text: str) -> str:
    text = re.sub(r"/\*.*?\*/", " ", text, flags=re.S)
    text = re.sub(r"//[^\n]*", " ", text)
    text = re.sub(r"^\s*\.(loc|file|pragma)\b[^\n]*$", " ", text, flags=re.M)
    return re.sub(r"\.section\s+\.\w+\s*\{.*?\n\s*\}", " ", text, flags=re.S)


def _split_operands(text: str) -> list[str]:
    out, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += c in "{[("
        depth -= c in "}])"
        if c == "," and depth == 0:
            out.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return out + [last] if last else out


def _operand(text: str, rename):
    if text.startswith("{"):
        return tuple(_operand(x, rename) for x in _split_operands(text[1:-1]))
    if text.startswith("["):
        inside = _split_operands(text[1:-1])
        base, _, offset = inside[0].partition("+")
        rest = tuple(_operand(x, rename) for x in inside[1:])
        return ("[]", rename(base.strip()), int(offset.strip() or "0", 0), *rest)
    if "|" in text:
        return tuple(rename(x.strip()) for x in text.split("|"))
    return rename(text)


def _instruction(text: str, rename) -> Instruction:
    guard, rest = None, text
    if text.startswith("@"):
        name, rest = text[1:].split(None, 1)
        guard = (rename(name.lstrip("!")), name.startswith("!"))
    opcode, _, operands = rest.partition(" ")
    parts = tuple(opcode.split("."))
    return Instruction(text, guard, parts, [_operand(x, rename) for x in _split_operands(operands)])


def _statements(body: str):
    """Statements of a function body; "{" and "}" of scopes on their own, labels with ":"."""
    i, start, depth = 0, 0, 0
    while i < len(body):
        c = body[i]
        begun = body[start:i].strip()
        if c == "{" and not begun:
            yield "{"
            start = i + 1
        elif c == "{":
            depth += 1
        elif c == "}" and depth:
            depth -= 1
        elif c == "}":
            yield "}"
            start = i + 1
        elif c == ";":
            if begun:
                yield re.sub(r"\s+", " ", begun)
            start = i + 1
        elif c == ":" and re.fullmatch(r"[$\w]+", begun) and body[i + 1] != ":":
            yield begun + ":"
            start = i + 1
        i += 1


class _Body:
    """Collects one function's registers, variables and blocks."""

    def __init__(self, shared, shared_bytes):
        self.registers, self.shared, self.shared_bytes = {}, dict(shared), shared_bytes
        self.blocks, self.labels = [Block()], {}
        self.scopes, self.n_scopes = [{}], 0

    def rename(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def declare(self, text: str):
        """.reg .b32 %r<20>, or names of a scope."""
        kind, names = re.fullmatch(r"\.reg \.(\w+) (.*)", text).groups()
        for name in _split_operands(names):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            every = [f"{many[1]}{k}" for k in range(int(many[2]))] if many else [name]
            for each in every:
                own = each if len(self.scopes) == 1 else f"{each}@{self.n_scopes}"
                self.scopes[-1][each] = own
                self.registers[own] = kind

    def variable(self, text: str):
        found = re.search(r"\.align (\d+) \.b8 ([$\w]+)\[(\d+)\]", text)
        align, name, size = int(found[1]), found[2], int(found[3])
        self.shared_bytes = -(-self.shared_bytes // align) * align
        self.shared[name] = self.shared_bytes
        self.shared_bytes += size

    def begin(self):
        if self.blocks[-1].body or self.blocks[-1].end:
            self.blocks.append(Block())

    def add(self, text: str):
        one = _instruction(text, self.rename)
        if one.parts[0] in ("bra", "ret", "exit"):
            self.blocks[-1].end = one
            self.blocks.append(Block())
        elif one.opcode.startswith(SYNCS):
            self.begin()
            self.blocks[-1].body.append(one)
            self.blocks[-1].is_sync = True
            self.blocks.append(Block())
        else:
            self.blocks[-1].body.append(one)

    def run(self, text: str):
        for each in _statements(text):
            if each == "{":
                self.n_scopes += 1
                self.scopes.append({})
            elif each == "}":
                self.scopes.pop()
            elif each.endswith(":"):
                self.begin()
                self.labels[self.rename(each[:-1])] = len(self.blocks) - 1
            elif each.startswith(".reg"):
                self.declare(each)
            elif each.startswith(".shared"):
                self.variable(each)
            elif not each.startswith("."):
                self.add(each)


def _params(text: str) -> list:
    out = []
    for each in _split_operands(text):
        array = re.search(r"\.align (\d+) \.b8 ([$\w]+)\[(\d+)\]", each)
        if array:
            out.append((array[2], int(array[3]), int(array[1])))
            continue
        width = WIDTHS[re.match(r"\.param \.(\w+)", each)[1]]
        out.append((each.split()[-1], width, width))
    return out


def _closing(text: str, start: int) -> int:
    depth = 0
    for i in range(start, len(text)):
        depth += text[i] == "{"
        depth -= text[i] == "}"
        if depth == 0:
            return i
    raise ValueError("a function without an end")


def parse_module(text: str) -> dict[str, Kernel]:
    """{entry name: Kernel} of one PTX module."""
    text = _without_comments(text)
    constants = {
        name: bytes(int(x) for x in values.split(",")).ljust(int(size), b"\0")
        for name, size, values in re.findall(
            r"\.(?:global|const)[^;{}]*?\.b8 ([$\w]+)\[(\d+)\] = \{([^}]*)\}", text
        )
    }
    kernels = {}
    for found in re.finditer(r"\.entry\s+([$\w]+)\s*\(", text):
        close = text.index(")", found.end())
        begin = text.index("{", close)
        # what the module declares: static arrays first, the dynamic one last
        body = _Body({}, 0)
        outside = re.sub(r"\{[^{}]*\}", "", text[: found.start()])
        for each in re.findall(r"(?<!\.extern )\.shared [^;]*\[\d+\]", outside):
            body.variable(each)
        body.run(text[begin + 1 : _closing(text, begin)])
        for name in re.findall(r"\.extern \.shared [^;]*?([$\w]+)\[\]", text):
            body.shared_bytes = -(-body.shared_bytes // 16) * 16
            body.shared[name] = body.shared_bytes
        params = _params(re.sub(r"\s+", " ", text[found.end() : close]))
        kernels[found[1]] = Kernel(
            found[1], params, body.registers, body.shared, body.shared_bytes, constants,
            body.blocks, body.labels,
        )  # fmt: skip
    return kernels

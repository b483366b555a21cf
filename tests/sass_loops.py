"""NVIDIA machine code (the text of `cuobjdump -sass`): its innermost loops, and what they spill."""

import re

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\S*\s.*?(0x[0-9a-f]+)")


def innermost_loops(text: str) -> list[list[str]]:
    """The instructions from a target to the branch back to it, where no other such lies inside."""
    code = [(int(m[1], 16), m[2].strip()) for m in INSTRUCTION.finditer(text)]
    place = {address: i for i, (address, _) in enumerate(code)}
    loops = []
    for i, (address, instruction) in enumerate(code):
        branch = BRANCH.search(instruction)
        if branch and int(branch[1], 16) < address:
            loops.append((place[int(branch[1], 16)], i))
    inner = (
        (a, b) for a, b in loops if not any((a, b) != o and a <= o[0] and o[1] <= b for o in loops)
    )
    return [[instruction for _, instruction in code[a : b + 1]] for a, b in inner]


def spills_in_loops(text: str) -> int:
    """Loads from and stores to a thread's stack in innermost loops."""
    loops = innermost_loops(text)
    return sum(bool(re.search(r"\b(LDL|STL)\b", one)) for loop in loops for one in loop)

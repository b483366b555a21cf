"""Leaves out, one at a time, the instructions in which an emulated kernel's threads wait.

    survivors(kernel, run)   # those without which run() does as well

Of a kernel that waits where it must and nowhere else, none survives.
"""

from emulator.machine import Deadlock
from emulator.memory import MemoryFault
from emulator.parse import Kernel

WAITS = ("bar.sync", "barrier.sync", "barrier.cluster", "cp.async.wait", "cp.async.commit")


def executed(kernel: Kernel) -> list[tuple[int, int]]:
    """(basic block, index) of the waits that the last launches ran."""
    ran = {
        at
        for machine in kernel.machines.values()
        for at, code in enumerate(machine.code)
        if code is not None
    }
    return [
        (at, i)
        for at in sorted(ran)
        for i, one in enumerate(kernel.blocks[at].body)
        if one.opcode.startswith(WAITS)
    ]


def survivors(kernel: Kernel, run) -> list[str]:
    """The waits whose absence run() does not see. run: launches the kernel and compares."""
    kernel.machines.clear()
    run()
    found = []
    for at, i in executed(kernel):
        block = kernel.blocks[at]
        body, is_sync = list(block.body), block.is_sync
        removed, block.is_sync = block.body.pop(i), False
        kernel.machines.clear()
        try:
            run()
            found.append(removed.text)
        except (MemoryFault, Deadlock, AssertionError):
            pass
        finally:
            block.body[:], block.is_sync = body, is_sync
            kernel.machines.clear()
    return found

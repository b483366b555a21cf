"""What the CPU backend keeps between calls, and how to be rid of it (csrc/cpu/scratch.h)."""


def release_scratch() -> int:
    """Give the system the memory that the CPU backend keeps between calls; returns its bytes.

    That is the chunk of logits, the fp32 accumulator of dweight and the GEMMs' panels of earlier
    calls, and their results of 32 MiB and more that nothing holds any longer (dweight after
    `zero_grad`): with what is in use at most 3 GiB, beyond which blocks go back at once. When
    memory is short the system takes the pages by itself (MADV_FREE), but counts them as resident
    until then. Under a limit on mapped memory (`ulimit -d` or `-v`) nothing is kept.
    Without the extension there is nothing to give. A GPU has `torch.cuda.empty_cache()`.
    """
    try:
        from pyoffline import _C
    except ImportError:
        return 0
    return _C.release_scratch()

"""Triton kernels on an emulated GPU (tests/emulator), called one by one with the library's own
configurations; test_emulated_gpu.py starts a process for each file and compute capability.
"""

import os

if "PYOFFLINE_EMULATE" not in os.environ:
    collect_ignore_glob = ["test_*.py"]
else:
    from emulator.triton_driver import install

    install(int(os.environ["PYOFFLINE_EMULATE"]))

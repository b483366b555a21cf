"""Benchmarks of the losses against the bare matrix products (the floor), plain PyTorch and peers.

`pyoffline bench` is the entry (`cli.py`). One timer, one list of shapes, one module per op, peers
as providers. Nothing here is imported by the library.
"""

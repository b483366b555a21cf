"""Values that a context manager overrides for its block: chunk plan and backend.

A context variable, and beside it torch's own thread-local state. For on a GPU a backward runs in a
thread of autograd's, and with it what `torch.utils.checkpoint` recomputes and what a compiled graph
reads when it runs: that thread has no context variables of the caller, but torch gives it the
caller's state. Not here: what is overridden (`plan.py`, `backends.py`).
"""

import contextlib
import contextvars
import threading

import torch


class Override:
    """One value, `default` outside every block."""

    def __init__(self, name: str, default):
        self.default = default
        self._key = f"pyoffline_{name}"
        self._var = contextvars.ContextVar(self._key, default=None)

    def get(self):
        """The innermost value, in autograd's threads that of the caller of the backward."""
        found = self._var.get()
        if found is None:
            found = self._of_caller()
        return self.default if found is None else found[0]

    def _of_caller(self) -> tuple | None:
        if not torch._C._is_key_in_tls(self._key):
            return None
        found = torch._C._get_obj_in_tls(self._key)
        # in the thread that entered the block the context variable decides (other asyncio tasks)
        return None if found is None or found[1] == threading.get_ident() else found

    @contextlib.contextmanager
    def set(self, value):
        """Context manager: `value` inside the block."""
        found, before = (value, threading.get_ident()), None
        if torch._C._is_key_in_tls(self._key):
            before = torch._C._get_obj_in_tls(self._key)
        token = self._var.set(found)
        torch._C._stash_obj_in_tls(self._key, found)
        try:
            yield
        finally:
            self._var.reset(token)
            torch._C._stash_obj_in_tls(self._key, before)

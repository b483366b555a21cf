"""A fingerprint of what is compiled: it changes where the compiler's input changes, and only there.

The input: the text of a kernel and of every device function that it can reach, without comments,
docstrings and layout; the constants of their modules; types, constants and alignments of the
arguments; the launch's options. Triton's own hash holds line numbers too. Paths, the Python version
and Triton's do not take part: the table names the Triton that it is of.
"""

import ast
import functools
import hashlib
import inspect
import textwrap
import types

import triton
from triton.runtime.jit import JITFunction

# Fields of a syntax tree that say nothing, or that some Python versions lack.
SILENT = {"ctx", "kind", "type_comment", "type_params", "decorator_list"}


def plain(node):
    """A syntax tree as tuples, without places, comments and docstrings."""
    if isinstance(node, list):
        return tuple(plain(x) for x in node)
    if not isinstance(node, ast.AST):
        return repr(node)
    values = {k: getattr(node, k) for k in node._fields if k not in SILENT}
    if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
        values["body"] = node.body[1:]
    return (type(node).__name__, *(plain(x) for x in values.values()))


def reached(kernel: JITFunction) -> dict:
    """Full name -> what it is, of each device function and each module constant in sight of the
    kernel, whatever its constexprs choose.
    """
    found = {}

    def note(name: str, value) -> None:
        value = getattr(value, "value", value)  # of a tl.constexpr
        if isinstance(value, JITFunction):
            add(value)
        elif isinstance(value, (bool, int, float, str)):
            found[name] = repr(value)

    def add(function: JITFunction) -> None:
        code, scope = function.fn, function.fn.__globals__
        home = scope["__name__"]
        name = f"{home}.{code.__name__}"
        if name in found:
            return
        tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
        found[name] = plain(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and node.id in scope:
                note(f"{home}:{node.id}", scope[node.id])
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                module = scope.get(node.value.id)
                if isinstance(module, types.ModuleType) and not _is_tritons(module):
                    value = getattr(module, node.attr)
                    note(f"{module.__name__}:{node.attr}", value)

    add(kernel)
    return found


def _is_tritons(module) -> bool:
    return module.__name__.split(".")[0] == triton.__name__


@functools.cache
def _of_text(kernel: JITFunction) -> str:
    return hashlib.sha256(repr(sorted(reached(kernel).items())).encode()).hexdigest()


def fingerprint(kernel: JITFunction, source: tuple[dict, dict, dict], options: dict) -> str:
    """16 hexadecimal digits; source: (signature, constants, attributes)."""
    signature, constants, attrs = source
    fixed = sorted((path, str(value)) for path, value in constants.items())
    parts = (_of_text(kernel), list(signature.items()), fixed, sorted(attrs.items()))
    text = repr((*parts, sorted(options.items())))
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""A per-token objective written once, in plain torch ops, and run fused on every backend.

`fn(t) -> loss` is traced once to `(loss, a, b, c) = (L, dL/dlogp, dL/dentropy, dL/dlse)`; the row
pass hands out its row scalars per chunk, the traced graph runs on those C-vectors, and the
coefficients go back in. Not here: objectives that look at other tokens (a token's loss must depend
on that token only; registration checks it).
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyoffline import checks
from pyoffline.compose import Objective
from pyoffline.objectives import CUSTOM_TERMS, MAX_PARAMS, REGISTRY, Term

_SCALARS = ("logp", "entropy", "lse")
_TOKEN_INPUTS = ("old", "mu", "ref", "adv")
# Samples are negative, as log-probs are; entropies are positive, advantages and lse of both signs.
_MIXED = [-1.0, 1.0, -1.0, 1.0, -1.0, -1.0, -1.0]
_SIGNS = {"entropy": [-1.0], "adv": _MIXED, "lse": _MIXED}


class TokenView:
    """What a custom objective sees: the row inputs, `t.extra[...]` and `t.params` of `custom`."""

    def __init__(self, values: Mapping[str, Tensor], extra: Mapping[str, Tensor], params: "Params"):
        self.__dict__.update(values)
        self.extra = extra
        self.params = params


class Params(dict):
    """Hyper-parameters by attribute or by key."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"custom objective has no parameter {name!r}; it has {sorted(self)}"
            ) from None


class _Recorder:
    """Stands in for the row inputs once, to find which of them the function reads."""

    def __init__(self, n: int, params: Params):
        self._n, self._seen, self.params = n, {}, params
        self.extra = _RecordedExtra(n)

    def __getattr__(self, name):
        if name not in _SCALARS + _TOKEN_INPUTS:
            raise AttributeError(
                f"a custom objective has no input {name!r}; it may read "
                f"{', '.join(_SCALARS + _TOKEN_INPUTS)}, extra[...] and params"
            )
        seen = self.__dict__["_seen"]
        if name not in seen:
            signs = torch.tensor(_SIGNS.get(name, [1.0]), dtype=torch.float64)
            seen[name] = _sample(self.__dict__["_n"], len(name)) * signs
        return seen[name]


class _RecordedExtra(dict):
    def __init__(self, n: int):
        super().__init__()
        self._n = n

    def __missing__(self, name):
        self[name] = _sample(self._n, len(name)).abs()
        return self[name]


def _sample(n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -torch.rand(n, generator=generator, dtype=torch.float64) - 0.25


@dataclass(frozen=True, eq=False)
class _Traced:
    """Traced graphs, one per dtype, and what they read; `number`: its place in CUSTOM_TERMS."""

    name: str
    graphs: dict[torch.dtype, Callable]
    reads: tuple[str, ...]
    extras: tuple[str, ...]
    param_names: tuple[str, ...]
    number: int
    source: tuple[Callable, Callable | None]  # the function and its closed form

    def evaluate(self, params: Tensor, rows, extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Loss and coefs on the [C] vectors of one chunk."""
        tokens = [getattr(rows, n) for n in self.reads]
        for name, value in zip(self.reads, tokens, strict=True):
            if value is None:
                raise ValueError(
                    f"custom objective {self.name!r} reads {name}: not in the TokenBatch"
                )
        args = [rows.logp, rows.entropy, rows.lse, *tokens, *(extras[n] for n in self.extras)]
        graph = self.graphs[rows.logp.dtype]
        loss, *coefs = graph(*args, *params[: len(self.param_names)].unbind())
        guarded = (torch.where(loss != loss, loss, coef) for coef in coefs)
        return {"loss": loss, **dict(zip("abc", guarded, strict=True))}


@dataclass(frozen=True, eq=False)
class CustomObjective(Objective):
    """A registered objective; call it with keywords to change its parameters."""

    traced: _Traced
    params: dict = field(default_factory=dict)

    def __call__(self, **params) -> "CustomObjective":
        unknown = sorted(set(params) - set(self.params))
        if unknown:
            raise TypeError(
                f"custom objective {self.traced.name!r} has no parameter {unknown[0]!r}; "
                f"it has {sorted(self.params)}"
            )
        return replace(self, params={**self.params, **{k: float(v) for k, v in params.items()}})

    def __reduce__(self):
        # by its function: the number is a place in the registry of this process only
        fn = self.traced.source[0]
        named = _look_up(sys.modules.get(fn.__module__), fn.__qualname__)
        if isinstance(named, CustomObjective) and named.traced is self.traced:
            # `@register_objective` left the objective under the function's name
            return _imported, (fn.__module__, fn.__qualname__, self.params)
        return _rebuild, (*self.traced.source, self.params)

    def __deepcopy__(self, memo):
        return self

    def terms(self, has_mu=False):
        return (Term(self.traced.name, 1.0, tuple(self.params.values()), custom=self.traced),)


def _look_up(owner, qualname: str):
    """What a module has under this dotted name, or None."""
    for part in qualname.split("."):
        owner = getattr(owner, part, None)
    return owner


def _imported(module: str, qualname: str, params) -> CustomObjective:
    """Unpickle what a decorator registered: the module's own, with these parameters."""
    return _look_up(importlib.import_module(module), qualname)(**params)


def _rebuild(fn, closed_form, params) -> CustomObjective:
    """Unpickle: trace the function again, in this process."""
    return custom(fn, closed_form=closed_form, **params)


def _split(args, reads, extras, params):
    """Positional arguments of a traced graph -> TokenView."""
    values = dict(zip(_SCALARS + reads, args, strict=False))
    rest = args[len(values) :]
    extra = dict(zip(extras, rest, strict=False))
    named = Params(zip(params, rest[len(extras) :], strict=True))
    return TokenView(values, extra, named)


def _trace(fn, reads, extras, params, example) -> Callable:
    def with_sum(*args):
        loss = fn(_split(args, reads, extras, params))
        return loss.sum(), loss

    def loss_and_coefs(*args):
        grads, (_, loss) = torch.func.grad_and_value(with_sum, (0, 1, 2), has_aux=True)(*args)
        return loss.detach(), *grads

    return make_fx(loss_and_coefs, tracing_mode="symbolic")(*example)


def _check_per_token(fn, name, view, n) -> None:
    loss = fn(view(slice(None)))
    if not isinstance(loss, Tensor) or loss.shape != (n,):
        got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"custom objective {name!r} must return one loss per token, shape [{n}]; got {got}"
        )
    # a prefix misses a running sum, so three tokens out of order are tried too
    for some in (torch.arange(3), torch.tensor([n - 1, 1, n - 3])):
        alone = fn(view(some))
        if alone.shape != some.shape or not torch.allclose(
            alone, loss[some], rtol=1e-9, atol=1e-12, equal_nan=True
        ):
            raise ValueError(
                f"custom objective {name!r} mixes tokens: the loss of three tokens changed when "
                "the others were left out. A token's loss may depend on that token only."
            )


def _check_closed_form(closed_form, traced, name, view, args) -> None:
    got = closed_form(view(slice(None)))
    want = traced(*args)
    if not isinstance(got, (tuple, list)) or len(got) != len(want):
        raise ValueError(
            f"custom objective {name!r}: the closed form returns (loss, dL/dlogp, dL/dentropy, "
            f"dL/dlse), got {len(got) if isinstance(got, (tuple, list)) else type(got).__name__}"
        )
    for label, g, w in zip(("loss", "a", "b", "c"), got, want, strict=True):
        g = torch.as_tensor(g, dtype=w.dtype).expand_as(w)
        if not torch.allclose(g, w, rtol=1e-6, atol=1e-9, equal_nan=True):
            raise ValueError(
                f"custom objective {name!r}: the closed form of {label} differs from autograd by "
                f"{(g - w).abs().max().item():.3e}"
            )


def custom(
    fn: Callable, *, closed_form: Callable | None = None, **params: float
) -> CustomObjective:
    """Make an objective of `fn(t) -> loss [C]`, in plain torch ops on the row scalars of a token.

    `t.logp, t.entropy, t.lse, t.old, t.mu, t.ref, t.adv, t.extra["name"]` are [C] vectors (nats;
    fp32, fp64 for fp64); `params` are floats reached as `t.params.alpha` (0-d tensors at run time).
    Use `.detach()` for stop-gradient. Equivalent PyTorch: `loss = (weights * fn(t)).sum()` with
    autograd through logp, entropy and lse. Memory: vectors of one chunk's rows.

    Args:
        fn: the loss; traced once here, so its name is its name in errors.
        closed_form: optional `(t) -> (loss, dL/dlogp, dL/dentropy, dL/dlse)`, checked against
            autograd and then used.
        params: names and defaults of the hyper-parameters, at most six.

    Raises:
        ValueError: the function mixes tokens, returns another shape, or the closed form differs.
        TypeError: it cannot be traced (a Python branch on a tensor's value).
    """
    with torch.device("cpu"):  # where it is traced and tried, whatever the default device is
        return _custom(fn, closed_form, params)


def _custom(fn, closed_form, params) -> CustomObjective:
    name = getattr(fn, "__name__", "custom")
    if len(params) > MAX_PARAMS:
        raise ValueError(
            f"custom objective {name!r}: at most {MAX_PARAMS} parameters, got {len(params)}"
        )
    params = {k: float(v) for k, v in params.items()}
    n = 7
    tensors = Params({k: torch.tensor(v, dtype=torch.float64) for k, v in params.items()})
    recorder = _Recorder(n, tensors)
    fn(recorder)
    seen = recorder.__dict__["_seen"]
    reads = tuple(x for x in _TOKEN_INPUTS if x in seen)
    extras = tuple(checks.gate_name(x) for x in recorder.extra)
    args = [getattr(recorder, s) for s in _SCALARS] + [seen[r] for r in reads]
    args += [recorder.extra[x] for x in extras] + list(tensors.values())

    def view(rows):
        cut = [a[rows] if a.dim() else a for a in args]
        return _split(cut, reads, extras, tuple(params))

    _check_per_token(fn, name, view, n)
    graphs = {}
    for dtype in (torch.float32, torch.float64):
        example = [a.to(dtype) for a in args]
        try:
            graphs[dtype] = _trace(fn, reads, extras, tuple(params), example)
        except Exception as error:
            raise TypeError(
                f"custom objective {name!r} cannot be traced: {str(error).splitlines()[0]} "
                "Use torch.where instead of a Python `if` on a tensor."
            ) from error
    if closed_form is not None:
        _check_closed_form(closed_form, graphs[torch.float64], name, view, args)
        graphs = dict.fromkeys(
            graphs, lambda *a: closed_form(_split(a, reads, extras, tuple(params)))
        )
    number, source = len(CUSTOM_TERMS), (fn, closed_form)
    traced = _Traced(name, graphs, reads, extras, tuple(params), number, source)
    CUSTOM_TERMS.append(traced)
    return CustomObjective(traced, params)


def register_objective(fn: Callable | None = None, *, closed_form=None, **params: float):
    """Decorator: `custom`, and configuration files can then name it by the function's name.

        @po.register_objective(alpha=0.5)
        def my_power(t):
            return -t.adv * torch.exp(t.params.alpha * (t.logp - t.mu))

        out = po.linear_policy_loss(hidden, head, tokens, my_power(alpha=0.3))

    Arguments and errors as `custom`; ValueError for a name that is taken.
    """
    if fn is None:
        return lambda f: register_objective(f, closed_form=closed_form, **params)
    if fn.__name__ in REGISTRY:
        raise ValueError(f"an objective named {fn.__name__!r} exists already; choose another name")
    objective = custom(fn, closed_form=closed_form, **params)
    REGISTRY[fn.__name__] = objective
    return objective


def ShapedIS(f: Callable[[Tensor], Tensor]) -> CustomObjective:  # noqa: N802  an objective's name
    """`-f(w).detach() * A * l`, coef -f(w) A, for any elementwise f of w = exp(l-mu).

    `ShapedIS(lambda w: w.clamp(0, 1))` is `TruncatedIS()`; f = identity has the gradient of
    `ImportanceSampling`.
    """

    def shaped_is(t):
        shaped = f(torch.exp(t.logp.detach() - t.mu)) * t.adv
        return -torch.where(t.adv == 0, 0.0, shaped) * t.logp

    return custom(shaped_is)

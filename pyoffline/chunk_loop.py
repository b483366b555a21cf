"""The fused linear loss head: a loop over chunks of rows, the same for every backend.

Per chunk: logits GEMM, row pass (logits become dlogits in place), dhidden GEMM, dweight GEMM
accumulated in fp32. Rows that do not count are compacted away first. A backend supplies the steps
as `Kernels`. Not here: autograd, checks of user input.
"""

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pyoffline.calls import LinearCall, LinearResult, RowOutputs, Rows, stats_dtype
from pyoffline.plan import plan_chunks


class Kernels(Protocol):
    """What a backend must provide; tensors are [C, V], [C, D] or [V, D], contiguous unless said."""

    device: str
    # The kernels report bad labels themselves and `scale` may be a number on the device: the host
    # asks the device for one thing only, the number of rows that count, and not if it is known.
    asynchronous: bool

    def buffer(self, rows: int, vocab: int, dtype: torch.dtype, device) -> Tensor: ...

    def logits(self, call: LinearCall, hidden: Tensor, adapter: Tensor | None, out: Tensor) -> None:
        """out[:] = hidden @ weight^T (+ adapter @ adapter_weight^T), rounded once."""

    def row_pass(
        self, logits: Tensor, rows: Rows, out: RowOutputs, grad: torch.dtype | None, scale
    ) -> Tensor | None:
        """Fill `out`; with `grad` return dlogits * scale in that dtype, over the logits or not."""

    def fold(
        self, call: LinearCall, hidden: Tensor, rows: Rows, out: RowOutputs, exps: Tensor
    ) -> Tensor | None:
        """Logits and row pass of a chunk in one: fill `out`, and `exps` so that dlogits =
        F[:, None] * exps, and return F [C] fp32; None, and nothing done, where that cannot be.
        """

    def score(self, call: LinearCall, hidden: Tensor, rows: Rows, out: RowOutputs) -> bool:
        """Fill `out` for all rows at once without storing logits; False where that cannot be."""

    def dhidden(self, dlogits: Tensor, weight: Tensor, spare: "Spare | None" = None) -> Tensor:
        """[C, D] fp32 (fp64) = dlogits @ weight. `spare`: of this weight's gradient."""

    def add_dweight(self, dlogits: Tensor, hidden: Tensor, grad: "WeightGrad", last: bool) -> None:
        """grad += dlogits^T @ hidden; on the last chunk scale and cast into grad.out."""

    def column_sum(self, dlogits: Tensor, out: Tensor) -> None:
        """out[V] += sum over rows."""

    def weighted_sum(self, loss: Tensor, weights: Tensor | None) -> Tensor: ...

    def empty(self, shape, dtype: torch.dtype, device) -> Tensor:
        """Memory of a result, the user's for as long as something holds it."""

    def scratch(self, shape, dtype: torch.dtype, device) -> Tensor:
        """Memory for the call itself: no result holds on to it."""


class NoShortcuts:
    """Of a backend whose logits are always stored, and then passed over row by row."""

    def fold(self, call, hidden, rows, out, exps):
        return None

    def score(self, call, hidden, rows, out):
        return False


def grad_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp16 gradients stay fp32 until the upstream gradient (a loss scale) is applied."""
    return torch.float32 if dtype == torch.float16 else dtype


@dataclass
class Spare:
    """Memory of a result that only the last chunk writes: until then a backend may keep there what
    every chunk's product reads, such as the weight packed for it.
    """

    memory: Tensor
    is_filled: bool = False


# Chunks added to one fp32 accumulator before it joins the total: two levels keep the error of 1,024
# chunks at that of one (PROMISES N8). Only fp32 needs it, whose result has no rounding to hide in.
CHUNKS_PER_LEVEL = 32


class WeightGrad:
    """A [V, D] gradient in the making: written at once for one chunk, else by an fp32 accumulator.

    An fp32 gradient is its own accumulator up to `CHUNKS_PER_LEVEL` chunks and the total of several
    accumulations beyond.
    """

    def __init__(self, k: Kernels, weight: Tensor, chunks: int, scale: float | Tensor):
        self.scale = scale
        self.first = True
        self.count = 0
        self.out = k.empty(weight.shape, grad_dtype(weight.dtype), weight.device)
        total = stats_dtype(weight.dtype)
        own = self.out.dtype == total
        self.two_level = own and chunks > CHUNKS_PER_LEVEL
        if own and not self.two_level:
            self.acc = self.out
        else:
            self.acc = k.scratch(weight.shape, total, weight.device) if chunks > 1 else None
        self.spare = Spare(self.out) if chunks > 1 and not own else None

    def add(self, k: Kernels, dlogits: Tensor, source: Tensor, last: bool) -> None:
        """Add one chunk; the last one scales and rounds into `out`."""
        k.add_dweight(dlogits, source, self, last and not self.two_level)
        if last:
            self.spare = None
        self.first = False
        self.count += 1
        if self.two_level and (last or self.count % CHUNKS_PER_LEVEL == 0):
            join = self.out.copy_ if self.count <= CHUNKS_PER_LEVEL else self.out.add_
            join(self.acc)
            self.first = True
            if last and not is_one(self.scale):
                self.out.mul_(self.scale)

    def rescale(self, factor: float, scale: float) -> None:
        """Multiply what is accumulated by `factor`, a power of two, and end with `scale`."""
        self.scale = scale
        if factor != 1.0 and self.count:
            self.acc.mul_(factor)
            if self.two_level and self.count >= CHUNKS_PER_LEVEL:
                self.out.mul_(factor)


def is_one(scale: float | Tensor) -> bool:
    """Whether a scale is known to be 1, without asking a device."""
    return not isinstance(scale, Tensor) and scale == 1.0


def power_of_two_scale(rows: Rows, dtype: torch.dtype, asynchronous: bool = False):
    """The power of two that brings the largest weight to [1, 2); fp16 only, against underflow.

    A float, or with `asynchronous` a number on the device.
    """
    if dtype != torch.float16:
        return 1.0
    if asynchronous:
        return _scale_on_device(rows)
    top = 1.0
    for factor in (rows.weights, rows.coefs):
        if factor is not None and factor.numel():
            finite = torch.where(factor.isfinite(), factor.abs(), 0.0)
            top *= finite.max().item()
    return 2.0 ** -max(-100, min(100, math.floor(math.log2(top)))) if top > 0 else 1.0


def _scale_on_device(rows: Rows) -> Tensor:
    counted = rows.counts()
    top = torch.ones((), dtype=torch.float32, device=counted.device)
    for factor in (rows.weights, rows.coefs):
        if factor is not None and factor.numel():
            read = factor.isfinite() & counted
            top = top * torch.where(read, factor.abs(), 0.0).max().float()
    exponent = torch.frexp(top).exponent.clamp(-99, 101) - 1
    scale = ((127 - exponent) << 23).to(torch.int32).view(torch.float32)
    return torch.where(top > 0, scale, torch.ones_like(scale))


def pad_rows(x: Tensor, rows: int) -> Tensor:
    """x with rows of zeros after its own; x itself where it has as many."""
    if x.shape[0] == rows:
        return x
    padded = x.new_zeros(rows, x.shape[1])
    padded[: x.shape[0]] = x
    return padded


class Gradients:
    """The gradients of one call, filled chunk by chunk."""

    def __init__(self, k: Kernels, call: LinearCall, n: int, chunks: int, scale: float):
        needs, self.k, self.call, self.inverse = call.needs, k, call, 1.0 / scale
        dtype = grad_dtype(call.hidden.dtype)
        dev = call.hidden.device

        def rows_like(x, wanted):
            return k.empty((n, x.shape[1]), dtype, dev) if wanted else None

        self.dhidden = rows_like(call.hidden, needs.hidden)
        self.dadapter_hidden = rows_like(call.adapter_hidden, needs.adapter_hidden)
        self.dweight = WeightGrad(k, call.weight, chunks, self.inverse) if needs.weight else None
        self.dadapter_weight = (
            WeightGrad(k, call.adapter_weight, chunks, self.inverse)
            if needs.adapter_weight
            else None
        )
        total = stats_dtype(call.hidden.dtype)
        vocab = call.weight.shape[0]
        self.dbias = torch.zeros(vocab, dtype=total, device=dev) if needs.bias else None

    def add(
        self, dlogits: Tensor, x: Tensor, adapter: Tensor | None, span, last: bool, factor=None
    ) -> None:
        """One chunk; `factor` [C]: its gradient is factor[:, None] * dlogits."""
        k, call = self.k, self.call
        start, stop = span
        pairs = (
            (self.dhidden, call.weight, self.dweight),
            (self.dadapter_hidden, call.adapter_weight, self.dadapter_weight),
        )
        for out, weight, grad in pairs:  # before the weights' gradients: they end what is spare
            if out is not None:
                spare = None if grad is None else grad.spare
                part = k.dhidden(dlogits, weight, spare)[: stop - start]
                part = part if factor is None else part.mul_(factor[:, None])
                self.put(out, part if is_one(self.inverse) else part * self.inverse, span)
        if factor is not None:
            x = (x * factor[:, None]).to(x.dtype)
        for grad, source in ((self.dweight, x), (self.dadapter_weight, adapter)):
            if grad is not None:
                grad.add(k, dlogits, source, last)
        if self.dbias is not None:
            k.column_sum(dlogits, self.dbias)

    def put(self, out: Tensor, part: Tensor, span) -> None:
        """Write the rows of one chunk."""
        out[slice(*span)] = part

    def result(self, loss: Tensor, out: RowOutputs, spread) -> LinearResult:
        if self.dbias is not None and not is_one(self.inverse):
            self.dbias *= self.inverse
        return LinearResult(
            loss,
            out,
            spread(self.dhidden),
            None if self.dweight is None else self.dweight.out,
            self.dbias,
            spread(self.dadapter_hidden),
            None if self.dadapter_weight is None else self.dadapter_weight.out,
        )


def empty_result(call: LinearCall, out: RowOutputs) -> LinearResult:
    """Nothing counts: loss 0 and zero gradients."""

    def zeros(x, wanted):
        return torch.zeros(x.shape, dtype=grad_dtype(x.dtype), device=x.device) if wanted else None

    needs = call.needs
    total = stats_dtype(call.hidden.dtype)
    dbias = call.hidden.new_zeros(call.weight.shape[0], dtype=total) if needs.bias else None
    return LinearResult(
        call.hidden.new_zeros((), dtype=total),
        out,
        zeros(call.hidden, needs.hidden),
        zeros(call.weight, needs.weight),
        dbias,
        zeros(call.adapter_hidden, needs.adapter_hidden),
        zeros(call.adapter_weight, needs.adapter_weight),
    )


def check_labels(labels: Tensor, vocab: int, index: Tensor | None) -> None:
    """CPU: IndexError naming row (of the flattened batch) and value of the first bad label."""
    bad = ((labels < 0) | (labels >= vocab)).nonzero()
    if bad.numel():
        row = int(bad[0])
        at = row if index is None else int(index[row])
        raise IndexError(
            f"labels: row {at} holds {int(labels[row])}, outside [0, {vocab}) and not ignore_index"
        )


def _chosen(k: Kernels, call: LinearCall) -> tuple[Tensor | None, int, LinearCall]:
    """(rows that count, or None for all; how many; the call with what must be masked, masked)."""
    keep, n = call.rows.counts(), call.hidden.shape[0]
    if not k.asynchronous:
        index = None if bool(keep.all()) else keep.nonzero()[:, 0]
        return index, n if index is None else index.numel(), call
    count = call.plan.n_valid
    if count < 0 and call.hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        # a captured graph cannot know: every row is multiplied, a row that does not count as 0
        def zeroed(x):
            return None if x is None else torch.where(keep[:, None], x, 0.0)

        masked = {"hidden": zeroed(call.hidden), "adapter_hidden": zeroed(call.adapter_hidden)}
        if call.rows.temperature is not None:  # that of a row that does not count may be NaN
            temperature = torch.where(keep, call.rows.temperature, 1.0)
            masked["rows"] = replace(call.rows, temperature=temperature)
        return None, n, replace(call, **masked)
    if count < 0:
        count = int(keep.sum())
    elif call.rows.weights is not None:
        # a wrong n_valid would drop or repeat rows: it shows as NaN everywhere
        weights = torch.where(keep.sum() == count, call.rows.weights, float("nan"))
        call = replace(call, rows=replace(call.rows, weights=weights))
    if count == n:
        return None, n, call
    place = torch.where(keep, keep.cumsum(0) - 1, count).clamp(max=count)
    index = torch.zeros(count + 1, dtype=torch.int64, device=keep.device)
    index.scatter_(0, place, torch.arange(n, device=keep.device))
    return index[:count], count, call


def run_linear(k: Kernels, call: LinearCall) -> LinearResult:
    """Loss, row statistics and the wanted gradients of one fused linear call."""
    if call.loop is not None:
        return call.loop(k, call)
    n, vocab = call.hidden.shape[0], call.weight.shape[0]
    stats = stats_dtype(call.hidden.dtype)
    out = RowOutputs.zeros(n, stats, call.hidden.device, call.wants_coefs)
    index, count, call = _chosen(k, call)
    if count == 0:
        return empty_result(call, out)

    def gather(x):
        return x if index is None or x is None else x.index_select(0, index)

    rows = call.rows.map(gather)
    if not k.asynchronous:
        check_labels(rows.labels, vocab, index)
    hidden, adapter = gather(call.hidden), gather(call.adapter_hidden)
    part = out.map(lambda v: v if index is None else v[..., :count].clone())
    if not call.needs.any and k.score(call, hidden, rows, part):
        loss = k.weighted_sum(part.loss, rows.weights)
        return LinearResult(loss, part.map(lambda x: _spread(x, index, n, -1)))
    nbytes = call.logits_dtype.itemsize + call.beside
    plan = plan_chunks(count, vocab, nbytes, call.plan, k.device)
    scale = power_of_two_scale(rows, call.hidden.dtype, k.asynchronous)
    bounds = plan.bounds
    grads = Gradients(k, call, count, len(bounds), scale)
    grad = call.hidden.dtype if call.needs.any else None
    height = plan.rows if plan.padded else min(plan.rows, count)
    buffer = k.buffer(height, vocab, call.logits_dtype, hidden.device)
    for start, stop in bounds:
        size = stop - start
        x, u = hidden[start:stop], None if adapter is None else adapter[start:stop]
        if plan.padded:
            x, u = pad_rows(x, height), None if u is None else pad_rows(u, height)
        logits = buffer[: x.shape[0]]
        cut = slice(start, stop)
        chunk = rows.map(lambda v, cut=cut: v[cut])
        results = part.map(lambda v, cut=cut: v[..., cut])
        dlogits, factor = logits, None
        if grad is not None:
            factor = k.fold(call, x, chunk, results, logits)
        if factor is None:
            k.logits(call, x, u, logits)
            logits[size:].zero_()
            dlogits = k.row_pass(logits, chunk, results, grad, scale)
        if dlogits is not None:
            grads.add(dlogits, x, u, (start, stop), stop == count, factor)
    loss = k.weighted_sum(part.loss, rows.weights)
    return grads.result(
        loss,
        part.map(lambda x: _spread(x, index, n, -1)),
        lambda x: _spread(x, index, n, 0),
    )


def _spread(x: Tensor | None, index: Tensor | None, n: int, dim: int) -> Tensor | None:
    """Compacted rows back to their places among `n`; the others are 0."""
    if x is None or index is None:
        return x
    shape = list(x.shape)
    shape[dim] = n
    return torch.zeros(shape, dtype=x.dtype, device=x.device).index_copy_(dim, index, x)

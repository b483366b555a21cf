"""The fused linear loss head for coupled objectives: chunks cut at unit borders.

Where a unit (sequence, pair, group, batch) fits a chunk its logits are still in the buffer when its
coefficients become known: three GEMMs, as for a token-local objective, and one more read of the
chunk. A longer unit takes a pass for its statistics and another for its gradients (four GEMMs),
over the rows whose coefficient is not 0. With a frozen head u_t = dlogp_t/dhidden_t is formed in
the first pass and dhidden_t = a_t u_t: two GEMMs always. Not here: the objectives, the kernels.
"""

from dataclasses import replace

import torch
from torch import Tensor

from pyoffline.calls import LinearCall, LinearResult, Needs, RowOutputs, stats_dtype
from pyoffline.chunk_loop import (
    Gradients,
    Kernels,
    check_labels,
    empty_result,
    pad_rows,
    power_of_two_scale,
)
from pyoffline.coupled_program import Evaluated, evaluate_units, logp_only, metric_names, reads_gap
from pyoffline.coupled_units import CoupledInputs, Units
from pyoffline.plan import Block, UnitPlan, plan_units

_HIDDEN_ONLY = Needs(hidden=True)


class _RowGradients(Gradients):
    """Gradients whose rows go where the call has them, under a scale that may shrink on the way.

    fp16 only: the scale follows the largest coefficient seen, and what is accumulated follows it.
    Both are powers of two, so nothing is rounded.
    """

    def __init__(self, k: Kernels, call: LinearCall, chunks: int):
        super().__init__(k, call, call.hidden.shape[0], chunks, 1.0)
        for x in (self.dhidden, self.dadapter_hidden):
            if x is not None:
                x.zero_()
        self.scale, self.pick = None, slice(None)

    def put(self, out: Tensor, part: Tensor, span) -> None:
        out[self.pick] = part.to(out.dtype)

    def rescale(self, coefs: Tensor, rows) -> float:
        """The scale for a chunk with these coefficients."""
        dtype = self.call.hidden.dtype
        if dtype == torch.float16 and not bool((coefs != 0).any()):
            return 1.0 if self.scale is None else self.scale
        wanted = power_of_two_scale(replace(rows, coefs=coefs), dtype)
        if self.scale is None or wanted < self.scale:
            factor = 1.0 if self.scale is None else wanted / self.scale
            self.scale, self.inverse = wanted, 1.0 / wanted
            for grad in (self.dweight, self.dadapter_weight):
                if grad is not None:
                    grad.rescale(factor, self.inverse)
            if self.dbias is not None:
                self.dbias *= factor
        return self.scale


class _Loop:
    """One call: its units, its plan, and what is filled on the way."""

    def __init__(self, k: Kernels, call: LinearCall, units: Units, out: RowOutputs):
        self.k, self.call, self.units, self.out = k, call, units, out
        vocab, itemsize = call.weight.shape[0], call.logits_dtype.itemsize
        sizes = units.layout.rows
        self.plan: UnitPlan = plan_units(sizes, vocab, itemsize, call.plan, k.device)
        parts = [p for b in self.plan.blocks for p in self.plan.parts(b)]
        self.grads = _RowGradients(k, call, len(parts))
        tallest = max(stop - start for start, stop in parts)
        self.height = self.plan.rows if self.plan.padded else tallest
        self.buffer = k.buffer(self.height, vocab, call.logits_dtype, call.hidden.device)
        self.grad = call.hidden.dtype if call.needs.any else None
        codes = units.inputs.codes
        self.frozen = call.needs == _HIDDEN_ONLY and logp_only(codes)
        self.loss = torch.zeros((), dtype=torch.float64, device=call.hidden.device)
        self.metrics = self.loss.new_zeros(2, len(metric_names(codes)))

    def rows_of(self, x: Tensor | None, pick) -> Tensor | None:
        if x is None:
            return None
        x = x[pick] if isinstance(pick, slice) else x.index_select(0, pick)
        return pad_rows(x, self.height) if self.plan.padded else x

    def pick(self, start: int, stop: int):
        """Where these rows lie in the call."""
        layout = self.units.layout
        return slice(start, stop) if layout.natural else layout.order[start:stop]

    def logits(self, pick, size: int):
        """The logits of these rows in the buffer, with the hidden rows that made them."""
        call = self.call
        x, u = self.rows_of(call.hidden, pick), self.rows_of(call.adapter_hidden, pick)
        logits = self.buffer[: x.shape[0]]
        self.k.logits(call, x, u, logits)
        logits[size:].zero_()
        return logits, x, u

    def scratch(self, size: int) -> RowOutputs:
        kind, device = self.out.logps.dtype, self.out.logps.device
        return RowOutputs.zeros(size, kind, device)

    def statistics(self, logits: Tensor, start: int, stop: int) -> None:
        rows = self.units.rows.map(lambda v: v[start:stop])
        out = self.out.map(lambda v: v[..., start:stop])
        self.k.row_pass(logits, rows, out, None, 1.0)

    def gradient(self, made, pick, rows, coefs: Tensor, last: bool) -> None:
        """From the logits in the buffer and the coefficients of these rows to every gradient."""
        logits, x, u = made
        size = coefs.shape[1]
        coefs = coefs.to(self.out.logps.dtype)
        scale = self.grads.rescale(coefs, rows)
        rows = replace(rows, coefs=coefs)
        dlogits = self.k.row_pass(logits, rows, self.scratch(size), self.grad, scale)
        self.grads.pick = pick
        self.grads.add(dlogits, x, u, (0, size), last)

    def evaluate(self, block: Block, sequences: slice) -> Evaluated:
        span = slice(block.start, block.stop)
        stats = self.out.map(lambda v: v[..., span])
        units = self.units
        c = units.coupled(span, sequences, stats)
        omega = {kind: x[sequences] for kind, x in units.omega.items()}
        gap = None if stats.gap is None else stats.gap.double()
        inputs = units.inputs
        got = evaluate_units(inputs.codes, inputs.hyper, c, omega, gap)
        self.loss = self.loss + got.loss
        self.metrics = self.metrics + got.metrics
        return got

    def short(self, block: Block, sequences: slice, last: bool) -> None:
        """Whole units in one chunk: three GEMMs."""
        pick, size = self.pick(block.start, block.stop), block.stop - block.start
        made = self.logits(pick, size)
        self.statistics(made[0], block.start, block.stop)
        coefs = self.evaluate(block, sequences).coefs
        if self.grad is not None:
            rows = self.units.rows.map(lambda v: v[block.start : block.stop])
            self.gradient(made, pick, rows, coefs, last)

    def long(self, block: Block, sequences: slice, last: bool) -> None:
        """One unit in several chunks: statistics first, then the logits again where needed."""
        if self.frozen:
            self.long_frozen(block, sequences)
            return
        for start, stop in self.plan.parts(block):
            made = self.logits(self.pick(start, stop), stop - start)
            self.statistics(made[0], start, stop)
        coefs = self.evaluate(block, sequences).coefs
        if self.grad is None:
            return
        live = (coefs != 0).any(0).nonzero()[:, 0]
        coefs, place = coefs[:, live], live + block.start
        # by the buffer's height: equal chunks of fewer rows may be taller than the unit's own were
        parts = self.plan.split(0, live.numel(), self.height) if live.numel() else []
        for start, stop in parts:
            at = place[start:stop]
            pick = self.units.layout.order[at]
            made = self.logits(pick, stop - start)
            rows = self.units.rows.map(lambda v, at=at: v[at])
            final = last and stop == live.numel()
            self.gradient(made, pick, rows, coefs[:, start:stop], final)
        if last and not parts:
            self.close()

    def close(self) -> None:
        """The last chunk had no row with a gradient: a row of zeros ends the accumulation."""
        zeros = self.call.hidden.new_zeros(1, self.call.weight.shape[0])
        pairs = (
            (self.grads.dweight, self.call.hidden),
            (self.grads.dadapter_weight, self.call.adapter_hidden),
        )
        for grad, source in pairs:
            if grad is not None:
                grad.add(self.k, zeros, source.new_zeros(1, source.shape[1]), True)

    def long_frozen(self, block: Block, sequences: slice) -> None:
        """u = dlogp/dhidden in the pass that gives the statistics, then dhidden = a u."""
        one = self.out.logps.new_zeros(4, self.height)
        one[0] = 1.0
        for start, stop in self.plan.parts(block):
            pick = self.pick(start, stop)
            made = self.logits(pick, stop - start)
            rows = self.units.rows.map(lambda v, s=start, e=stop: v[s:e])
            rows = replace(rows, coefs=one[:, : stop - start])
            out = self.out.map(lambda v, s=start, e=stop: v[..., s:e])
            dlogits = self.k.row_pass(made[0], rows, out, self.grad, 1.0)
            part = self.k.dhidden(dlogits, self.call.weight)[: stop - start]
            self.grads.pick = pick
            self.grads.put(self.grads.dhidden, part, None)
        a = self.evaluate(block, sequences).coefs[0]
        for start, stop in self.plan.parts(block):
            pick = self.pick(start, stop)
            factor = a[start - block.start : stop - block.start, None]
            u = self.grads.dhidden[pick].to(factor.dtype)
            u = torch.where(factor == 0, 0.0, factor * u)
            self.grads.dhidden[pick] = u.to(self.grads.dhidden.dtype)

    def run(self) -> LinearResult:
        sequence = 0
        counts = self.units.layout.sequences
        for i, block in enumerate(self.plan.blocks):
            held = sum(counts[slice(*block.units)])
            sequences = slice(sequence, sequence + held)
            sequence += held
            step = self.short if block.fits else self.long
            step(block, sequences, i == len(self.plan.blocks) - 1)
        result = self.grads.result(self.loss.to(self.out.logps.dtype), self.spread(), lambda x: x)
        return replace(result, metrics=mean_metrics(self.metrics))

    def spread(self) -> RowOutputs:
        """The statistics where the call has their rows, 0 elsewhere."""
        layout, n = self.units.layout, self.call.hidden.shape[0]
        if layout.natural:
            return self.out
        return self.out.map(lambda x: x.new_zeros(n).index_copy_(0, layout.order, x))


def mean_metrics(metrics: Tensor) -> Tensor:
    """[2, M] sums and counts -> [M] means, 0 where nothing was counted."""
    return metrics[0] / metrics[1].clamp(min=1.0)


def run_coupled(k: Kernels, call: LinearCall, inputs: CoupledInputs) -> LinearResult:
    """`run_linear` for a program with coupled terms. `call.rows` carries no codes of its own."""
    units = Units(call.rows, inputs)
    stats, device = stats_dtype(call.hidden.dtype), call.hidden.device
    if units.count == 0:
        n = call.hidden.shape[0]
        empty = empty_result(call, RowOutputs.zeros(n, stats, device))
        none = torch.zeros(len(metric_names(inputs.codes)), dtype=torch.float64, device=device)
        return replace(empty, metrics=none)
    index = None if units.layout.natural else units.layout.order
    check_labels(units.rows.labels, call.weight.shape[0], index)
    out = RowOutputs.zeros(units.count, stats, device, gap=reads_gap(inputs.codes))
    return _Loop(k, call, units, out).run()

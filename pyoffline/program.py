"""A composed objective as flat data: what kernels, custom ops and torch.compile can carry.

`compile_terms` turns a composed objective into integer triples (static structure) and an fp64
tensor of hyper-parameters (runtime values, so that twenty values of beta are one compile).
`evaluate` runs a program on vectors of row scalars in plain PyTorch: the reference backend, and
every backend when a custom Python term takes part. Not here: chunks, logits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyoffline.coupled import common_unit
from pyoffline.coupled_table import COUPLED, COUPLED_OF_CODE, MASKS
from pyoffline.objectives import ANCHORS, CUSTOM_TERMS, ROW_OF_CODE, TABLE, Term
from pyoffline.records import SEQUENCE_FIELDS

CUSTOM_CODE = 0
HYPER_COLUMNS = 8  # scale, six parameters, one spare: a row is one cache line
_ANCHOR_NAMES = {number: name for name, number in ANCHORS.items()}
_TOKEN_INPUTS = ("old", "mu", "ref", "adv")
_WRT = {"logp": "a", "entropy": "b", "lse": "c", "gap": "e"}


@dataclass(frozen=True, eq=False)
class Program:
    """Flat form of an objective.

    `codes`: (code, gate, anchor) per term (for a custom term the anchor is its registry number, for
    a mask the number of terms that follow and are masked); `hyper`: fp64 [K, 8] on the CPU, scale
    then parameters; `gates`: names of the extra tensors, in gate order; `reads`: the token inputs
    read. `sequence_reads`: the sequence inputs; `optional` and `one_of` as in CoupledRow, of both
    kinds.
    """

    codes: tuple[int, ...]
    hyper: Tensor
    gates: tuple[str, ...]
    reads: frozenset[str]
    needs_adv: bool
    sequence_reads: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    one_of: tuple[tuple[str, ...], ...] = ()

    @property
    def coupled(self) -> tuple:
        """The coupled rows and masks of this program, in order; empty for a token-local one."""
        return coupled_rows(self.codes)


def coupled_rows(codes) -> tuple:
    """The coupled rows among (code, gate, anchor) triples."""
    return tuple(COUPLED_OF_CODE[code] for code in codes[0::3] if code in COUPLED_OF_CODE)


def unit_of(codes) -> str:
    """What must be whole before any coefficient of this program is known."""
    return common_unit(row.unit for row in coupled_rows(codes))


class RowScalars(NamedTuple):
    """What objective functions read of one chunk: [C] vectors, fp32 or fp64; None: not given."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    gap: Tensor
    old: Tensor | None = None
    mu: Tensor | None = None
    ref: Tensor | None = None
    adv: Tensor | None = None


class Coefs(NamedTuple):
    """Per-token loss and its derivatives a, b, c, e in logp, entropy, lse and gap, all [C]."""

    loss: Tensor
    a: Tensor
    b: Tensor
    c: Tensor
    e: Tensor


# `adv` missing means 1 for these rows; every other row that reads it requires it.
_ADV_DEFAULTS_TO_ONE = frozenset({"prob_power"})


def _row(term: Term):
    for table in (TABLE, COUPLED, MASKS):
        if term.row in table:
            return table[term.row]
    raise KeyError(term.row)


def _reads(term: Term) -> set[str]:
    if term.custom is not None:
        return set(term.custom.reads)
    names = set(_row(term).reads)
    if "anchor" in names:
        names.discard("anchor")
        names.add(_ANCHOR_NAMES[term.anchor])
    return names


def _triple(t: Term, gates: list[str]) -> tuple[int, int, int]:
    gate = gates.index(t.gate) if t.gate else -1
    if t.custom is not None:
        return CUSTOM_CODE, gate, t.custom.number
    if t.row in COUPLED and t.gate:
        raise ValueError(
            f"{t.row} couples the tokens of a unit and cannot be weighted per token by "
            f"{t.gate!r}: weigh its sequences (SequenceBatch.weights), or a token-local term"
        )
    return _row(t).code, gate if t.row in TABLE else -1, t.anchor


def compile_terms(terms: tuple[Term, ...]) -> Program:
    """Flatten a list of terms."""
    gates: list[str] = []
    codes: list[int] = []
    reads: set[str] = set()
    needs_adv = False
    for t in terms:
        names = [t.gate] if t.gate else []
        names += list(t.custom.extras) if t.custom is not None else []
        gates += [n for n in names if n not in gates]
        codes += _triple(t, gates)
        term_reads = _reads(t)
        reads |= term_reads
        needs_adv |= "adv" in term_reads and t.row not in _ADV_DEFAULTS_TO_ONE
    hyper = torch.zeros(len(terms), HYPER_COLUMNS, dtype=torch.float64, device="cpu")
    for k, t in enumerate(terms):
        row = [t.scale, *t.params]
        hyper[k, : len(row)] = torch.tensor(row, dtype=torch.float64, device="cpu")
    rows = coupled_rows(codes)
    return Program(
        tuple(codes),
        hyper,
        tuple(gates),
        frozenset(reads & set(_TOKEN_INPUTS)),
        needs_adv,
        frozenset(reads & set(SEQUENCE_FIELDS.values())),
        # a list: Dynamo of torch 2.7 makes no frozenset of a generator
        frozenset([name for row in rows for name in row.optional]),
        tuple(names for row in rows for names in row.one_of),
    )


def _call_row(code: int, anchor: int, params: Tensor, rows: RowScalars) -> tuple[Tensor, Tensor]:
    row = ROW_OF_CODE[code]
    args = {}
    for name in row.reads:
        source = _ANCHOR_NAMES[anchor] if name == "anchor" else name
        value = getattr(rows, source)
        if value is None and source == "adv":
            value = torch.ones_like(rows.logp)
        args[name] = value
    for j, name in enumerate(row.params):
        args[name] = params[j]
    loss, coef = row.fn(**args)
    coef = torch.as_tensor(coef, dtype=loss.dtype, device=loss.device).expand_as(loss)
    return loss, torch.where(loss != loss, loss, coef)


def evaluate(codes, hyper: Tensor, rows: RowScalars, extras: dict[str, Tensor]) -> Coefs:
    """Loss and coefficients of all terms, scaled, gated and added; a gate of 0 is an off switch."""
    gates = list(extras.values())
    zero = torch.zeros_like(rows.logp)
    total = {"loss": zero, "a": zero, "b": zero, "c": zero, "e": zero}
    hyper = hyper.to(rows.logp.dtype)
    scales = hyper[:, 0].tolist()  # on the CPU: no device is asked
    hyper = hyper.to(rows.logp.device)
    for k in range(len(codes) // 3):
        code, gate, anchor = codes[3 * k : 3 * k + 3]
        if scales[k] == 0.0:
            continue
        if code == CUSTOM_CODE:
            parts = CUSTOM_TERMS[anchor].evaluate(hyper[k, 1:], rows, extras)
        else:
            loss, coef = _call_row(code, anchor, hyper[k, 1:], rows)
            parts = {"loss": loss, _WRT[ROW_OF_CODE[code].wrt]: coef}
        factor = hyper[k, 0] if gate < 0 else hyper[k, 0] * gates[gate]
        off = None if gate < 0 else gates[gate] == 0
        for name, value in parts.items():
            value = factor * value
            total[name] = total[name] + (value if off is None else torch.where(off, zero, value))
    return Coefs(**total)

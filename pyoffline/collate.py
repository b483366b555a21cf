"""Samples to one batch of tensors: padded [B, T], or packed [1, T] with position and sequence ids.

Every per-token tensor sits at its token's own position, as labels do in transformers; the trainer
shifts all of them together. Not here: weights (they need all micro-batches of a step), tokenising.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyoffline import teacher_columns
from pyoffline.data import Sample
from pyoffline.units import flatten_units

IGNORE = -100
# Columns that belong to whole sequences -> their names in a batch, each [S].
OF_SEQUENCE = {"reward": "rewards", "label": "targets", "target": "targets"}


@dataclass(frozen=True)
class Collator:
    """`Collator(pad_id)(samples)`: tensors by name, input_ids, labels and the columns in `keep`.

    Items are samples, or tuples of them (`unit` of units.py): a pair's chosen half comes first, all
    chosen before all rejected; `unit_ids` [S] then says which item a sequence came from. Sequence
    columns become `rewards`, `targets`, `group_ids` and (`ref_logps` as one number a row)
    `ref_sums`, each [S].

    Padding is on the right. Another float column becomes [B] (advantages only) or is spread over
    the tokens of the completion; a list column is [B, T], a teacher's top-k [B, T, k], 0 outside
    it. `packing` lays the samples end to end in one row without padding: attention stays inside
    each (transformers reads the restarts of position_ids), and labels at each first token are
    ignored.
    """

    pad_id: int = 0
    keep: frozenset[str] = frozenset()
    packing: bool = False
    unit: str = "row"

    def __call__(self, items: Sequence) -> dict[str, Tensor]:
        samples, unit_ids = flatten_units(items, self.unit)
        batch = {
            "input_ids": self._rows([s.ids for s in samples], self.pad_id, torch.int64),
            "labels": self._rows([_labels(s) for s in samples], IGNORE, torch.int64),
        }
        there = self.keep & set().union(*(s.columns for s in samples))
        for name in sorted(there - {"group"}):
            self._add_column(batch, samples, name)
        if "group" in self.keep:
            batch["group_ids"] = torch.tensor([s.columns["group"] for s in samples])
        if self.unit != "row":
            batch["unit_ids"] = torch.tensor(unit_ids)
        lengths = [len(s.ids) for s in samples]
        if self.packing:
            batch["position_ids"] = torch.cat([torch.arange(n) for n in lengths])[None]
            ids = torch.arange(len(samples))
            batch["sequence_ids"] = ids.repeat_interleave(torch.tensor(lengths))[None]
        else:
            width = max(lengths)
            batch["attention_mask"] = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        return batch

    def _add_column(self, batch: dict, samples: list[Sample], name: str) -> None:
        values = [s.columns.get(name) for s in samples]
        scalar = all(not isinstance(v, list) for v in values)
        if name in OF_SEQUENCE:
            batch[OF_SEQUENCE[name]] = torch.tensor([float(v) for v in values])
        elif name == "ref_logps" and scalar:
            batch["ref_sums"] = torch.tensor([float(v) for v in values])
        elif name in teacher_columns.COLUMNS:
            batch[name] = (
                teacher_columns.packed(samples, name)
                if self.packing
                else teacher_columns.padded(samples, name, batch["input_ids"].shape[1])
            )
        elif name == "advantages" and scalar and not self.packing:
            batch[name] = torch.tensor([float(v) for v in values])
        else:
            batch[name] = self._rows([_spread(s, name) for s in samples], 0.0, torch.float32)

    def _rows(self, rows: list[list], fill, dtype) -> Tensor:
        if self.packing:
            return torch.tensor([x for row in rows for x in row], dtype=dtype)[None]
        out = torch.full((len(rows), max(map(len, rows))), fill, dtype=dtype)
        for i, row in enumerate(rows):
            out[i, : len(row)] = torch.tensor(row, dtype=dtype)
        return out


def _labels(sample: Sample) -> list[int]:
    start = max(sample.n_prompt, 1)  # nothing predicts the first token
    return [IGNORE] * start + sample.ids[start:]


def _spread(sample: Sample, name: str) -> list[float]:
    value = sample.columns[name]
    values = value if isinstance(value, list) else [float(value)] * sample.n_completion
    return [0.0] * sample.n_prompt + values

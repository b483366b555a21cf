"""OfflineConfig: transformers.TrainingArguments with the fields of this library and defaults that
hide nothing.

Not here: the trainer (trainer.py); what a run needs beside it, model, data and objective
(config.py).
"""

from dataclasses import dataclass

from transformers import TrainingArguments

from pyoffline.aggregate import ALIASES, MODES


@dataclass
class OfflineConfig(TrainingArguments):
    """TrainingArguments plus how losses aggregate. Changed defaults are listed; everything else is
    transformers' own.

    Args:
        aggregation: a mode of `pyoffline.token_weights`, over all micro-batches and ranks of an
            optimiser step. "auto" is what the objective means by default: the mean over tokens, or
            over sequences, pairs or groups for objectives that couple them. Any mode turns a
            coupled objective's weights into the sums of its tokens' weights.
        horizon: the length that modes "constant" and "seq-mean-token-sum-norm" divide by.
        memory_budget_mib: bytes of one logits chunk, in MiB; None takes the library's default.
        backend: the pyoffline backend that computes the loss ("auto", "cpu", "reference", ...).

    Changed: `remove_unused_columns=False` (the objective reads them),
    `logging_nan_inf_filter=False` (a NaN loss is shown), `logging_steps=10`. Refused:
    `label_smoothing_factor` (use `NLL(label_smoothing=)`), `torch_compile`, `auto_find_batch_size`,
    `use_liger_kernel`, and `push_to_hub`, which would send data away.
    """

    aggregation: str = "auto"
    horizon: int | None = None
    memory_budget_mib: int | None = None
    backend: str = "auto"
    remove_unused_columns: bool = False
    logging_nan_inf_filter: bool = False
    logging_steps: float = 10

    def __post_init__(self):
        super().__post_init__()
        known = ("auto", *MODES, *ALIASES)
        if self.aggregation not in known:
            raise ValueError(f"aggregation: {self.aggregation!r} is not one of {', '.join(known)}")
        if self.memory_budget_mib is not None and self.memory_budget_mib < 1:
            raise ValueError(
                f"memory_budget_mib: expected at least 1, got {self.memory_budget_mib}"
            )
        refused = {
            "label_smoothing_factor": "use the objective NLL(label_smoothing=...)",
            "torch_compile": "compile the base model yourself",
            "auto_find_batch_size": "it would change the batch size after a failure",
            "use_liger_kernel": "it replaces the loss head that this trainer replaces",
            "push_to_hub": "upload the finished folder yourself",
        }
        for name, why in refused.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported here: {why}")

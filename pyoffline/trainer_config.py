"""OfflineConfig: transformers.TrainingArguments, our fields, and defaults that hide nothing.

Not here: the trainer (trainer.py); what a run needs beside it, model, data and objective
(config.py).
"""

from dataclasses import dataclass

from transformers import TrainingArguments, integrations

from pyoffline.aggregate import ALIASES, MODES
from pyoffline.backends import NAMES

LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "seed": 0,
    "weight_decay": 0,
    "memory_budget_mib": 1,
    "horizon": 1,
}


@dataclass
class OfflineConfig(TrainingArguments):
    """TrainingArguments plus how losses aggregate; what else changes is listed.

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
        wrong = [*self._choices(), *self._numbers(), *self._reports()]
        if wrong:
            raise ValueError("; ".join(wrong))
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

    def _choices(self):
        """What is wrong with the names."""
        for name, known in (
            ("aggregation", ("auto", *MODES, *ALIASES)),
            ("backend", ("auto", *NAMES)),
        ):
            if getattr(self, name) not in known:
                yield f"{name}: {getattr(self, name)!r} is not one of {', '.join(known)}"
        mode = MODES.get(ALIASES.get(self.aggregation, self.aggregation))
        if mode is not None and mode.horizon and self.horizon is None:
            yield (
                f"horizon: aggregation {self.aggregation} divides by it, and micro-batches have "
                "no common length: give a number of tokens"
            )
        if self.horizon is not None and not (mode is not None and mode.horizon):
            yield f"horizon: aggregation {self.aggregation} divides by none; leave it out"

    def _numbers(self):
        """What is wrong with numbers that transformers takes and that no run survives."""
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                yield f"{name}: expected at least {least}, got {value}"
        if self.max_steps == 0 or self.max_steps < -1:
            yield (
                f"max_steps: expected at least 1, or -1 (num_train_epochs says how long), got "
                f"{self.max_steps}"
            )
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            yield f"num_train_epochs: expected more than 0, got {self.num_train_epochs}"

    def _reports(self):
        """Loggers that are not installed: transformers says so after the data was read."""
        for name in self.report_to:
            there = getattr(integrations, f"is_{name}_available", None)
            if there is not None and not there():
                yield f"report_to: {name} is not installed; install it, or leave it out"

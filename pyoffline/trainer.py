"""OfflineTrainer: transformers.Trainer with `linear_policy_loss` on the base model's output.

The model's own forward, and with it the [N, V] logits, is never run. Weights over all micro-batches
and ranks come from step_weights.py; a non-finite gradient stops before the optimiser step;
checkpoints are safetensors and JSON (checkpoint.py). Not here: data (data.py, collate.py),
objectives, the loss itself.
"""

import contextlib
import itertools
import math

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from pyoffline.backends import use_backend
from pyoffline.checkpoint import SafeCheckpoints
from pyoffline.compose import Objective
from pyoffline.coupled_program import metric_names
from pyoffline.distill import linear_distill_loss
from pyoffline.divergences import Divergence
from pyoffline.fixed_models import FixedModels, last_hidden
from pyoffline.head import Head
from pyoffline.plan import memory_budget
from pyoffline.policy_loss import linear_policy_loss
from pyoffline.records import (
    SEQUENCE_FIELDS,
    TOKEN_FIELDS,
    LossOutput,
    SequenceBatch,
    TokenBatch,
)
from pyoffline.step_weights import aligned_labels, sequence_tokens, step_weights
from pyoffline.token_objectives import NLL
from pyoffline.trainer_config import OfflineConfig
from pyoffline.units import program_of, refuse_mixed_weights, unit_weights, weighs_of

__all__ = ["NonFiniteGradientError", "OfflineConfig", "OfflineTrainer"]

# Arguments of transformers.Trainer that are called with logits.
LOGITS_READERS = ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics")
UNIT_MEANS = {"sequence", "pair", "group"}


class NonFiniteGradientError(FloatingPointError):
    """The gradient is NaN or inf; the model is as it was after the last good step."""


class OfflineTrainer(SafeCheckpoints, Trainer):
    """Trains `model` on `objective` (default NLL) without logits.

    A batch holds input_ids, labels (both unshifted, as transformers has them) and the columns that
    the objective reads, each [B, T] at its token's own position, or advantages [B]; for objectives
    that couple sequences also rewards, group_ids, targets, ref_sums, each [S] (a pair's or group's
    rows in one batch: units.py, collate.py). With `weights` [B, T] in the batch the caller owns the
    normaliser: they are used as they are (with data parallelism the host averages over ranks).
    `args` is an OfflineConfig.

    `objective` may be a divergence (`po.JSD(0.5) + 0.1 * po.NLL()`) from `teacher_model`, or from
    the batch's teacher_topk_ids and teacher_topk_logps, each [B, T, k]. `ref_model` gives the
    reference log-probs of batches that have none. Both are frozen here and never trained.

    Raises ValueError for models whose loss has parts outside the head, TypeError from `Head.of` for
    unknown heads, NonFiniteGradientError in training.
    """

    # The weights divide by the counts of the whole step. transformers < 5.19 reads the flag that
    # __init__ sets.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model,
        args: OfflineConfig,
        objective=None,
        ref_model=None,
        teacher_model=None,
        **kwargs,
    ):
        if not isinstance(args, OfflineConfig):
            raise TypeError(f"args: expected an OfflineConfig, got {type(args).__name__}")
        if args.n_gpu > 1:
            raise ValueError(
                "one process sees several GPUs (DataParallel); start one a GPU with torchrun"
            )
        reads_logits = {name for name in LOGITS_READERS if kwargs.get(name) is not None}
        if reads_logits:
            raise ValueError(
                f"{', '.join(sorted(reads_logits))}: there are no logits for it to read; metrics "
                "come from the objective, or override evaluation_loop"
            )
        super().__init__(model=model, args=args, **kwargs)
        config = getattr(self.model, "config", None)
        if getattr(config, "output_router_logits", False):
            raise ValueError(
                "the model adds a router loss to its own, which this trainer does not compute; set "
                "model.config.output_router_logits = False"
            )
        self.model_accepts_loss_kwargs = True
        self.objective = NLL() if objective is None else objective
        self._bind(ref_model, teacher_model)
        self._dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        self._meter = Meter()

    def _bind(self, ref_model, teacher_model) -> None:
        """What follows from the objective and the models; raises now, not at the first step."""
        if not isinstance(self.objective, Objective | Divergence):
            raise TypeError(
                "objective: expected an objective such as po.PPOClip(0.2, 0.28), got "
                f"{self.objective!r}"
            )
        try:
            with self._settings():
                pass
        except RuntimeError as error:  # now, not at the first step
            raise ValueError(f"backend: {error}") from None
        self._weighs = weighs_of(self.objective)
        refuse_mixed_weights(self.objective, self.args.aggregation)
        self._unit_metrics = frozenset(metric_names(program_of(self.objective).codes))
        Head.of(self.model)
        self._fixed = FixedModels.of(
            self.objective, self.model, self.args.device, ref_model, teacher_model
        )

    # One optimiser step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The micro-batches of a step, each with its share of the step's weights."""
        if self.at_end:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = list(itertools.islice(epoch_iterator, num_batches))
        return batches, self._add_weights(batches).to(device) if batches else None

    def _add_weights(self, batches: list[dict]) -> Tensor:
        """Puts `weights` into batches, at their tokens' own positions; returns their number."""
        given = [b for b in batches if "weights" in b]
        if given:
            if len(given) < len(batches):
                raise ValueError("some micro-batches of a step have `weights` and some do not")
            return torch.tensor(sum(int((aligned_labels(b) != -100).sum()) for b in batches))
        own = self.args.aggregation == "auto"
        mode, ranks = "token-mean" if own else self.args.aggregation, self.accelerator.num_processes
        weights, tokens = step_weights(
            batches, mode, self.args.horizon, self._sum, ranks, self._dtype
        )
        if own and "chosen" in self._weighs:
            chosen = self._sum(sum(self._chosen_tokens(b) for b in batches))
            weights = [w * (tokens.double() / chosen) for w in weights]
        for batch, w in zip(batches, weights, strict=True):
            batch["weights"] = torch.cat([torch.zeros_like(w[..., :1]), w[..., :-1]], -1)
        if own and self._weighs & UNIT_MEANS:
            counts = [sequence_tokens(b, aligned_labels(b) != -100) for b in batches]
            shares = unit_weights(batches, counts, self._weighs, self._sum, ranks)
            for batch, omega in zip(batches, shares, strict=True):
                batch["omega"] = omega.to(self._dtype)
        return tokens

    @staticmethod
    def _chosen_tokens(batch: dict) -> Tensor:
        counts = sequence_tokens(batch, aligned_labels(batch) != -100)
        return counts[: len(counts) // 2].sum()

    def _sum(self, t: Tensor) -> Tensor:
        return self.accelerator.reduce(t.to(self.args.device), "sum")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """sum(weights * loss_t) of a micro-batch."""
        if "weights" not in inputs:
            self._add_weights([inputs])
        out = self._fused_forward(model, inputs)
        self._measure(self._meter, out.metrics, inputs)
        return (out.loss, {"loss": out.loss}) if return_outputs else out.loss

    def _measure(self, meter: "Meter", metrics: dict[str, Tensor], inputs: dict) -> None:
        """Means over tokens weigh by tokens, means over sequences, pairs or groups by sequences."""
        mask = aligned_labels(inputs) != -100
        meter.add({k: v for k, v in metrics.items() if k not in self._unit_metrics}, mask.sum())
        if self._unit_metrics:
            live = (sequence_tokens(inputs, mask) > 0).sum()
            meter.add({k: v for k, v in metrics.items() if k in self._unit_metrics}, live)

    def _fused_forward(self, model, inputs) -> LossOutput:
        """Runs the loss as the forward of the wrapped model: DDP, FSDP2, DeepSpeed hooks see it."""
        inner = self.accelerator.unwrap_model(model)

        def forward(**batch):
            with self.accelerator.autocast(), self._settings():
                hidden = last_hidden(inner, batch)
                given = (self._tokens(batch), self.objective)
                if not isinstance(self.objective, Divergence):
                    return linear_policy_loss(hidden, Head.of(inner), *given)
                shape = batch["input_ids"].shape
                teacher = self._fixed.distribution(batch, lambda x: _shift(x, shape))
                return linear_distill_loss(hidden, Head.of(inner), teacher, *given)

        with replaced_forward(inner, forward):
            return model(**inputs)

    def _tokens(self, batch: dict) -> TokenBatch:
        """The columns that the objective reads, shifted to the positions that predict them."""
        program = program_of(self.objective, "behavior_logps" in batch)
        shape, reads = batch["input_ids"].shape, {*program.reads, *program.optional, "omega"}
        reads = reads.union(program.sequence_reads, *program.one_of)
        columns = {
            field: _shift(batch[field], shape)
            for field, name in TOKEN_FIELDS.items()
            if name in reads and field in batch
        }
        reference = self._fixed.reference(batch)
        columns |= {} if reference is None else {"ref_logps": reference}
        of_sequence = {
            field: batch[name]
            for field, name in SEQUENCE_FIELDS.items()
            if name in reads and name in batch
        }
        extra = {name: _shift(batch[name], shape) for name in program.gates}
        return TokenBatch(
            aligned_labels(batch),
            weights=_shift(batch["weights"], shape),
            sequence_ids=batch.get("sequence_ids"),
            sequences=SequenceBatch(**of_sequence) if of_sequence else None,
            extra=extra or None,
            **columns,
        )

    def _settings(self):
        stack = contextlib.ExitStack()
        if self.args.memory_budget_mib is not None:
            stack.enter_context(memory_budget(self.args.memory_budget_mib * 2**20))
        if self.args.backend != "auto":
            stack.enter_context(use_backend(self.args.backend))
        return stack

    def _get_grad_norm(self, model, grad_norm=None):
        """The norm that transformers logs; one that is not finite, the same on all, stops all."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.is_enabled():
            return norm  # fp16: the scaler skips such a step and lowers its scale
        if not math.isfinite(float(norm)):
            raise NonFiniteGradientError(
                f"the gradient norm is {float(norm)} at step {self.state.global_step + 1}, before "
                f"the optimiser step; weights are unchanged.{self._blame()} Look at the losses "
                "and ratios in metrics.jsonl; lower the learning rate, or clip the ratios"
            )
        return norm

    def _blame(self) -> str:
        names = [
            n
            for n, p in self.model.named_parameters()
            if p.grad is not None and not p.grad.isfinite().all()
        ]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f" Not finite: {', '.join(names[:3])}{more}." if names else ""

    def log(self, logs, start_time=None):
        """transformers' log with the metrics of the objective since the last one."""
        if "loss" in logs:
            logs |= self._meter.drain(self.accelerator.gather)
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(
        self,
        dataloader,
        description,
        prediction_loss_only=None,
        ignore_keys=None,
        metric_key_prefix="eval",
    ):
        """Evaluation as one accumulated step: the loss over the whole set, whatever the batch size
        and the number of ranks. No logits.
        """
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            model = self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        before = torch.get_rng_state()  # a loader draws a seed: evaluation must not move training
        batches = list(dataloader)
        torch.set_rng_state(before)
        self._drop_repeated_rows(batches, dataloader)
        self._add_weights(batches)
        meter, total = Meter(), torch.zeros((), dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in batches:
                inputs = self._prepare_inputs(batch)
                out = self._fused_forward(model, inputs)
                total += out.loss
                self._measure(meter, out.metrics, inputs)
                self.control = self.callback_handler.on_prediction_step(
                    self.args, self.state, self.control
                )
        loss = self.accelerator.reduce(total, "mean").item()
        named = {"loss": loss} | meter.drain(self.accelerator.gather)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in named.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _drop_repeated_rows(self, batches: list[dict], dataloader) -> None:
        """Takes the labels from rows that accelerate repeats at the end to make ranks even."""
        remainder = getattr(dataloader, "remainder", -1)
        if remainder <= 0 or not batches:
            return
        last = batches[-1]
        labels = last["labels"] = last["labels"].clone()
        ids = last.get("sequence_ids")
        rows = len(labels) if ids is None else int(ids.max()) + 1
        index = torch.arange(rows, device=labels.device)[:, None] if ids is None else ids
        if "unit_ids" in last:
            index = last["unit_ids"][index]
        own = remainder - self.accelerator.process_index * (int(index.max()) + 1)
        labels.masked_fill_((index >= own).expand(labels.shape), -100)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(loss, None, None): there are no logits to give."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None


class Meter:
    """Means of metrics by tokens, on the device; sums of `num_*`, extremes of `*min`, `*max`."""

    def __init__(self):
        self.values: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        for name, value in metrics.items():
            value = value.detach().double()
            if name.endswith(("max", "min")):
                pick = torch.maximum if name.endswith("max") else torch.minimum
                self.values[name] = pick(self.values[name], value) if name in self.values else value
                continue
            total = name.startswith("num_")
            self.values[name] = self.values.get(name, 0.0) + (value if total else value * tokens)
            if total:
                continue
            self.tokens[name] = self.tokens.get(name, 0) + tokens.double()

    def drain(self, gather) -> dict[str, float]:
        """name -> float since the last call, over all ranks; `gather` concatenates along dim 0."""
        if not self.values:
            return {}
        one = torch.ones((), dtype=torch.float64)
        pairs = [torch.stack([v, self.tokens.get(n, one.to(v))]) for n, v in self.values.items()]
        ranks = gather(torch.stack(pairs)[None]).double().cpu()  # [ranks, metrics, 2]
        out = {}
        for i, name in enumerate(self.values):
            value, tokens = ranks[:, i].unbind(-1)
            if name in self.tokens:
                out[name] = float(value.sum() / tokens.sum().clamp(min=1))
            elif name.startswith("num_"):
                out[name] = float(value.sum())
            else:
                out[name] = float(value.amax() if name.endswith("max") else value.amin())
        self.__init__()
        return out


@contextlib.contextmanager
def replaced_forward(module, forward):
    """`module(...)` runs `forward`; hooks of the module and of its wrappers stay."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _shift(values: Tensor, shape) -> Tensor:
    """[B, T] or [B, T, k] at tokens -> at the positions that predict them; [B] stays."""
    if values.shape[:2] != shape:
        return values
    return torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], 1)

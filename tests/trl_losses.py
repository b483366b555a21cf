"""TRL's own loss code, reached without a trainer: the real methods on objects made without
`__init__`, with a stand-in for the model that returns given logits.

Nothing of TRL's formulas is repeated here; `Batch` only lays its inputs out as TRL's collators do.
Every function returns the 0-d loss, differentiable in `batch.logits`.
"""

from collections import defaultdict
from types import SimpleNamespace

import torch
from torch import Tensor


class Batch:
    """S sequences of T+1 tokens: the first is the prompt, `lengths` [S] completion tokens follow.

    `logits` [S, T+1, V] (the last position predicts nothing), `ref` [S, T] its reference.
    """

    def __init__(self, seed: int, lengths, vocab: int = 11, dtype=torch.float64, scale=1.0):
        g = torch.Generator().manual_seed(seed)
        self.lengths = torch.tensor(lengths)
        size, top = len(lengths), max(lengths)
        self.logits = (scale * torch.randn(size, top + 1, vocab, generator=g)).to(dtype)
        self.logits.requires_grad_()
        self.ids = torch.randint(1, vocab, (size, top + 1), generator=g)
        place = torch.arange(top + 1)
        self.completion = ((place > 0) & (place <= self.lengths[:, None])).long()
        self.attention = (place <= self.lengths[:, None]).long()
        noise = 0.5 * torch.randn(size, top, generator=g).to(dtype)
        self.ref = (self.log_probs().detach() + noise) * self.mask

    @property
    def mask(self) -> Tensor:
        return self.completion[:, 1:].bool()

    @property
    def labels(self) -> Tensor:
        """[S, T], aligned with `logits[:, :-1]`, -100 where nothing counts."""
        return self.ids[:, 1:].masked_fill(~self.mask, -100)

    def all_log_probs(self) -> Tensor:
        return self.logits[:, :-1].log_softmax(-1)

    def log_probs(self) -> Tensor:
        logp = self.all_log_probs().gather(-1, self.ids[:, 1:, None])[..., 0]
        return torch.where(self.mask, logp, 0.0)

    def outputs(self) -> SimpleNamespace:
        """What a model with TRL's fused head returns."""
        full = self.all_log_probs()
        return SimpleNamespace(
            log_probs=self.log_probs(),
            log_sum_sq_probs=(2 * full).logsumexp(-1),
            entropy=-(full.exp() * full).sum(-1),
            mean_logits=self.logits[:, :-1].mean(-1),
            is_top1=self.logits[:, :-1].argmax(-1) == self.ids[:, 1:],
            logits=self.logits,
        )

    def inputs(self) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "completion_mask")
        return dict(zip(names, (self.ids, self.attention, self.completion), strict=True))


def _bare(cls, batch: Batch, **settings):
    """A trainer without __init__."""
    trainer = object.__new__(cls)
    trainer.accelerator = SimpleNamespace(
        device=batch.logits.device, gather=lambda x: x, gather_for_metrics=lambda x: x
    )
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = defaultdict(lambda: defaultdict(list))
    trainer._total_train_tokens, trainer._tp_size = 0, 1
    trainer.aux_loss_enabled, trainer.precompute_ref_logps = False, True
    for name, value in settings.items():
        setattr(trainer, name, value)
    return trainer


def dpo(batch: Batch, loss: str, beta: float, **settings) -> Tensor:
    """`DPOTrainer._compute_loss`; settings: label_smoothing, f_divergence_type, use_weighting..."""
    from trl import DPOTrainer

    defaults = {
        "label_smoothing": 0.0,
        "f_divergence_type": "reverse_kl",
        "f_alpha_divergence_coef": 0.5,
        "use_weighting": False,
        "ld_alpha": None,
        "args": SimpleNamespace(discopop_tau=0.05),
    }
    names = {"loss_types": [loss], "loss_weights": [1.0], "beta": beta}
    trainer = _bare(DPOTrainer, batch, **(defaults | names | settings))
    chosen, rejected = batch.ref.sum(1).chunk(2)
    inputs = batch.inputs() | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    return trainer._compute_loss(lambda **_: batch.outputs(), inputs, False)


def kto(batch: Batch, label: Tensor, beta: float, kl: float, **settings) -> Tensor:
    """`KTOTrainer._compute_loss`, its KL estimate fed with sequences whose log-ratio is `kl`."""
    from trl import KTOTrainer

    names = {
        "beta": beta,
        "loss_type": "kto",
        "calculate_KL": True,
        "desirable_weight": 1.0,
        "undesirable_weight": 1.0,
    }
    trainer = _bare(KTOTrainer, batch, **(names | settings))
    estimate = torch.full((len(batch.lengths),), kl, dtype=batch.logits.dtype)
    trainer._compute_kl_logps = lambda model, inputs: estimate
    ref = {"ref_logps": batch.ref.sum(1), "ref_KL_logps": torch.zeros_like(estimate)}
    inputs = batch.inputs() | {"label": label} | ref
    return trainer._compute_loss(lambda **_: batch.outputs(), inputs, False)


def _paired(cls, batch: Batch, **settings):
    """CPO's and ORPO's `get_batch_loss_metrics`, which builds everything from logits."""
    trainer = _bare(cls, batch, is_encoder_decoder=False, pad_token_id=0, padding_value=0)
    for name, value in settings.items():
        setattr(trainer, name, value)
    labels = batch.ids.masked_fill(batch.completion == 0, -100)
    trainer.concatenated_inputs = lambda *_, **__: {
        "concatenated_input_ids": batch.ids,
        "concatenated_attention_mask": batch.attention,
        "concatenated_labels": labels,
    }
    half = labels[: len(labels) // 2]
    model = lambda *_, **__: SimpleNamespace(logits=batch.logits)  # noqa: E731
    return trainer.get_batch_loss_metrics(model, {"chosen_labels": half})[0]


def cpo(batch: Batch, loss: str, beta: float, **settings) -> Tensor:
    """`CPOTrainer.get_batch_loss_metrics`; settings: simpo_gamma, cpo_alpha, alpha."""
    from trl.experimental.cpo import CPOTrainer

    names = {"loss_type": loss, "beta": beta, "label_smoothing": 0.0, "alpha": 0.0}
    names |= {"simpo_gamma": 0.5, "cpo_alpha": 1.0}
    return _paired(CPOTrainer, batch, **(names | settings))


def orpo(batch: Batch, beta: float) -> Tensor:
    """`ORPOTrainer.get_batch_loss_metrics`."""
    from trl.experimental.orpo import ORPOTrainer

    return _paired(ORPOTrainer, batch, beta=beta)


def tpo(batch: Batch, loss: str, beta: float, **settings) -> Tensor:
    """`TPOTrainer._compute_loss`: three branches, chosen, rejected, gold."""
    from trl.experimental.tpo import TPOTrainer

    names = {"loss_type": loss, "beta": beta, "label_smoothing": 0.0, "tpo_l_gamma": 0.5}
    trainer = _bare(TPOTrainer, batch, **(names | {"tpo_alpha": 1.0} | settings))
    return trainer._compute_loss(lambda **_: batch.outputs(), batch.inputs(), False)

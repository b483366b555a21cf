"""What a trained policy is measured by: right answers, KL from the behaviour policy, ESS.

A problem has one right answer, so the probability that a policy gives it is read off the policy,
without sampling. Not here: training (learning.py).
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from pyoffline.demo import arithmetic, behaviour, policy
from pyoffline.demo.behaviour import Behaviour


@dataclass(frozen=True)
class Result:
    """One trained policy (or the behaviour policy, seed -1) on held-out problems."""

    method: str
    seed: int
    accuracy: float  # mean probability of the right answer, exact
    greedy: float  # fraction of problems whose greedy answer is right, exact
    kl: float  # KL(policy || behaviour) of whole answers, nats
    kl_error: float  # its standard error over sampled answers
    ess: float  # of the answers in the file, whole-answer weights


class Judge:
    """Measures a model folder against the behaviour policy; loads what does not change once."""

    def __init__(self, made: Behaviour):
        from pyoffline.config import DataConfig
        from pyoffline.data import load_samples
        from pyoffline.training import load_tokenizer

        self.behaviour = _load(made.model)
        self.tokenizer = load_tokenizer(_config(made.model))
        self.prompts = behaviour.prompt_ids(self.tokenizer, made.split.held_out)
        settings = DataConfig(str(made.samples), max_length=16)
        self.data = load_samples(made.samples, self.tokenizer, settings).samples
        self.right = right_samples(made.split.held_out, self.tokenizer)

    def frontier(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(KL, accuracy) of the best policies on the held-out problems; `policy.frontier`."""
        return policy.frontier(
            right_answers(self.behaviour, self.right)[0], torch.linspace(0, 25, 251)
        )

    def measure(self, folder: Path, method: str, seed: int) -> Result:
        model = _load(folder)
        chance, greedy = right_answers(model, self.right)
        kl, error = self.kl(model)
        return Result(
            method,
            seed,
            float(chance.mean()),
            float(greedy.double().mean()),
            kl,
            error,
            float(self.ess(model)),
        )

    def kl(self, model) -> tuple[float, float]:
        """KL from the behaviour policy, its standard error; one fresh answer a held-out problem."""
        generator = torch.Generator().manual_seed(1)
        eos = self.tokenizer.eos_token_id
        drawn = policy.sample(model, self.prompts, arithmetic.MAX_ANSWER, eos, generator)
        log_p, log_q = (
            policy.answer_log_probs(m, drawn.ids, drawn.n_prompt) for m in (model, self.behaviour)
        )
        return policy.mean_and_error(policy.sequence_kl(log_p, log_q, drawn.mask))

    def ess(self, model) -> torch.Tensor:
        """Effective sample size of the file's answers under `model`, a fraction."""
        from pyoffline.diagnostics import effective_sample_size
        from pyoffline.score import score_samples

        logps = score_samples(model, self.data, batch=512)
        log_w = torch.tensor(
            [
                sum(now) - sum(s.columns["behavior_logps"])
                for now, s in zip(logps, self.data, strict=True)
            ],
            dtype=torch.float64,
        )
        return effective_sample_size(log_w, torch.ones_like(log_w, dtype=torch.bool))


def right_answers(model, samples) -> tuple[torch.Tensor, torch.Tensor]:
    """For each sample (prompt and right answer): the probability that the model gives it, fp64,
    and whether greedy decoding does (each of its tokens is the likeliest one).
    """
    from pyoffline.collate import Collator
    from pyoffline.head import Head, backbone
    from pyoffline.logps import linear_token_logps
    from pyoffline.step_weights import aligned_labels

    inputs = Collator()(samples)
    labels = aligned_labels(inputs)
    model.eval()
    with torch.no_grad():
        base = backbone(model)
        hidden = base(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).last_hidden_state
        stats = linear_token_logps(hidden, Head.of(model), labels)
    valid = labels != -100
    return stats.logps.double().sum(-1).exp(), (stats.is_top1.bool() | ~valid).all(-1)


def right_samples(problems, tokenizer):
    from pyoffline.data import Sample

    out = []
    for line, problem in enumerate(problems, 1):
        prompt, answer = (tokenizer(x)["input_ids"] for x in (problem.prompt, problem.answer))
        out.append(Sample([*prompt, *answer, tokenizer.eos_token_id], len(prompt), line))
    return out


def _config(folder: Path):
    from pyoffline.config import ModelConfig

    return ModelConfig(str(folder))


def _load(folder: Path):
    from pyoffline.training import load_model

    return load_model(_config(folder))

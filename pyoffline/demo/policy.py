"""A small policy: sampling with its own log-probs, and what a trained policy is measured by.

Every prompt has the same number of tokens. KL and ESS are in nats and fractions of whole answers.
Not here: the task (arithmetic.py), the order of the demo (learning.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """Sampled answers, one row each."""

    ids: Tensor  # [B, T] prompt and answer; after the end token, the end token
    n_prompt: int
    logps: Tensor  # [B, T - n_prompt] fp32, as the sampler drew them
    mask: Tensor  # [B, T - n_prompt] bool: the answer with its end token

    def rows(self):
        """(token ids, log-probs) of each answer, the end token included."""
        answers = self.ids[:, self.n_prompt :]
        for ids, logps, mask in zip(answers, self.logps, self.mask, strict=True):
            yield ids[mask].tolist(), logps[mask].tolist()


@torch.no_grad()
def sample(model, prompts: Tensor, max_new: int, eos: int, generator) -> Answers:
    """Draw one answer a row of `prompts` [B, P] at temperature 1, with a key-value cache."""
    model.eval()
    ids, fed, past = prompts, prompts, None
    running = torch.ones(len(prompts), dtype=torch.bool)
    logps, masks = [], []
    for _ in range(max_new):
        out = model(input_ids=fed, past_key_values=past, use_cache=True)
        past = out.past_key_values
        log_p = out.logits[:, -1].float().log_softmax(-1)
        token = torch.multinomial(log_p.exp(), 1, generator=generator)
        token = torch.where(running[:, None], token, eos)
        logps.append(log_p.gather(-1, token)[:, 0] * running)
        masks.append(running)
        running = running & (token[:, 0] != eos)
        ids, fed = torch.cat([ids, token], -1), token
    return Answers(ids, prompts.shape[1], torch.stack(logps, -1), torch.stack(masks, -1))


@torch.no_grad()
def answer_log_probs(model, ids: Tensor, n_prompt: int) -> Tensor:
    """[B, T - n_prompt, V] fp64 log-probs of every token at every place of the answers."""
    model.eval()
    return model(input_ids=ids).logits[:, n_prompt - 1 : -1].double().log_softmax(-1)


def sequence_kl(log_p: Tensor, log_q: Tensor, mask: Tensor) -> Tensor:
    """`(p * (log_p - log_q)).sum(-1)` summed over an answer's tokens: [B] nats.

    On answers drawn from p its mean is an unbiased estimate of KL(p || q) of whole answers: the
    sum over the vocabulary is exact, only the prefixes are sampled (log_p - log_q of the drawn
    tokens has the same mean and a larger variance).
    """
    return ((log_p.exp() * (log_p - log_q)).sum(-1) * mask).sum(-1)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """The mean and its standard error (unbiased std over sqrt(n))."""
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


def frontier(q: Tensor, lam: Tensor) -> tuple[Tensor, Tensor]:
    """The best accuracy that any policy can have at a KL from the behaviour policy.

    q [N]: the behaviour policy's probability of the right answer. The policies mu e^{lam R} / Z
    maximise E[R] - KL / lam; they answer right with p = q e^lam / (1 - q + q e^lam), at a KL of
    p log(p/q) + (1-p) log((1-p)/(1-q)). Returns (kl [L], accuracy [L]) for `lam` [L], means over
    prompts.
    """
    odds = torch.logit(q.double(), eps=1e-12) + lam.double()[:, None]
    p = odds.sigmoid()
    log_z = torch.logaddexp(torch.log1p(-q.double()), q.double().log() + lam.double()[:, None])
    return (p * lam[:, None] - log_z).mean(-1), p.mean(-1)

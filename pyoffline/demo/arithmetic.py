"""The learning demo's task: two-digit addition, taught by somebody who forgets to carry.

A prompt is "27+45=", an answer "72" and the end token. The teacher forgets each carry with
probability `forget`, so many wrong answers are likelier than the right one. `check` is the
reward: 1 for the sum, 0 for anything else. Not here: models (behaviour.py), training (learning.py).
"""

import random
from dataclasses import dataclass
from pathlib import Path

SYMBOLS = "0123456789+="
EOS = "<|end|>"
MAX_ANSWER = 4  # tokens: three digits and the end
FIRST, LAST = 10, 99


@dataclass(frozen=True)
class Problem:
    """`a` + `b`; both have two digits, so every prompt has the same number of tokens."""

    a: int
    b: int

    @property
    def prompt(self) -> str:
        return f"{self.a}+{self.b}="

    @property
    def answer(self) -> str:
        return str(self.a + self.b)


@dataclass(frozen=True)
class Split:
    """Disjoint problems: what the teacher shows, what answers are sampled for (taught too), what
    nobody sees before the end.
    """

    taught: list[Problem]
    sampled: list[Problem]
    held_out: list[Problem]

    @staticmethod
    def draw(n_sampled: int, n_held_out: int, seed: int) -> "Split":
        """All 8,100 problems, shuffled and cut. ValueError when too many are asked for."""
        numbers = range(FIRST, LAST + 1)
        problems = [Problem(a, b) for a in numbers for b in numbers]
        if n_sampled + n_held_out > len(problems):
            raise ValueError(
                f"{n_sampled} + {n_held_out} problems, there are {len(problems)}; ask for fewer"
            )
        random.Random(seed).shuffle(problems)  # noqa: S311 (an order, not a secret)
        held_out, rest = problems[:n_held_out], problems[n_held_out:]
        return Split(rest, rest[:n_sampled], held_out)


def check(problem: Problem, answer: str) -> float:
    """1.0 for the decimal digits of a + b, else 0.0 (no spaces, no leading zero)."""
    return float(answer == problem.answer)


def taught_answer(problem: Problem, forget: float, rng: random.Random) -> str:
    """Column by column from the right; each carry is forgotten with probability `forget`."""
    a, b, carry, digits = problem.a, problem.b, 0, []
    while a or b or carry:
        total = a % 10 + b % 10 + carry
        digits.append(str(total % 10))
        carry = int(total > 9 and rng.random() >= forget)
        a, b = a // 10, b // 10
    return "".join(reversed(digits))


def make_tokenizer(folder: Path):
    """One token a character and the end token, as a transformers tokenizer, saved in `folder`."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {symbol: i for i, symbol in enumerate([*SYMBOLS, EOS])}
    words = Tokenizer(models.WordLevel(vocab, unk_token=EOS))
    words.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    words.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=EOS, pad_token=EOS)
    tokenizer.save_pretrained(folder)
    return tokenizer

"""Shapes, bars and inputs of the benchmarks, in one place.

Inputs are random normal (never zeros: a multiplication by zero draws less power and clocks higher),
no row is ignored, old = logp + 0.1 randn, so that a few per cent of the rows are clipped.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import pyoffline as po

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
MIB = 1 << 20
NOISE = 0.1  # of old log-probs, nats
CLIP = 0.2
LOGIT_STD = 2.0  # of the random logits; 0.6 would leave the distribution nearly uniform


@dataclass(frozen=True)
class Shape:
    """N tokens, D hidden, V vocabulary."""

    n: int
    d: int
    v: int

    @staticmethod
    def parse(text: str) -> "Shape":
        """From "N,D,V"; ValueError otherwise."""
        parts = text.replace("x", ",").split(",")
        try:
            n, d, v = (int(part) for part in parts)
        except ValueError:
            raise ValueError(f"--shape: expected N,D,V or all, got {text!r}") from None
        if min(n, d, v) < 1:
            raise ValueError(f"--shape: expected positive sizes, got {text!r}")
        return Shape(n, d, v)

    def __str__(self) -> str:
        return f"{self.n},{self.d},{self.v}"

    @property
    def gemm_flop(self) -> int:
        """FLOP of one of the products, 2NDV."""
        return 2 * self.n * self.d * self.v

    def gemm_nbytes(self, itemsize: int) -> int:
        """Bytes of one product's three matrices, each once."""
        return (self.n * self.d + self.v * self.d + self.n * self.v) * itemsize


# DESIGN.md section 7, the CPU row and the H200 rows: time over the floor of a fused forward and
# backward in bf16.
FUSED_BARS = {
    Shape(1024, 896, 151936): 1.12,
    Shape(4096, 896, 151936): 1.12,
    Shape(2048, 2048, 32000): 1.10,
}
GPU_FUSED_BARS = {
    Shape(4096, 4096, 128256): 1.10,
    Shape(8192, 4096, 151936): 1.12,
    Shape(8192, 896, 151936): 1.35,
}
BARS = {"cpu": FUSED_BARS, "cuda": GPU_FUSED_BARS}
SHAPES = {kind: tuple(bars) for kind, bars in BARS.items()}
CHUNK = {"cpu": 512 * MIB, "cuda": 1024 * MIB}  # of the memory bar
# Flat memory is shown by the same bytes at four times the tokens.
MEMORY_SHAPE = Shape(16384, 896, 151936)


def fused_bar(shape: Shape, dtype: str, kind: str = "cpu") -> float | None:
    """Time bar of three GEMMs and a row pass; bars are stated for bf16."""
    return BARS[kind].get(shape) if dtype == "bf16" else None


def memory_bar(shape: Shape, kind: str = "cpu") -> int:
    """Bytes beyond inputs and gradients: one chunk (512 MiB, on a GPU 1 GiB) and the fp32
    accumulator of dweight.
    """
    return CHUNK[kind] + 4 * shape.v * shape.d


@dataclass(eq=False)
class Inputs:
    """One call's tensors."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    advantages: Tensor  # [N] fp32
    old: Tensor  # [N] fp32
    g_logps: Tensor  # [N] fp32, an upstream gradient for log-probs
    logps: Tensor  # [N] fp32, what `old` was made from

    def take(self, rows) -> "Inputs":
        """The same weight with some of the rows."""
        return Inputs(
            self.hidden.detach()[rows].contiguous(),
            self.weight.detach(),
            self.labels[rows],
            self.advantages[rows],
            self.old[rows],
            self.g_logps[rows],
            self.logps[rows],
        )

    def clear_grads(self) -> None:
        """Drop gradients, so that the next backward does not add."""
        self.hidden.grad = None
        self.weight.grad = None

    def want_grads(self, hidden: bool, weight: bool) -> None:
        """Say which gradients the next run forms."""
        self.hidden.requires_grad_(hidden)
        self.weight.requires_grad_(weight)

    def clipped(self) -> float:
        """Fraction of rows whose PPO gradient is 0, from the ratio that `old` was made with."""
        ratio = self.noise_ratio()
        high = (self.advantages > 0) & (ratio > 1 + CLIP)
        low = (self.advantages < 0) & (ratio < 1 - CLIP)
        return float((high | low).float().mean())

    def noise_ratio(self) -> Tensor:
        """The importance ratio exp(logp - old)."""
        return (self.logps - self.old).exp()


def make_inputs(
    shape: Shape,
    dtype: torch.dtype,
    seed: int = 0,
    exact_old: bool = True,
    device: torch.device | str = "cpu",
) -> Inputs:
    """Random inputs; `exact_old=False` skips the GEMM for old (memory does not depend on it)."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=random, device=device)

    hidden = normal(shape.n, shape.d).to(dtype)
    weight = torch.empty(shape.v, shape.d, dtype=dtype, device=device)
    for start in range(0, shape.v, 8192):  # the fp32 draws of a whole [V, D] are not needed at once
        part = weight[start : start + 8192]
        part.copy_(normal(*part.shape) * (LOGIT_STD / math.sqrt(shape.d)))
    labels = torch.randint(shape.v, (shape.n,), generator=random, device=device)
    if exact_old:
        with torch.no_grad():
            logps = po.linear_token_logps(hidden, po.Head(weight), labels).logps
    else:
        expected = -math.log(shape.v) - LOGIT_STD**2 / 2
        logps = torch.full((shape.n,), expected, device=device)
    old = logps + NOISE * normal(shape.n)
    return Inputs(hidden, weight, labels, normal(shape.n), old, normal(shape.n), logps)

"""Batches for the tests, and one way to run the package on them (backend by name)."""

import contextlib

import oracle
import pytest
import torch

import pyoffline as po
from pyoffline.backends import why_not

MISSING_CPU = why_not("cpu", "cpu")
needs_cpu = pytest.mark.skipif(bool(MISSING_CPU), reason=f"not run: {MISSING_CPU}")
BACKENDS = ("reference", pytest.param("cpu", marks=needs_cpu))
HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
STATS = ("logps", "entropy", "lse", "log_sum_p2")
FIELDS = {"old": "old_logps", "mu": "behavior_logps", "ref": "ref_logps", "adv": "advantages"}


def dtype_name(x):
    """Ids of parametrised tests."""
    return str(x).removeprefix("torch.") if isinstance(x, torch.dtype) else None


def make(n=37, d=48, v=301, dtype=torch.float32, seed=0, reads=(), **options) -> dict:
    """A batch as `oracle.run` reads it; about a fifth of the rows ignored or of weight 0.

    `options`: bias, temperature, ignored (bool), head (dict), extra (names).
    """
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, v, (n,), generator=g)
    weights = torch.rand(n, generator=g) / max(n, 1) + 0.5 / max(n, 1)
    if options.get("ignored", True) and n > 8:
        labels[3::7] = -100
        weights[5::11] = 0.0
    hidden, weight = randn(n, d).to(dtype), (randn(v, d) * 2 / d**0.5).to(dtype)
    batch = {"hidden": hidden, "weight": weight, "labels": labels, "weights": weights}
    batch["bias"] = randn(v).to(dtype) if options.get("bias") else None
    batch["temperature"] = torch.rand(n, generator=g) + 0.5 if options.get("temperature") else None
    batch["head"] = options.get("head", {})
    truth = oracle.run({**batch, "weights": torch.ones(n)}, po.NLL(), torch.float64)["logps"]
    for name in ("old", "mu", "ref"):
        # ratios near 1 or well past a clip border (at it, the rounding of a logit decides), at most
        # 1.7: one unclipped row of ratio 5 would outweigh the batch, and its error is one draw
        far = torch.rand(n, generator=g) < 0.5
        moved = 0.04 * torch.rand(n, generator=g) + far * (0.3 + 0.2 * torch.rand(n, generator=g))
        moved = moved * torch.where(torch.rand(n, generator=g) < 0.5, -1.0, 1.0)
        moved = torch.where(truth + moved > -1e-3, -moved.abs(), moved)
        batch[name] = (truth + moved).float() if name in reads else None
    batch["adv"] = randn(n) if "adv" in reads else None
    batch["extra"] = {name: randn(n) for name in options.get("extra", ())}
    return batch


def tokens(batch: dict, **changes) -> po.TokenBatch:
    """The TokenBatch of a batch."""
    given = {FIELDS[k]: batch[k] for k in FIELDS if batch.get(k) is not None}
    given |= {k: batch[k] for k in ("labels", "weights", "temperature")}
    return po.TokenBatch(**{**given, "extra": batch["extra"] or None, **changes})


def run(batch: dict, objective, backend: str, upstream: float = 1.0, **head) -> dict:
    """`linear_policy_loss` and its gradients, in the form of `oracle.run`."""
    leaves = {
        k: batch[k].detach().clone().requires_grad_()
        for k in ("hidden", "weight", "bias")
        if batch.get(k) is not None
    }
    with po.use_backend(backend):
        h = po.Head(leaves["weight"], leaves.get("bias"), **batch["head"], **head)
        out = po.linear_policy_loss(leaves["hidden"], h, tokens(batch), objective)
        (out.loss * upstream).backward()
    result = {"loss": out.loss.detach(), **out.stats._asdict(), "metrics": out.metrics}
    for k, x in leaves.items():
        assert x.grad.dtype == x.dtype
        result[f"d{k}"] = x.grad if upstream == 1.0 else x.grad.double() / upstream
    return result


def run_logits(logits, batch: dict, objective, backend: str, upstream: float = 1.0) -> dict:
    """`policy_loss` on given logits [N, V]; the gradient under "dlogits"."""
    z = logits.detach().requires_grad_()
    with po.use_backend(backend):
        out = po.policy_loss(z, tokens(batch), objective)
        (out.loss * upstream).backward()
    result = {"loss": out.loss.detach(), **out.stats._asdict(), "metrics": out.metrics}
    return result | {"dlogits": z.grad}


def row_batch(labels, weights=None, **given) -> dict:
    """A batch for `run_logits`: labels, weights (default 1) and the token inputs by short name."""
    labels = torch.as_tensor(labels)
    weights = torch.ones(labels.shape[0]) if weights is None else weights
    return {"labels": labels, "weights": weights, "temperature": None, "extra": {}, **given}


@contextlib.contextmanager
def threads(n: int):
    """torch.set_num_threads for a block."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)

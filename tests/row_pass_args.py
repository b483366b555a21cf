"""Valid arguments of `_C.row_pass`, and the guarded memory that the binding tests put them in."""

import numpy as np
import torch

from pyoffline import _C

BAND = 4096  # bytes of canary on either side of an output
CANARY = 0xA5
PER_ROW = ("loss", "logps", "entropy", "lse", "gap", "log_sum_p2")
CODES = _C.codes()


class Guarded:
    """A tensor between two bands of known bytes, poisoned with NaN."""

    def __init__(self, shape, dtype):
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        self.memory = torch.full((nbytes + 2 * BAND,), CANARY, dtype=torch.uint8)
        inside = self.memory[BAND : BAND + nbytes]
        self.tensor = inside.view(dtype).view(shape)
        if dtype.is_floating_point:
            self.tensor.fill_(float("nan"))
        self.end = BAND + nbytes

    def intact(self):
        """Whether no byte of the bands changed."""
        return bool(
            (self.memory[:BAND] == CANARY).all() and (self.memory[self.end :] == CANARY).all()
        )


def inputs(rows=5, vocab=37, dtype=torch.float32, seed=0):
    """Logits, labels and every optional row input, with an ignored row and a weight-0 row."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    labels = torch.randint(0, vocab, (rows,), generator=g)
    weights = torch.rand(rows, generator=g) + 0.5
    if rows > 3:
        labels[1] = -100
        weights[2] = 0.0
    return {
        "logits": (3 * randn(rows, vocab)).to(dtype),
        "labels": labels,
        "bias": randn(vocab),
        "class_weight": torch.rand(vocab, generator=g),
        "temperature": torch.rand(rows, generator=g) + 0.5,
        "weights": weights,
        **{name: -5 * torch.rand(rows, generator=g) for name in ("old", "mu", "ref")},
        "adv": randn(rows),
        "extras": [torch.rand(rows, generator=g)],
        # PPO clip, gated KL against ref, entropy bonus, label smoothing
        "codes": [
            *(CODES["ppo_clip"], -1, 0),
            *(CODES["kl_k3"], 0, 1),
            *(CODES["entropy_term"], -1, 0),
            *(CODES["smoothing"], -1, 0),
        ],
        "hyper": torch.tensor(
            [
                [1.0, 0.2, 0.28, float("inf"), float("inf"), 0, 0, 0],
                [0.04, 0, 0, 0, 0, 0, 0, 0],
                [-0.01, 0, 0, 0, 0, 0, 0, 0],
                [0.1, 0, 0, 0, 0, 0, 0, 0],
            ],
            dtype=torch.float64,
        ),
        "softcap": 20.0,
        "logit_scale": 0.9,
    }


def outputs(rows, vocab, dtype, make=lambda shape, dtype: Guarded(shape, dtype)):
    """Every output, each in its own guarded memory."""
    return {
        "dlogits": make((rows, vocab), dtype),
        **{name: make((rows,), torch.float32) for name in PER_ROW},
        "is_top1": make((rows,), torch.uint8),
        "coefs_out": make((4, rows), torch.float32),
    }


def call(arguments, results, **more):
    """row_pass on these inputs and outputs (plain or guarded)."""
    arguments = {**arguments, **more}
    plain = {name: getattr(x, "tensor", x) for name, x in results.items()}
    logits, labels = arguments.pop("logits"), arguments.pop("labels")
    _C.row_pass(logits, labels, **arguments, **plain)

"""Low-precision products in fp32 through torch, one panel of the vocabulary at a time.

The path where no vendor GEMM multiplies bf16 into fp32 (and for LoRA heads, whose second product
is added before the one rounding). A panel of 2048 rows of the weight is widened to fp32 in cache:
258 GFLOP/s against 65 of torch's own bf16 mm on a CPU without bf16 units (Ice Lake Xeon, 2 cores,
2026-11-21). Not here: the choice between the paths (`cpu.py`).
"""

from torch import Tensor

PANEL = 2048


def _panels(vocab: int):
    return [slice(v, min(v + PANEL, vocab)) for v in range(0, vocab, PANEL)]


def logits(
    hidden: Tensor, weight: Tensor, out: Tensor, adapter: Tensor | None, factor: Tensor | None
) -> None:
    """out[C, V] = hidden @ weight^T (+ adapter @ factor^T), fp32 inside, rounded once."""
    x = hidden.float()
    u = None if adapter is None else adapter.float()
    for cut in _panels(weight.shape[0]):
        part = x @ weight[cut].float().t()
        if u is not None:
            part.addmm_(u, factor[cut].float().t())
        out[:, cut] = part


def dhidden(dlogits: Tensor, weight: Tensor, out: Tensor) -> None:
    """out[C, D] fp32 = dlogits @ weight."""
    for i, cut in enumerate(_panels(weight.shape[0])):
        out.addmm_(dlogits[:, cut].float(), weight[cut].float(), beta=float(i > 0))


def add_dweight(
    dlogits: Tensor,
    hidden: Tensor,
    acc: Tensor | None,
    first: bool,
    cast: Tensor | None,
    scale: float,
) -> None:
    """acc[V, D] fp32 (+)= dlogits^T @ hidden; with `cast`, each finished panel is scaled and
    rounded into it.
    """
    x = hidden.float()
    for cut in _panels(dlogits.shape[1]):
        part = dlogits[:, cut].t().float() @ x if acc is None else acc[cut]
        if acc is not None:
            part.addmm_(dlogits[:, cut].t().float(), x, beta=0.0 if first else 1.0)
        if cast is not None:
            cast[cut] = part if scale == 1.0 else part * scale

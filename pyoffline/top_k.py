"""The k most probable entries of each position, as a cache for distillation: `linear_top_k`.

Logits come in chunks within the memory budget; nothing of size N x V exists, and nothing has a
gradient. Not here: reading the cache (`teachers.py`, `teacher_columns.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pyoffline.flatten import flatten_head
from pyoffline.head import Head
from pyoffline.plan import current_settings, plan_chunks
from pyoffline.teachers import TeacherTopK


def linear_top_k(
    hidden: Tensor,  # [..., D] any float
    head: Head,
    k: int,
) -> TeacherTopK:
    """`head(hidden).float().log_softmax(-1).topk(k)`: ids int64 and logps fp32 (fp64), [..., k].

    Bias, LoRA, scale, softcap and temperature are the head's own. ValueError for k outside [1, V].
    """
    with torch.no_grad():
        parts = head.tensors()
        x = flatten_head(hidden, parts)
        vocab = x.weight.shape[0]
        if not 1 <= k <= vocab:
            raise ValueError(f"k: expected 1 to the vocabulary's {vocab}, got {k}")
        wide = torch.promote_types(x.hidden.dtype, torch.float32)
        plan = plan_chunks(
            len(x.hidden), vocab, 2 * wide.itemsize, current_settings(), x.hidden.device.type
        )
        found = [_chunk(x, parts, slice(*span), k, wide) for span in plan.bounds]
        shape = (*hidden.shape[:-1], k)
        empty = x.hidden.new_zeros(0, k, dtype=wide)
        ids = torch.cat([empty.long(), *(i for i, _ in found)])
        logps = torch.cat([empty, *(p for _, p in found)])
        return TeacherTopK(ids.reshape(shape), logps.reshape(shape))


def _chunk(x, parts, rows: slice, k: int, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    rounded = parts.logits_dtype or x.hidden.dtype
    z = F.linear(x.hidden[rows], x.weight)
    if x.adapter_hidden is not None:
        z = z + F.linear(x.adapter_hidden[rows], x.adapter_weight)
    z = z.to(rounded).to(wide)
    z = (z if x.bias is None else z + x.bias) * parts.logit_scale
    if parts.softcap:
        z = parts.softcap * torch.tanh(z / parts.softcap)
    z = z / parts.temperature
    top, ids = z.topk(k, -1)
    best = top[:, :1]
    log_d = (z - best).exp_().sum(-1, keepdim=True).log()
    return ids, (top - best) - log_d

"""A reference model in the same call: a TeacherHead in the place of `ref_logps`.

Its log-probs of the labels come from the scoring path (one GEMM, chunked, no gradient, no [N, V]),
before the loss reads them as `ref`. Not here: given log-probs (`flatten.py`), whole distributions
of a teacher (`distill.py`).
"""

from dataclasses import fields

import torch
from torch import Tensor

from pyoffline.head import Head
from pyoffline.logps import linear_token_logps
from pyoffline.records import TokenBatch
from pyoffline.teachers import TeacherHead, same_vocabulary


def with_reference(
    tokens: TokenBatch,
    vocab: int,  # of the policy
) -> TokenBatch:
    """`tokens` with log-probs where `ref_logps` was a TeacherHead; otherwise as they are.

    The reference keeps its own temperature: `tokens.temperature` is the policy's. ValueError,
    TypeError: hidden states that do not fit the labels, another vocabulary.
    """
    reference = tokens.ref_logps
    if not isinstance(reference, TeacherHead):
        return tokens
    head = reference.head
    try:
        if not isinstance(head, Head):
            raise TypeError(f"expected a po.Head, got {type(head).__name__}; use po.Head.of(model)")
        with torch.no_grad():
            same_vocabulary("its head", head.tensors().weight.shape[0], vocab)
            stats = linear_token_logps(
                reference.hidden.detach(),
                head,
                _counted_labels(tokens),
                ignore_index=tokens.ignore_index,
            )
    except (TypeError, ValueError) as error:
        raise type(error)(f"tokens.ref_logps, a TeacherHead: {error}") from error
    # dataclasses.replace, which Dynamo of torch 2.6 does not trace
    given = {f.name: getattr(tokens, f.name) for f in fields(tokens)}
    return TokenBatch(**{**given, "ref_logps": stats.logps})


def _counted_labels(tokens: TokenBatch) -> Tensor:
    """The labels, ignored where the weight is 0: what does not count is never read."""
    if tokens.weights is None or tokens.weights.shape != tokens.labels.shape:
        return tokens.labels
    return torch.where(tokens.weights == 0, tokens.ignore_index, tokens.labels)

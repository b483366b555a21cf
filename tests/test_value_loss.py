"""`ValueLoss` against its formula; what it refuses."""

import pytest
import torch

import pyoffline as po

V = torch.tensor([0.0, 1.0, -1.0, 2.0], dtype=torch.float64)
R = torch.tensor([0.5, 0.9, 1.0, -1.0], dtype=torch.float64)
OLD = torch.tensor([0.1, 0.2, -1.1, 2.5], dtype=torch.float64)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_it_is_its_formula_and_its_gradient(clip, weighted):
    given = V.clone().requires_grad_()
    weights = torch.tensor([0.5, 0.0, 1.0, 2.0], dtype=torch.float64) if weighted else None
    old = OLD if clip else None
    got = po.ValueLoss(clip)(given, R, old, weights)
    got.backward()
    v = V.clone().requires_grad_()
    loss = (v - R) ** 2
    if clip:
        loss = torch.maximum(loss, (OLD + (v - OLD).clamp(-clip, clip) - R) ** 2)
    want = (0.5 * loss * (torch.full_like(V, 0.25) if weights is None else weights)).sum()
    want.backward()
    assert torch.allclose(got, want, rtol=1e-12) and torch.allclose(given.grad, v.grad, rtol=1e-12)


def test_N2_a_value_of_weight_0_is_not_read():
    v, weights = V.clone(), torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    clean = po.ValueLoss(0.2)(v, R, OLD, weights)
    for x in (v, old := OLD.clone(), returns := R.clone()):
        x[1] = torch.nan
    assert torch.equal(po.ValueLoss(0.2)(v, returns, old, weights), clean)


# call, what the message must say
ERRORS = [
    (lambda: po.ValueLoss(0.2)(V, R), "needs old_values"),
    (lambda: po.ValueLoss()(V, R, OLD), "does not read old_values"),
    (lambda: po.ValueLoss()(V, R[:2]), "returns"),
    (lambda: po.ValueLoss(0.0), "positive"),
]


@pytest.mark.parametrize(("call", "words"), ERRORS, ids=[e[1] for e in ERRORS])
def test_N12_what_is_missing_or_not_read_raises(call, words):
    with pytest.raises(ValueError, match=words):
        call()

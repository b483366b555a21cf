"""A reference model's head in the same call: the numbers of given log-probs, no gradient to it,
what does not count is not read, and clear errors.
"""

from dataclasses import replace

import pytest
import torch
from batches import BACKENDS
from preference_cases import CASES, D, V, draw, run

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
REFERENCED = [n for n in CASES if draw(n)["tokens"].ref_logps is not None]


def reference(batch, width=D + 3):
    """Hidden states and a head of another width, every tensor with a gradient to be had."""
    random = torch.Generator().manual_seed(5)

    def draw_(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64).requires_grad_()

    return draw_(*batch["tokens"].labels.shape, width), po.Head(draw_(V, width), softcap=4.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", REFERENCED)
def test_the_loss_and_gradients_are_those_of_given_log_probs(name, backend):
    batch = draw(name, 3)
    hidden, head = reference(batch)
    z = 4.0 * torch.tanh(hidden @ head.weight.T / 4.0)
    labels = batch["tokens"].labels
    ref = z.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0].detach()
    with po.use_backend(backend):
        want = run(batch, CASES[name][0], ref_logps=ref)
        got = run(batch, CASES[name][0], ref_logps=po.TeacherHead(hidden, head))
    for x, y in zip(got[:3], want[:3], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-11, atol=1e-12)
    assert hidden.grad is None and head.weight.grad is None


def test_token_local_terms_and_given_logits_take_it_too():
    batch = draw("sigmoid", 4)
    hidden, head = reference(batch)
    labels = batch["tokens"].labels
    teacher = po.TeacherHead(hidden, head)
    with torch.no_grad():
        ref = po.linear_token_logps(hidden, head, labels).logps
    logits = batch["hidden"] @ batch["weight"].T
    objective = po.NLL() + 0.1 * po.KL("k3")
    want = po.policy_loss(logits, po.TokenBatch(labels, ref_logps=ref), objective).loss
    got = po.policy_loss(logits, po.TokenBatch(labels, ref_logps=teacher), objective).loss
    assert torch.equal(got, want)
    student, tops = po.Head(batch["weight"]), po.TeacherLogits(logits.flip(-1))
    losses = [
        po.linear_distill_loss(
            batch["hidden"], student, tops, po.TokenBatch(labels, ref_logps=x), po.JSD() + po.KL()
        ).loss
        for x in (ref, teacher)
    ]
    assert torch.equal(*losses)


def test_n2_a_position_that_does_not_count_is_not_read():
    batch = draw("sigmoid", 5)
    hidden, head = reference(batch)
    labels, weights = batch["tokens"].labels.clone(), torch.ones(8, 6, dtype=torch.float64)
    weights[1, 2:] = 0.0
    dirty = hidden.detach().clone()
    dirty[labels == -100] = torch.nan
    dirty[1, 2:] = torch.inf
    wrong = torch.where(weights == 0, V + 7, labels)
    results = [
        run(batch, po.DPO(), labels=y, weights=weights, ref_logps=po.TeacherHead(x, head))
        for x, y in ((hidden, labels), (dirty, wrong))
    ]
    for x, y in zip(*(r[:3] for r in results), strict=True):
        assert torch.equal(x, y) and x.isfinite().all()


def test_n3_a_nan_of_the_reference_shows_in_its_pair_alone():
    batch = draw("sigmoid", 6)
    hidden, head = reference(batch)
    hidden = hidden.detach().clone()
    clean = run(batch, po.DPO(), ref_logps=po.TeacherHead(hidden.clone(), head))
    hidden[1, 0] = torch.nan
    got = run(batch, po.DPO(), ref_logps=po.TeacherHead(hidden, head))
    others = [0, 2, 3, 4, 6, 7]  # sequences 1 and 5 are one pair
    assert got[0].isnan() and got[1][1].isnan().any()
    assert torch.equal(got[1][others], clean[1][others])


def test_it_compiles_into_one_graph():
    batch = draw("sigmoid", 7, torch.float32)
    hidden, head = reference(batch)
    hidden, head = hidden.detach().float(), po.Head(head.weight.detach().float())
    labels = batch["tokens"].labels

    def loss(x, weight, ref_hidden, ref_weight):
        tokens = po.TokenBatch(labels, ref_logps=po.TeacherHead(ref_hidden, po.Head(ref_weight)))
        return po.linear_policy_loss(x, po.Head(weight), tokens, po.DPO()).loss

    given = (batch["hidden"], batch["weight"], hidden, head.weight)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), loss(*given))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda h, w: (h[:-1], po.Head(w)), ValueError, "a TeacherHead: .*labels"),
        (lambda h, w: (h, po.Head(w[:-1])), ValueError, "has 12 entries, the student's 13"),
        (lambda h, w: (h[..., 1:], po.Head(w)), ValueError, "a TeacherHead: hidden"),
        (lambda h, w: (h, w), TypeError, "expected a po.Head"),
    ],
    ids=["other_positions", "other_vocabulary", "other_width", "a_weight"],
)
def test_n12_what_does_not_fit_is_named(change, error, words):
    batch = draw("sigmoid", 8)
    hidden, head = reference(batch)
    with pytest.raises(error, match=words):
        run(batch, po.DPO(), ref_logps=po.TeacherHead(*change(hidden, head.weight)))


def test_n12_a_reference_that_nothing_reads_or_given_twice_is_an_error():
    batch = draw("sigmoid", 9)
    teacher = po.TeacherHead(*reference(batch))
    with pytest.raises(ValueError, match="ref_logps is given but"):
        run(batch, po.SimPO(), ref_logps=teacher)
    tokens = replace(batch["tokens"], ref_logps=teacher)
    with pytest.raises(ValueError, match="expected one of them, got .* and"):
        run(
            batch | {"tokens": tokens},
            po.DPO(),
            sequences=po.SequenceBatch(ref_logps=torch.zeros(8)),
        )

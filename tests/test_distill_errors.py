"""Bad arguments of linear_distill_loss (PROMISES N12), and how divergences compose."""

import pytest
import torch
from batches import BACKENDS

import pyoffline as po

pytestmark = pytest.mark.usefixtures("one_thread")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
N, D, V = 6, 16, 37
X = torch.zeros(N, D)
HEAD = po.Head(torch.ones(V, D))
LABELS = torch.zeros(N).long()
TOKENS = po.TokenBatch(LABELS)
TEACHER = po.TeacherHead(torch.zeros(N, 8), po.Head(torch.ones(V, 8)))
TOP = torch.full((N, 3), -2.0)
IDS = torch.arange(3).expand(N, 3)


def with_(tensor, at, value):
    changed = tensor.clone()
    changed[at] = value
    return changed


# what is wrong -> (arguments replaced, error, words of the message)
BAD = {
    "another vocabulary": (
        {"teacher": po.TeacherHead(torch.zeros(N, 8), po.Head(torch.ones(V + 3, 8)))},
        ValueError,
        "40 entries, the student's 37",
    ),
    "logits of another vocabulary": (
        {"teacher": po.TeacherLogits(torch.zeros(N, V - 1))},
        ValueError,
        "36 entries, the student's 37",
    ),
    "teacher of other positions": (
        {"teacher": po.TeacherHead(torch.zeros(N + 1, 8), po.Head(torch.ones(V, 8)))},
        ValueError,
        "leading shape",
    ),
    "teacher's width": (
        {"teacher": po.TeacherHead(torch.zeros(N, 9), po.Head(torch.ones(V, 8)))},
        ValueError,
        "TeacherHead: hidden",
    ),
    "teacher is a tensor": ({"teacher": torch.zeros(N, V)}, TypeError, "po.TeacherLogits"),
    "teacher's head is a weight": (
        {"teacher": po.TeacherHead(X, torch.ones(V, D))},
        TypeError,
        "po.Head",
    ),
    "teacher in fp64": (
        {"teacher": po.TeacherHead(X.double(), po.Head(torch.ones(V, D).double()))},
        TypeError,
        "float64 beside a student",
    ),
    "temperature 0": (
        {"teacher": po.TeacherLogits(torch.zeros(N, V), temperature=0.0)},
        ValueError,
        "temperature",
    ),
    "top-k of another k": (
        {"teacher": po.TeacherTopK(IDS, TOP[:, :2])},
        ValueError,
        "one shape",
    ),
    "k above V": (
        {"teacher": po.TeacherTopK(torch.zeros(N, V + 1).long(), torch.zeros(N, V + 1))},
        ValueError,
        "k from 1",
    ),
    "ids are floats": ({"teacher": po.TeacherTopK(IDS.float(), TOP)}, TypeError, "int64"),
    "an id twice": (
        {"teacher": po.TeacherTopK(with_(IDS, (2, 1), 0), TOP)},
        ValueError,
        "row 2 holds 0 twice",
    ),
    "an id out of range": (
        {"teacher": po.TeacherTopK(with_(IDS, (3, 1), V), TOP)},
        IndexError,
        "row 3 holds 37",
    ),
    "no distribution": (
        {"teacher": po.TeacherTopK(IDS, with_(TOP, (4, 0), 0.1))},
        ValueError,
        "row 4 sums to 1.3",
    ),
    "an objective alone": ({"divergence": po.NLL()}, TypeError, "po.ForwardKL"),
    "an unused tensor": (
        {"tokens": po.TokenBatch(LABELS, advantages=torch.ones(N))},
        ValueError,
        "tokens.advantages is given",
    ),
    "an unused extra": (
        {"tokens": po.TokenBatch(LABELS, extra={"g": torch.ones(N)})},
        ValueError,
        "'g'",
    ),
    "a missing extra": (
        {"divergence": po.ForwardKL().weighted_by("g")},
        ValueError,
        "extra\\['g'\\]",
    ),
    "a missing tensor": (
        {"divergence": po.ForwardKL() + po.PPOClip()},
        ValueError,
        "reads tokens.old_logps|reads tokens.advantages",
    ),
    "head is a weight": ({"head": torch.ones(V, D)}, TypeError, "po.Head"),
}


@each_backend
@pytest.mark.parametrize("what", BAD)
def test_N12_bad_arguments_are_named_errors(what, backend):
    replaced, error, words = BAD[what]
    good = {"hidden": X, "head": HEAD, "teacher": TEACHER, "tokens": TOKENS}
    good["divergence"] = po.ForwardKL()
    with po.use_backend(backend):
        po.linear_distill_loss(**good)
        with pytest.raises(error, match=words):
            po.linear_distill_loss(**{**good, **replaced})


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: po.JSD(1.5), ValueError),
        (lambda: po.JSD(float("nan")), ValueError),
        (lambda: po.JSD("half"), TypeError),
        (lambda: po.RenyiDivergence(0.0), ValueError),
        (lambda: po.RenyiDivergence(float("inf")), ValueError),
        (lambda: po.AlphaDivergence(float("inf")), ValueError),
        (lambda: po.ForwardKL() * float("inf"), ValueError),
        (lambda: po.ForwardKL() * "2", TypeError),
        (lambda: po.ForwardKL().weighted_by(3), TypeError),
        (lambda: po.ForwardKL().weighted_by("a").weighted_by("b"), ValueError),
        (lambda: sum([po.TVD()] * 8, po.TVD()), ValueError),
        (lambda: po.TVD() + po.GSPO(), ValueError),
        (lambda: 0.1 * po.DPO() - po.TVD(), ValueError),
        (lambda: po.linear_policy_loss(X, HEAD, TOKENS, po.ForwardKL()), TypeError),
    ],
)
def test_N12_bad_divergences_are_errors(make, error):
    with pytest.raises(error):
        make()


def test_divergences_compose_both_ways_and_subtract():
    n, f = po.NLL(), po.ForwardKL()
    for made, scales in (
        (n + f, (1.0, 1.0)),
        (f + n, (1.0, 1.0)),
        (n - 2 * f, (-2.0, 1.0)),
        (f - 0.5 * n, (1.0, -0.5)),
        (-(f + n), (-1.0, -1.0)),
        ((f + n) * 3, (3.0, 3.0)),
    ):
        program = made.program(False)
        assert program.hyper[:, 0].tolist() == [scales[0]]
        assert program.objective.hyper[0, 0].item() == scales[1]
    gated = (f + n).weighted_by("a") + po.JSD().weighted_by("b")
    assert gated.program(False).objective.gates == ("a", "b")


def test_the_table_of_backends_names_the_op():
    assert "linear_distill_loss" in str(po.backends())
    with pytest.raises(RuntimeError):
        with po.use_backend("triton"):
            pass

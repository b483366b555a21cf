"""Bad input, kind by kind, in the library and in a data file: a clear error or the documented
value, never a NaN. (More of each kind: test_preference_errors.py, test_coupled_errors.py,
test_distill_errors.py, test_data.py, test_pairs.py.)
"""

import math

import pytest
import torch

pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    VOCAB,
    losses,
    pair_rows,
    single_rows,
    train,
    write_config,
    write_model,
)

import pyoffline as po  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")
LENGTHS = (3, 1, 4, 2)
JSD = {"name": "distill", "divergence": "jsd"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def call(objective, lengths=LENGTHS, keep=None, **columns):
    """(loss, dhidden, log-prob sums) of a padded batch of these lengths, cut to `keep` rows."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(lengths), 4, 5, generator=random).double()[:keep].requires_grad_()
    weight = torch.randn(VOCAB, 5, generator=random).double()
    labels = torch.randint(VOCAB, (len(lengths), 4), generator=random)
    labels[torch.arange(4) >= torch.tensor(lengths)[:, None]] = -100
    labels = labels[:keep]
    given = {
        k: v.double().expand(labels.shape) if k.endswith("logps") else v for k, v in columns.items()
    }
    tokens = po.TokenBatch(labels, **given)
    out = po.linear_policy_loss(hidden, po.Head(weight), tokens, objective)
    out.loss.backward()
    return out.loss.detach(), hidden.grad, out.stats.logps.sum(1)


def sequences(rewards, groups):
    return po.SequenceBatch(rewards=torch.tensor(rewards).double(), group_ids=torch.tensor(groups))


def stopped(tmp_path, folder, rows, capsys, **config):
    """What is said of a file that stops a run before step 0."""
    assert train(write_config(tmp_path, folder, rows, batch=2, **config)) == (2, [])
    return capsys.readouterr().err


# A lone chosen without its rejected


def test_a_lone_chosen_in_the_library():
    with pytest.raises(ValueError, match="an even number of sequences .* got 3"):
        call(po.SimPO(), lengths=(3, 1, 4))
    with pytest.raises(ValueError, match="one side only"):
        call(po.SimPO(), lengths=(3, 1, 0, 2))


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_lone_answer_in_a_file(tmp_path, folder, capsys, side):
    rows = pair_rows()
    del rows[1][f"{side}_ids"]
    err = stopped(tmp_path, folder, rows, capsys, objective="dpo")
    assert f"s.jsonl:2: {side}: missing; the objective compares chosen and rejected" in err


# A group of one, a group of equal rewards

ALONE = sequences([1.0, -2.0, 0.5, 3.0], [5, 6, 7, 8])
EQUAL = sequences([0.1, 0.1, 0.3, 0.3], [0, 0, 1, 1])
MU = torch.full((), -2.0)


@pytest.mark.parametrize("given", [ALONE, EQUAL], ids=["one", "equal"])
@pytest.mark.parametrize("objective", [po.ListDPO(reference_free=True), po.RRHF()])
def test_a_ranking_of_nothing_is_0(objective, given):
    loss, dhidden, _ = call(objective, sequences=given)
    assert loss == 0 and (dhidden == 0).all()


def test_group_objectives_have_their_documented_value():
    """RenyiRWR alone: -log W; of equal rewards the power mean of W. AlphaELBO alone: -R / tau."""
    loss, dhidden, logps = call(po.RenyiRWR(0.5), behavior_logps=MU, sequences=ALONE)
    log_w = logps - MU * torch.tensor(LENGTHS)
    torch.testing.assert_close(loss, -log_w.mean())
    assert (dhidden != 0).any()
    loss, *_ = call(po.RenyiRWR(0.5), behavior_logps=MU, sequences=EQUAL)
    means = (0.5 * log_w).view(2, 2).logsumexp(1) - math.log(2)
    torch.testing.assert_close(loss, -2 * means.mean())
    loss, dhidden, _ = call(po.AlphaELBO(0.5), behavior_logps=MU, sequences=ALONE)
    torch.testing.assert_close(loss, -ALONE.rewards.mean())
    assert dhidden.abs().max() < 1e-15


@pytest.mark.parametrize("groups", [(0, 1, 2, 3), (0, 0, 0, 0)], ids=["one", "equal"])
def test_advantages_have_their_documented_value(groups):
    """Nothing to compare is 0; rwr, a softmax times the group's size, is 1."""
    rewards, ids = torch.full((4,), 0.7), torch.tensor(groups)
    for estimator in (po.advantages.group_normalize, po.advantages.leave_one_out):
        assert estimator(rewards, ids).tolist() == [0.0] * 4
    assert po.advantages.opo(rewards, ids, torch.tensor([3.0, 1, 4, 2])).tolist() == [0.0] * 4
    assert po.advantages.rwr(rewards, ids).tolist() == [1.0] * 4


@pytest.mark.parametrize("kind", ["one", "equal"])
@pytest.mark.parametrize(
    ("objective", "advantage", "zero"),
    [
        ("ppo_clip", "group_normalize", True),
        ("weighted_nll", "leave_one_out", True),
        ("weighted_nll", "rwr", False),
        ("list_dpo", None, True),
        ("rrhf", None, True),
        ("renyi_rwr", None, False),
        ("alpha_elbo", None, False),
    ],
)
def test_such_a_group_in_a_file(tmp_path, folder, objective, advantage, zero, kind):
    rows = single_rows(4)
    for i, row in enumerate(rows):
        del row["advantages"]
        row |= {"group": i} if kind == "one" else {"reward": 0.3}
    config = write_config(tmp_path, folder, rows, objective=objective, advantage=advantage)
    code, events = train(config)
    assert code == 0
    steps = [(row["loss"], row["grad_norm"]) for row in events if row["event"] == "train"]
    assert all(math.isfinite(x) for step in steps for x in step)
    assert not zero or steps == [(0.0, 0.0)] * 2


# An empty sequence


@pytest.mark.parametrize("objective", [po.GSPO(), po.VESPO(), po.GMPO(), po.SAPO()])
def test_an_empty_sequence_in_the_library_is_not_there(objective):
    adv = torch.tensor([1.0, -1.0, 0.5, 2.0]).double()
    (loss, dhidden, _), (without, d_without, _) = (
        call(objective, (3, 1, 4, 0), keep, advantages=adv[:keep], old_logps=MU) for keep in (4, 3)
    )
    torch.testing.assert_close(loss, without)
    torch.testing.assert_close(dhidden[:3], d_without)
    assert (dhidden[3] == 0).all() and (d_without != 0).any()


def test_nothing_but_empty_sequences_is_0():
    for objective in (po.GSPO(), po.PPOClip()):
        adv = torch.ones(2).double()
        loss, dhidden, _ = call(objective, lengths=(0, 0), advantages=adv, old_logps=MU)
        assert loss == 0 and (dhidden == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"completion_ids": []}, "completion_ids: empty; there is nothing to train on"),
        ({"completion_ids": None, "completion": ""}, "completion: empty; there is nothing"),
        ({"completion_ids": None, "prompt_ids": None, "text": ""}, "text: empty; there is nothing"),
        ({"prompt_ids": []}, "prompt: empty, and the tokenizer adds no first token"),
    ],
)
def test_an_empty_sequence_in_a_file(tmp_path, folder, capsys, change, message):
    rows = single_rows()
    rows[2] |= change
    assert f"s.jsonl:3: {message}" in stopped(tmp_path, folder, rows, capsys, objective="nll")


def test_an_empty_answer_of_a_pair_in_a_file(tmp_path, folder, capsys):
    rows = pair_rows()
    rows[2]["rejected_ids"] = []
    err = stopped(tmp_path, folder, rows, capsys, objective="sim_po")
    assert "s.jsonl:3: rejected_ids: empty; there is nothing to train on" in err


# A ranking with ties


def test_tied_answers_are_not_compared_with_each_other():
    given = sequences([1.0, 1.0, 0.0, 0.0], [4, 4, 4, 4])
    loss, dhidden, x = call(po.ListDPO(0.5, reference_free=True), sequences=given)
    score, worse = 0.5 * x, 0.5 * x[2:]
    chances = [score[i] - torch.cat([score[i, None], worse]).logsumexp(0) for i in (0, 1)]
    torch.testing.assert_close(loss, -sum(chances))
    assert dhidden.isfinite().all() and (dhidden[2:] != 0).any()
    loss, _, x = call(po.RRHF(), sequences=given)
    mean = x / torch.tensor(LENGTHS)
    want = sum((mean[j] - mean[i]).clamp(min=0) for i in (0, 1) for j in (2, 3))
    torch.testing.assert_close(loss, want)


@pytest.mark.parametrize("objective", ["list_dpo", "rrhf"])
def test_ties_in_a_file(tmp_path, folder, objective):
    rows = single_rows()
    for i, row in enumerate(rows):
        row |= {"group": 0, "reward": float(i < 3)}
    code, events = train(write_config(tmp_path, folder, rows, objective=objective))
    assert code == 0 and all(x > 0 and math.isfinite(x) for x in losses(events))


def test_a_reward_that_is_no_number_ranks_nothing(tmp_path, folder, capsys):
    rows = single_rows()
    rows[1]["reward"] = math.nan
    err = stopped(tmp_path, folder, rows, capsys, objective="list_dpo")
    assert "s.jsonl:2: reward: nan is not a finite number" in err


# A teacher of another vocabulary, a top-k that is no distribution


def distilled(teacher):
    hidden, weight = torch.zeros(2, 5), torch.ones(VOCAB, 5)
    tokens = po.TokenBatch(torch.tensor([1, 2]))
    return po.linear_distill_loss(hidden, po.Head(weight), teacher, tokens, po.JSD())


def top(ids, logps):
    return po.TeacherTopK(torch.tensor(ids), torch.tensor(logps))


@pytest.mark.parametrize(
    ("teacher", "error", "words"),
    [
        (po.TeacherHead(torch.zeros(2, 3), po.Head(torch.ones(50, 3))), ValueError, "50 entries"),
        (po.TeacherLogits(torch.zeros(2, 40)), ValueError, "40 entries, the student's 41"),
        (top([[0, 1], [0, 41]], [[-1.0, -1.0]] * 2), IndexError, "row 1 holds 41"),
        (top([[0, 1], [3, 3]], [[-1.0, -1.0]] * 2), ValueError, "row 1 holds 3 twice"),
        (top([[0, 1]] * 2, [[-1.0, -1.0], [-0.1, -0.5]]), ValueError, "row 1 sums to 1.5"),
    ],
    ids=["head", "logits", "id", "twice", "above_1"],
)
def test_a_teacher_that_does_not_fit_in_the_library(teacher, error, words):
    with pytest.raises(error, match=words):
        distilled(teacher)


def good_top():
    return single_rows()[2]["teacher_topk_ids"], single_rows()[2]["teacher_topk_logps"]


def changed(at, i, value):
    ids, logps = good_top()
    (ids if at == "ids" else logps)[i] = value
    return {"teacher_topk_ids": ids, "teacher_topk_logps": logps}


BAD_TOP_K = {
    "above 1": (
        changed("logps", 1, [-0.1, -0.5, -2.0]),
        "teacher_topk_logps[1]: the probabilities",
    ),
    "far above 1": (changed("logps", 0, [9e9, -1.0, -2.0]), "teacher_topk_logps[0]: the probabil"),
    "nan": (changed("logps", 0, [math.nan, -1, -2]), "teacher_topk_logps[0]: nan is not a finite"),
    "-inf": (changed("logps", 0, [-math.inf, -1, -2]), "teacher_topk_logps[0]: -inf is not a"),
    "text": (changed("logps", 0, ["-1", -1, -2]), "teacher_topk_logps[0]: expected numbers, got"),
    "twice": (changed("ids", 0, [4, 4, 5]), "teacher_topk_ids[0]: an id comes twice"),
    "negative": (changed("ids", 0, [4, -1, 5]), "teacher_topk_ids[0]: expected token ids"),
    "float ids": (changed("ids", 0, [4.0, 1, 5]), "teacher_topk_ids[0]: expected token ids"),
    "ragged": (changed("ids", 1, [4, 5]), "teacher_topk_ids[1]: 2 entries, the first token has 3"),
    "other k": (
        {"teacher_topk_ids": [[1]] * 3, "teacher_topk_logps": [[-1.0]] * 3},
        "teacher_topk_ids: 1 entries a token here, 3 in the first row",
    ),
    "one shape": ({"teacher_topk_ids": [[1]] * 3}, "teacher_topk_logps: not of the shape of"),
    "flat": ({"teacher_topk_ids": [1, 2, 3]}, "teacher_topk_ids: expected a list with one list"),
    "empty": ({"teacher_topk_ids": []}, "teacher_topk_ids: expected a list with one list of k"),
    "tokens": (
        {"teacher_topk_ids": [[1, 2, 3]] * 2, "teacher_topk_logps": [[-2.0] * 3] * 2},
        "teacher_topk_ids: 2 values for 3 completion tokens",
    ),
    "missing": (
        {"teacher_topk_logps": None},
        "teacher_topk_logps: missing; distill reads the log-probs of the teacher's top-k",
    ),
    "vocabulary": (
        changed("ids", 0, [4, VOCAB, 5]),
        "teacher_topk_ids: id 41 is outside the model's vocabulary of 41",
    ),
}


@pytest.mark.parametrize("name", BAD_TOP_K)
def test_a_teacher_that_does_not_fit_in_a_file(tmp_path, folder, capsys, name):
    rows, (change, message) = single_rows(), BAD_TOP_K[name]
    rows[2] |= change
    assert f"s.jsonl:3: {message}" in stopped(tmp_path, folder, rows, capsys, objective=JSD)


def test_skip_bad_trains_on_the_other_rows(tmp_path, folder, capsys):
    rows = single_rows()
    rows[2] |= BAD_TOP_K["above 1"][0]
    code, events = train(write_config(tmp_path, folder, rows, objective=JSD), "--skip-bad")
    assert code == 0 and "left out 1 row\n" in capsys.readouterr().err
    tokens = sum(len(row["completion_ids"]) for i, row in enumerate(rows) if i != 2)
    assert next(row for row in events if row["event"] == "train")["num_tokens"] == tokens

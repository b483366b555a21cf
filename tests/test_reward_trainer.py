"""A reward model from a configuration file: loss, gradient step and evaluation against a plain loop
in fp64, whatever the micro-batches; what is saved scores as it was trained.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    losses,
    pair_rows,
    single_rows,
    train,
    write_config,
    write_model,
)
from transformers import AutoModelForSequenceClassification  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")
RATE = 0.05


def classifier(folder, scores):
    """A classifier of so many scores, so that a run starts from known weights."""
    made = write_model(folder)
    torch.manual_seed(3)
    options = {"num_labels": scores, "dtype": torch.float64}
    AutoModelForSequenceClassification.from_pretrained(made, **options).save_pretrained(made)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("model"), 1)


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory):
    return classifier(tmp_path_factory.mktemp("two"), 2)


def score(model, prompt, ids):
    """The scores of one sequence alone, no padding."""
    return model(input_ids=torch.tensor([prompt + ids])).logits[0]


def sides_of(model, row):
    return [score(model, row["prompt_ids"], row[f"{s}_ids"]) for s in ("chosen", "rejected")]


def plain_pairs(model, rows, margin=0.0):
    total = 0.0
    for row in rows:
        up, down = sides_of(model, row)
        gap = row["chosen_reward"] - row["rejected_reward"] if margin == "rewards" else margin
        total = total - F.logsigmoid(up[0] - down[0] - gap)
    return total / len(rows)


def plain_variance(model, rows, link="logistic"):
    total = 0.0
    for row in rows:
        up, down = sides_of(model, row)
        s2 = up[1].exp() ** 2 + down[1].exp() ** 2
        z = (up[0] - down[0]) / s2.sqrt()
        likely = {"logistic": lambda z: F.logsigmoid(2**0.5 * z), "probit": torch.special.log_ndtr}
        total = total - likely[link](z)
    return total / len(rows)


def plain_ranking(model, rows):
    """Both groups, every answer against those ranked below it."""
    total = 0.0
    for group in (0, 1):
        own = [r for r in rows if r["group"] == group]
        scored = [(r["reward"], score(model, r["prompt_ids"], r["completion_ids"])[0]) for r in own]
        for rank, s in scored:
            below = [other for lower, other in scored if lower < rank]
            if below:
                total = total - s + torch.stack([s, *below]).logsumexp(0)
    return total / 2


@pytest.mark.parametrize("batch", [3, 2, 1])
@pytest.mark.parametrize("margin", [0.25, "rewards"])
def test_training_equals_a_plain_loop(tmp_path, folder, margin, batch):
    rows, objective = pair_rows(), {"name": "bradley_terry", "margin": margin}
    check_run(tmp_path, folder, rows, objective, batch, lambda m: plain_pairs(m, rows, margin))


@pytest.mark.parametrize("batch", [3, 1])
@pytest.mark.parametrize("link", ["logistic", "probit"])
def test_scores_with_variance_equal_a_plain_loop(tmp_path, folder_of_two, link, batch):
    rows, objective = pair_rows(), {"name": "bradley_terry_variance", "link": link}
    loss = partial(plain_variance, rows=rows, link=link)
    evals = check_run(tmp_path, folder_of_two, rows, objective, batch, loss)
    assert evals[0]["eval_rewards/spread"] > 0


@pytest.mark.parametrize("ties", [(), (0, 2), (0, 2, 4)])
@pytest.mark.parametrize("batch", [2, 1])
def test_a_ranking_equals_a_plain_loop(tmp_path, folder, batch, ties):
    rows = single_rows()
    for i in ties:  # of group 0: answers that are not compared with each other
        rows[i]["reward"] = 9.0
    loss = partial(plain_ranking, rows=rows)
    check_run(tmp_path, folder, rows, {"name": "plackett_luce"}, batch, loss, units=2)


def check_run(tmp_path, folder, rows, objective, batch, plain_loss, units=3):
    """Two steps of gradient descent, evaluated, against autograd; returns the evaluations."""
    path = write_config(tmp_path, folder, rows, batch=batch, objective=objective)
    options = [f"learning_rate={RATE}", "optim=sgd", "lr_scheduler_type=constant"]
    options += ["max_grad_norm=0", f"gradient_accumulation_steps={-(-units // batch)}"]
    options += ["eval_strategy=epoch", "per_device_eval_batch_size=2"]
    options = [f"trainer.{x}" for x in options] + [f"data.eval={tmp_path / 's.jsonl'}"]
    code, events = train(path, *options)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    want = []
    for _ in range(3):
        loss = plain_loss(model)
        want.append(loss.item())
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    assert code == 0 and losses(events) == pytest.approx(want[:2], rel=2e-6)
    evals = [row for row in events if row["event"] == "eval"]
    assert [row["eval_loss"] for row in evals] == pytest.approx(want[1:], rel=1e-9)
    saved = tmp_path / "out" / "final"
    trained = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float64)
    assert plain_loss(trained).item() == pytest.approx(want[2], rel=1e-9)
    for name in ("margins", "accuracies"):
        assert f"eval_rewards/{name}" in evals[0]
    if objective["name"] != "plackett_luce":
        gap = evals[1]["eval_rewards/chosen"] - evals[1]["eval_rewards/rejected"]
        assert gap == pytest.approx(evals[1]["eval_rewards/margins"], rel=1e-9)
    return evals


@pytest.mark.parametrize("name", ["reward", "group"])
def test_a_ranking_needs_rewards_and_groups(tmp_path, folder, name, capsys):
    rows = single_rows()
    del rows[3][name]
    assert train(write_config(tmp_path, folder, rows, objective="plackett_luce")) == (2, [])
    assert f"s.jsonl:4: {name}: missing" in capsys.readouterr().err


def test_a_saved_classifier_of_another_number_of_scores_stops_the_run(tmp_path, folder, capsys):
    path = write_config(tmp_path, folder, pair_rows(), objective="bradley_terry_variance")
    assert train(path) == (2, [])
    assert "a causal LM, or a classifier of num_labels=2" in capsys.readouterr().err


def test_a_causal_lm_gets_a_new_score_and_a_margin_needs_its_columns(tmp_path, capsys):
    lm = write_model(tmp_path / "lm")
    rows = pair_rows()
    code, events = train(write_config(tmp_path, lm, rows, objective="bradley_terry"))
    assert code == 0 and len(losses(events)) == 2
    del rows[1]["rejected_reward"]
    other = tmp_path / "other"
    other.mkdir()
    objective = {"name": "bradley_terry", "margin": "rewards"}
    assert train(write_config(other, lm, rows, objective=objective)) == (2, [])
    assert "s.jsonl:2: rejected_reward: missing" in capsys.readouterr().err


def test_a_classifier_of_more_scores_is_refused(tmp_path, capsys):
    from pyoffline.config_objective import BradleyTerry, PlackettLuce
    from pyoffline.reward_trainer import RewardTrainer
    from pyoffline.trainer_config import OfflineConfig

    made = write_model(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(made, num_labels=2)
    args = OfflineConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    for objective in (BradleyTerry(), PlackettLuce()):
        with pytest.raises(ValueError, match="num_labels=1 .* got num_labels=2"):
            RewardTrainer(model, args, objective)

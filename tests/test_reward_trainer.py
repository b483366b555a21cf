"""A reward model from a configuration file: loss, gradient step and evaluation against a plain loop
in fp64, whatever the micro-batches; what is saved scores as it was trained.
"""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")

from family_cases import losses, pair_rows, train, write_config, write_model  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")
RATE = 0.05


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A classifier of one score, so that the run starts from known weights."""
    made = write_model(tmp_path_factory.mktemp("model"))
    torch.manual_seed(3)
    options = {"num_labels": 1, "dtype": torch.float64}
    AutoModelForSequenceClassification.from_pretrained(made, **options).save_pretrained(made)
    return made


def score(model, prompt, ids):
    """One sequence alone, no padding."""
    return model(input_ids=torch.tensor([prompt + ids])).logits[0, 0]


def plain_loss(model, rows, margin):
    total = 0.0
    for row in rows:
        sides = (score(model, row["prompt_ids"], row[f"{s}_ids"]) for s in ("chosen", "rejected"))
        gap = row["chosen_reward"] - row["rejected_reward"] if margin == "rewards" else margin
        up, down = sides
        total = total - F.logsigmoid(up - down - gap)
    return total / len(rows)


@pytest.mark.parametrize("batch", [3, 2, 1])
@pytest.mark.parametrize("margin", [0.25, "rewards"])
def test_training_equals_a_plain_loop(tmp_path, folder, margin, batch):
    rows = pair_rows()
    objective = {"name": "bradley_terry", "margin": margin}
    path = write_config(tmp_path, folder, rows, batch=batch, objective=objective)
    options = [f"learning_rate={RATE}", "optim=sgd", "lr_scheduler_type=constant"]
    options += ["max_grad_norm=0", f"gradient_accumulation_steps={-(-3 // batch)}"]
    options += ["eval_strategy=epoch", "per_device_eval_batch_size=2"]
    options = [f"trainer.{x}" for x in options] + [f"data.eval={tmp_path / 's.jsonl'}"]
    code, events = train(path, *options)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    want = []
    for _ in range(3):
        loss = plain_loss(model, rows, margin)
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
    assert plain_loss(trained, rows, margin).item() == pytest.approx(want[2], rel=1e-9)
    for name in ("chosen", "rejected", "margins", "accuracies"):
        assert f"eval_rewards/{name}" in evals[0]
    gap = evals[1]["eval_rewards/chosen"] - evals[1]["eval_rewards/rejected"]
    assert gap == pytest.approx(evals[1]["eval_rewards/margins"], rel=1e-9)


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
    from pyoffline.config_objective import BradleyTerry
    from pyoffline.reward_trainer import RewardTrainer
    from pyoffline.trainer_config import OfflineConfig

    made = write_model(tmp_path / "lm")
    model = AutoModelForSequenceClassification.from_pretrained(made, num_labels=2)
    args = OfflineConfig(output_dir=str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ValueError, match="num_labels=2"):
        RewardTrainer(model, args, BradleyTerry())

"""OfflineTrainer against a plain PyTorch loop in fp64: one sequence at a time, with logits."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from trainer_cases import COLUMNS, RATE, make_trainer, samples, tiny_model  # noqa: E402

from pyoffline.callbacks import JsonlCallback  # noqa: E402
from pyoffline.collate import Collator  # noqa: E402
from pyoffline.step_weights import step_weights  # noqa: E402
from pyoffline.token_objectives import KL, NLL, Entropy, PPOClip  # noqa: E402
from pyoffline.trainer import NonFiniteGradientError, OfflineTrainer  # noqa: E402
from pyoffline.trainer_config import OfflineConfig  # noqa: E402


class Gradients(transformers.TrainerCallback):
    """Copies of all gradients before each optimiser step."""

    def __init__(self):
        self.steps = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append([p.grad.clone() for p in model.parameters()])


def token_terms(model, sample):
    """logp, entropy [n] of the completion's tokens, from the model's own logits."""
    logits = model(input_ids=torch.tensor([sample.ids])).logits[0].log_softmax(-1)
    labels = torch.tensor(sample.ids)[1:, None]
    keep = slice(max(sample.n_prompt, 1) - 1, None)
    logps = logits[:-1].gather(-1, labels)[:, 0]
    return logps[keep], -(logits.exp() * logits).sum(-1)[:-1][keep]


def fp32(values):
    """Columns travel as fp32, so the oracle reads the same numbers."""
    return torch.tensor(values, dtype=torch.float32).double()


def nll_loss(model, sample):
    return -token_terms(model, sample)[0]


def ppo_loss(model, sample):
    logps, entropy = token_terms(model, sample)
    old, ref = (fp32(sample.columns[k]) for k in ("old_logps", "ref_logps"))
    adv = fp32(sample.columns["advantages"])
    ratio = (logps - old).exp()
    clipped = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
    gap = logps - ref
    return -clipped + 0.04 * ((-gap).exp() - 1 + gap) - 0.001 * entropy


PPO = PPOClip(0.2, 0.28) + 0.04 * KL("k3") - 0.001 * Entropy()
OBJECTIVES = {
    "nll": (NLL(), nll_loss, frozenset()),
    "ppo_kl_entropy": (PPO, ppo_loss, COLUMNS),
}


def scale(mode, all_samples, sample):
    """What one token of `sample` weighs in a step over `all_samples`."""
    if mode == "token-mean":
        return 1 / sum(s.n_completion for s in all_samples)
    if mode == "seq-mean-token-mean":
        return 1 / (len(all_samples) * sample.n_completion)
    if mode == "prompt-mean":
        group = [s for s in all_samples if s.columns["group"] == sample.columns["group"]]
        prompts = len({s.columns["group"] for s in all_samples})
        return 1 / (prompts * sum(s.n_completion for s in group))
    assert mode == "constant"
    return 1 / (len(all_samples) * 10)


def total_loss(model, per_token, step, mode="token-mean"):
    return sum((per_token(model, s) * scale(mode, step, s)).sum() for s in step)


def plain_loop(steps, per_token, mode):
    """SGD on the unpadded sequences; gradients and losses of every step."""
    model = tiny_model()
    gradients, losses = [], []
    for step in steps:
        loss = total_loss(model, per_token, step, mode)
        model.zero_grad()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        losses.append(loss.item())
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    return model, gradients, losses


def assert_same_training(trainer, seen, per_token, accumulation, mode="token-mean"):
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    steps = [sum(seen[i : i + accumulation], []) for i in range(0, len(seen), accumulation)]
    model, gradients, losses = plain_loop(steps, per_token, mode)
    assert len(watch.steps) == len(steps) > 1
    for got, expected in zip(watch.steps, gradients, strict=True):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=2e-7)  # transformers keeps losses in fp32
    for a, b in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("accumulation", [1, 2, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_a_plain_loop(tmp_path, name, accumulation, packing):
    objective, per_token, keep = OBJECTIVES[name]
    trainer, seen = make_trainer(
        tmp_path, samples(13), objective, packing, keep, gradient_accumulation_steps=accumulation
    )  # 7 micro-batches, the last of one row: the last step of 2 and 3 is short
    assert_same_training(trainer, seen, per_token, accumulation)


@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "prompt-mean", "constant"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_aggregation_spans_the_micro_batches(tmp_path, mode, packing):
    trainer, seen = make_trainer(
        tmp_path,
        samples(13),
        NLL(),
        packing,
        frozenset({"group"}),
        gradient_accumulation_steps=3,
        aggregation=mode,
        horizon=10 if mode == "constant" else None,
    )
    assert_same_training(trainer, seen, nll_loss, 3, mode)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("batch", [1, 3, 20])
def test_eval_loss_is_the_loss_of_the_whole_set(tmp_path, name, batch):
    objective, per_token, keep = OBJECTIVES[name]
    data = samples(7)
    trainer, _ = make_trainer(
        tmp_path, data, objective, keep=keep, per_device_eval_batch_size=batch
    )
    expected = total_loss(tiny_model(), per_token, data).item()
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)
    assert metrics["eval_num_tokens"] == sum(s.n_completion for s in data)
    assert all(p.grad is None for p in trainer.model.parameters())


def test_weights_of_the_batch_are_used_as_they_are(tmp_path):
    trainer, _ = make_trainer(tmp_path, samples(4), NLL(), keep=frozenset())
    batch = Collator(0)(samples(4))
    batch["weights"] = torch.rand(batch["labels"].shape, dtype=torch.float64)
    expected = 0.0
    for row, s in enumerate(samples(4)):
        weights = batch["weights"][row, s.n_prompt : len(s.ids)]
        expected += (nll_loss(trainer.model, s) * weights).sum()
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_the_models_own_forward_and_logits_are_never_used(tmp_path):
    model = tiny_model()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    own = type(model).forward
    try:
        type(model).forward = lambda *a, **k: pytest.fail("the model's own forward ran")
        with pytest.raises(TypeError, match="hook"):  # a hooked head is refused by Head.of
            make_trainer(tmp_path, samples(4), NLL(), keep=frozenset(), model=model)
        model.lm_head._forward_pre_hooks.clear()
        trainer, _ = make_trainer(tmp_path, samples(4), NLL(), keep=frozenset(), model=model)
        trainer.train()
        trainer.evaluate()
    finally:
        type(model).forward = own
    assert "forward" not in model.__dict__


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_t3_a_non_finite_gradient_stops_before_the_optimiser_step(tmp_path, value):
    data = samples(8)
    bad = data[5].columns["advantages"] = [1.0] * data[5].n_completion
    bad[0] = value
    trainer, _ = make_trainer(tmp_path, data, PPOClip(), keep=COLUMNS - {"ref_logps"})
    stepped = []
    trainer.create_optimizer()
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda *a, **k: stepped.append(step(*a, **k))
    with pytest.raises(NonFiniteGradientError, match="before the optimiser step"):
        trainer.train()
    assert len(stepped) == trainer.state.global_step < 4
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_metrics_are_logged_with_the_fields_names(tmp_path):
    trainer, _ = make_trainer(tmp_path, samples(4), PPO)
    trainer.add_callback(JsonlCallback(tmp_path / "metrics.jsonl"))
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["event"] for r in rows] == ["train_begin", "train", "train", "end"]
    for row in rows[1:3]:
        assert {
            "loss",
            "grad_norm",
            "entropy",
            "kl",
            "ratio/mean",
            "ratio/max",
            "step_time_s",
        } <= set(row)
        assert row["ratio/max"] >= row["ratio/mean"] >= row["ratio/min"] > 0
    assert sum(r["num_tokens"] for r in rows[1:3]) == sum(s.n_completion for s in samples(4))


def test_resume_continues_bitwise_from_safetensors(tmp_path):
    def train(folder, **options):
        model = tiny_model(torch.float32)
        trainer, _ = make_trainer(
            folder,
            samples(16),
            NLL(),
            keep=frozenset(),
            model=model,
            optim="adamw_torch",
            gradient_accumulation_steps=2,
            save_strategy="steps",
            save_steps=2,
            lr_scheduler_type="cosine",
        )
        trainer.train(**options)
        return [p.detach().clone() for p in model.parameters()]

    whole = train(tmp_path)
    files = {p.name for p in tmp_path.rglob("*") if p.is_file()}
    assert "optimizer.safetensors" in files
    assert {name.rsplit(".", 1)[-1] for name in files} <= {"safetensors", "json"}
    resumed = train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_weights_over_ranks_add_up_after_the_host_averages(ranks):
    collate = Collator(0, frozenset({"group"}))
    batches = [collate(samples(8)[i : i + 2]) for i in range(0, 8, 2)]
    whole, tokens = step_weights(batches, "token-mean", None, lambda t: t, 1, torch.float64)
    parts = []
    for rank in range(ranks):
        mine = batches[rank::ranks]

        def everyone(t, mine=mine):
            return torch.tensor([tokens, 8])

        parts += step_weights(mine, "token-mean", None, everyone, ranks, torch.float64)[0]
    assert sum(w.sum() for w in parts).item() / ranks == pytest.approx(1.0, rel=1e-12)
    assert sum(w.sum() for w in whole).item() == pytest.approx(1.0, rel=1e-12)


def ranks_run(folder, batch, accumulation):
    """A training and evaluation at 8 rows a step, however they are split; rank 0 writes it down."""
    trainer, _ = make_trainer(
        folder,
        samples(16),
        PPO,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo" if "RANK" in os.environ else None,
    )
    trainer.train()
    result = trainer.evaluate()  # 16 rows, 3 a batch: some are repeated to make ranks even
    result["loss"] = [r["loss"] for r in trainer.state.log_history if "loss" in r]
    result["parameters"] = [p.tolist() for p in trainer.model.parameters()]
    if trainer.is_world_process_zero():
        (Path(folder) / "result.json").write_text(json.dumps(result))


def ranks_stop(folder):
    """A NaN in one row, which one rank holds: each rank writes what it did."""
    data = samples(16)
    data[9].columns["advantages"] = [math.nan] * data[9].n_completion
    trainer, _ = make_trainer(
        folder,
        data,
        PPO,
        per_device_train_batch_size=4,
        train_sampling_strategy="sequential",
        ddp_find_unused_parameters=False,
        ddp_backend="gloo",
    )
    try:
        trainer.train()
        message = None
    except NonFiniteGradientError as error:
        message = str(error)
    result = {
        "message": message,
        "steps": trainer.state.global_step,
        "finite": all(bool(p.isfinite().all()) for p in trainer.model.parameters()),
    }
    (Path(folder) / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(result))


def launch_two_ranks(folder, *what):
    root = Path(__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "tests")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *launch, __file__, str(folder), *what]
    done = subprocess.run(command, env=environment, check=False, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()[-2000:]


@pytest.mark.slow
def test_t3_a_non_finite_gradient_of_one_rank_stops_both(tmp_path):
    launch_two_ranks(tmp_path, "stop")
    for rank in (0, 1):
        result = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert "before the optimiser step" in (result["message"] or "")
        assert result["steps"] == 1 and result["finite"]


@pytest.mark.slow
def test_two_ranks_equal_one_process(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    ranks_run(one, 8, 1)
    launch_two_ranks(two)
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, two))
    for x, y in zip(a["parameters"], b["parameters"], strict=True):
        torch.testing.assert_close(torch.tensor(x), torch.tensor(y), rtol=1e-12, atol=1e-12)
    assert b["eval_loss"] == pytest.approx(a["eval_loss"], rel=1e-12)
    for name in ("eval_num_tokens", "eval_entropy", "eval_ratio/max", "eval_kl"):
        assert b[name] == pytest.approx(a[name], rel=1e-12), name
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-6, abs=1e-7)


if __name__ == "__main__":  # a rank of launch_two_ranks
    ranks_stop(sys.argv[1]) if "stop" in sys.argv else ranks_run(sys.argv[1], 2, 2)


@pytest.mark.parametrize(
    "name", ["compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"]
)
def test_a_function_of_logits_raises_and_is_not_left_uncalled(tmp_path, name):
    options = OfflineConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match=f"{name}: there are no logits"):
        OfflineTrainer(tiny_model(), options, **{name: lambda *args: {}})


def test_an_objective_by_name_and_a_batch_without_labels_are_explained(tmp_path):
    options = OfflineConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="expected an objective such as po.PPOClip"):
        OfflineTrainer(tiny_model(), options, "ppo_clip")
    trainer = OfflineTrainer(tiny_model(), options)
    with pytest.raises(ValueError, match="no labels, only input_ids: a data collator makes them"):
        trainer.compute_loss(trainer.model, {"input_ids": torch.ones(1, 3, dtype=torch.long)})

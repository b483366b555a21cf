"""Objectives that couple sequences, pairs and groups in the trainer, in fp64 against a plain loop:
whatever the micro-batches, padded or packed; and their rows through a configuration file.
"""

import json
import math

import pytest
import torch
import torch.nn.functional as F
import yaml

pytest.importorskip("transformers")

from test_interrupt import write_model  # noqa: E402
from test_trainer import Gradients, fp32, token_terms  # noqa: E402
from trainer_cases import RATE, VOCAB, make_trainer, tiny_model  # noqa: E402

import pyoffline as po  # noqa: E402
from pyoffline import cli, units  # noqa: E402
from pyoffline.collate import Collator  # noqa: E402
from pyoffline.data import Needs, Sample, SampleSet  # noqa: E402


def rows(n, seed=0):
    """Ragged sequences with every column; groups of 2 and 3, not side by side."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        n_prompt, n_completion = 1 + i % 3, 1 + (5 * i) % 7
        ids = torch.randint(1, VOCAB, (n_prompt + n_completion,), generator=random).tolist()
        noise = torch.randn(3, n_completion, generator=random) * 0.1 - math.log(VOCAB)
        columns = dict(
            zip(("old_logps", "ref_logps", "behavior_logps"), noise.tolist(), strict=True)
        )
        columns |= {"advantages": float(torch.randn((), generator=random)), "group": i % 4}
        columns |= {"reward": float(torch.randn((), generator=random)), "label": i % 2}
        out.append(Sample(ids, n_prompt, i + 1, columns))
    return out


def logps_of(model, s):
    """One forward a sequence: Llama's norm is fp32, so two gradients would round apart."""
    return token_terms(model, s)[0]


def gspo(logps, s):
    adv = fp32(s.columns["advantages"])
    ratio = (logps - fp32(s.columns["old_logps"])).mean().exp()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - 3e-2, 1 + 4e-2) * adv)


def k3(logps, s):
    gap = fp32(s.columns["ref_logps"]) - logps
    return (gap.exp() - 1 - gap).sum()


def log_ratio(model, s):
    return (logps_of(model, s) - fp32(s.columns["ref_logps"])).sum()


def gspo_step(model, items):
    tokens, logps = sum(s.n_completion for s in items), [logps_of(model, s) for s in items]
    pairs = list(zip(logps, items, strict=True))
    return sum(gspo(x, s) / len(items) + 0.1 * k3(x, s) / tokens for x, s in pairs)


def gspo_tokens_step(model, items):
    """aggregation token-mean: a sequence weighs its tokens."""
    tokens = sum(s.n_completion for s in items)
    return sum(gspo(logps_of(model, s), s) * s.n_completion / tokens for s in items)


def kto_step(model, items):
    score = [0.1 * log_ratio(model, s) for s in items]
    signs = [2 * s.columns["label"] - 1 for s in items]
    return sum(1 - torch.sigmoid(sign * x) for sign, x in zip(signs, score, strict=True)) / len(
        items
    )


def dpo_step(model, pairs):
    gaps = [log_ratio(model, a) - log_ratio(model, b) for a, b in pairs]
    return sum(-F.logsigmoid(0.1 * g) for g in gaps) / len(pairs)


def orpo_step(model, pairs):
    def odds(logps):
        return logps.mean() - torch.log1p(-logps.mean().exp())

    tokens = sum(a.n_completion for a, _ in pairs)
    both = [(logps_of(model, a), logps_of(model, b)) for a, b in pairs]
    nll = sum(-x.sum() for x, _ in both) / tokens
    return nll - sum(F.logsigmoid(odds(x) - odds(y)) for x, y in both) * 0.1 / len(pairs)


def renyi_step(model, groups):
    total = 0.0
    for group in groups:
        log_w = [
            (token_terms(model, s)[0] - fp32(s.columns["behavior_logps"])).sum() for s in group
        ]
        reward = torch.stack([fp32(s.columns["reward"]) for s in group])
        top = torch.logsumexp(0.5 * torch.stack(log_w) + reward, 0) - torch.logsumexp(reward, 0)
        total = total - top / 0.5
    return total / len(groups)


CASES = {
    "gspo_kl": (po.GSPO(3e-2, 4e-2) + 0.1 * po.KL("k3"), gspo_step, "auto"),
    "gspo_tokens": (po.GSPO(3e-2, 4e-2), gspo_tokens_step, "token-mean"),
    "kto": (po.KTO(beta=0.1), kto_step, "auto"),
    "dpo": (po.DPO(beta=0.1), dpo_step, "auto"),
    "orpo": (po.ORPO(beta=0.1), orpo_step, "auto"),
    "renyi": (po.RenyiRWR(alpha=0.5), renyi_step, "auto"),
}


def trainer_of(folder, name, packing, **options):
    objective, step, aggregation = CASES[name]
    needs = Needs.of(objective, None)
    trainer, _ = make_trainer(folder, rows(4), po.NLL(), **options, aggregation=aggregation)
    data = SampleSet(rows(14), {}, 0, needs.unit)
    collate, seen = Collator(0, needs.keep, packing, needs.unit), []

    def record(items):
        seen.append(items)
        return collate(items)

    made = type(trainer)(
        tiny_model(),
        trainer.args,
        objective,
        train_dataset=data,
        eval_dataset=data,
        data_collator=record,
    )
    return made, step, seen, data


@pytest.mark.parametrize(
    ("accumulation", "packing"), [(1, False), (3, True)], ids=["padded", "packed_by_3"]
)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_a_plain_loop(tmp_path, name, accumulation, packing):
    trainer, step, seen, _ = trainer_of(
        tmp_path, name, packing, gradient_accumulation_steps=accumulation
    )
    watch = Gradients()
    trainer.add_callback(watch)
    trainer.train()
    model, losses = tiny_model(), []
    steps = [sum(seen[i : i + accumulation], []) for i in range(0, len(seen), accumulation)]
    assert len(watch.steps) == len(steps)
    for got, items in zip(watch.steps, steps, strict=True):
        loss = step(model, items)
        model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        for a, p in zip(got, model.parameters(), strict=True):
            torch.testing.assert_close(a, p.grad, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            for p in model.parameters():
                p -= RATE * p.grad
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(losses, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("batch", [1, 3])
def test_eval_loss_is_the_loss_of_the_whole_set(tmp_path, name, batch):
    trainer, step, _, data = trainer_of(tmp_path, name, False, per_device_eval_batch_size=batch)
    expected = step(tiny_model(), data.items).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-12)


def test_metrics_of_pairs_are_means_over_pairs_whatever_the_batches(tmp_path):
    means = []
    for batch in (1, 2, 7):
        trainer, *_ = trainer_of(tmp_path, "dpo", False, per_device_eval_batch_size=batch)
        got = trainer.evaluate()
        means.append(
            [got[f"eval_rewards/{k}"] for k in ("chosen", "rejected", "accuracies", "margins")]
        )
    assert means[0] == pytest.approx(means[1], rel=1e-9)
    assert means[0] == pytest.approx(means[2], rel=1e-9)
    assert means[0][0] - means[0][1] == pytest.approx(means[0][3], rel=1e-6)


def test_units_lie_in_one_batch_and_their_weights_span_all_of_them():
    samples = rows(9)
    groups = units.make_units(samples, "group")
    assert [[s.line for s in g] for g in groups] == [[1, 5, 9], [2, 6], [3, 7], [4, 8]]
    collate = Collator(0, frozenset({"group"}), unit="group")
    batches = [collate(groups[:1]), collate(groups[1:])]
    counts = [(b["labels"] != -100).sum(-1) for b in batches]
    counts[1][0] = 0  # a row whose tokens are all masked is not of its group
    whole = units.unit_weights(batches, counts, frozenset({"group"}), lambda t: t, 1)
    assert whole[0].tolist() == pytest.approx([1 / 12] * 3)
    assert whole[1].tolist() == pytest.approx([0, 1 / 4] + [1 / 8] * 4)
    assert (
        units.unit_weights(batches, counts, frozenset({"pair"}), lambda t: t, 2)[0].tolist()
        == [0.25] * 3
    )
    with pytest.raises(ValueError, match="cannot be mixed"):
        units.unit_weights(batches, counts, frozenset({"group", "pair"}), lambda t: t, 1)


def test_a_batch_of_pairs_has_all_chosen_first():
    pairs = units.make_units(rows(6), "pair")
    batch = Collator(0, frozenset({"ref_logps"}), unit="pair")(pairs)
    firsts = [s.ids[0] for s, _ in pairs] + [s.ids[0] for _, s in pairs]
    assert batch["input_ids"][:, 0].tolist() == firsts
    assert batch["unit_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    with pytest.raises(ValueError):
        units.make_units(rows(5), "pair")


def test_an_objective_with_two_meanings_of_the_mean_is_refused(tmp_path):
    with pytest.raises(ValueError, match="trainer.aggregation"):
        make_trainer(tmp_path, rows(4), po.ORPO() + 0.1 * po.Entropy())
    make_trainer(tmp_path, rows(4), po.ORPO() + 0.1 * po.Entropy(), aggregation="token-mean")
    with pytest.raises(ValueError, match="pairs and terms on groups"):
        units.unit_of(po.DPO() + po.RenyiRWR())


CONFIGS = {
    "gspo": {"objective": "gspo", "advantage": "group_normalize"},
    "renyi_rwr": {"objective": {"name": "renyi_rwr", "alpha": 0.5}},
    "kto": {"objective": {"name": "kto", "beta": 0.2}},
    "dpo": {"objective": "dpo"},
    "rpo": {
        "objective": "dpo",
        "terms": [{"name": "nll", "weighted_by": "positive", "scale": 0.5}],
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_from_a_configuration_file(tmp_path, name, capsys):
    write_model(tmp_path / "model")
    pairs = name in ("dpo", "rpo")
    lines = []
    for i in range(8):
        row = {"prompt": "a b", "reward": float(i % 3), "group": i // 4, "label": bool(i % 2)}
        row |= {f"{k}_logps": [-4.0, -4.1] for k in ("old", "behavior", "ref")}
        if pairs:
            row = {"prompt": "a b", "chosen": f"{'cde'[i % 3]} d", "rejected": "f g h"}
            row |= {"ref_chosen_logps": -12.0, "ref_rejected_logps": -16.5, "positive": 1.0}
        else:
            row["completion_ids"] = [3 + i, 0]
        lines.append(json.dumps(row))
    (tmp_path / "s.jsonl").write_text("\n".join(lines))
    trainer = {"output_dir": str(tmp_path / "out"), "max_steps": 2, "use_cpu": True}
    trainer |= {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    data = {"train": str(tmp_path / "s.jsonl"), "eval": str(tmp_path / "s.jsonl")}
    config = {"model": str(tmp_path / "model"), "data": data, "trainer": trainer} | CONFIGS[name]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["train", str(tmp_path / "c.yaml"), "trainer.eval_strategy=epoch"]) == 0, (
        capsys.readouterr().err
    )
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    events = list(lines)
    first = next(r for r in events if r["event"] == "train")
    assert isinstance(first["loss"], float) and math.isfinite(first["grad_norm"])
    if pairs:
        assert {"rewards/margins", "rewards/accuracies", "logps/chosen"} <= set(first)

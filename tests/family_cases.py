"""Runs from a configuration file for the tests of the families: tiny models in folders, rows with
every column, and the same batch built by hand, straight from the rows, for one call in fp64.
"""

import json
import math

import torch
import transformers
import yaml

import pyoffline as po
from pyoffline import cli

VOCAB = 41
WORDS = "abcdefghijklmnopqrstuvwxyz0123456789+-=?"  # VOCAB - 1 of them


def write_model(folder, width=16, seed=0, words=WORDS, vocab=VOCAB):
    """A one-layer Llama and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    ids = {"<eos>": 0} | {w: i for i, w in enumerate(words, 1)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="?"))  # noqa: S106 (a token, no secret)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"eos_token": "<eos>", "unk_token": "?"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def logps(n, random):
    """n log-probs around a random model's, as fp32 holds them."""
    return (torch.randn(n, generator=random) * 0.2 - math.log(VOCAB)).tolist()


def single_rows(n=6, k=3):
    """Rows of two groups with every column, ragged."""
    random, out = torch.Generator().manual_seed(1), []
    for i in range(n):
        m = 1 + (5 * i) % 4
        ids = torch.randint(1, VOCAB, (2 + i % 2 + m,), generator=random).tolist()
        row = {"prompt_ids": ids[:-m], "completion_ids": ids[-m:], "group": i % 2}
        row |= {f"{name}_logps": logps(m, random) for name in ("old", "behavior", "ref")}
        row |= {"reward": float(n - i), "label": bool(i % 3), "advantages": 1.0 - 0.5 * i}
        top = torch.randn(m, VOCAB, generator=random).log_softmax(-1).topk(k)
        row |= {"teacher_topk_ids": top.indices.tolist(), "teacher_topk_logps": top.values.tolist()}
        out.append(row)
    return out


def pair_rows(n=3):
    random, out = torch.Generator().manual_seed(2), []
    for i in range(n):
        ids = torch.randint(1, VOCAB, (9,), generator=random).tolist()
        sides = {"chosen": ids[2 : 4 + i], "rejected": ids[6:]}
        row = {"prompt_ids": ids[:2]} | {f"{k}_ids": v for k, v in sides.items()}
        row |= {f"ref_{k}_logps": logps(len(v), random) for k, v in sides.items()}
        row |= {"chosen_reward": 1.0 + i, "rejected_reward": 0.5}
        out.append(row)
    return out


def sequences_of(rows):
    """Rows of the usual kind: of pairs all chosen first, then all rejected."""
    if "chosen_ids" not in rows[0]:
        return rows
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "completion_ids": row[f"{side}_ids"],
            "ref_logps": row[f"ref_{side}_logps"],
            "reward": row[f"{side}_reward"],
        }
        for side in ("chosen", "rejected")
        for row in rows
    ]


def by_hand(model, rows, reads) -> tuple:
    """(hidden [S, T, D], TokenBatch) of all rows as one padded batch, with what `reads` names."""
    rows = sequences_of(rows)
    ids = [row["prompt_ids"] + row["completion_ids"] for row in rows]
    width = max(map(len, ids))
    inputs, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), -100)
    given = {"old": "old_logps", "mu": "behavior_logps", "ref": "ref_logps"}
    columns = {given[r]: torch.zeros(len(rows), width).double() for r in reads if r in given}
    for i, row in enumerate(rows):
        inputs[i, : len(ids[i])] = torch.tensor(ids[i])
        mask[i, : len(ids[i])] = 1
        here = slice(len(row["prompt_ids"]) - 1, len(ids[i]) - 1)  # what predicts the completion
        labels[i, here] = torch.tensor(row["completion_ids"])
        for name, x in columns.items():
            x[i, here] = torch.tensor(row[name]).double()
    if "adv" in reads:
        columns["advantages"] = torch.tensor([row["advantages"] for row in rows]).double()
    with torch.no_grad():
        hidden = model.model(input_ids=inputs, attention_mask=mask).last_hidden_state
    of = {"rewards": "reward", "targets": "label", "groups": "group"}
    values = {r: torch.tensor([row[of[r]] for row in rows]) for r in reads if r in of}
    values = {k: v if k == "groups" else v.double() for k, v in values.items()}
    if "groups" in values:
        values["group_ids"] = values.pop("groups")
    sequences = po.SequenceBatch(**values) if values else None
    return hidden, po.TokenBatch(labels, sequences=sequences, **columns)


def load(folder, dtype=torch.float64):
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=dtype)


def write_rows(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_config(folder, model, rows, batch=None, **changes):
    """run.yaml of two steps, each over all rows unless `batch` says fewer units."""
    config = {
        "model": {"path": str(model), "dtype": "float64"},
        "data": {"train": str(write_rows(folder / "s.jsonl", rows))},
        "trainer": {
            "output_dir": str(folder / "out"),
            "max_steps": 2,
            "per_device_train_batch_size": batch or len(rows),
            "learning_rate": 1e-3,
            "use_cpu": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "report_to": "none",
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config | changes))
    return folder / "run.yaml"


def train(path, *overrides):
    """(exit code, rows of metrics.jsonl)."""
    code = cli.main(["train", str(path), "--quiet", *overrides])
    metrics = path.parent / "out" / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    return code, [json.loads(line) for line in lines]


def losses(events):
    return [row["loss"] for row in events if row["event"] == "train"]

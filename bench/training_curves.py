"""300 steps of training: pyoffline in fp32 and bf16 against plain PyTorch with logits in fp64.

The same tiny Llama, rows, order and AdamW; what differs is the loss and the arithmetic. The final
losses (fp64, on held-out rows) must lie within the spread of the reference over five seeds. Prints
a table and writes JSON:

    python bench/training_curves.py --output bench/results/training_curves-cpu.json

Not here: time and memory (`pyoffline bench`).
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path

import torch
import transformers

import pyoffline as po
from pyoffline.benchmarks.provenance import provenance
from pyoffline.collate import Collator
from pyoffline.data import Sample, SampleSet
from pyoffline.trainer import OfflineTrainer
from pyoffline.trainer_config import OfflineConfig

VOCAB, HIDDEN, BATCH, RATE = 97, 32, 8, 3e-3
COLUMNS = ("old_logps", "ref_logps", "advantages")
OBJECTIVES = {
    "nll": (po.NLL(), frozenset()),
    "ppo_clip": (po.PPOClip(0.2, 0.28) + 0.04 * po.KL("k3"), frozenset(COLUMNS)),
}
KINDS = ("fp64 reference", "pyoffline fp32", "pyoffline bf16")


def make_model(seed):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def make_rows(n, seed):
    """Sequences with something to learn: each token is 3 x the last + 1, with noise; better rows
    have the larger advantage. Old and reference log-probs are those of a uniform policy, blurred.
    """
    random = torch.Generator().manual_seed(seed)
    rows = []
    for line in range(n):
        length = 4 + int(torch.randint(9, (), generator=random))
        ids = [int(torch.randint(1, VOCAB, (), generator=random))]
        noise = torch.rand(length, generator=random) < 0.3
        guesses = torch.randint(VOCAB, (length,), generator=random).tolist()
        for wrong, guess in zip(noise.tolist(), guesses, strict=True):
            ids.append(guess if wrong else (3 * ids[-1] + 1) % VOCAB)
        blur = 0.1 * torch.randn(2, length, generator=random) - torch.tensor(VOCAB).log()
        columns = dict(zip(COLUMNS, blur.tolist(), strict=False))
        columns["advantages"] = 1.0 - 2.0 * float(noise.float().mean())
        rows.append(Sample(ids, 1, line, columns))
    return rows


def plain_loss(model, batch, name):
    """The loss with logits, in the model's dtype."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    keep = labels != -100
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0][keep]
    if name == "nll":
        return -logps.mean()
    old, ref = (batch[c][:, 1:][keep].to(logps.dtype) for c in COLUMNS[:2])
    adv = batch["advantages"][:, None].expand_as(labels)[keep].to(logps.dtype)
    ratio, gap = (logps - old).exp(), ref - logps
    clipped = torch.minimum(ratio * adv, ratio.clamp(0.8, 1.28) * adv)
    return (-clipped + 0.04 * (gap.exp() - 1 - gap)).mean()


def reference(name, rows, seed):
    model = make_model(seed).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    collate = Collator(0, OBJECTIVES[name][1])
    for start in range(0, len(rows), BATCH):
        optimizer.zero_grad()
        plain_loss(model, collate(rows[start : start + BATCH]), name).backward()
        optimizer.step()
    return model


def fused(name, rows, seed, bf16):
    model = make_model(seed)
    objective, keep = OBJECTIVES[name]
    with tempfile.TemporaryDirectory() as folder:
        args = OfflineConfig(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            optim="adamw_torch",
            learning_rate=RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            train_sampling_strategy="sequential",
            bf16=bf16,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=100000,
            dataloader_pin_memory=False,
        )
        data = SampleSet(rows, {})
        trainer = OfflineTrainer(
            model, args, objective, train_dataset=data, data_collator=Collator(0, keep)
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
    return model


def final_loss(model, name, rows):
    """On the held-out rows, in fp64, whatever the model was trained in."""
    with torch.no_grad():
        batch = Collator(0, OBJECTIVES[name][1])(rows)
        return plain_loss(model.double().eval(), batch, name).item()


def study(name, steps, seeds):
    """kind -> final loss of each seed, and the loss before training."""
    held_out = make_rows(64, 10**6)
    out = {kind: [] for kind in KINDS}
    out["untrained"] = [final_loss(make_model(seed), name, held_out) for seed in range(seeds)]
    for seed in range(seeds):
        rows = make_rows(steps * BATCH, seed)
        models = (reference(name, rows, seed), *(fused(name, rows, seed, b) for b in (False, True)))
        for kind, model in zip(KINDS, models, strict=True):
            out[kind].append(final_loss(model, name, held_out))
    return out


def verdict(losses):
    """The reference's spread (max - min over seeds), and for each kind its largest distance from
    the reference at the same seed, whether its mean is in the reference's range, and both.
    """
    truth = losses[KINDS[0]]
    spread = max(truth) - min(truth)
    out = {"spread": spread}
    for kind in KINDS[1:]:
        apart = max(abs(a - b) for a, b in zip(losses[kind], truth, strict=True))
        mean = sum(losses[kind]) / len(truth)
        inside = min(truth) <= mean <= max(truth)
        out[kind] = {"largest_difference": apart, "mean_inside_range": inside}
        out[kind]["holds"] = inside and apart <= spread
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="optimiser steps of a run (default: %(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="runs of each kind (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, help="write the report there, as JSON")
    args = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    report = provenance() | {"steps": args.steps, "seeds": args.seeds}
    report["transformers"] = transformers.__version__
    for name in OBJECTIVES:
        losses = study(name, args.steps, args.seeds)
        report[name] = {"final_loss": losses, "verdict": verdict(losses)}
        print(f"{name}: final loss of seeds 0..{args.seeds - 1}")
        for kind, values in losses.items():
            print(f"  {kind:16}" + "".join(f"{v:12.6f}" for v in values))
        print(f"  {json.dumps(report[name]['verdict'])}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

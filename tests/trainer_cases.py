"""A tiny Llama, ragged samples with every column, and a trainer on them."""

import math

import torch
import transformers

from pyoffline.collate import Collator
from pyoffline.data import Sample, SampleSet
from pyoffline.trainer import OfflineTrainer
from pyoffline.trainer_config import OfflineConfig

VOCAB, RATE = 61, 0.02
COLUMNS = frozenset({"old_logps", "ref_logps", "advantages"})


def tiny_model(dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).to(dtype)


def samples(n, seed=0):
    """Ragged sequences with every column; old log-probs around what a random model gives."""
    random = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        n_prompt, n_completion = 1 + i % 3, 1 + (5 * i) % 7
        ids = torch.randint(1, VOCAB, (n_prompt + n_completion,), generator=random).tolist()
        noise = torch.randn(2, n_completion, generator=random) * 0.3 - math.log(VOCAB)
        columns = {"old_logps": noise[0].tolist(), "ref_logps": noise[1].tolist()}
        columns |= {"advantages": float(torch.randn((), generator=random)), "group": i // 2}
        out.append(Sample(ids, n_prompt, i + 1, columns))
    return out


def make_trainer(tmp_path, data, objective, packing=False, keep=COLUMNS, model=None, **options):
    defaults = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "per_device_eval_batch_size": 3,
    }
    seen = []
    collate = Collator(0, keep, packing)

    def record(batch):
        seen.append(batch)
        return collate(batch)

    trainer = OfflineTrainer(
        tiny_model() if model is None else model,
        OfflineConfig(**(defaults | options)),
        objective,
        train_dataset=SampleSet(data, {}),
        eval_dataset=SampleSet(data, {}),
        data_collator=record,
    )
    return trainer, seen

"""Signals and resumption (PROMISES T2): at any moment a run ends with a complete checkpoint or with
none, and goes on bitwise, in mid-epoch, with dropout, gradient accumulation and shuffling.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.data import DataLoader

accelerate = pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")

from trainer_cases import make_trainer, samples, tiny_model  # noqa: E402

from pyoffline.callbacks import StopCallback  # noqa: E402
from pyoffline.checkpoint import load_optimizer  # noqa: E402
from pyoffline.token_objectives import NLL  # noqa: E402

ROOT = Path(__file__).parents[1]


def dropped():
    """The tiny model with dropout in attention, so that every step draws random numbers."""
    model = tiny_model(torch.float32)
    model.config.attention_dropout = 0.3
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model


def train(folder, steps=None, resume=None, **options):
    """Weights, optimizer state and the order of the rows of a run of 12 steps in 2.4 epochs."""
    defaults = {
        "optim": "adamw_torch",
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 3,
        "max_steps": 12,
        "max_grad_norm": 1.0,
    }
    model = dropped()
    trainer, seen = make_trainer(
        folder, samples(29), NLL(), keep=frozenset(), model=model, **(defaults | options)
    )

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == steps:
                control.should_save = control.should_training_stop = True

    trainer.add_callback(Stop())
    trainer.train(resume_from_checkpoint=resume)
    state = trainer.optimizer.state_dict()["state"]
    tensors = [p.detach().clone() for p in model.parameters()]
    tensors += [t.clone() for i in sorted(state) for _, t in sorted(state[i].items())]
    return tensors, [[s.line for s in batch] for batch in seen], torch.get_rng_state()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stop", [1, 3, 4, 5, 6, 9, 10, 11])
def test_t2_resume_is_bitwise_wherever_it_stopped(tmp_path, whole, stop):
    """5 steps an epoch: stops in mid-epoch, at its last step (of 2 micro-batches) and its end."""
    train(tmp_path, steps=stop)
    tensors, rows, rng = train(tmp_path, resume=str(tmp_path / f"checkpoint-{stop}"))
    for a, b in zip(whole[0], tensors, strict=True):
        assert torch.equal(a, b)
    assert rows[-len(rows) :] == whole[1][-len(rows) :]
    assert torch.equal(rng, whole[2])


def test_dropout_is_on_and_seeds_matter(tmp_path, whole):
    """The test above would pass in vain without random numbers."""
    other = train(tmp_path, seed=1)[0]
    assert not all(torch.equal(a, b) for a, b in zip(whole[0], other, strict=True))
    model = dropped().train()
    ids = torch.arange(1, 20)[None]
    assert not torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("file", ["rng_state_0.safetensors", "optimizer.safetensors"])
def test_t2_a_state_that_cannot_be_restored_raises(tmp_path, file):
    """Historical bug: an exception on restoring the generators swallowed, and the run diverges."""
    train(tmp_path, steps=2)
    (tmp_path / "checkpoint-2" / file).unlink()
    with pytest.raises(OSError, match=f"{file} is missing"):
        train(tmp_path, resume=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="nothing was read|no optimizer"):
        load_optimizer(tmp_path, None, None)


def write_model(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": 0} | {w: i for i, w in enumerate("abcdefghijklmnopqrstuvwxyz", 1)}
    inner = Tokenizer(models.WordLevel(words, unk_token="z"))  # noqa: S106 (a token, no secret)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **{"eos_token": "<eos>"})
    made.save_pretrained(folder)
    dropped().save_pretrained(folder)


def test_t2_signals_at_random_moments(tmp_path):
    write_model(tmp_path / "model")
    rows = [{"prompt": "a b", "completion": "c d e f"[: 1 + 2 * (i % 4)]} for i in range(24)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trainer = {
        "max_steps": 16,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "use_cpu": True,
        "save_steps": 4,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "output_dir": "set on the command line",
    }
    data = {"train": str(tmp_path / "s.jsonl"), "eval": str(tmp_path / "s.jsonl")}
    config = {"model": str(tmp_path / "model"), "data": data, "trainer": trainer}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, str(ROOT / "tests" / "interrupt_driver.py")]
    command += [str(tmp_path / "c.yaml"), str(tmp_path), "10", "5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    rows = json.loads(done.stdout.decode().splitlines()[-1])
    for row in rows:
        assert row["code"] in (0, 128 + row["number"], 130, -row["number"]), row
        assert row["problems"] == [] and not row["left"], row
        assert row.get("resumed", 0) == 0 and row["equal"], row
        saved = "stopping after this step" in row["log"] and not row["twice"]
        assert not saved or row["code"] == 0 or row["step"] > 0, row
    assert sum(row["code"] != 0 for row in rows) >= 5


@pytest.mark.parametrize("wrap", [None, "accelerate"])
def test_t2_a_sigterm_to_the_group_leaves_the_workers_until_training_has_ended(wrap):
    """A scheduler's signal reaches the workers first: they serve the step that is being finished,
    and end by the same signal afterwards. The trainer's loader is one that accelerate has wrapped.
    """
    stop, loader = StopCallback(), DataLoader(Slow(), batch_size=1, num_workers=1)
    if wrap:
        loader = accelerate.Accelerator(cpu=True).prepare(loader)
    assert stop.keep_workers(stop.keep_workers(loader)) is loader
    batches = iter(loader)
    assert next(batches).item() == 0
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert [x.item() for x in batches] == [1, 2, 3]

    batches = iter(loader)
    assert next(batches).item() == 0
    (worker,) = multiprocessing.active_children()
    stop.restore()
    with contextlib.suppress(RuntimeError):  # torch's word on a worker that ends before its loader
        os.kill(worker.pid, signal.SIGTERM)
        worker.join(20)
    worker.join(20)
    assert worker.exitcode == 128 + signal.SIGTERM


class Slow(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        time.sleep(0.05)
        return i

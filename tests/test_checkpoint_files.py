"""The files of a checkpoint when something goes wrong: a write that dies, random numbers that are
missing or damaged (PROMISES T2).
"""

import shutil

import pytest
import torch

pytest.importorskip("transformers")

from test_trainer import make_trainer, samples  # noqa: E402

from pyoffline import checkpoint  # noqa: E402
from pyoffline.token_objectives import NLL  # noqa: E402


def dies_half_way(tensors, path, metadata=None):
    """As safetensors' save_file on a disk that is full after eight bytes."""
    path.write_bytes(b"\x00" * 8)
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("kind", ["optimizer", "rng"])
def test_t2_a_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch, kind):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    checkpoint.save_optimizer(tmp_path, optimizer, None)
    checkpoint.save_rng(tmp_path, 0)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(checkpoint, "save_file", dies_half_way)
    with pytest.raises(OSError, match="No space left"):
        if kind == "optimizer":
            checkpoint.save_optimizer(tmp_path, optimizer, None)
        else:
            checkpoint.save_rng(tmp_path, 0)
    assert {n: (tmp_path / n).read_bytes() for n in before} == before
    checkpoint.load_optimizer(tmp_path, torch.optim.AdamW(model.parameters()), None)
    checkpoint.load_rng(tmp_path, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a checkpoint after one of two steps."""
    folder = tmp_path_factory.mktemp("run")
    train(folder)
    return folder


def train(folder, **options):
    trainer, _ = make_trainer(
        folder, samples(4), NLL(), keep=frozenset(), save_strategy="steps", save_steps=1
    )
    trainer.train(**options)


@pytest.mark.parametrize("damage", ["missing", "cut", "without torch's"])
def test_t2_a_run_does_not_resume_without_its_random_numbers(run, tmp_path, damage):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-1" / "rng_state_0.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        with checkpoint.safe_open(path, framework="pt") as file:
            meta = file.metadata()
        checkpoint.save_file({"numpy": torch.zeros(624, dtype=torch.int64)}, path, metadata=meta)
    before = torch.get_rng_state()
    with pytest.raises(Exception, match="rng_state_0|header|incomplete|torch") as caught:
        train(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert not isinstance(caught.value, AssertionError)
    torch.set_rng_state(before)

"""Checkpoints (PROMISES T2, T4): killed at every write, a full disk, damage and pickles. The newest
complete one loads and holds exactly what was written.
"""

import json
import os
import pickle
import resource
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402
from trainer_cases import make_trainer, samples, tiny_model  # noqa: E402

from pyoffline import checkpoint, run_folder  # noqa: E402
from pyoffline.run_folder import CheckpointError, DamagedCheckpointError  # noqa: E402
from pyoffline.token_objectives import NLL  # noqa: E402

WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


@pytest.fixture
def run(tmp_path):
    """A trainer at step 2 with checkpoint-1: since then every weight has moved by 1."""
    folder = tmp_path / "run"
    trainer, _ = make_trainer(
        folder,
        samples(4),
        NLL(),
        keep=frozenset(),
        model=tiny_model(torch.float32),
        optim="adamw_torch",
        save_strategy="steps",
        save_steps=1,
        max_steps=1,
        save_total_limit=1,
    )
    trainer.train()
    move(trainer, 2)
    return trainer, folder


def move(trainer, step):
    trainer.state.global_step = step
    with torch.no_grad():
        for p in trainer.model.parameters():
            p += 1


def weights(folder):
    return load_file(folder / "model.safetensors")


class Killer:
    """Counts what changes files under a folder; at the n-th, SIGKILL. `torn`: what was not flushed
    by then is cut in half first, as a power failure may do.
    """

    def __init__(self, folder, n, torn):
        self.folder, self.n, self.torn, self.count = str(folder), n, torn, 0
        self.unflushed, self.dead = set(), False

    def install(self):
        sys.addaudithook(self.audit)
        fsync, save = os.fsync, checkpoint.save_file

        def flushing(descriptor):
            path = str(Path(f"/proc/self/fd/{descriptor}").readlink())
            self.point()
            fsync(descriptor)
            self.unflushed.discard(path)

        def saving(tensors, path, **kwargs):
            self.point()
            self.unflushed.add(str(path))
            save(tensors, path, **kwargs)
            self.point()

        os.fsync, checkpoint.save_file = flushing, saving

    def audit(self, event, args):
        if self.dead or not args or not str(args[0]).startswith(self.folder):
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        if writes or event in WRITES:
            self.point()
            if writes:
                self.unflushed.add(str(args[0]))
            if event == "os.rename":  # files keep their state under the new name
                old, new = map(str, args[:2])
                self.unflushed = {
                    new + p.removeprefix(old) if p.startswith(old) else p for p in self.unflushed
                }

    def point(self):
        self.count += 1
        if self.count != self.n:
            return
        self.dead = True
        for path in self.unflushed if self.torn else ():
            if Path(path).is_file():
                os.truncate(path, Path(path).stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)


def save_and_die(trainer, folder, n, torn):
    """A child process that saves into `folder` and is killed at write n; its exit: the number of
    writes, or None when it was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            trainer.args.output_dir = str(folder)
            killer = Killer(folder, n, torn)
            killer.install()
            trainer.save_checkpoint()
            os.write(writer, str(killer.count).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as file:
        text = file.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return None
    assert text, "the child failed before it was killed"
    return int(text)


@pytest.mark.parametrize("torn", [False, True], ids=["written", "torn"])
@pytest.mark.parametrize("target", ["new", "replaced"])
def test_t2_kill_9_at_every_write_leaves_the_newest_complete_one(run, tmp_path, target, torn):
    trainer, folder = run
    if target == "replaced":  # checkpoint-2 is there already, with other weights
        trainer.save_checkpoint()
        move(trainer, 2)
    before = run_folder.newest(folder)
    old = {k: v.clone() for k, v in weights(before).items()}
    seen = set()
    for n in range(1, 1000):
        copy = tmp_path / f"copy-{n}"
        shutil.copytree(folder, copy)
        writes = save_and_die(trainer, copy, n, torn)
        found = run_folder.newest(copy)
        assert found is not None and run_folder.problems(found) == [], n
        got, step = weights(found), int(found.name.split("-")[1])
        assert json.loads((found / "trainer_state.json").read_text())["global_step"] == step
        is_old = all(torch.equal(got[k], v) for k, v in old.items())
        is_new = all(
            torch.equal(got[k], v) for k, v in trainer.model.state_dict().items() if k in got
        )
        assert is_old != is_new and (target == "replaced" or is_new == (step == 2)), n
        seen.add("new" if is_new else "old")
        run_folder.recover(copy)
        assert not (copy / run_folder.PARTIAL).exists()
        again = run_folder.newest(copy)
        assert again.parent == copy and all(torch.equal(weights(again)[k], got[k]) for k in got)
        shutil.rmtree(copy)
        if writes is not None:
            assert n == writes + 1 > 30  # every write was a point of death
            assert seen == {"old", "new"}
            return
    pytest.fail("the save never came to its end")


def test_t2_the_killer_itself_has_teeth(run, tmp_path, monkeypatch):
    """Without fsync a power failure after the rename costs both checkpoints."""
    trainer, folder = run
    monkeypatch.setattr(run_folder, "_flush", lambda path: None)
    lost = 0
    for n in range(1, 1000):
        copy = tmp_path / f"copy-{n}"
        shutil.copytree(folder, copy)
        if save_and_die(trainer, copy, n, torn=True) is not None:
            break
        lost += run_folder.newest(copy) is None
    assert lost > 0


def test_t2_a_full_disk_keeps_the_previous_checkpoint(run):
    """A limit on file sizes, which the optimizer's file passes and the model's does not."""
    trainer, folder = run
    size = (folder / "checkpoint-1" / "optimizer.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            trainer.save_checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert "checkpoint-2 could not be written" in text and "MiB are free" in text
    assert "checkpoint-1 is complete: resume from it" in text
    assert [p.name for p in sorted(folder.glob("checkpoint-*"))] == ["checkpoint-1"]
    assert run_folder.problems(folder / "checkpoint-1") == []
    assert not (folder / run_folder.PARTIAL / "checkpoint-2").exists()
    trainer.save_checkpoint()  # with room again
    assert run_folder.newest(folder).name == "checkpoint-2"


@pytest.mark.parametrize("n", range(1, 12))
def test_t2_no_space_at_the_nth_file(run, monkeypatch, n):
    trainer, folder = run
    count = 0

    def full(path):
        nonlocal count
        count += 1
        if count == n:
            raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(run_folder, "_flush", full)
    error = None
    try:
        trainer.save_checkpoint()
    except CheckpointError as caught:
        error = caught
    assert (error is None) == (count < n)
    assert error is None or "No space left" in str(error)
    newest = run_folder.newest(folder)
    assert run_folder.problems(newest) == []
    assert newest.name == "checkpoint-2" or error is not None
    trainer.save_checkpoint()  # with room again
    assert run_folder.newest(folder).name == "checkpoint-2"


DAMAGE = {
    "cut": (lambda p: os.truncate(p, p.stat().st_size // 2), "bytes, it was written with"),
    "flipped": (lambda p: flip(p), "SHA-256 differs"),
    "missing": (lambda p: p.unlink(), "is missing"),
}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"]
)
@pytest.mark.parametrize("damage", DAMAGE)
def test_t2_a_damaged_checkpoint_is_refused_by_name(run, damage, name):
    trainer, folder = run
    trainer.args.save_total_limit = 2
    trainer.save_checkpoint()
    do, message = DAMAGE[damage]
    do(folder / "checkpoint-2" / name)
    with pytest.raises(DamagedCheckpointError) as caught:
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    text = str(caught.value)
    assert name in text and message in text and "goes on from checkpoint-1" in text
    expected = "checkpoint-2" if damage == "flipped" else "checkpoint-1"
    assert run_folder.newest(folder).name == expected  # sizes are compared, contents on use


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


PICKLED = (
    "pytorch_model.bin",
    "adapter_model.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scaler.pt",
    "rng_state.pth",
    "rng_state_0.pth",
    "training_args.bin",
)


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("replaces", [False, True], ids=["beside", "instead"])
def test_t4_a_malicious_pickle_in_a_checkpoint_is_never_loaded(run, tmp_path, name, replaces):
    trainer, folder = run
    touched, target = tmp_path / "touched", folder / "checkpoint-1"
    (target / name).write_bytes(pickle.dumps(Payload(touched)))
    if replaces:
        stem = name.split(".")[0].replace("pytorch_model", "model").replace("adapter_", "")
        for path in target.glob(f"{stem.split('_0')[0]}*.safetensors"):
            path.unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{name}: this library writes no pickles"):
        trainer.train(resume_from_checkpoint=str(target))
    assert not touched.exists()
    pickle.loads((target / name).read_bytes())  # noqa: S301 (the payload does work)
    assert touched.exists()


def test_t4_a_model_of_pickles_is_never_loaded(tmp_path):
    from pyoffline.config import ConfigError, ModelConfig
    from pyoffline.training import load_model

    tiny_model(torch.float32).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    touched = tmp_path / "touched"
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(touched)))
    with pytest.raises(ConfigError, match="no model could be loaded"):
        load_model(ModelConfig(str(tmp_path / "model")))
    assert not touched.exists()


def test_rotation_keeps_the_newest_and_the_best(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    run_folder.rotate(tmp_path, 2, tmp_path / "checkpoint-4")
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-4", "checkpoint-8"}
    run_folder.rotate(tmp_path, None, None)
    run_folder.rotate(tmp_path, 1, None)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-8"}


def test_the_best_model_is_found_by_the_name_that_it_got(tmp_path):
    trainer, _ = make_trainer(
        tmp_path,
        samples(8),
        NLL(),
        keep=frozenset(),
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the loss falls, so that the first is "best"
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    best = weights(tmp_path / "checkpoint-1")
    for name, value in trainer.model.state_dict().items():
        if name in best:
            assert torch.equal(value, best[name])


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with run_folder.sole_run(tmp_path / "out"):
        with pytest.raises(run_folder.FolderInUseError, match="another run is writing there"):
            with run_folder.sole_run(tmp_path / "out"):
                pytest.fail("two runs hold the folder")
    with run_folder.sole_run(tmp_path / "out"):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(run_folder.FolderInUseError, match="cannot be written"):
        with run_folder.sole_run(tmp_path / "file" / "out"):
            pytest.fail("a file is no folder")

"""Trainer state as safetensors and JSON: optimizer, scheduler, random numbers. No pickles.

`optimizer.safetensors` holds state tensors as `<parameter>.<name>`, everything else as JSON in its
metadata; `rng_state_<rank>.safetensors` the generators; `scheduler.json` and `scaler.json` (fp16)
their state. Not here: model weights (transformers writes them as safetensors), and how a folder
becomes complete (run_folder.py).
"""

import contextlib
import json
import random
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from pyoffline import run_folder

OPTIMIZER, SCHEDULER = "optimizer.safetensors", "scheduler.json"
PICKLES = ("optimizer.pt", "optimizer.bin", "scheduler.pt")


def save_optimizer(folder: Path, optimizer, scheduler) -> None:
    """Write the state of an optimizer and of a scheduler (None: none)."""
    state = optimizer.state_dict()
    tensors, plain = {}, {}
    for index, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                # clone: safetensors refuses tensors that share memory
                tensors[f"{index}.{name}"] = value.detach().clone().contiguous()
            else:
                plain[f"{index}.{name}"] = value
    groups = json.dumps({"param_groups": state["param_groups"], "plain": plain}, default=_number)
    metadata = {"state": groups, "optimizer": _kind(optimizer)}
    save_file(tensors, folder / OPTIMIZER, metadata=metadata)
    if scheduler is not None:
        _write_text(folder / SCHEDULER, json.dumps(scheduler.state_dict(), default=_number))


def load_optimizer(folder: Path, optimizer, scheduler) -> None:
    """Restore what `save_optimizer` wrote.

    ValueError where the folder holds pickles only, or nothing; OtherRunError where it is another
    optimizer's.
    """
    path = folder / OPTIMIZER
    if not path.is_file():
        pickles = [name for name in PICKLES if (folder / name).exists()]
        why = f"; it has {', '.join(pickles)}, and pickles are not loaded" if pickles else ""
        raise ValueError(
            f"{folder}: no {OPTIMIZER}{why}. Start from its weights instead: model: {folder}"
        )
    state: dict = {}
    with safe_open(path, framework="pt") as file:
        written = file.metadata().get("optimizer")
        meta = json.loads(file.metadata()["state"])
        entries = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if written not in (None, _kind(optimizer)):
        raise run_folder.OtherRunError(
            f"{path} is the state of {written}, this run has {_kind(optimizer)}: give the "
            f"trainer.optim of that run, or start from its weights in a new folder: model: {folder}"
        )
    for key, value in [*entries.items(), *meta["plain"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": meta["param_groups"]})
    if scheduler is not None:
        scheduler.load_state_dict(json.loads((folder / SCHEDULER).read_text()))


def _kind(optimizer) -> str:
    """The class of an optimizer, inside accelerate's wrapper."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def save_rng(folder: Path, rank: int) -> None:
    """Write the generators of random, numpy and torch (CPU and every CUDA device)."""
    kind, keys, *rest = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(keys.astype(np.int64))}
    if torch.cuda.is_available():
        tensors |= {f"cuda.{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    meta = {"python": json.dumps(random.getstate()), "numpy": json.dumps([kind, *rest])}
    save_file(tensors, folder / f"rng_state_{rank}.safetensors", metadata=meta)


def load_rng(folder: Path, rank: int) -> None:
    """Restore what `save_rng` wrote. ValueError where it is missing."""
    path = folder / f"rng_state_{rank}.safetensors"
    if not path.is_file():
        raise ValueError(f"{path}: missing, so the run cannot go on exactly where it stopped")
    with safe_open(path, framework="pt") as file:
        meta = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    version, numbers, gauss = json.loads(meta["python"])
    random.setstate((version, tuple(numbers), gauss))
    kind, *rest = json.loads(meta["numpy"])
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), *rest))
    torch.set_rng_state(tensors["torch"])
    devices = [tensors[name] for name in sorted(tensors) if name.startswith("cuda.")]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)


def _number(value):
    """A tensor in a parameter group (a learning rate on the device) as a float."""
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def _nothing():
    yield


class SafeCheckpoints:
    """Mix-in for transformers.Trainer: safetensors and JSON only, complete or not there."""

    _partial = None  # where a checkpoint is being written

    def train(self, resume_from_checkpoint=None, **kwargs):
        """As transformers'. True takes the newest complete checkpoint of output_dir; what it holds
        is compared with its sums first. DamagedCheckpointError: there is none, or it is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = run_folder.newest(Path(self.args.output_dir))
            if resume_from_checkpoint is None:
                raise run_folder.DamagedCheckpointError(
                    f"{self.args.output_dir}: no complete checkpoint to resume from"
                )
        if resume_from_checkpoint:
            resume_from_checkpoint = str(run_folder.check(Path(resume_from_checkpoint)))
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    @property
    def at_end(self) -> bool:
        """Whether the run's steps are done; resumed, transformers would make one more."""
        return self.state.global_step >= self.state.max_steps > 0

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self.at_end:
            self.control.should_training_stop = True
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def save_checkpoint(self) -> Path:
        """Write a checkpoint of this moment, between two steps. CheckpointError: it was not, the
        older ones are untouched.
        """
        self._save_checkpoint(self.model, None)
        return Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"

    def save_whole(self, folder: Path) -> None:
        """`save_model`, complete or not at all."""
        whole = run_folder.whole_folder(folder) if self.args.should_save else _nothing()
        try:
            with whole:
                self.save_model(str(folder.parent / run_folder.PARTIAL / folder.name), True)
                self.accelerator.wait_for_everyone()
        except (OSError, SafetensorError) as error:
            raise self._explained(error, folder) from None

    def _save_checkpoint(self, model, trial):
        """transformers' own, into a folder that is renamed when it is complete, on rank 0."""
        run = Path(super()._get_output_dir(trial=trial))
        final = run / f"checkpoint-{self.state.global_step}"
        whole = run_folder.whole_folder(final) if self.args.should_save else _nothing()
        try:
            with whole:
                self.accelerator.wait_for_everyone()
                self._partial = final.parent / run_folder.PARTIAL
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                self._name_best(final)
            if self.args.should_save:
                best = self.state.best_model_checkpoint
                run_folder.rotate(run, self.args.save_total_limit, best and Path(best))
        except (OSError, SafetensorError) as error:
            raise self._explained(error, final) from None
        finally:
            self._partial = None
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except RuntimeError as error:
            lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
            if not lines:
                raise
            raise self._another_model(resume_from_checkpoint, lines[0]) from None

    def _issue_warnings_after_load(self, load_result):
        """transformers' warnings; a parameter that the checkpoint does not have, and that shares no
        memory with one that it has, is an error.
        """
        own, missing = self.model.state_dict(), set(load_result.missing_keys)
        loaded = {t.data_ptr() for name, t in own.items() if name not in missing}
        lost = sorted(n for n in missing & own.keys() if own[n].data_ptr() not in loaded)
        if lost:
            raise self._another_model(self.args.output_dir, f"it has no {lost[0]}")
        if load_result.unexpected_keys:
            super()._issue_warnings_after_load(load_result)

    @staticmethod
    def _another_model(folder, why: str) -> run_folder.OtherRunError:
        return run_folder.OtherRunError(
            f"{folder}: a checkpoint of another model ({why}): give the model of that run, or "
            "another trainer.output_dir"
        )

    def _determine_best_metric(self, metrics, trial):
        try:
            return super()._determine_best_metric(metrics, trial)
        except KeyError:
            kept, name = self.save_checkpoint(), self.args.metric_for_best_model
            names = ", ".join(sorted(n for n in metrics if n.startswith("eval_")))
            raise ValueError(
                f"metric_for_best_model: {name!r} is not measured; there are {names}. {kept} has "
                "the steps so far: correct the name and resume"
            ) from None

    def _load_best_model(self):
        run_folder.check(Path(self.state.best_model_checkpoint))
        super()._load_best_model()

    def _get_output_dir(self, trial=None):
        return str(self._partial) if self._partial else super()._get_output_dir(trial)

    def _name_best(self, final: Path) -> None:
        """The best checkpoint by the name that it will have."""
        written = self._partial / final.name
        if self.state.best_model_checkpoint == str(written):
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / "trainer_state.json"))

    def _explained(self, error: Exception, final: Path) -> run_folder.CheckpointError:
        tensors = list(self.model.parameters())
        if self.optimizer is not None and final.name != "final":
            states = self.optimizer.state_dict()["state"].values()
            tensors += [t for s in states for t in s.values() if isinstance(t, torch.Tensor)]
        needed = sum(t.numel() * t.element_size() for t in tensors) / 2**20
        newest = run_folder.newest(final.parent)
        kept = f"{newest} is complete: resume from it" if newest else "there is no older checkpoint"
        return run_folder.CheckpointError(
            f"{final} could not be written: {error}. It needs about {needed:,.1f} MiB, "
            f"{run_folder.free_bytes(final.parent) / 2**20:,.1f} MiB are free (a quota or a limit "
            f"on file sizes may be lower); {kept} (--resume) when there is room"
        )

    def _save(self, output_dir=None, state_dict=None):
        """Model and tokenizer by `save_pretrained`, arguments as JSON."""
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.accelerator.unwrap_model(self.model).save_pretrained(folder, state_dict=state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        text = json.dumps(self.args.to_dict(), default=str, indent=1)
        (folder / "training_args.json").write_text(text, encoding="utf-8")

    def _save_optimizer_and_scheduler(self, output_dir):
        self._refuse_sharded()
        if self.args.should_save:
            save_optimizer(Path(output_dir), self.optimizer, self.lr_scheduler)

    def _load_optimizer_and_scheduler(self, checkpoint_dir):
        if checkpoint_dir is not None:
            self._refuse_sharded()
            load_optimizer(Path(checkpoint_dir), self.optimizer, self.lr_scheduler)

    def _save_rng_state(self, output_dir):
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_rng(Path(output_dir), self.args.process_index)

    def _load_rng_state(self, checkpoint_dir):
        if checkpoint_dir is not None:
            load_rng(Path(checkpoint_dir), self.args.process_index)

    def _save_scaler(self, output_dir):
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and self.args.should_save:
            (Path(output_dir) / "scaler.json").write_text(json.dumps(scaler.state_dict()))

    def _load_scaler(self, checkpoint_dir):
        path = Path(checkpoint_dir or "") / "scaler.json"
        if checkpoint_dir is not None and path.is_file():
            self.accelerator.scaler.load_state_dict(json.loads(path.read_text()))

    def _refuse_sharded(self):
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise NotImplementedError(
                "optimizer state of sharded models is not saved: set save_only_model=True"
            )

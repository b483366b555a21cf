"""What a training run shows and writes, and a clean stop on Ctrl-C or SIGTERM.

Not here: TensorBoard (transformers' own callback, `trainer.report_to: tensorboard`).
"""

import json
import math
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback


def memory_mib() -> tuple[float, float]:
    """Resident memory of this process now and at its peak (VmHWM, which exec resets), MiB."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return tuple(int(lines[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return math.nan, peak


class JsonlCallback(TrainerCallback):
    """One JSON object a log: step, loss, metrics, step time, memory; non-finite numbers as text."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.seconds: list[tuple[float, float]] = []  # wall and processor time of each step

    def on_train_begin(self, args, state, control, **kwargs):
        if args.should_save and self.path.is_file():
            _cut_torn_line(self.path)
        now, peak = memory_mib()
        event = {"event": "train_begin", "step": state.global_step, "max_steps": state.max_steps}
        event["threads"] = torch.get_num_threads()
        self._write(args, event | {"rss_mib": now, "peak_rss_mib": peak})

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        wall, processor = self.start
        self.seconds.append((time.perf_counter() - wall, time.process_time() - processor))

    def on_log(self, args, state, control, logs=None, **kwargs):
        now, peak = memory_mib()
        event = (
            "train"
            if "loss" in logs
            else "eval"
            if any(k.startswith("eval_") for k in logs)
            else "end"
        )
        row = {
            "event": event,
            "step": state.global_step,
            **logs,
            "rss_mib": now,
            "peak_rss_mib": peak,
        }
        if event == "train" and self.seconds:
            wall, processor = (sum(x) / len(self.seconds) for x in zip(*self.seconds, strict=True))
            row |= {"step_time_s": wall, "step_cpu_s": processor}
            self.seconds = []
        self._write(args, row)

    def _write(self, args, row: dict) -> None:
        if not args.should_save:
            return
        clean = {
            k: str(v) if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in row.items()
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(clean, allow_nan=False) + "\n")
        except OSError as error:
            raise OSError(
                f"{self.path}: a line of metrics could not be written: {error.strerror or error}; "
                "make room and pass --resume to go on from the newest checkpoint"
            ) from None


def _cut_torn_line(path: Path) -> None:
    """A killed or full-disk run may leave half a line at the end: it goes."""
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)


class ProgressBar(TrainerCallback):
    """One line on stderr: step, time left, loss, gradient norm, last evaluation."""

    def __init__(self, label: str = "train"):
        self.label, self.bar, self.shown = label, None, {}

    def on_train_begin(self, args, state, control, **kwargs):
        off = not state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            unit="step",
            file=sys.stderr,
            disable=off,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key, name in (("loss", "loss"), ("grad_norm", "grad"), ("eval_loss", "eval")):
            if key in (logs or {}):
                self.shown[name] = f"{logs[key]:.4f}"
        if self.bar is not None:
            self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def close_bars(trainer) -> None:
    """End the line of the bar where training did not, so that an error has a line of its own."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressBar) and callback.bar is not None:
            callback.bar.close()


class WorkerStart:
    """Start of a data loader's worker, after `before`.

    A SIGTERM to the whole group (a scheduler's) does not end it while the trainer finishes its
    step, and ends it once `quits` is set.
    """

    def __init__(self, before, quits):
        self.before, self.quits = before, quits

    def __call__(self, worker):
        if self.before is not None:
            self.before(worker)
        signal.signal(signal.SIGTERM, self._end)  # torch's own handler ends the worker at once
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    def _end(self, number, frame):
        if self.quits.value:
            os._exit(128 + number)


class StoppedInEvaluation(Exception):
    """A signal came while an evaluation ran; the step before it is complete."""


class StopCallback(TrainerCallback):
    """Ctrl-C or SIGTERM: finish the step, write a checkpoint, stop. A second Ctrl-C stops at once.

    An evaluation is not finished: it raises StoppedInEvaluation, and the caller writes the
    checkpoint. `stopped_by` is the signal's number, or None. Signals are restored when training
    ends.
    """

    def __init__(self):
        self.stopped_by = None
        self._before: dict = {}
        self._pid = os.getpid()
        self._quits = multiprocessing.RawValue("b", 0)  # shared with the loaders' workers

    def keep_workers(self, loader):
        """The loader, whose workers outlive a SIGTERM until training has ended."""
        inner = getattr(loader, "base_dataloader", loader)  # accelerate's wrapper iterates its own
        if inner.num_workers == 0 or isinstance(inner.worker_init_fn, WorkerStart):
            return loader
        inner.worker_init_fn = WorkerStart(inner.worker_init_fn, self._quits)
        start = inner._get_iterator

        def started():
            """Workers are born with SIGTERM held back, until they have their handler."""
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                return start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        inner._get_iterator = started
        return loader

    def on_train_begin(self, args, state, control, **kwargs):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._stop)

    def _stop(self, number, frame):
        if os.getpid() != self._pid:  # a data loader's worker: the trainer decides when it ends
            return
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = number
        sys.stderr.write("\nstopping after this step, with a checkpoint (Ctrl-C again: at once)\n")

    def on_step_end(self, args, state, control, **kwargs):
        if self.stopped_by is not None:
            control.should_save = control.should_training_stop = control.should_log = True
            control.should_evaluate = False

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.stopped_by is not None:
            raise StoppedInEvaluation

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Give the signals back; also called when training raised."""
        self._quits.value = 1
        while self._before:
            signal.signal(*self._before.popitem())

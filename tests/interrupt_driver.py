"""The process of tests/test_interrupt.py: imports once, then forks a child per signal.

`python interrupt_driver.py CONFIG WORK`: first a run without signals, then children that are sent
SIGINT or SIGTERM at random moments, or twice; a JSON report on stdout. One thread: torch may not be
forked with more.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyoffline import cli, run_folder


def child(argv, log):
    """A forked `pyoffline`; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code = cli.main(argv)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)


def ended(pid):
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def run_once(config, out, extra=(), log="log"):
    pid = child(["train", str(config), f"trainer.output_dir={out}", *extra], f"{out}.{log}")
    return ended(pid)


def signalled(config, out, workers, number, delay, twice):
    """One child, a signal to its whole group after `delay` seconds; what was left behind."""
    argv = ["train", str(config), f"trainer.output_dir={out}"]
    pid = child([*argv, f"trainer.dataloader_num_workers={workers}"], f"{out}.log")
    time.sleep(delay)
    try:
        os.killpg(pid, number)
        if twice:
            time.sleep(0.05)
            os.killpg(pid, signal.SIGINT)
    except ProcessLookupError:
        pass
    code = ended(pid)
    try:
        os.killpg(pid, 0)
        left = True
    except ProcessLookupError:
        left = False
    return code, left


def report(config, work, trials):
    random.seed(0)
    whole = work / "whole"
    start = time.monotonic()
    assert run_once(config, whole) == 0, (work / "whole.log").read_text()
    seconds = time.monotonic() - start
    truth = load_file(whole / "final" / "model.safetensors")
    rows = []
    for trial in range(trials):
        out = work / f"run-{trial}"
        number = signal.SIGTERM if trial % 3 == 2 else signal.SIGINT
        twice, workers = trial % 4 == 3, 2 * (trial % 2)
        delay = random.uniform(0.02, 1.0) * seconds  # noqa: S311 (moments, no secrets)
        code, left = signalled(config, out, workers, number, delay, twice)
        newest = run_folder.newest(out) if out.is_dir() else None
        row = {"code": code, "number": int(number), "twice": twice, "left": left, "delay": delay}
        row["log"] = Path(f"{out}.log").read_text()[-2000:]
        row["step"] = int(newest.name.split("-")[1]) if newest else 0
        row["problems"] = run_folder.problems(newest) if newest else []
        if code != 0:
            row["resumed"] = run_once(config, out, ["--resume"] if newest else [], "again.log")
        got = load_file(out / "final" / "model.safetensors")
        row["equal"] = all(torch.equal(got[k], v) for k, v in truth.items())
        rows.append(row)
        shutil.rmtree(out)
    return {"seconds": seconds, "rows": rows}


if __name__ == "__main__":
    config, work = Path(sys.argv[1]), Path(sys.argv[2])
    sys.stdout.write("\n" + json.dumps(report(config, work, int(sys.argv[3]))) + "\n")

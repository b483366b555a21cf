"""The process of tests/test_interrupt.py: imports once, then forks a child per signal.

`python interrupt_driver.py CONFIG WORK TRIALS HITS`: first a run without signals, then children
that send their group SIGINT or SIGTERM at random moments of their processor time, or twice; a JSON
report on stdout. A child that ends before its moment tells how long a run takes now (processor time
too grows on a busy machine): the moments after it are drawn from that, and trials go on until HITS
runs were interrupted, at most 4 TRIALS. One thread: torch may not be forked with more.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from pyoffline import cli, run_folder


def child(argv, log, number=None, after=0.0, twice=False):
    """A forked `pyoffline`; `number`: a signal to its group after so much processor time."""
    pid = os.fork()
    if pid:
        return pid
    os.setpgid(0, 0)
    with Path(log).open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if number:

        def fire(*_):
            os.killpg(0, number)
            if twice:
                os.killpg(0, signal.SIGINT)

        signal.signal(signal.SIGPROF, fire)
        signal.setitimer(signal.ITIMER_PROF, after)
    try:
        code = cli.main(argv)
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    os._exit(code)


def ended(pid):
    """Exit code (minus a signal's number), and the processor time it took."""
    _, status, used = os.wait4(pid, 0)
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime


def run_once(config, out, extra=(), log="log"):
    return ended(child(["train", str(config), f"trainer.output_dir={out}", *extra], f"{out}.{log}"))


def alive(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def report(config, work, trials, hits):
    random.seed(0)
    # imports what a run imports, so that children spend their time on the run
    assert cli.main(["train", str(config), f"trainer.output_dir={work / 'first'}"]) == 0
    whole = work / "whole"
    code, seconds = run_once(config, whole)
    assert code == 0, (work / "whole.log").read_text()
    truth = load_file(whole / "final" / "model.safetensors")
    rows = []
    for trial in range(4 * trials):
        if trial >= trials and sum(row["code"] != 0 for row in rows) >= hits:
            break
        out = work / f"run-{trial}"
        number = signal.SIGTERM if trial % 3 == 2 else signal.SIGINT
        twice, workers = trial % 4 == 3, 2 * (trial % 2)
        after = random.uniform(0.02, 0.95) * seconds  # noqa: S311 (moments, no secrets)
        argv = ["train", str(config), f"trainer.output_dir={out}"]
        argv.append(f"trainer.dataloader_num_workers={workers}")
        pid = child(argv, f"{out}.log", number, after, twice)
        code, used = ended(pid)
        if code == 0:
            seconds = min(seconds, used)
        newest = run_folder.newest(out) if out.is_dir() else None
        row = {"code": code, "number": int(number), "twice": twice, "left": alive(pid)}
        row["log"] = Path(f"{out}.log").read_text()[-2000:]
        row["step"] = int(newest.name.split("-")[1]) if newest else 0
        row["problems"] = run_folder.problems(newest) if newest else []
        if code != 0:
            again = ["--resume"] if newest else []
            row["resumed"] = run_once(config, out, again, "again.log")[0]
        got = load_file(out / "final" / "model.safetensors")
        row["equal"] = all(torch.equal(got[k], v) for k, v in truth.items())
        rows.append(row)
        shutil.rmtree(out)
    return rows


if __name__ == "__main__":
    config, work = Path(sys.argv[1]), Path(sys.argv[2])
    rows = report(config, work, int(sys.argv[3]), int(sys.argv[4]))
    sys.stdout.write("\n" + json.dumps(rows) + "\n")

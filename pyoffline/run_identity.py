"""What a run is: written into its folder when it begins, compared when it goes on.

Not here: the model and the optimizer (checkpoint.py), the folder (run_folder.py).
"""

import json
from pathlib import Path

from pyoffline.config import RunConfig, build_objective
from pyoffline.run_folder import OtherRunError, sha256

NAME = "run.json"
TRAINER = ("seed", "data_seed", "aggregation", "horizon")


def identity(config: RunConfig) -> dict[str, str]:
    """Text by key of the configuration: what the steps before a stop and those after must share."""
    data = config.data
    found = {
        "objective": repr(build_objective(config)),
        "advantage": json.dumps(config.advantage, sort_keys=True),
        "loss": config.loss,
        "data.train": f"SHA-256 {sha256(Path(data.train))}",
    }
    for name in ("max_length", "too_long", "append_eos", "packing", "skip_bad"):
        found[f"data.{name}"] = json.dumps(getattr(data, name))
    found |= {f"{name}.path": getattr(config, name).path for name in sorted(config.models)}
    return found | {f"trainer.{k}": json.dumps(config.trainer.get(k)) for k in TRAINER}


def record(run: Path, config: RunConfig) -> None:
    """At the start of a run that resumes none."""
    text = json.dumps(identity(config), indent=1)
    (run / NAME).write_text(text + "\n", encoding="utf-8")


def compare(run: Path, config: RunConfig) -> str | None:
    """OtherRunError where the run in this folder was another; a note where that cannot be known."""
    path = run / NAME
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"no {path}: objective and data are not compared with those before"
    except (OSError, ValueError) as error:
        raise OtherRunError(f"{path} cannot be read: {error}; delete it to go on without") from None
    now = identity(config)
    odd = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if odd:
        lines = [f"{k}: {before.get(k)} before, {now.get(k)} now" for k in odd]
        head = f"{run}: --resume goes on with the same run, and this is another"
        last = (
            "give that run's configuration; or train its weights in a new folder (model.path: a "
            f"checkpoint, and another trainer.output_dir); or, where it is meant, delete {path}"
        )
        raise OtherRunError("\n  ".join([head, *lines, last]))
    return None

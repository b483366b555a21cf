"""Learning from one fixed file of offline samples, with every method of a table, three seeds each.

Each run is one configuration of `pyoffline train`, run in this process; the methods differ in
`objective` and `advantage` and in nothing else. Each result is measured on problems that nobody
saw (judge.py). Not here: the file (behaviour.py), the figure (learning_figure.py).
"""

import contextlib
import json
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from tqdm.auto import tqdm

from pyoffline.demo import behaviour, learning_figure
from pyoffline.demo.behaviour import Behaviour, LearningSettings
from pyoffline.demo.judge import Judge, Result

REWARD = {"name": "reward"}
CENTRED = {"name": "group_normalize", "std": None}  # R - mean of the prompt's answers


@dataclass(frozen=True)
class Method:
    """A row of the table. `alpha`: where it stands on the PowerIS curve, if it does."""

    key: str
    label: str
    objective: dict
    advantage: dict | None = None
    alpha: float | None = None


def power(alpha: float) -> Method:
    objective = {"name": "power_is", "alpha": alpha}
    return Method(f"power-is-{alpha:g}", f"PowerIS, α = {alpha:g}", objective, REWARD, alpha)


METHODS = (
    Method("sft-all", "SFT, all answers", {"name": "nll"}),
    Method("sft-correct", "SFT, correct (α = 0)", {"name": "weighted_nll"}, REWARD, alpha=0.0),
    Method("rwr", "RWR", {"name": "weighted_nll"}, {"name": "rwr", "lam": 2.0}),
    power(0.25),
    power(0.5),
    power(0.75),
    Method("is", "IS (α = 1)", {"name": "importance_sampling"}, REWARD, alpha=1.0),
    Method("ppo-clip", "PPO-clip", {"name": "ppo_clip"}, REWARD),
    Method("is-group", "IS, centred", {"name": "importance_sampling"}, CENTRED),
    Method("ppo-group", "PPO-clip, centred", {"name": "ppo_clip"}, CENTRED),
    Method("asym-re", "AsymRE, centred", {"name": "asym_re"}, CENTRED),
)


@dataclass(frozen=True)
class Row:
    """A method over its seeds: means, and the unbiased standard deviation (0 for one seed)."""

    method: Method
    accuracy: float
    accuracy_std: float
    greedy: float
    greedy_std: float
    kl: float
    kl_std: float
    ess: float
    ess_std: float

    @staticmethod
    def of(method: Method, results: list[Result]) -> "Row":
        runs = [r for r in results if r.method == method.key]
        columns = [[getattr(r, name) for r in runs] for name in ("accuracy", "greedy", "kl", "ess")]
        return Row(method, *(x for column in columns for x in spread(column)))


def spread(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def run_learning(settings: LearningSettings, methods=METHODS) -> Path:
    """Make the file, learn from it, measure, draw; returns the figure's path."""
    start = time.perf_counter()
    settings = settings.resolved()
    settings.output.mkdir(parents=True, exist_ok=True)
    print("[1/3] a behaviour policy: a small Llama, taught addition by one who forgets to carry")
    made = behaviour.make_behaviour(settings, lambda config: train(settings, config))
    _say_file(settings, made)
    runs = [(method, seed) for method in methods for seed in settings.seeds]
    print(
        f"[2/3] {len(methods)} methods, {len(settings.seeds)} seeds each, from that file",
        flush=True,
    )
    judge = Judge(made)
    results = [judge.measure(made.model, "behaviour", -1)]
    log = settings.output / "train.log"
    log.unlink(missing_ok=True)
    for method, seed in (bar := tqdm(runs, desc="learn", unit="run", file=sys.stderr)):
        bar.set_postfix_str(f"{method.label}, seed {seed}")
        with log.open("a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
            folder = train(settings, method_config(settings, made, method, seed))
            results.append(judge.measure(folder, method.key, seed))
        save_results(settings.output / "results.jsonl", results)
    print("[3/3] the figure", flush=True)
    rows = [Row.of(method, results) for method in methods]
    path = settings.figure or settings.output / "learning.png"
    learning_figure.draw(rows, results[0], judge.frontier(), _subtitle(settings), path)
    _say(rows, results[0], len(settings.seeds))
    print(f"figure       {path}\nsamples      {made.samples}  sha256 {made.sha256[:16]}")
    print(f"results      {settings.output / 'results.jsonl'}\nlog          {log}")
    print(f"took {time.perf_counter() - start:.0f} s")
    return path


def train(settings: LearningSettings, config: dict) -> Path:
    """`pyoffline train` in this process, from a YAML file that stays; the model's folder."""
    from pyoffline.config import load_config
    from pyoffline.training import run_training

    output = Path(config["trainer"]["output_dir"])
    shutil.rmtree(output, ignore_errors=True)
    path = settings.output / "configs" / f"{output.name}.yaml"
    result = run_training(load_config(behaviour.write_config(path, config)))
    if result.stopped_by is not None:
        raise KeyboardInterrupt
    return result.model_dir


def method_config(settings: LearningSettings, made: Behaviour, method: Method, seed: int) -> dict:
    """The configuration of one run."""
    config = {
        "model": str(made.model),
        "data": {"train": str(made.samples), "max_length": 16},
        "objective": method.objective,
        "advantage": method.advantage,
        "trainer": {
            "output_dir": str(settings.output / "runs" / f"{method.key}-{seed}"),
            "per_device_train_batch_size": settings.batch,
            "max_steps": settings.steps,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": "constant",
            **behaviour.common_trainer(seed),
        },
    }
    return {k: v for k, v in config.items() if v is not None}


def save_results(path: Path, results: list[Result]) -> None:
    """results.jsonl, one run a line."""
    path.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results), encoding="utf-8")


def _subtitle(settings: LearningSettings) -> str:
    return (
        f"{settings.n_sampled} prompts × {settings.answers} answers of the behaviour policy, "
        f"{settings.steps} steps of {settings.batch}, one learning rate; means of "
        f"{len(settings.seeds)} seeds, bars: ± one standard deviation"
    )


def _say_file(settings: LearningSettings, made: Behaviour) -> None:
    print(
        f"      {settings.n_sampled * settings.answers:,} answers to {settings.n_sampled} prompts, "
        f"{made.reward:.1%} of them right; the sampler's log-probs and `pyoffline score` differ "
        f"by at most {made.difference:.1e}\n      {made.samples}\n      sha256 {made.sha256}"
    )


def _say(rows: list[Row], base: Result, n_seeds: int) -> None:
    """The table on stdout."""
    print(f"\nheld-out problems, mean ± standard deviation over {n_seeds} seeds")
    print(
        "accuracy: probability of the right answer; greedy: fraction right when decoded greedily;"
    )
    print("centred: the reward minus the mean of its prompt's answers; others: the reward itself")
    print("KL: nats an answer, from the behaviour policy; ESS: of the file's answers\n")
    print(f"{'':22}{'accuracy':>16}{'greedy':>16}{'KL':>16}{'ESS':>16}")
    print(f"{'behaviour policy':22}{base.accuracy:>9.3f}{base.greedy:>16.3f}{0:>16.3f}{1:>16.3f}")
    for row in rows:
        pairs = (
            (row.accuracy, row.accuracy_std),
            (row.greedy, row.greedy_std),
            (row.kl, row.kl_std),
            (row.ess, row.ess_std),
        )
        cells = "".join(f"{m:>9.3f} ±{s:5.3f}" for m, s in pairs)
        print(f"{row.method.label:22}{cells}")
    print()

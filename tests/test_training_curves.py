"""bench/training_curves.py, short: the fused losses end where the fp64 reference does, and its
committed result of 300 steps and 5 seeds holds.
"""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "training_curves-cpu.json"


@pytest.fixture(scope="module")
def curves():
    spec = importlib.util.spec_from_file_location("curves", ROOT / "bench" / "training_curves.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_12_steps_end_within_the_spread_of_seeds(curves):
    losses = curves.study("ppo_clip", 12, 3)
    got = curves.verdict(losses)
    untrained, trained = losses["untrained"], losses["fp64 reference"]
    assert all(b < a - 0.02 for a, b in zip(untrained, trained, strict=True))
    assert got["pyoffline fp32"]["largest_difference"] < 1e-5 < got["spread"]
    assert got["pyoffline bf16"]["largest_difference"] <= got["spread"]


def test_a_loss_outside_the_spread_does_not_hold(curves):
    losses = {
        "fp64 reference": [1.0, 1.2],
        "pyoffline fp32": [1.1, 1.15],
        "pyoffline bf16": [1.5, 1.2],
    }
    got = curves.verdict(losses)
    assert got["pyoffline fp32"]["holds"] and not got["pyoffline bf16"]["holds"]


def test_the_committed_result_holds(curves):
    if not RESULT.is_file():
        pytest.skip("not run: no committed result")
    report = json.loads(RESULT.read_text())
    assert report["steps"] == 300 and report["seeds"] == 5
    for name in curves.OBJECTIVES:
        verdict = curves.verdict(report[name]["final_loss"])
        assert verdict == report[name]["verdict"]
        assert verdict["pyoffline fp32"]["holds"] and verdict["pyoffline bf16"]["holds"]

"""The examples' own claims at a small size: what docs/theory.md says must be what they compute."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

import pyoffline as po

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def modes():
    return load("mode_seeking")


def test_without_a_ratio_the_fit_matches_the_targets_moments(modes):
    """f(w) = 1 is forward KL; its minimum in an exponential family has the target's moments."""
    got = modes.measure(modes.fit(modes.power_is(0.0)))
    p, x = modes.PI_STAR, modes.X
    mean = (p * x).sum()
    assert got["mean"] == pytest.approx(float(mean), abs=1e-4)
    assert got["width"] == pytest.approx(float((p * (x - mean) ** 2).sum().sqrt()), abs=1e-4)
    weights = po.advantages.rwr(modes.REWARDS, torch.zeros(121, dtype=torch.int64), 1 / modes.TAU)
    rwr = modes.measure(modes.fit(modes.offline_loss(po.WeightedNLL(), weights)))
    assert rwr["mean"] == pytest.approx(got["mean"], abs=1e-4)


def test_power_shaping_sits_in_the_highest_mode_and_narrows_as_the_root_of_1_minus_alpha(modes):
    got = modes.measure(modes.fit(modes.grouped(po.RenyiRWR(0.6, modes.TAU))))
    assert got["mean"] == pytest.approx(-2.4, abs=0.01) and got["other"] < 1e-3
    assert got["width"] == pytest.approx(0.55 * math.sqrt(0.4), abs=0.003)


def test_the_alpha_elbo_at_1_is_reverse_kl_and_keeps_the_modes_width(modes):
    elbo = modes.measure(modes.fit(modes.grouped(po.AlphaELBO(1.0, modes.TAU))))
    reverse = modes.measure(modes.fit(modes.jsd(1.0)))
    assert elbo["reverse"] == pytest.approx(reverse["reverse"], abs=1e-6)
    assert elbo["width"] == pytest.approx(0.756, abs=0.002)


def test_rwr_is_optimistic_by_its_formula(modes):
    for row in modes.optimism(trials=8000, lams=(0.25, 0.5), sizes=(16, 64)):
        assert row["measured"] > 0
        assert abs(row["measured"] - row["formula"]) < 4 * row["error"] + 0.005


def test_sampled_prefix_ratios_rank_better_with_more_completions(modes):
    few, many = modes.prefixes(sizes=(64, 4096), repeats=5)
    assert many["agreement"] > 0.97 > few["agreement"]
    assert many["error"] < 0.25 * few["error"]

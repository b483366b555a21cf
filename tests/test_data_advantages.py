"""Advantages by name over a file: equal to their functions, chained, refused before step 0."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from pyoffline import advantages, corrections, data_advantages  # noqa: E402
from pyoffline.config import parse_config  # noqa: E402
from pyoffline.data import Sample  # noqa: E402

LENGTHS = (3, 1, 2, 4, 2, 2)
REWARDS = (1.0, 0.0, 0.5, 3.0, -1.0, 2.0)
GROUPS = (0, 1, 0, 1, 2, 2)
WIDTH = max(LENGTHS)


def made_samples():
    random = torch.Generator().manual_seed(0)
    out = []
    for i, n in enumerate(LENGTHS):
        logps = (-torch.rand(5, n, generator=random, dtype=torch.float64) - 0.1).tolist()
        columns = {"reward": REWARDS[i], "group": GROUPS[i], "greedy_reward": 0.25 * i}
        columns |= dict(zip(("old_logps", "ref_logps", "behavior_logps"), logps, strict=False))
        columns |= {"values": logps[3], "log_sum_p2": logps[4]}
        out.append(Sample(list(range(2 + n)), 2, i + 1, columns))
    return out


def padded(name):
    rows = [s.columns[name] + [0.0] * (WIDTH - s.n_completion) for s in made_samples()]
    return torch.tensor(rows, dtype=torch.float64)


R = torch.tensor(REWARDS, dtype=torch.float64)
G = torch.tensor(GROUPS)
MASK = torch.arange(WIDTH) < torch.tensor(LENGTHS)[:, None]
N = torch.tensor(LENGTHS).float()
EXPECTED = {
    "reward": lambda: R,
    "reward_to_go": lambda: advantages.reward_to_go(R, MASK),
    "gae": lambda: advantages.gae(R, padded("values"), MASK),
    "group_normalize": lambda: advantages.group_normalize(R, G),
    "leave_one_out": lambda: advantages.leave_one_out(R, G),
    "reinforce_plus_plus": lambda: advantages.reinforce_plus_plus(R, MASK),
    "remax": lambda: advantages.remax(R, torch.arange(6) * 0.25),
    "opo": lambda: advantages.opo(R, G, N),
    "rwr": lambda: advantages.rwr(R, G),
    "astar": lambda: R - advantages.astar_value(R, G),
    "position": lambda: advantages.position(MASK),
    "kl_shaped": lambda: advantages.kl_shaped(R, padded("old_logps"), padded("ref_logps"), MASK),
    "optimal_token_baseline": lambda: advantages.optimal_token_baseline(
        R, G, MASK, padded("old_logps"), padded("log_sum_p2")
    ),
}


def result(spec, samples=None):
    samples = made_samples() if samples is None else samples
    data_advantages.add_advantages(samples, spec)
    return [s.columns["advantages"] for s in samples]


def assert_rows(got, expected):
    for i, value in enumerate(got):
        row = expected[i].tolist()
        row = row[: LENGTHS[i]] if isinstance(row, list) else row
        assert value == pytest.approx(row, rel=1e-12, abs=1e-12)


def test_every_name_is_here():
    assert set(EXPECTED) | {"awr"} == set(data_advantages.ADVANTAGES)
    public = {
        n
        for n, f in vars(advantages).items()
        if getattr(f, "__module__", "") == advantages.__name__
    }
    functions = {n for n in public if not n.startswith("_") and n[0].islower()}
    assert functions - set(data_advantages.ADVANTAGES) == {
        "adaptive_kl",
        "astar_value",
        "rso_pairs",
    }


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_is_its_function(name):
    assert_rows(result({"name": name}), EXPECTED[name]())


def test_awr_takes_values_where_every_row_has_them():
    samples = made_samples()
    for s in samples:
        s.columns["values"] = 0.5
    assert_rows(
        result({"name": "awr", "beta": 2.0}, samples), advantages.awr(R, R * 0 + 0.5, beta=2.0)
    )
    del samples[3].columns["values"]
    assert_rows(result({"name": "awr"}, samples), advantages.awr(R))


CHAINS = {
    "kl_shaped_gae": (
        [{"name": "kl_shaped", "beta": 0.1}, {"name": "gae", "lam": 0.9}],
        lambda: advantages.gae(
            advantages.kl_shaped(R, padded("old_logps"), padded("ref_logps"), MASK, 0.1),
            padded("values"),
            MASK,
            lam=0.9,
        ),
    ),
    "normalized_then_truncated": (
        [{"name": "group_normalize"}, {"name": "truncate", "high": 1.5}],
        lambda: (
            advantages.group_normalize(R, G)[:, None]
            * corrections.truncate(padded("old_logps"), padded("behavior_logps"), MASK, high=1.5)
        ),
    ),
    "to_go_masked": (
        [{"name": "reward_to_go", "gamma": 0.5}, {"name": "mask", "low": 0.9}],
        lambda: (
            advantages.reward_to_go(R, MASK, 0.5)
            * corrections.mask(padded("old_logps"), padded("behavior_logps"), MASK, low=0.9)
        ),
    ),
    "to_go_awr": (
        [{"name": "reward_to_go"}, {"name": "awr"}],
        lambda: advantages.awr(advantages.reward_to_go(R, MASK), padded("values"), MASK),
    ),
    "loo_m2po": (
        [{"name": "leave_one_out"}, {"name": "m2po", "tau": 0.01}],
        lambda: (
            advantages.leave_one_out(R, G)[:, None]
            * corrections.m2po(padded("old_logps"), padded("behavior_logps"), MASK, 0.01)
        ),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_is_its_functions_one_after_the_other(name):
    spec, expected = CHAINS[name]
    assert_rows(result(spec), expected())


def test_columns_follow_the_chain():
    columns = data_advantages.columns_of(CHAINS["kl_shaped_gae"][0])
    assert columns == {"reward", "old_logps", "ref_logps", "values"}
    assert data_advantages.columns_of({"name": "reinforce_plus_plus", "baseline": True}) == {
        "reward",
        "group",
    }
    assert data_advantages.columns_of({"name": "position"}) == set()
    assert data_advantages.optional_columns({"name": "awr"}) == {"values"}


def test_values_of_the_wrong_kind_are_an_error_of_the_stage():
    samples = made_samples()
    for s in samples:
        s.columns["values"] = 0.5
    with pytest.raises(ValueError, match="advantage gae: values"):
        result({"name": "gae"}, samples)


BAD = {
    "correction_first": ([{"name": "truncate"}], "truncate multiplies advantages"),
    "position_second": (["reward", "position"], "position reads no rewards"),
    "unknown": ([{"name": "reward"}, {"name": "gea"}], "advantage[1].name: no advantage 'gea'"),
    "unknown_setting": ({"name": "gae", "lamda": 0.9}, "did you mean 'lam'"),
    "column_as_setting": ({"name": "gae", "values": 1}, "advantage.values: no such parameter"),
    "unread": ({"name": "opo"}, "advantage: nll reads no advantages"),
    "no_mapping": ([3], "advantage[0]: expected {name"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_specification_is_a_configuration_error(name):
    spec, message = BAD[name]
    errors = []
    parse_config(
        {"model": "m", "data": {"train": "s"}, "trainer": {"output_dir": "o"}, "advantage": spec},
        errors,
    )
    assert any(message in e for e in errors), errors


def test_a_group_of_one_and_equal_rewards_are_0_and_never_nan():
    samples = made_samples()
    for s, group in zip(samples, (0, 1, 2, 2, 3, 3), strict=True):
        s.columns |= {"group": group, "reward": 1.0 if group else 2.0}
    for name in ("group_normalize", "leave_one_out", "opo"):
        assert result({"name": name}, samples) == [0.0] * 6, name
    assert all(math.isfinite(x) for x in result({"name": "rwr"}, samples))

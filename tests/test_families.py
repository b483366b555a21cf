"""Every objective by its name in a configuration file: two steps of a tiny model, the first one's
loss against one call of the library in fp64 on a batch built by hand; and the error of each column
that is missing.
"""

import inspect
import math

import pytest

pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    by_hand,
    load,
    losses,
    pair_rows,
    single_rows,
    train,
    write_config,
    write_model,
    write_rows,
)

import pyoffline as po  # noqa: E402
from pyoffline.config import DataConfig, parse_config  # noqa: E402
from pyoffline.config_objective import make  # noqa: E402
from pyoffline.data import DataError, Needs, load_samples  # noqa: E402
from pyoffline.objectives import REGISTRY  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")
PPO = {"name": "ppo_clip", "clip_high": 0.28}

# name -> (what it reads, parameters)
FAMILIES = {
    "nll": ("", {"label_smoothing": 0.1}),
    "weighted_nll": ("adv", {}),
    "dft": ("", {}),
    "prob_power": ("adv", {}),
    "luffy": ("adv", {}),
    "importance_weighted_sft": ("ref", {}),
    "proximal_sft": ("old", {}),
    "importance_sampling": ("mu adv", {}),
    "power_is": ("mu adv", {}),
    "truncated_is": ("mu adv", {}),
    "ppo_clip": ("old adv", {"clip_high": 0.28}),
    "decoupled_ppo": ("old mu adv", {}),
    "cispo": ("old adv", {}),
    "sapo": ("old adv", {}),
    "dppo": ("old adv", {}),
    "dro": ("old adv", {"beta": 0.5}),
    "asym_re": ("adv", {}),
    "topr_token": ("mu adv", {}),
    "distill_token": ("ref mu", {}),
    "kl": ("ref", {"kind": "k3"}),
    "entropy": ("", {}),
    "z_loss": ("", {}),
    "gspo": ("old adv", {"clip_low": 0.1, "clip_high": 0.1}),
    "luspo": ("old adv", {}),
    "gmpo": ("old adv", {}),
    "vespo": ("old adv", {}),
    "sequence_power_is": ("mu adv", {"alpha": 0.5}),
    "topr": ("mu rewards", {}),
    "importance_weighted_sft_sequence": ("ref", {}),
    "a_star_po": ("ref adv", {}),
    "kl_regularized_pg": ("old ref rewards", {"beta": 0.1}),
    "opsm": ("old mu adv", {"delta": 0.1, "objective": PPO}),
    "renyi_rwr": ("mu rewards groups", {}),
    "alpha_elbo": ("mu rewards groups", {}),
    "dpo": ("ref", {"beta": 0.2}),
    "kto": ("ref targets", {}),
    "cpo": ("", {}),
    "sim_po": ("", {}),
    "alpha_po": ("", {}),
    "orpo": ("", {}),
    "tpo": ("", {}),
    "wpo": ("ref", {"objective": "dpo"}),
    "list_dpo": ("ref rewards groups", {}),
    "rrhf": ("rewards groups", {}),
}
PAIRED = ("dpo", "cpo", "sim_po", "alpha_po", "orpo", "tpo", "wpo")
COLUMN = {
    "old": "old_logps",
    "mu": "behavior_logps",
    "ref": "ref_logps",
    "adv": "advantages",
    "rewards": "reward",
    "targets": "label",
    "groups": "group",
}
MORE = {
    "dpo_hinge_on_rewards": ("ref rewards", {"name": "dpo", "loss": "hinge", "margin": "rewards"}),
    "dpo_ipo": ("ref", {"name": "dpo", "loss": "ipo"}),
    "dpo_aot": ("ref", {"name": "dpo", "loss": "aot"}),
    "dpo_reference_free": ("", {"name": "dpo", "reference_free": True}),
    "wpo_of_hinge": ("ref", {"name": "wpo", "objective": {"name": "dpo", "loss": "hinge"}}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


def spec_of(name):
    if name in MORE:
        reads, spec = MORE[name]
        return reads.split(), spec
    reads, params = FAMILIES[name]
    return reads.split(), {"name": name} | params


def rows_of(spec):
    return pair_rows() if spec["name"] in PAIRED else single_rows()


def checked(spec):
    """The objective that a configuration makes of a specification."""
    raw = {"model": "m", "data": {"train": "s.jsonl"}, "objective": dict(spec)}
    errors = []
    config = parse_config(raw | {"trainer": {"output_dir": "o", "use_cpu": True}}, errors)
    assert not errors, errors
    return make(config.objective)


def test_the_table_has_every_registered_name():
    classes = {name for name, made in REGISTRY.items() if inspect.isclass(made)}
    assert set(FAMILIES) == classes


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_the_first_step_is_one_call_of_the_library(tmp_path, folder, name):
    reads, spec = spec_of(name)
    rows = rows_of(spec)
    code, events = train(write_config(tmp_path, folder, rows, objective=spec))
    assert code == 0
    model = load(folder)
    hidden, tokens = by_hand(model, rows, reads)
    head = po.Head(model.lm_head.weight.detach())
    with po.use_backend("reference"):
        out = po.linear_policy_loss(hidden, head, tokens, checked(spec))
    first, second = losses(events)
    assert first == pytest.approx(out.loss.item(), rel=2e-6, abs=1e-7)  # kept in fp32
    assert math.isfinite(second) and second != first
    for key in ("entropy", "num_tokens"):
        assert events[1][key] == pytest.approx(out.metrics[key].item(), rel=1e-6)


@pytest.mark.parametrize("name", [n for n in FAMILIES if FAMILIES[n][0]])
def test_a_column_that_one_row_lacks_is_named(tmp_path, folder, name):
    from transformers import AutoTokenizer

    reads, spec = spec_of(name)
    tokenizer, objective = AutoTokenizer.from_pretrained(folder), checked(spec)
    for read in reads:
        column = COLUMN[read] if name not in PAIRED else "ref_rejected_logps"
        rows = rows_of(spec)
        del rows[-1][column]
        path = write_rows(tmp_path / f"{read}.jsonl", rows)
        needs = Needs.of(objective, None)
        with pytest.raises(DataError) as caught:
            load_samples(path, tokenizer, DataConfig(str(path)), needs)
        wanted = f"{path}:{len(rows)}: {column}: missing"
        assert any(p.startswith(wanted) for p in caught.value.problems), str(caught.value)

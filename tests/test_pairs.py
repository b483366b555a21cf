"""Preference rows, labels and groups: tokens, bad rows by file, line and column, scoring."""

import json

import pytest

pytest.importorskip("transformers")

from test_cli import model, run_config  # noqa: E402, F401
from test_data import load, tokenizer, write  # noqa: E402, F401

import pyoffline as po  # noqa: E402
from pyoffline import cli  # noqa: E402
from pyoffline.data import DataError, Needs  # noqa: E402

PAIR = {
    "prompt": "ab",
    "chosen": "cd",
    "rejected": "e",
    "ref_chosen_logps": [-1.0, -2.0, -0.5],
    "ref_rejected_logps": [-1.0, -3.0],
}
SUMS = PAIR | {"ref_chosen_logps": -3.5, "ref_rejected_logps": -4.0}
CHAT = [{"role": "user", "content": "ab"}]


def answer(text):
    return [{"role": "assistant", "content": text}]


def without(*names):
    return {k: v for k, v in PAIR.items() if k not in names}


BAD = {
    "no_rejected": (without("rejected"), "rejected: missing; the objective compares"),
    "misspelt": (without("chosen") | {"choosen": "cd"}, "did you mean 'choosen'"),
    "the_same": (PAIR | {"rejected": "cd"}, "rejected: the same as chosen"),
    "empty": (PAIR | {"chosen": ""}, "chosen: empty; there is nothing to train on"),
    "number": (PAIR | {"rejected": 3}, "rejected: expected a string, got int"),
    "no_prompt": (without("prompt"), "prompt: missing"),
    "no_ref": (without("ref_rejected_logps"), "ref_rejected_logps: missing"),
    "short_ref": (PAIR | {"ref_chosen_logps": [-1.0]}, "ref_chosen_logps: 1 values for 3"),
    "nan_ref": (PAIR | {"ref_chosen_logps": [-1.0, float("nan"), 0.0]}, "ref_chosen_logps[1]: nan"),
    "positive_ref": (
        PAIR | {"ref_rejected_logps": [0.5, -1.0]},
        "ref_rejected_logps[0]: 0.5 is above",
    ),
    "positive_sum": (SUMS | {"ref_chosen_logps": 2.0}, "ref_chosen_logps: 2.0 is above 0"),
    "mixed": (PAIR | {"ref_chosen_logps": -3.5}, "ref_logps: one number here and a list in other"),
    "target": (PAIR | {"target": 1.5}, "target: expected P(chosen beats rejected) in [0, 1]"),
    "lone_target": (PAIR | {"target": 0.5}, "target: missing here, and"),
    "too_long": (PAIR | {"chosen": "c" * 40}, "max_length: 43 tokens"),
    "bad_chat": (PAIR | {"chosen": CHAT, "rejected": CHAT[:0]}, "chosen: the last message must be"),
}


@pytest.mark.parametrize("name", BAD)
def test_t1_a_bad_pair_is_named_by_file_line_and_column(tmp_path, tokenizer, name):  # noqa: F811
    row, message = BAD[name]
    path = write(tmp_path / "s.jsonl", [PAIR, row, PAIR])
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, po.DPO(), max_length=16)
    found = [p for p in caught.value.problems if message in p]
    assert found and all(p.startswith(f"{path}:") for p in found), str(caught.value)
    assert name == "lone_target" or any(p.startswith(f"{path}:2: ") for p in found)


def test_t1_skip_bad_leaves_out_both_halves(tmp_path, tokenizer):  # noqa: F811
    rows = [PAIR, PAIR | {"ref_rejected_logps": [-1.0]}, PAIR | {"chosen": ""}, PAIR]
    data = load(write(tmp_path / "s.jsonl", rows), tokenizer, po.DPO(), skip_bad=True)
    assert [s.line for s in data.samples] == [1, 1, 4, 4] and len(data) == 2
    assert sum(data.skipped.values()) == 2


def test_both_halves_have_the_prompt_and_their_own_columns(tmp_path, tokenizer):  # noqa: F811
    chat = {"chosen": answer("cd"), "rejected": answer("e"), "prompt": CHAT}
    ids = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    path = write(tmp_path / "s.jsonl", [PAIR | {"target": 0.75}])
    (a, b), *_ = load(path, tokenizer, po.DPO()).items
    assert (a.ids, b.ids) == ([1, 2, 3, 4, 0], [1, 2, 5, 0]) and a.n_prompt == b.n_prompt == 2
    assert a.columns["ref_logps"] == [-1.0, -2.0, -0.5] and b.columns["ref_logps"] == [-1.0, -3.0]
    assert a.columns["target"] == 0.75
    free = po.DPO(reference_free=True)
    (a, b), (c, d) = load(write(tmp_path / "t.jsonl", [chat, ids]), tokenizer, free).items
    assert (a.ids, b.ids) == ([1, 2, 17, 26, 3, 4, 0], [1, 2, 17, 26, 5, 0])
    assert (c.ids, d.ids) == ([1, 2, 3, 4], [1, 2, 5])


def test_sums_of_references_do_for_every_row(tmp_path, tokenizer):  # noqa: F811
    data = load(write(tmp_path / "s.jsonl", [SUMS, SUMS]), tokenizer, po.DPO())
    assert [s.columns["ref_logps"] for s in data.samples] == [-3.5, -4.0] * 2
    path = write(tmp_path / "t.jsonl", [SUMS | {"chosen": "c" * 40}])
    with pytest.raises(
        DataError, match="ref_chosen_logps: a sum over all tokens, but max_length cuts"
    ):
        load(path, tokenizer, po.DPO(), max_length=16, too_long="truncate")


LABELLED = {"prompt": "a", "completion": "b", "label": True, "ref_logps": [-1.0, -1.0]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {k: v for k, v in LABELLED.items() if k != "label"},
            "label: missing; the objective reads it",
        ),
        (LABELLED | {"label": "yes"}, "label: expected true or false"),
        (LABELLED | {"label": 0.5}, "label: expected true or false"),
    ],
)
def test_t1_labels_of_kto(tmp_path, tokenizer, row, message):  # noqa: F811
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "s.jsonl", [LABELLED, row]), tokenizer, po.KTO())


def test_t1_a_group_objective_needs_groups_and_rewards(tmp_path, tokenizer):  # noqa: F811
    row = {"prompt": "a", "completion": "b", "behavior_logps": [-1.0, -1.0]}
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "s.jsonl", [row]), tokenizer, po.RenyiRWR())
    assert "group: missing" in str(caught.value) and "reward: missing" in str(caught.value)


def test_needs_of_coupled_objectives():
    dpo, kto, renyi = (Needs.of(o, None) for o in (po.DPO(), po.KTO(), po.RenyiRWR()))
    assert (dpo.unit, kto.unit, renyi.unit) == ("pair", "row", "group")
    assert dpo.columns == {"ref_logps"} and dpo.optional == {"target"} and dpo.sums
    assert kto.columns == {"ref_logps", "label"}
    assert renyi.columns == {"behavior_logps", "reward", "group"}
    assert Needs.of(po.GSPO(), {"name": "astar"}).columns == {"old_logps", "reward", "group"}


def test_score_then_train_on_pairs_starts_at_log_2(tmp_path, model, capsys):  # noqa: F811
    """N15: the same weights as policy and reference, so that every margin is 0."""
    rows = [{"prompt": "2+", "chosen": f"{i}=", "rejected": f"{i}+{i}"} for i in range(4)]
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = tmp_path / "scored.jsonl"
    argv = ["score", str(tmp_path / "raw.jsonl"), "--model", str(model), "--output", str(scored)]
    assert cli.main(argv) == 2
    assert "take ref_logps only" in capsys.readouterr().err
    assert cli.main([*argv, "--column", "ref_logps"]) == 0
    row = json.loads(scored.read_text().splitlines()[0])
    assert len(row["ref_chosen_logps"]) == len(row["chosen_ids"])
    assert len(row["ref_rejected_logps"]) == len(row["rejected_ids"])
    path = run_config(tmp_path, model, objective="dpo", terms=[], advantage=None)
    assert cli.main(["train", str(path), f"data.train={scored}", "trainer.max_steps=1"]) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r["event"] == "train")
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_score_adds_log_sum_p2_for_the_optimal_token_baseline(tmp_path, model):  # noqa: F811
    rows = [{"prompt": "2+", "completion": f"{i}=", "reward": i, "group": 0} for i in range(4)]
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = tmp_path / "scored.jsonl"
    argv = ["score", str(tmp_path / "raw.jsonl"), "--model", str(model), "--output", str(scored)]
    assert cli.main([*argv, "--log-sum-p2"]) == 0
    row = json.loads(scored.read_text().splitlines()[0])
    assert len(row["log_sum_p2"]) == len(row["old_logps"]) == len(row["completion_ids"])
    assert all(-6.0 < x < 0.0 for x in row["log_sum_p2"])  # 1/V <= sum p^2 <= 1
    path = run_config(tmp_path, model, advantage={"name": "optimal_token_baseline"})
    assert cli.main(["train", str(path), f"data.train={scored}", "trainer.max_steps=1"]) == 0

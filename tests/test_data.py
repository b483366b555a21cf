"""Offline samples: every bad row is named before step 0, good rows become the right tensors."""

import json
import math

import pytest
import torch

pytest.importorskip("transformers")

from pyoffline import advantages  # noqa: E402
from pyoffline.collate import Collator  # noqa: E402
from pyoffline.config import DataConfig  # noqa: E402
from pyoffline.data import DataError, Needs, load_samples  # noqa: E402
from pyoffline.token_objectives import KL, NLL, ImportanceSampling, PPOClip  # noqa: E402

GOOD = {
    "prompt": "ab",
    "completion": "cd",
    "reward": 1.0,
    "group": "g",
    "old_logps": [-1.0, -2.0, -0.5],
}


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, and an end-of-sequence token."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<eos>": 0} | {c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz?", 1)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="?"))  # noqa: S106  a token, no secret
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    names = {"eos_token": "<eos>", "unk_token": "?"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    turns = "{% for m in messages %}{{ m['content'] }}q{% endfor %}"
    made.chat_template = turns + "{% if add_generation_prompt %}z{% endif %}"
    return made


def write(path, rows):
    lines = (r if isinstance(r, bytes) else json.dumps(r).encode() for r in rows)
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def load(path, tokenizer, objective=None, advantage=None, **settings):
    objective = NLL() if objective is None else objective
    config = DataConfig(str(path), **settings)
    return load_samples(path, tokenizer, config, Needs.of(objective, advantage), advantage)


PPO = (PPOClip(), {"name": "group_normalize"})
BAD_ROWS = {
    "nan_reward": (GOOD | {"reward": math.nan}, "reward: nan is not a finite number"),
    "text_reward": (GOOD | {"reward": "1"}, "reward: expected a number, got '1'"),
    "bool_reward": (GOOD | {"reward": True}, "reward: expected a number, got True"),
    "missing_reward": ({k: v for k, v in GOOD.items() if k != "reward"}, "reward: missing"),
    "null_reward": (GOOD | {"reward": None}, "reward: missing"),
    "short_logps": (GOOD | {"old_logps": [-1.0]}, "old_logps: 1 values for 3 completion tokens"),
    "no_eos_logps": (GOOD | {"old_logps": [-1.0, -1.0]}, "one is the end-of-sequence token"),
    "inf_logps": (GOOD | {"old_logps": [-1.0, -math.inf, 0.0]}, "old_logps[1]: -inf"),
    "positive_logps": (GOOD | {"old_logps": [-1.0, 0.5, 0.0]}, "old_logps[1]: 0.5 is above 0"),
    "scalar_logps": (GOOD | {"old_logps": -3.0}, "old_logps: expected a list"),
    "misspelt_logps": (
        {("old_logprobs" if k == "old_logps" else k): v for k, v in GOOD.items()},
        "did you mean 'old_logprobs'",
    ),
    "empty_completion": (GOOD | {"completion": ""}, "completion: empty"),
    "missing_completion": (
        {("completions" if k == "completion" else k): v for k, v in GOOD.items()},
        "completion: missing; a row needs completion, completion_ids, messages or text; "
        "did you mean 'completions'",
    ),
    "missing_prompt": ({k: v for k, v in GOOD.items() if k != "prompt"}, "prompt: missing"),
    "empty_prompt": (GOOD | {"prompt": ""}, "prompt: empty, and the tokenizer adds no first token"),
    "list_prompt": (GOOD | {"prompt": ["a"]}, "prompt: expected a string, got list"),
    "misspelt_optional": (
        GOOD | {"ref_logp": [-1.0] * 3},
        "ref_logp: unknown column; did you mean",
    ),
    "unhashable_group": (GOOD | {"group": [1]}, "group: expected a string or an integer"),
    "token_outside": (GOOD | {"completion_ids": [1, 2, 99]}, "token 99 is outside the tokenizer's"),
    "text_ids": (GOOD | {"completion_ids": "abc"}, "completion_ids: expected a list of token ids"),
    "too_long": (GOOD | {"prompt": "a" * 40}, "max_length: 43 tokens, the limit is 16"),
    "two_texts": (GOOD | {"text": "abc"}, "text: given beside completion"),
    "not_utf8": (b'{"prompt": "\xff"}', "row: not UTF-8 at byte 13"),
    "not_json": (b'{"prompt": "ab",}', "row: not JSON"),
    "not_an_object": (b"[1, 2]", "row: expected an object, got list"),
    "cut_line": (b'{"prompt": "ab", "comple', "row: not JSON"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_line_and_field(tmp_path, tokenizer, name):
    row, message = BAD_ROWS[name]
    path = write(tmp_path / "s.jsonl", [GOOD, GOOD, row, GOOD])
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, *PPO, max_length=16)
    assert any(p.startswith(f"{path}:3: ") and message in p for p in caught.value.problems), str(
        caught.value
    )


def test_all_problems_come_at_once_and_skip_bad_counts_them(tmp_path, tokenizer):
    rows = [row for row, _ in BAD_ROWS.values()]
    path = write(tmp_path / "s.jsonl", [GOOD, *rows, GOOD])
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, *PPO, max_length=16)
    lines = {int(p.split(":")[1]) for p in caught.value.problems}
    assert lines == set(range(2, len(rows) + 2))
    assert "and" in str(caught.value).splitlines()[-1] and len(str(caught.value).splitlines()) <= 22
    data = load(path, tokenizer, *PPO, max_length=16, skip_bad=True)
    assert [s.line for s in data.samples] == [1, len(rows) + 2]
    assert sum(data.skipped.values()) == len(caught.value.problems)


def test_t1_a_column_that_every_row_lacks_is_one_line_of_the_error(tmp_path, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] * 30
    path = write(tmp_path / "s.jsonl", rows)
    with pytest.raises(DataError) as caught:
        load(path, tokenizer, *PPO)
    assert len(caught.value.problems) == 90
    lines = str(caught.value).splitlines()
    assert len(lines) == 4 and all("(and 29 more rows)" in line for line in lines[1:])


def test_a_file_with_no_usable_row_stops_even_with_skip_bad(tmp_path, tokenizer):
    path = write(tmp_path / "s.jsonl", [{"completion": ""}])
    with pytest.raises(DataError, match="no usable row"):
        load(path, tokenizer, skip_bad=True)
    path.write_text("")
    with pytest.raises(DataError, match="no usable row"):
        load(path, tokenizer)


@pytest.mark.parametrize("name", ["absent.jsonl", "data.csv", "broken.parquet"])
def test_a_file_that_cannot_be_read_says_so(tmp_path, tokenizer, name):
    path = tmp_path / name
    if name != "absent.jsonl":
        path.write_bytes(b"a,b\n")
    with pytest.raises(ValueError, match=name):
        load(path, tokenizer)


def test_parquet_and_jsonl_give_the_same_samples(tmp_path, tokenizer):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [GOOD, GOOD | {"reward": 0.0, "completion": "xy"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "s.parquet")
    a = load(tmp_path / "s.parquet", tokenizer, *PPO)
    b = load(write(tmp_path / "s.jsonl", rows), tokenizer, *PPO)
    assert a.samples == b.samples


def test_tokens_of_each_kind_of_row(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "c"}]
    rows = [
        {"prompt": "ab", "completion": "c"},
        {"text": "abc"},
        {"messages": chat},
        {"prompt": "ab", "completion_ids": [7, 8]},
        {"prompt_ids": [9], "completion_ids": [7]},
    ]
    data = load(write(tmp_path / "s.jsonl", rows), tokenizer)
    got = [(s.ids, s.n_prompt) for s in data.samples]
    assert got == [
        ([1, 2, 3, 0], 2),
        ([1, 2, 3, 0], 1),
        ([1, 2, 17, 26, 3, 0], 4),
        ([1, 2, 7, 8], 2),
        ([9, 7], 1),
    ]


def test_truncate_cuts_lists_too_and_drop_counts(tmp_path, tokenizer):
    path = write(tmp_path / "s.jsonl", [GOOD])
    cut = load(path, tokenizer, *PPO, max_length=4, too_long="truncate")
    assert cut.samples[0].ids == [1, 2, 3, 4] and cut.truncated == 1
    assert cut.samples[0].columns["old_logps"] == [-1.0, -2.0]
    dropped = load(
        write(tmp_path / "t.jsonl", [GOOD, {**GOOD, "prompt": "a"}]),
        tokenizer,
        *PPO,
        max_length=4,
        too_long="drop",
        skip_bad=True,
    )
    assert [s.line for s in dropped.samples] == [2]


@pytest.mark.parametrize(
    "name", ["group_normalize", "leave_one_out", "rwr", "opo", "position", "reward"]
)
def test_advantages_by_name_equal_the_function(tmp_path, tokenizer, name):
    rows = [
        GOOD | {"reward": float(r), "group": g} for r, g in ((1, "a"), (0, "b"), (0, "a"), (3, "b"))
    ]
    data = load(write(tmp_path / "s.jsonl", rows), tokenizer, PPOClip(), {"name": name})
    rewards, groups = torch.tensor([1.0, 0, 0, 3], dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    lengths = torch.full((4,), 3.0)
    expected = {
        "group_normalize": lambda: advantages.group_normalize(rewards, groups),
        "leave_one_out": lambda: advantages.leave_one_out(rewards, groups),
        "rwr": lambda: advantages.rwr(rewards, groups),
        "opo": lambda: advantages.opo(rewards, groups, lengths),
        "position": lambda: advantages.position(torch.ones(4, 3, dtype=torch.bool)),
        "reward": lambda: rewards,
    }[name]()
    got = torch.tensor([s.columns["advantages"] for s in data.samples], dtype=expected.dtype)
    torch.testing.assert_close(got, expected)


def test_needs_follow_the_objective():
    assert Needs.of(NLL(), None).columns == frozenset()
    assert Needs.of(PPOClip(), None).columns == {"old_logps", "advantages"}
    assert Needs.of(PPOClip(), {"name": "group_normalize"}).columns == {
        "old_logps",
        "reward",
        "group",
    }
    assert Needs.of(ImportanceSampling() + KL("k3"), {"name": "reward"}).columns == {
        "behavior_logps",
        "ref_logps",
        "reward",
    }
    weighted = Needs.of(NLL() + 0.1 * NLL().weighted_by("positive"), None)
    assert weighted.extras == ("positive",)


def test_padded_and_packed_batches_hold_the_same_tokens(tmp_path, tokenizer):
    rows = [
        GOOD,
        {"prompt": "a", "completion": "bcde", "reward": 0.0, "group": "g", "old_logps": [-1.5] * 5},
    ]
    data = load(write(tmp_path / "s.jsonl", rows), tokenizer, *PPO)
    keep = frozenset({"old_logps", "advantages", "group"})
    padded, packed = Collator(0, keep)(data.samples), Collator(0, keep, packing=True)(data.samples)
    assert padded["input_ids"].shape == (2, 6) and packed["input_ids"].shape == (1, 11)
    assert padded["attention_mask"].sum() == 11
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]
    assert packed["sequence_ids"].tolist() == [[0] * 5 + [1] * 6]
    inside = padded["attention_mask"].bool()
    for name in ("input_ids", "labels", "old_logps"):
        assert torch.equal(padded[name][inside], packed[name][0])
    assert padded["labels"][0].tolist() == [-100, -100, 3, 4, 0, -100]
    assert padded["old_logps"][0].tolist() == [0, 0, -1, -2, -0.5, 0]
    assert padded["advantages"].shape == (2,) and packed["advantages"].shape == (1, 11)
    assert padded["group_ids"].tolist() == [0, 0]

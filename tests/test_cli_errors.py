"""What a user gets wrong at the command line (PROMISES T1): every message says where and what to
do, the exit code is 2, and nothing is started or overwritten.
"""

import datetime
import decimal
import json

import pytest
import yaml

transformers = pytest.importorskip("transformers")

from family_cases import single_rows, train, write_config, write_model, write_rows  # noqa: E402

from pyoffline import cli  # noqa: E402
from pyoffline.config import ConfigError, load_config  # noqa: E402

PLAIN = [{"prompt": "a b", "completion": "c d"}, {"prompt": "b", "completion": "a"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


# changed keys of the configuration -> the messages
WRONG = {
    "advantage_of_no_kind": ({"advantage": 3}, ["advantage: expected dict or list"]),
    "advantage_without_stages": ({"advantage": []}, ["advantage: expected {name: ...} or a list"]),
    "scale_null": (
        {"terms": [{"name": "entropy", "scale": None}]},
        ["terms[0].scale: expected a number, got None"],
    ),
    "output_dir_null": ({"trainer.output_dir": None}, ["trainer.output_dir: missing"]),
    "output_dir_empty": ({"trainer.output_dir": ""}, ["trainer.output_dir: missing"]),
    "numbers": (
        {"trainer.per_device_train_batch_size": 0, "trainer.learning_rate": -1.0},
        ["per_device_train_batch_size: expected at least 1, got 0", "learning_rate: expected at"],
    ),
    "no_epochs": (
        {"trainer.max_steps": -1, "trainer.num_train_epochs": 0},
        ["num_train_epochs: expected more than 0"],
    ),
    "backend": ({"trainer.backend": "cudda"}, ["backend: 'cudda' is not one of auto, reference"]),
    "horizon_missing": ({"trainer.aggregation": "dr_grpo"}, ["horizon: aggregation dr_grpo"]),
    "horizon_unread": ({"trainer.horizon": 9}, ["horizon: aggregation auto divides by none"]),
    "eval_unread": ({"data.eval": "x.jsonl"}, ["data.eval: never evaluated"]),
    "eval_without_data": ({"trainer.eval_strategy": "epoch"}, ["name a file: data.eval"]),
    "group_by_length": (
        {"trainer.train_sampling_strategy": "group_by_length"},
        ["group_by_length reads datasets of dictionaries only"],
    ),
    "stock_aggregation": (
        {"loss": "stock", "trainer.aggregation": "grpo"},
        ["trainer.aggregation: loss stock has its own mean"],
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_t1_a_configuration_that_no_run_survives_stops_before_it(tmp_path, model, case):
    changes, messages = WRONG[case]
    path = write_config(tmp_path, model, PLAIN)
    raw = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (raw[section] if section else raw)[last] = value
    path.write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(message in str(caught.value) for message in messages), str(caught.value)
    assert not (tmp_path / "out").exists()


def test_t1_a_key_given_twice_is_an_error(tmp_path):
    (tmp_path / "c.yaml").write_text("model: m\ndata: {train: a.jsonl}\ndata: {train: b.jsonl}\n")
    with pytest.raises(ConfigError, match="the key 'data' is given twice"):
        load_config(tmp_path / "c.yaml")
    anchors = "x: &x {a: 1}\ny: {<<: *x, b: 2}\nz: {<<: *x, a: 3}\n"
    (tmp_path / "d.yaml").write_text(anchors)
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "d.yaml")
    assert "the key" not in str(caught.value)


def test_a_backend_that_is_not_there_stops_before_step_0(tmp_path, model, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    path = write_config(tmp_path, model, PLAIN)
    assert cli.main(["train", str(path), "trainer.backend=cuda"]) == 2
    assert "backend: use_backend('cuda')" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [("no.jsonl", "no such file"), ("", "a folder"), ("x.parquet", "Parquet"), ("x.csv", ".csv")],
)
def test_t1_a_data_file_that_cannot_be_read_exits_2(tmp_path, model, capsys, name, message):
    (tmp_path / "x.parquet").write_text("none")
    (tmp_path / "x.csv").write_text("none")
    path = write_config(tmp_path, model, PLAIN)
    assert cli.main(["train", str(path), f"data.train={tmp_path / name}"]) == 2
    assert message in capsys.readouterr().err
    output = tmp_path / "new.jsonl"
    argv = ["score", str(tmp_path / name), "--model", str(model), "--output", str(output)]
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_t1_prompt_mean_without_groups_is_an_error(tmp_path, model, capsys):
    path = write_config(tmp_path, model, PLAIN)
    assert cli.main(["train", str(path), "trainer.aggregation=prompt-mean"]) == 2
    assert "s.jsonl:1: group: missing" in capsys.readouterr().err


def test_t1_a_token_without_an_embedding_is_named_by_line(tmp_path, model, capsys):
    other = write_model(tmp_path / "small", words="abcd", vocab=5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["new"])
    tokenizer.save_pretrained(other)
    path = write_config(tmp_path, other, [*PLAIN, {"prompt": "a", "completion": "new"}])
    assert cli.main(["train", str(path)]) == 2
    assert "s.jsonl:3: tokens: token 6 is outside the model's 5 embeddings" in (
        capsys.readouterr().err
    )
    output = tmp_path / "o.jsonl"
    argv = ["score", str(tmp_path / "s.jsonl"), "--model", str(other), "--output", str(output)]
    assert cli.main(argv) == 2
    assert "s.jsonl:3: tokens: token 6" in capsys.readouterr().err and not output.exists()


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "Llama"])
def test_t1_more_tokens_than_learned_positions_are_named_by_line(tmp_path, model, capsys, kind):
    """An index beyond the table would end the run in the middle; a rotary model has no table."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 41}
    sizes |= {"max_position_embeddings": 8, "intermediate_size": 16, "ffn_dim": 16}
    sizes |= {"word_embed_proj_dim": 16, "eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    getattr(transformers, f"{kind}{'LMHeadModel' if kind == 'GPT2' else 'ForCausalLM'}")(
        config
    ).save_pretrained(tmp_path / "m")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "m")
    long = {"prompt": "a b c", "completion": "a b c d e"}  # and the end of the text: 9 tokens
    path = write_config(tmp_path, tmp_path / "m", [*PLAIN, long])
    output = tmp_path / "o.jsonl"
    score = ["score", str(tmp_path / "s.jsonl"), "--model", str(tmp_path / "m")]
    for argv in (["train", str(path)], [*score, "--output", str(output)]):
        code = cli.main(argv)
        error = capsys.readouterr().err
        if kind == "Llama":
            assert code == 0
            continue
        assert code == 2 and "s.jsonl:3: tokens: 9 tokens, the model has 8 positions" in error
        assert "data.max_length" in error or "--max-length" in error
    short = [str(path), "data.max_length=8", "data.too_long=truncate"]
    assert kind == "Llama" or cli.main(["train", *short]) == 0


def test_a_finished_run_is_not_overwritten_by_another(tmp_path, model, capsys):
    path = write_config(tmp_path, model, PLAIN)
    assert train(path)[0] == 0
    weights = (tmp_path / "out" / "final" / "model.safetensors").read_bytes()
    lines = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert cli.main(["train", str(path), "trainer.learning_rate=0.1"]) == 2
    assert "has the model of an earlier run" in capsys.readouterr().err
    assert (tmp_path / "out" / "final" / "model.safetensors").read_bytes() == weights
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == lines


def test_a_missing_package_is_a_message_and_no_traceback(tmp_path, model, capsys):
    pytest.importorskip("torch")
    if transformers.utils.is_bitsandbytes_available():
        pytest.skip("bitsandbytes is there")
    path = write_config(tmp_path, model, PLAIN)
    assert cli.main(["train", str(path), "trainer.optim=adamw_bnb_8bit"]) == 1
    error = capsys.readouterr().err
    assert "bitsandbytes" in error and "Traceback" not in error


def test_no_warning_about_pinned_memory_in_the_progress_bar(tmp_path, model, recwarn):
    path = write_config(tmp_path, model, PLAIN)
    assert train(path, "trainer.use_cpu=false")[0] == 0
    assert not [w for w in recwarn if "pin_memory" in str(w.message)]


@pytest.mark.parametrize("argv", [["0", "4", "4"], ["4", "-1", "4"]])
def test_explain_refuses_sizes_with_exit_2(argv, capsys):
    assert cli.main(["explain", *argv]) == 2
    assert "expected at least 1" in capsys.readouterr().err


def score(tmp_path, model, samples, *options, output="o.jsonl"):
    argv = ["score", str(samples), "--model", str(model), "--output", str(tmp_path / output)]
    return cli.main([*argv, *options])


def test_score_finds_an_unwritable_output_before_the_model_runs(tmp_path, model, capsys):
    samples = write_rows(tmp_path / "s.jsonl", PLAIN)
    assert score(tmp_path, model, samples, output="s.jsonl/o.jsonl") == 2
    error = capsys.readouterr().err
    assert "--output" in error and "cannot be written" in error and "row/s" not in error


def test_score_says_why_rows_are_left_out_and_checks_its_limits(tmp_path, model, capsys):
    samples = write_rows(tmp_path / "s.jsonl", [*PLAIN, {"prompt": "a", "completion": ""}])
    assert score(tmp_path, model, samples, "--max-length", "1") == 2
    assert "--max-length: expected at least 2, got 1" in capsys.readouterr().err
    assert score(tmp_path, model, samples, "--skip-bad", "--max-length", "4") == 0
    error = capsys.readouterr().err
    assert "left out 2 rows" in error and "completion: empty" in error
    assert "5 tokens, the limit is 4; raise it (data.max_length, score --max-length)" in error


def test_score_passes_parquet_kinds_on_and_leaves_nothing_behind(tmp_path, model, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    row = PLAIN[0] | {"at": datetime.date(2026, 1, 2), "cost": decimal.Decimal("1.5"), "raw": b"\1"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "s.parquet")
    assert score(tmp_path, model, tmp_path / "s.parquet") == 0
    scored = json.loads((tmp_path / "o.jsonl").read_text())
    assert (scored["at"], scored["cost"], scored["raw"]) == ("2026-01-02", "1.5", "AQ==")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("pyoffline.score._scored_row", interrupted)
    assert score(tmp_path, model, tmp_path / "s.parquet", output="p.jsonl") == 130
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.jsonl", "s.parquet"]


def test_dropped_rows_may_have_a_prompt_that_is_too_long(tmp_path, model, capsys):
    rows = [*PLAIN, {"prompt": "a b c d e f", "completion": "a"}]
    path = write_config(tmp_path, model, rows, batch=2)
    options = ["data.max_length=5", "data.too_long=drop"]
    assert train(path, *options)[0] == 0
    assert "left out 1 row\n" in capsys.readouterr().err
    assert cli.main(["train", str(path), *options, "data.max_length=2", "--check"]) == 2
    assert "no usable row: 3 of 3 have more than data.max_length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"advantages": 10**400}, "advantages: beyond 3.4e+38"),
        ({"advantages": 1e39}, "advantages: beyond 3.4e+38"),
        ({"completion": None}, "missing; a row needs completion, completion_ids, messages or text"),
        ({"prompt": None}, "prompt: missing"),
    ],
)
def test_t1_odd_values_of_a_row(tmp_path, model, capsys, row, message):
    path = write_config(tmp_path, model, [PLAIN[0] | row])
    assert cli.main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"s.jsonl:1: {message}" in error or message in error
    assert "did you mean" not in error and "1 problem in 1 row," in error


def test_t1_an_integer_of_5000_digits_is_a_bad_row(tmp_path, model, capsys):
    path = write_config(tmp_path, model, PLAIN)
    (tmp_path / "s.jsonl").write_text(
        '{"prompt": "a", "completion": "b", "x": 1' + "0" * 5000 + "}"
    )
    assert cli.main(["train", str(path)]) == 2
    assert "s.jsonl:1: row: not JSON that can be read" in capsys.readouterr().err


def test_a_reward_run_names_its_problems_too(tmp_path, model, capsys):
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}]
    path = write_config(tmp_path, model, rows, objective="bradley_terry")
    assert cli.main(["train", str(path), "trainer.report_to=tensorbord"]) == 2
    assert "tensorbord is not supported" in capsys.readouterr().err


def test_groups_of_prompt_mean_reach_the_loss(tmp_path, model):
    path = write_config(tmp_path, model, single_rows())
    assert train(path, "trainer.aggregation=prompt-mean")[0] == 0


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
STRICT = "{% if messages|length > 1 %}{{ raise_exception('roles must alternate') }}{% endif %}a"


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "no chat template"), (STRICT, "chat template refuses it: roles must alternate")],
)
@pytest.mark.parametrize("paired", [False, True])
def test_t1_a_conversation_that_cannot_be_rendered(
    tmp_path, model, capsys, template, message, paired
):
    other = write_model(tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(other)
    turns = [*CHAT, *CHAT] if template else CHAT
    row, changes = {"messages": turns}, {}
    if paired:
        reply = [{"role": "assistant", "content": "c"}]
        row = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": reply}
        changes = {"objective": "sim_po"}
    path = write_config(tmp_path, other, [row], **changes)
    assert cli.main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"s.jsonl:1: {'chosen' if paired else 'messages'}: the tokenizer" in error
    assert message in error


def test_an_unknown_metric_of_the_best_model_loses_no_step(tmp_path, model, capsys):
    path = write_config(tmp_path, model, PLAIN)
    options = [f"data.eval={tmp_path / 's.jsonl'}", "trainer.eval_strategy=steps"]
    options += ["trainer.eval_steps=1", "trainer.save_strategy=steps", "trainer.save_steps=1"]
    options += ["trainer.load_best_model_at_end=true"]
    wrong = "trainer.metric_for_best_model=accuracy"
    assert cli.main(["train", str(path), *options, wrong]) == 1
    error = capsys.readouterr().err
    assert "metric_for_best_model: 'accuracy' is not measured; there are eval_entropy" in error
    assert (tmp_path / "out" / "checkpoint-1" / "complete.json").is_file()
    assert cli.main(["train", str(path), *options, "--resume"]) == 0

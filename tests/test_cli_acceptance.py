"""What a new user met at the command line: the RPO of docs/training.md, `no` in YAML, odd keys and
characters, and what stands on the screen after an error (PROMISES T1, T2).
"""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    by_hand,
    load,
    losses,
    pair_rows,
    train,
    write_config,
    write_model,
)

import pyoffline as po  # noqa: E402
from pyoffline import cli, run_folder, training  # noqa: E402

PLAIN = [{"prompt": "a b", "completion": "c d"}, {"prompt": "b", "completion": "a"}]
RPO = {"objective": "dpo", "terms": [{"name": "nll", "weighted_by": "positive", "scale": 0.5}]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


def sided(chosen, rejected):
    return {"chosen_positive": chosen, "rejected_positive": rejected}


# columns of each row -> the gate on the chosen and on the rejected side
GATES = {
    "made": ({}, (1, 0)),
    "one_column": ({"positive": 0.25}, (0.25, 0)),
    "two_columns": (sided(0.5, 2.0), (0.5, 2)),
}


@pytest.mark.parametrize("case", GATES)
def test_the_nll_of_rpo_is_on_the_chosen_side(tmp_path, model, case):
    """It was on both, so that the rejected answers were trained too."""
    columns, (chosen, rejected) = GATES[case]
    rows = [row | columns for row in pair_rows()]
    code, events = train(write_config(tmp_path, model, rows, **RPO))
    lm = load(model)
    hidden, tokens = by_hand(lm, rows, {"ref"})
    mine = tokens.labels != -100
    gate = torch.zeros(mine.shape, dtype=torch.float64)
    gate[: len(rows)], gate[len(rows) :] = chosen, rejected
    with torch.no_grad():
        logps = po.linear_token_logps(hidden, po.Head.of(lm), tokens.labels).logps.double()
        dpo = po.linear_policy_loss(hidden, po.Head.of(lm), tokens, po.DPO()).loss
    expected = dpo - 0.5 * (gate * logps)[mine].mean()
    assert code == 0 and losses(events)[0] == pytest.approx(float(expected), rel=1e-6)


def test_t1_a_bad_gate_of_one_side_is_named(tmp_path, model, capsys):
    rows = pair_rows()
    rows[1] |= sided(float("nan"), 1.0)
    rows[2] |= sided(1.0, [1.0])
    assert train(write_config(tmp_path, model, rows, **RPO))[0] == 2
    said = capsys.readouterr().err
    assert ":2: chosen_positive: nan is not a finite number" in said
    rows[1] |= sided(1.0, 1.0)
    assert train(write_config(tmp_path, model, rows, **RPO))[0] == 2
    assert ":3: rejected_positive: 1 values for 3 completion tokens" in capsys.readouterr().err


def test_a_bare_no_turns_a_strategy_off(tmp_path, model, capsys):
    """YAML 1.1 reads it as false, which transformers refuses with a list that has 'no' in it."""
    path = write_config(tmp_path, model, PLAIN)
    off = [f"trainer.{name}_strategy=no" for name in ("eval", "save", "logging")]
    assert train(path, *off)[0] == 0, capsys.readouterr().err
    assert not list((tmp_path / "out").glob("checkpoint-*"))


WRONG = {
    "a_list_as_key": ("? [a, b]\n: c\n", "{path}:1:3: cannot be read as YAML: a key is a list"),
    "twice": ("model: m\nmodel: n\n", "{path}:2:1: cannot be read as YAML: the key 'model' is"),
    "not_closed": ("data: {train: [\n", "{path}:2:1: cannot be read as YAML: while parsing"),
    "no_steps": ("trainer.max_steps=0", "max_steps: expected at least 1, or -1"),
    "fewer": ("trainer.max_steps=-3", "max_steps: expected at least 1, or -1"),
    "objective": ("objective=zzz", "objective.name: no objective 'zzz'; known: nll, "),
    "report": ("trainer.report_to=wandb", "report_to: wandb is not installed"),
}


@pytest.mark.parametrize("case", WRONG)
def test_t1_a_wrong_configuration_has_a_place_and_exit_2(
    tmp_path, model, capsys, case, monkeypatch
):
    monkeypatch.setattr("transformers.integrations.is_wandb_available", lambda: False)
    given, message = WRONG[case]
    path, overrides = write_config(tmp_path, model, PLAIN), []
    if "\n" in given:
        path.write_text(given)
    else:
        overrides = [given]
    assert train(path, *overrides)[0] == 2
    said = capsys.readouterr().err
    assert message.format(path=path) in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


LINES = {
    "half_a_character": (r'{"prompt": "a", "completion": "b \ud800"}', "completion: \\ud800 at ch"),
    "in_a_message": (
        r'{"messages": [{"role": "user", "content": "\udc00"}, '
        r'{"role": "assistant", "content": "a"}]}',
        "messages[0].content: \\udc00 at character 1 is half of a surrogate pair",
    ),
    "twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' is given tw"),
    "eos_of_ids": (
        '{"prompt": "a", "completion_ids": [1, 0], "old_logps": [-1.0]}',
        "old_logps: 1 values for 2 completion tokens\n",
    ),
    "no_room": (
        json.dumps({"prompt": "a " * 9, "completion": "b"}),
        "prompt: 9 tokens fill max_length 8; raise it, or let data.too_long drop such rows",
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_t1_a_bad_line_is_a_message(tmp_path, model, capsys, case):
    line, message = LINES[case]
    path = write_config(tmp_path, model, PLAIN)
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write(line + "\n")
    short = ("data.max_length=8", "data.too_long=truncate")
    assert train(path, *short)[0] == 2
    said = capsys.readouterr().err + "\n"
    assert f"s.jsonl:3: {'row: ' if case == 'twice' else ''}{message}" in said
    assert "Traceback" not in said
    assert train(path, *short, "data.skip_bad=true")[0] == 0


def test_a_byte_order_mark_before_the_first_row_is_none_of_it(tmp_path, model, capsys):
    path = write_config(tmp_path, model, PLAIN)
    file = tmp_path / "s.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert train(path)[0] == 0, capsys.readouterr().err


def test_skip_bad_is_not_advised_to_who_gave_it(tmp_path, model, capsys):
    path = write_config(tmp_path, model, [{"prompt": "a", "completion": ""}])
    assert train(path)[0] == 2 and "pass --skip-bad" in capsys.readouterr().err
    assert train(path, "--skip-bad")[0] == 2
    said = capsys.readouterr().err
    assert "no usable row" in said and "--skip-bad" not in said


def test_train_alone_asks_for_the_configuration_only(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("are required: CONFIG.yaml\n")


def test_t2_after_a_failed_write_the_message_has_its_own_line(tmp_path, model, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "complete", full)
    path = write_config(tmp_path, model, PLAIN)
    assert train(path, "trainer.save_strategy=steps", "trainer.save_steps=1")[0] == 1
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert last.startswith("pyoffline: ") and "No space left on device" in last
    assert not (tmp_path / "out" / run_folder.PARTIAL).exists()


@pytest.mark.parametrize(("rank", "n"), [("0", 1), ("1", 0)])
def test_under_torchrun_one_rank_says_where_things_are(
    tmp_path, model, capsys, monkeypatch, rank, n
):
    result = training.RunResult(tmp_path, tmp_path / "final", tmp_path / "metrics.jsonl", 2)
    monkeypatch.setattr(training, "run_training", lambda *args, **options: result)
    monkeypatch.setenv("RANK", rank)
    assert cli.main(["train", str(write_config(tmp_path, model, PLAIN))]) == 0
    assert capsys.readouterr().out.count("2 steps") == n


def test_the_folder_of_an_adapter_is_refused_before_step_0(tmp_path, model, capsys):
    """It ended in autograd's "element 0 of tensors does not require grad" and exit code 1."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base = transformers.AutoModelForCausalLM.from_pretrained(model)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(tmp_path / "adapter")
    path = write_config(tmp_path, tmp_path / "adapter", PLAIN)
    assert train(path)[0] == 2
    assert "no parameter of it trains" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()

"""The command line as a user meets it: help, errors all at once, exit codes, a run from a file."""

import json
import os
import signal

import pytest
import yaml

pytest.importorskip("transformers")

from pyoffline import cli  # noqa: E402
from pyoffline.config import ConfigError, build_objective, load_config  # noqa: E402
from pyoffline.trainer_config import OfflineConfig  # noqa: E402

GOOD = {
    "model": "some/model",
    "data": {"train": "s.jsonl"},
    "objective": {"name": "ppo_clip", "clip_high": 0.28},
    "terms": [{"name": "kl", "kind": "k3", "scale": 0.04}, {"name": "entropy", "scale": -0.001}],
    "advantage": {"name": "group_normalize"},
    "trainer": {"output_dir": "out", "learning_rate": "1e-5", "use_cpu": True},
}


def write(path, config):
    path.write_text(yaml.safe_dump(config) if isinstance(config, dict) else config)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Llama and a byte-level tokenizer, as a folder."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        ["2+2=4"], vocab_size=300, special_tokens=["<eos>"], show_progress=False
    )
    names = {"eos_token": "<eos>", "pad_token": "<eos>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **names)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def samples(path, n=8):
    rows = [
        {
            "prompt": f"{i}+{i}=",
            "completion_ids": [5 + i, 0],
            "reward": float(i % 2),
            "group": i // 4,
            "old_logps": [-5.5, -5.6],
        }
        for i in range(n)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def run_config(folder, model, **changes):
    config = GOOD | {
        "model": str(model),
        "terms": [{"name": "entropy", "scale": -0.001}],
        "data": {"train": str(samples(folder / "s.jsonl")), "max_length": 64},
        "trainer": {
            "output_dir": str(folder / "out"),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "use_cpu": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "logging_steps": 1,
            "report_to": "tensorboard",
        },
    }
    return write(folder / "run.yaml", config | changes)


def test_a_good_configuration_becomes_the_composed_objective(tmp_path):
    config = load_config(
        write(tmp_path / "c.yaml", GOOD), ["objective.clip_low=0.1", "data.max_length=99"]
    )
    assert config.trainer["learning_rate"] == 1e-5
    assert config.data.max_length == 99
    assert config.model.path == "some/model" and not config.model.trust_remote_code
    terms = build_objective(config).terms()
    assert [(t.row, t.scale) for t in terms] == [
        ("ppo_clip", 1.0),
        ("kl_k3", 0.04),
        ("entropy_term", -0.001),
    ]
    assert terms[0].params[:2] == (0.1, 0.28)


def test_all_errors_come_at_once_with_the_nearest_names(tmp_path):
    config = {
        "modle": "x",
        "data": {"trian": "s.jsonl", "max_length": "long", "too_long": "cut"},
        "objective": {"name": "ppo_clp"},
        "terms": [{"name": "kl", "kid": "k3"}, {"name": "kl", "kind": "k9"}, "entropy"],
        "advantage": {"name": "group_normalise"},
        "loss": "fuzed",
        "trainer": {"learning_rte": 1e-5, "max_steps": 1.5, "bf16": "maybe"},
    }
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path / "c.yaml", config), ["novalue", "trainer.seed=[1"])
    text = str(caught.value)
    expected = (
        "modle: unknown key; did you mean 'model'?",
        "model: missing",
        "data.trian: unknown key; did you mean 'train'?",
        "data.train: missing",
        "data.max_length: expected int, got str 'long'",
        "data.too_long: 'cut' is not one of",
        "objective.name: no objective 'ppo_clp'; did you mean 'ppo_clip'?",
        "terms[0].kid: kl has no such parameter; did you mean 'kind'?",
        "terms[1]: ",
        "terms[2]: expected {name",
        "advantage.name: no advantage 'group_normalise'; did you mean 'group_normalize'?",
        "loss: 'fuzed' is not one of fused, stock; did you mean 'fused'?",
        "trainer.learning_rte: unknown key; did you mean 'learning_rate'?",
        "trainer.output_dir: missing",
        "trainer.max_steps: expected int, got float 1.5",
        "trainer.bf16: expected bool, got str 'maybe'",
        "'novalue': expected key=value",
        "'trainer.seed=[1': the value is not YAML",
    )
    for line in expected:
        assert line in text, line
    assert len(caught.value.errors) == len(expected)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "got an empty file"),
        ("- a\n", "got list"),
        ("a: [1", "cannot be read as YAML"),
        ("a: !!python/object/apply:os.system [true]", "cannot be read as YAML"),
    ],
    ids=["empty", "list", "broken", "code"],
)
def test_a_file_that_is_no_configuration(tmp_path, text, match, capsys):
    path = write(tmp_path / "c.yaml", text)
    assert cli.main(["train", str(path)]) == 2
    assert match in capsys.readouterr().err


def test_missing_file_exits_2(tmp_path, capsys):
    assert cli.main(["train", str(tmp_path / "absent.yaml")]) == 2
    assert "no such file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["train", "score", "demo", "doctor", "explain"])
def test_help_of_each_command(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([command, "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: pyoffline" in text and (command == "doctor" or "examples:" in text)
    assert max(map(len, text.splitlines())) <= 100


def test_a_run_from_file_to_checkpoint(tmp_path, model, capsys):
    path = run_config(tmp_path, model)
    assert cli.main(["train", str(path)]) == 0
    out = tmp_path / "out"
    assert (out / "final" / "model.safetensors").is_file() and (
        out / "final" / "tokenizer.json"
    ).is_file()
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [r for r in rows if r["event"] == "train"]
    assert [r["step"] for r in losses] == [1, 2, 3] and "ratio/mean" in losses[0]
    assert list(out.rglob("events.out.tfevents*"))
    suffixes = {
        p.suffix
        for p in out.rglob("*")
        if p.is_file() and "tfevents" not in p.name and p.name != ".lock"
    }
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja"}, suffixes
    assert "final" in capsys.readouterr().out
    assert cli.main(["train", str(path), "--resume", "trainer.max_steps=4"]) == 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["event"] == "train_begin"] == [0, 3]


def test_stock_and_fused_runs_have_the_same_losses(tmp_path, model):
    curves = []
    for loss in ("stock", "fused"):
        folder = tmp_path / loss
        folder.mkdir()
        path = run_config(folder, model, loss=loss, objective="nll", terms=[], advantage=None)
        assert cli.main(["train", str(path)]) == 0
        rows = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
        curves.append([r["loss"] for r in rows if r["event"] == "train"])
        assert not list(folder.rglob("*.bin")) and not list(folder.rglob("*.pt"))
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_check_trains_nothing(tmp_path, model, capsys):
    path = run_config(tmp_path, model)
    assert cli.main(["train", str(path), "--check"]) == 0
    assert "nothing was trained" in capsys.readouterr().out
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_bad_data_exits_2_before_step_0_and_skip_bad_goes_on(tmp_path, model, capsys):
    path = run_config(tmp_path, model)
    with (tmp_path / "s.jsonl").open("a") as file:
        file.write(
            '{"prompt": "1=", "completion": "2", "reward": NaN, "group": 9, "old_logps": [0]}\n'
        )
    assert cli.main(["train", str(path)]) == 2
    assert "s.jsonl:9: reward: nan is not a finite number" in capsys.readouterr().err
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
    assert cli.main(["train", str(path), "--skip-bad"]) == 0
    assert "left out 1 row\n" in capsys.readouterr().err


def test_a_non_finite_gradient_exits_3(tmp_path, model, capsys):
    path = run_config(tmp_path, model)
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    for row in rows:
        row["old_logps"] = [-1e30, -1e30]  # finite, and the ratio is infinite
        row["reward"] = -row["reward"]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert cli.main(["train", str(path)]) == 3
    assert "before the optimiser step" in capsys.readouterr().err


def test_a_model_that_is_not_there_exits_2(tmp_path, model, capsys):
    path = run_config(tmp_path, tmp_path / "nowhere")
    assert cli.main(["train", str(path)]) == 2
    assert "no tokenizer could be loaded" in capsys.readouterr().err


def test_doctor_finds_the_known_answer(capsys):
    assert cli.main(["doctor"]) == 0
    assert "known answer ok" in capsys.readouterr().out


def test_an_unknown_option_exits_2(tmp_path):
    for argv in (["train", "c.yaml", "--bogus"], ["doctor", "a=b"], ["nothing"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(argv)
        assert caught.value.code == 2


@pytest.mark.parametrize("kind", ["prompt", "text", "messages"])
def test_score_then_train_starts_at_ratio_1(tmp_path, model, capsys, kind):
    texts = ("2+2=4", "3+30=33 and more", "1")
    made = {
        "prompt": lambda t: {"prompt": "say ", "completion": t},
        "text": lambda t: {"text": "so " + t},
        "messages": lambda t: {"messages": [user, {"role": "assistant", "content": t}]},
    }[kind]
    user = {"role": "user", "content": "say"}
    rows = [made(t) | {"reward": float(i), "group": 0} for i, t in enumerate(texts)]
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, rows)))
    scored = tmp_path / "s2.jsonl"
    argv = ["score", str(tmp_path / "raw.jsonl"), "--model", str(model), "--output", str(scored)]
    assert cli.main([*argv, "--batch", "2"]) == 0
    assert "3 rows with old_logps" in capsys.readouterr().out
    path = run_config(tmp_path, model)
    assert cli.main(["train", str(path), f"data.train={scored}", "trainer.max_steps=1"]) == 0
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    first = next(r for r in map(json.loads, lines) if r["event"] == "train")
    for name in ("ratio/min", "ratio/mean", "ratio/max"):
        assert first[name] == pytest.approx(1.0, abs=1e-5)
    assert cli.main(argv) == 2  # the output is there: nothing is overwritten
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_leaves_a_checkpoint(tmp_path, model, monkeypatch, number):
    from pyoffline import callbacks

    class Interrupting(callbacks.StopCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(callbacks, "StopCallback", Interrupting)
    path = run_config(tmp_path, model)
    before = signal.getsignal(number)
    assert cli.main(["train", str(path), "trainer.save_steps=100"]) == 128 + number
    assert signal.getsignal(number) is before
    folder = tmp_path / "out" / "checkpoint-2"
    assert (folder / "optimizer.safetensors").is_file()
    monkeypatch.undo()
    assert cli.main(["train", str(path), "--resume"]) == 0
    assert (tmp_path / "out" / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"aggregation": "token-maen"}, "aggregation"),
        ({"label_smoothing_factor": 0.1}, "NLL"),
        ({"torch_compile": True}, "torch_compile"),
        ({"memory_budget_mib": 0}, "memory_budget_mib"),
    ],
)
def test_options_that_would_do_nothing_raise(tmp_path, options, match):
    with pytest.raises(ValueError, match=match):
        OfflineConfig(output_dir=str(tmp_path), **options)

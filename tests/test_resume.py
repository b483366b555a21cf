"""What a run goes on from (PROMISES T2): a finished run stays as it is, a checkpoint of another
model, optimizer, objective or data is refused by name, and no step is missing from the metrics.
"""

import json
import os
import signal

import pytest

pytest.importorskip("transformers")

from family_cases import single_rows, train, write_config, write_model  # noqa: E402

from pyoffline import cli  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


def configured(folder, model, **changes):
    path = write_config(folder, model, single_rows(), batch=2, **changes)
    return path, ["trainer.save_strategy=steps", "trainer.save_steps=1"]


@pytest.mark.parametrize(
    "length",
    [["trainer.max_steps=2"], ["trainer.max_steps=-1", "trainer.num_train_epochs=0.5"]],
    ids=["steps", "epochs"],
)
@pytest.mark.parametrize("loss", ["fused", "stock"])
def test_t2_resuming_a_finished_run_trains_no_further(tmp_path, model, capsys, length, loss):
    path, options = configured(tmp_path, model, loss=loss)
    assert cli.main(["train", str(path), *options, *length]) == 0
    said = capsys.readouterr().out
    weights = (tmp_path / "out" / "final" / "model.safetensors").read_bytes()
    folders = sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*"))
    assert cli.main(["train", str(path), *options, *length, "--resume"]) == 0
    assert capsys.readouterr().out == said
    assert (tmp_path / "out" / "final" / "model.safetensors").read_bytes() == weights
    assert sorted(p.name for p in (tmp_path / "out").glob("checkpoint-*")) == folders


def test_t2_a_checkpoint_of_a_wider_model_is_refused(tmp_path, model, capsys):
    path, options = configured(tmp_path, model)
    assert train(path, *options)[0] == 0
    other = write_model(tmp_path / "wide", width=32)
    options += [f"model.path={other}", "trainer.max_steps=4", "--resume"]
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert cli.main(["train", str(path), *options]) == 2
    error = capsys.readouterr().err
    assert "checkpoint-2: a checkpoint of another model (size mismatch" in error
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before


def test_t2_a_checkpoint_without_some_parameters_is_refused(tmp_path, model, capsys):
    """transformers warns, and trains what it did not find from where the model was."""
    import transformers

    path, options = configured(tmp_path, model)
    assert train(path, *options)[0] == 0
    config = transformers.AutoConfig.from_pretrained(model)
    config.num_hidden_layers = 2
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deep")
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(tmp_path / "deep")
    options += [f"model.path={tmp_path / 'deep'}", "trainer.max_steps=4", "--resume"]
    assert cli.main(["train", str(path), *options]) == 2
    assert "another model (it has no model.layers.1." in capsys.readouterr().err


def test_t2_the_state_of_another_optimizer_is_refused(tmp_path, model, capsys):
    path, options = configured(tmp_path, model)
    assert train(path, *options)[0] == 0
    options += ["trainer.optim=sgd", "trainer.max_steps=4", "--resume"]
    assert cli.main(["train", str(path), *options]) == 2
    assert "is the state of AdamW, this run has SGD" in capsys.readouterr().err


def test_t2_the_steps_before_a_stop_are_in_the_metrics(tmp_path, model, monkeypatch):
    """Logged every 3 steps, stopped after 2: each step is in exactly one mean."""
    from pyoffline import callbacks

    class Interrupting(callbacks.StopCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    path, options = configured(tmp_path, model)
    options += ["trainer.max_steps=3", "trainer.logging_steps=3"]
    _, whole = train(path, *options, "trainer.logging_steps=1")
    losses = [row["loss"] for row in whole if row["event"] == "train"]
    options.append(f"trainer.output_dir={tmp_path / 'two'}")
    monkeypatch.setattr(callbacks, "StopCallback", Interrupting)
    assert cli.main(["train", str(path), *options]) == 128 + signal.SIGTERM
    monkeypatch.undo()
    assert cli.main(["train", str(path), *options, "--resume"]) == 0
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["event"] == "train"]
    assert [row["step"] for row in rows] == [2, 3]
    assert rows[0]["loss"] == pytest.approx(sum(losses[:2]) / 2, rel=1e-6)
    assert rows[1]["loss"] == pytest.approx(losses[2], rel=1e-6)


OTHERS = {
    "objective": ["objective.clip_high=0.3"],
    "advantage": ["advantage=opo"],
    "loss": ["objective={name: nll}", "loss=stock"],
    "data.max_length": ["data.max_length=100"],
    "trainer.seed": ["trainer.seed=5"],
    "trainer.aggregation": ["trainer.aggregation=seq-mean-token-sum"],
}


@pytest.fixture
def stopped(tmp_path, model):
    """A run of PPO with two of four steps done; what resumes it."""
    path, options = configured(tmp_path, model, objective={"name": "ppo_clip", "clip_high": 0.2})
    assert train(path, *options)[0] == 0
    return ["train", str(path), *options, "trainer.max_steps=4", "--resume"]


@pytest.mark.parametrize("key", OTHERS)
def test_t2_another_objective_or_order_is_refused_by_name(tmp_path, stopped, capsys, key):
    before = (tmp_path / "out" / "metrics.jsonl").read_text()
    assert cli.main([*stopped, *OTHERS[key]]) == 2
    error = capsys.readouterr().err
    assert f"\n  {key}: " in error and " before, " in error and "this is another" in error
    assert (tmp_path / "out" / "metrics.jsonl").read_text() == before
    (tmp_path / "out" / "run.json").unlink()  # where it is meant
    assert cli.main([*stopped, *OTHERS[key]]) == 0
    assert "are not compared with those before" in capsys.readouterr().err


def test_t2_another_data_file_is_refused_and_a_moved_one_is_not(tmp_path, stopped, capsys):
    (file,) = tmp_path.glob("*.jsonl")
    moved = file.rename(tmp_path / "moved.jsonl")
    lines = moved.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[::-1]))
    assert cli.main(stopped) == 2
    assert "\n  data.train: SHA-256 " in capsys.readouterr().err
    same = ["objective={clip_high: 0.2, name: ppo_clip, clip_low: 0.2}"]  # the default spelled out
    assert cli.main([*stopped, *same, f"data.train={moved}"]) == 0

"""Distillation and reference models from a configuration file: the loss of the first step against
one call of the library in fp64, evaluation, bitwise resumption, scoring, and clear errors.
"""

import json

import pytest
import torch

pytest.importorskip("transformers")

from family_cases import (  # noqa: E402
    VOCAB,
    WORDS,
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
from pyoffline import cli  # noqa: E402
from pyoffline.config import ConfigError, load_config  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_heap")
DIVERGENCES = {
    "forward_kl": (po.ForwardKL(), {}),
    "reverse_kl": (po.ReverseKL(), {}),
    "jsd": (po.JSD(0.3), {"beta": 0.3}),
    "tvd": (po.TVD(), {}),
    "renyi_divergence": (po.RenyiDivergence(0.5), {"alpha": 0.5}),
    "alpha_divergence": (po.AlphaDivergence(0.5), {"alpha": "0.5"}),
}
JSD = {"name": "distill", "divergence": "jsd", "beta": 0.3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(student, a wider teacher), one vocabulary."""
    student, teacher = (tmp_path_factory.mktemp(n) for n in ("student", "teacher"))
    return write_model(student), write_model(teacher, width=24, seed=1)


def plain(rows):
    """Rows without the columns that a model would compute."""
    computed = ("teacher_topk_ids", "teacher_topk_logps", "ref_logps")
    computed += ("ref_chosen_logps", "ref_rejected_logps")
    return [{k: v for k, v in row.items() if k not in computed} for row in rows]


def student_call(models, rows, reads=()):
    model = load(models[0])
    hidden, tokens = by_hand(model, rows, reads)
    return hidden, po.Head(model.lm_head.weight.detach()), tokens


def teacher_head(models, rows):
    model = load(models[1])
    return po.TeacherHead(by_hand(model, rows, ())[0], po.Head(model.lm_head.weight.detach()))


def top_k(rows, tokens):
    """TeacherTopK of the rows' columns, at the positions that predict the tokens."""
    shape = (*tokens.labels.shape, len(rows[0]["teacher_topk_ids"][0]))
    ids, logps = torch.zeros(shape, dtype=torch.long), torch.zeros(shape)
    for i, row in enumerate(rows):
        here = tokens.labels[i] != -100
        ids[i, here] = torch.tensor(row["teacher_topk_ids"])
        logps[i, here] = torch.tensor(row["teacher_topk_logps"])
    return po.TeacherTopK(ids, logps.double())


@pytest.mark.parametrize("cached", [False, True], ids=["teacher_model", "top_k"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_first_step_is_one_call_of_the_library(tmp_path, models, name, cached):
    rows = single_rows()
    divergence, params = DIVERGENCES[name]
    given = {} if cached else {"teacher_model": str(models[1])}
    path = write_config(
        tmp_path,
        models[0],
        rows if cached else plain(rows),
        objective={"name": "distill", "divergence": name} | params,
        terms=[{"name": "nll", "scale": 0.25}],
        **given,
    )
    code, events = train(path)
    hidden, head, tokens = student_call(models, rows)
    teacher = top_k(rows, tokens) if cached else teacher_head(models, rows)
    with po.use_backend("reference"):
        out = po.linear_distill_loss(hidden, head, teacher, tokens, divergence + 0.25 * po.NLL())
    first, second = losses(events)
    assert code == 0 and first == pytest.approx(out.loss.item(), rel=2e-6)
    assert second != first
    for key in ("divergence", name, "teacher_entropy", "top1_agreement", "entropy"):
        assert events[1][key] == pytest.approx(out.metrics[key].item(), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("cached", [False, True], ids=["teacher_model", "top_k"])
def test_micro_batches_and_evaluation_give_the_loss_of_the_whole(tmp_path, models, cached, packing):
    rows = single_rows() if cached else plain(single_rows())
    given = {} if cached else {"teacher_model": str(models[1])}
    path = write_config(tmp_path, models[0], rows, batch=2, objective=JSD, **given)
    overrides = ["trainer.gradient_accumulation_steps=3", "trainer.eval_strategy=epoch"]
    overrides += [f"data.eval={tmp_path / 's.jsonl'}", "trainer.learning_rate=0"]
    overrides += [f"data.packing={str(packing).lower()}", "trainer.per_device_eval_batch_size=4"]
    code, events = train(path, *overrides)
    hidden, head, tokens = student_call(models, rows)
    teacher = top_k(rows, tokens) if cached else teacher_head(models, rows)
    want = po.linear_distill_loss(hidden, head, teacher, tokens, po.JSD(0.3)).loss.item()
    assert code == 0 and losses(events) == pytest.approx([want, want], rel=2e-6)
    evals = [row["eval_loss"] for row in events if row["event"] == "eval"]
    assert evals == pytest.approx([want, want], rel=1e-9)


@pytest.mark.parametrize("cached", [False, True], ids=["teacher_model", "top_k"])
def test_t2_resumption_is_bitwise(tmp_path, models, cached):
    from safetensors.torch import load_file

    rows = single_rows() if cached else plain(single_rows())
    given = {} if cached else {"teacher_model": str(models[1])}
    weights = []
    for name in ("whole", "resumed"):
        folder = tmp_path / name
        folder.mkdir()
        path = write_config(folder, models[0], rows, batch=2, objective=JSD, **given)
        steps = ["trainer.save_strategy=steps", "trainer.save_steps=2", "trainer.max_steps=5"]
        if name == "resumed":
            train(path, *steps, "trainer.max_steps=2", "trainer.lr_scheduler_type=constant")
            steps.append("--resume")
        assert train(path, *steps, "trainer.lr_scheduler_type=constant")[0] == 0
        weights.append(load_file(folder / "out" / "final" / "model.safetensors"))
    for key, x in weights[0].items():
        assert torch.equal(x, weights[1][key]), key
    assert not list((tmp_path / "whole" / "out").rglob("*teacher*"))


@pytest.mark.parametrize("objective", ["dpo", "distill_token", "kl_and_jsd"])
def test_a_reference_model_stands_for_the_column(tmp_path, models, objective):
    rows = plain(pair_rows() if objective == "dpo" else single_rows())
    if objective == "distill_token":
        rows = [{k: v for k, v in row.items() if k != "behavior_logps"} for row in rows]
    given = {"objective": objective, "ref_model": str(models[1])}
    if objective == "kl_and_jsd":
        given |= {"objective": JSD, "terms": [{"name": "kl", "kind": "k3", "scale": 0.5}]}
        given["teacher_model"] = str(models[1])
    code, events = train(write_config(tmp_path, models[0], rows, **given))
    hidden, head, tokens = student_call(models, rows if objective != "dpo" else pair_rows())
    teacher = teacher_head(models, rows if objective != "dpo" else pair_rows())
    with torch.no_grad():
        z = teacher.hidden @ teacher.head.weight.T
    ref = z.log_softmax(-1).gather(-1, tokens.labels.clamp(min=0)[..., None])[..., 0]
    tokens = po.TokenBatch(tokens.labels, ref_logps=ref)
    if objective == "kl_and_jsd":
        loss = po.linear_distill_loss(
            hidden, head, teacher, tokens, po.JSD(0.3) + 0.5 * po.KL("k3")
        ).loss
    else:
        made = po.DPO() if objective == "dpo" else po.DistillToken()
        loss = po.linear_policy_loss(hidden, head, tokens, made).loss
    assert code == 0 and losses(events)[0] == pytest.approx(loss.item(), rel=2e-6, abs=1e-7)


def test_score_writes_the_teacher_and_training_on_it_is_training_with_it(tmp_path, models, capsys):
    """With k = V nothing is cut off, so both runs have one loss."""
    rows = [
        {k: row[k] for k in ("prompt_ids", "completion_ids")} | {"reward": 1.0}
        for row in single_rows()
    ]
    raw, scored = write_rows(tmp_path / "raw.jsonl", rows), tmp_path / "scored.jsonl"
    argv = ["score", str(raw), "--model", str(models[1]), "--output", str(scored)]
    assert cli.main([*argv, "--teacher-topk", str(VOCAB), "--batch", "4"]) == 0
    assert f"6 rows with the top {VOCAB} of the teacher" in capsys.readouterr().out
    made = [json.loads(line) for line in scored.read_text().splitlines()]
    assert "old_logps" not in made[0] and made[0]["reward"] == 1.0
    for row in made:
        n = len(row["completion_ids"])
        assert len(row["teacher_topk_ids"]) == len(row["teacher_topk_logps"]) == n
        for logps in row["teacher_topk_logps"]:
            assert logps == sorted(logps, reverse=True)
            assert torch.tensor(logps).exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    runs = []
    for name, given in (("cached", {}), ("model", {"teacher_model": str(models[1])})):
        folder = tmp_path / name
        folder.mkdir()
        data = made if name == "cached" else rows
        runs.append(train(write_config(folder, models[0], data, objective=JSD, **given)))
    assert losses(runs[0][1]) == pytest.approx(losses(runs[1][1]), rel=1e-5)


def test_score_adds_both_where_a_column_is_asked_for(tmp_path, models):
    rows = single_rows()
    raw, scored = write_rows(tmp_path / "raw.jsonl", plain(rows)), tmp_path / "scored.jsonl"
    argv = ["score", str(raw), "--model", str(models[1]), "--output", str(scored)]
    assert cli.main([*argv, "--teacher-topk", "4", "--column", "ref_logps"]) == 0
    teacher = teacher_head(models, rows)
    labels = student_call(models, rows)[2].labels
    z = (teacher.hidden @ teacher.head.weight.T).log_softmax(-1).detach()
    for i, line in enumerate(scored.read_text().splitlines()):
        row, here = json.loads(line), labels[i] != -100
        top = z[i, here].topk(4)
        assert row["teacher_topk_ids"] == top.indices.tolist()
        torch.testing.assert_close(
            torch.tensor(row["teacher_topk_logps"]).double(), top.values, atol=1e-5, rtol=1e-5
        )
        ref = z[i, here].gather(-1, labels[i, here][:, None])[:, 0]
        torch.testing.assert_close(
            torch.tensor(row["ref_logps"]).double(), ref, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize(
    ("options", "match"),
    [(["--teacher-topk", "0"], "at least 1"), (["--teacher-topk", "99"], "expected at most 41")],
)
def test_score_refuses_a_k_that_cannot_be(tmp_path, models, capsys, options, match):
    raw, scored = write_rows(tmp_path / "raw.jsonl", plain(single_rows())), tmp_path / "x.jsonl"
    argv = ["score", str(raw), "--model", str(models[1]), "--output", str(scored)]
    assert cli.main([*argv, *options]) == 2 and match in capsys.readouterr().err
    assert not scored.exists()


@pytest.mark.parametrize("key", ["teacher_model", "ref_model"])
def test_another_vocabulary_stops_before_step_0(tmp_path, models, capsys, key):
    others = {
        "order": write_model(tmp_path / "order", words=WORDS[::-1]),
        "size": write_model(tmp_path / "size", vocab=VOCAB + 3),
    }
    for name, words in (("order", "40 tokens differ, first"), ("size", "44 entries, the student")):
        objective = JSD if key == "teacher_model" else {"name": "distill_token"}
        given = {"objective": objective, key: str(others[name])}
        code, events = train(write_config(tmp_path, models[0], plain(single_rows()), **given))
        err = capsys.readouterr().err
        assert code == 2 and not events and words in err and key in err, err


BAD_CONFIGS = {
    "teacher without use": (
        {"objective": "nll", "teacher_model": "t"},
        "teacher_model: nll compares with no teacher's distribution",
    ),
    "reference without use": ({"objective": "nll", "ref_model": "r"}, "ref_model: nll reads no"),
    "reference of an advantage": (
        {
            "objective": "weighted_nll",
            "terms": [{"name": "kl", "scale": 0.1}],
            "advantage": [{"name": "kl_shaped", "beta": 0.1}],
            "ref_model": "r",
        },
        "the advantage reads the column ref_logps before training",
    ),
    "divergence": (
        {"objective": {"name": "distill", "divergence": "jds"}},
        "objective.divergence: 'jds' is not one of forward_kl, reverse_kl, jsd, tvd, "
        "renyi_divergence, alpha_divergence; did you mean 'jsd'?",
    ),
    "its name as an objective": (
        {"objective": "jsd"},
        "'jsd' is a divergence: {name: distill, divergence: jsd}",
    ),
    "a reward model": (
        {"objective": {"name": "bradley_terry"}, "terms": [{"name": "nll"}]},
        "bradley_terry trains a reward model and stands alone",
    ),
    "what it does not read": (
        {"objective": "bradley_terry", "ref_model": "r"},
        "ref_model: bradley_terry reads none",
    ),
    "a margin": (
        {"objective": {"name": "bradley_terry", "margin": "wide"}},
        "margin='wide': a number or 'rewards'",
    ),
    "a link": (
        {"objective": {"name": "bradley_terry_variance", "link": "logit"}},
        "link='logit': expected one of logistic, probit, tanh",
    ),
    "a ranking beside terms": (
        {"objective": "plackett_luce", "terms": [{"name": "nll"}]},
        "plackett_luce trains a reward model and stands alone",
    ),
    "parameter": (
        {"objective": {"name": "distill", "divergence": "tvd", "beta": 0.5}},
        "objective.beta: tvd has no such parameter",
    ),
    "range": ({"objective": JSD | {"beta": 2}}, "objective: JSD(beta=2) is outside [0, 1]"),
    "no alpha": (
        {"objective": {"name": "distill", "divergence": "renyi_divergence"}},
        "missing 1 required positional argument: 'alpha'",
    ),
    "beside sequences": (
        {"objective": JSD, "terms": ["dpo"]},
        "terms[0]: expected {name: ..., parameter: ...}",
    ),
    "coupled term": (
        {"objective": JSD, "terms": [{"name": "gspo"}]},
        "a divergence composes with token-local objectives",
    ),
    "nested": (
        {"objective": {"name": "wpo", "objective": {"name": "dpo", "bta": 0.1}}},
        "objective.objective.bta: dpo has no such parameter; did you mean 'beta'?",
    ),
    "nested name": (
        {"objective": {"name": "opsm", "delta": 0.1, "objective": "ppo"}},
        "objective.objective.name: no objective 'ppo'",
    ),
    "code of a teacher": (
        {"objective": JSD, "teacher_model": {"path": "t", "trust_remote_code": True}},
        "teacher_model.trust_remote_code: a file cannot turn it on",
    ),
    "dtype of a teacher": (
        {"objective": JSD, "teacher_model": {"path": "t", "dtype": "fp8"}},
        "teacher_model.dtype: 'fp8' is not one of",
    ),
    "unknown key": (
        {"objective": JSD, "teacher_model": {"pth": "t"}},
        "teacher_model.pth: unknown key; did you mean 'path'?",
    ),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_n12_a_configuration_that_cannot_be_is_named(tmp_path, name):
    changes, message = BAD_CONFIGS[name]
    path = write_config(tmp_path, "some/model", [], batch=1, **changes)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_a_fixed_model_has_the_models_dtype_unless_it_says(tmp_path):
    path = write_config(tmp_path, "m", [], batch=1, objective=JSD, teacher_model="t")
    assert load_config(path).teacher_model.dtype == "float64"
    other = load_config(path, ["teacher_model.dtype=bfloat16"]).teacher_model
    assert (other.path, other.dtype) == ("t", "bfloat16")


@pytest.mark.parametrize(
    ("objective", "rows", "key", "column"),
    [
        (JSD, single_rows(), "teacher_model", "teacher_topk_ids"),
        ({"name": "kto"}, single_rows(), "ref_model", "ref_logps"),
        ({"name": "dpo"}, pair_rows(), "ref_model", "ref_rejected_logps"),
    ],
)
def test_a_column_beside_the_model_that_computes_it_is_refused(
    tmp_path, models, capsys, objective, rows, key, column
):
    path = write_config(tmp_path, models[0], rows, objective=objective, **{key: str(models[1])})
    assert train(path) == (2, [])
    assert f"{column}: given here, and {key} would compute it" in capsys.readouterr().err

"""The demo's second part: the checker, the sampler's log-probs, KL and the frontier against
enumeration, one small run from the random model to the figure.
"""

import itertools
import json
import random
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from matplotlib import image  # noqa: E402

from pyoffline.config import parse_config  # noqa: E402
from pyoffline.data import Sample  # noqa: E402
from pyoffline.demo import arithmetic, behaviour, judge, learning, learning_figure, policy  # noqa: E402
from pyoffline.demo.arithmetic import Problem, Split, check, taught_answer  # noqa: E402
from pyoffline.score import score_samples  # noqa: E402

TINY = behaviour.LearningSettings(
    hidden=32,
    layers=1,
    taught_per_problem=1,
    teach_steps=3,
    teach_batch=16,
    n_sampled=12,
    n_held_out=40,
    answers=2,
    steps=2,
    batch=8,
    seeds=(0, 1),
)


def make_llama(vocab, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 1,
    )
    return LlamaForCausalLM(config).eval()


# The task


def test_the_checker_knows_every_sum_and_nothing_else():
    for a, b in itertools.product(range(10, 100), repeat=2):
        assert check(Problem(a, b), str(a + b)) == 1.0
        assert check(Problem(a, b), str(a + b + 1)) == 0.0
    for wrong in ("", "072", "7 2", " 72", "72\n", "27+45", "seventy-two"):
        assert check(Problem(27, 45), wrong) == 0.0, wrong


@pytest.mark.parametrize(
    ("a", "b", "never", "always"),
    [(27, 45, "72", "62"), (11, 22, "33", "33"), (95, 27, "122", "12"), (60, 70, "130", "30")],
    ids=["units", "none", "both", "tens"],
)
def test_what_the_teacher_forgets(a, b, never, always):
    rng = random.Random(0)
    assert taught_answer(Problem(a, b), 0.0, rng) == never
    assert taught_answer(Problem(a, b), 1.0, rng) == always


def test_a_carry_is_forgotten_as_often_as_asked():
    rng = random.Random(0)
    n = 4000
    right = sum(check(Problem(27, 45), taught_answer(Problem(27, 45), 0.6, rng)) for _ in range(n))
    assert abs(right / n - 0.4) < 4 * (0.4 * 0.6 / n) ** 0.5


def test_held_out_problems_are_seen_by_nobody():
    split = Split.draw(100, 200, seed=0)
    assert len(split.held_out) == 200 and len(split.sampled) == 100
    assert len(split.taught) == 8100 - 200 and set(split.sampled) <= set(split.taught)
    assert not set(split.held_out) & set(split.taught)
    with pytest.raises(ValueError, match="ask for fewer"):
        Split.draw(8000, 200, seed=0)


def test_one_token_a_character(tmp_path):
    tokenizer = arithmetic.make_tokenizer(tmp_path)
    ids = tokenizer("27+45=")["input_ids"]
    assert len(ids) == 6 and tokenizer.decode(ids) == "27+45="
    assert len(tokenizer) == 13 and tokenizer.eos_token_id == 12


# The sampler


@pytest.fixture(scope="module")
def drawn():
    model = make_llama(13, seed=0)
    prompts = torch.randint(0, 12, (300, 6), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    return model, prompts, policy.sample(model, prompts, 4, 12, generator)


def test_the_samplers_log_probs_are_the_scored_ones(drawn):
    model, prompts, answers = drawn
    rows = list(answers.rows())
    samples = [
        Sample([*prompt, *ids], len(prompt), i)
        for i, (prompt, (ids, _)) in enumerate(zip(prompts.tolist(), rows, strict=True))
    ]
    scored = score_samples(model, samples, batch=64)
    for (ids, logps), other in zip(rows, scored, strict=True):
        assert len(ids) == len(logps) == len(other)
        assert logps == pytest.approx(other, abs=1e-5)


def test_an_answer_ends_with_its_end_token_or_at_the_limit(drawn):
    _, _, answers = drawn
    lengths = set()
    for ids, _ in answers.rows():
        assert 12 not in ids[:-1] and (ids[-1] == 12 or len(ids) == 4)
        lengths.add(len(ids))
    assert {1, 4} <= lengths


def test_samples_follow_the_model_and_repeat_by_seed(drawn):
    model, prompts, answers = drawn
    again = policy.sample(model, prompts, 4, 12, torch.Generator().manual_seed(1))
    assert torch.equal(again.ids, answers.ids) and torch.equal(again.logps, answers.logps)
    n = 4000
    many = policy.sample(model, prompts[:1].expand(n, -1), 1, 12, torch.Generator().manual_seed(2))
    p = policy.answer_log_probs(model, many.ids[:1], 6)[0, 0].exp()
    counts = torch.bincount(many.ids[:, -1], minlength=13) / n
    assert ((counts - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-3).all()


# KL and the frontier


def all_answers(vocab, length, eos):
    """Every answer, filled up with `eos` after its end, and its mask."""
    seen = {}
    for ids in itertools.product(range(vocab), repeat=length):
        n = ids.index(eos) + 1 if eos in ids else length
        seen[ids[:n] + (eos,) * (length - n)] = [True] * n + [False] * (length - n)
    return torch.tensor(list(seen)), torch.tensor(list(seen.values()))


def test_the_kl_estimate_is_unbiased_on_a_known_pair():
    """Every answer of two small models is enumerated: sum_y p(y) estimate(y) is the KL itself."""
    p, q = make_llama(4, seed=0), make_llama(4, seed=1)
    prompt = torch.tensor([[0, 1]])
    answers, mask = all_answers(4, 3, eos=3)
    ids = torch.cat([prompt.expand(len(answers), -1), answers], -1)
    log_p, log_q = (policy.answer_log_probs(m, ids, 2) for m in (p, q))
    taken = [
        (x.gather(-1, answers[..., None])[..., 0] * mask).sum(-1).double() for x in (log_p, log_q)
    ]
    assert float(taken[0].exp().sum()) == pytest.approx(1.0, abs=1e-6)
    exact = float((taken[0].exp() * (taken[0] - taken[1])).sum())
    estimates = policy.sequence_kl(log_p, log_q, mask)
    assert exact > 0.1 and float(estimates.min()) >= 0
    assert float((taken[0].exp() * estimates).sum()) == pytest.approx(exact, rel=1e-6)

    drawn = policy.sample(p, prompt.expand(3000, -1), 3, 3, torch.Generator().manual_seed(0))
    log_p, log_q = (policy.answer_log_probs(m, drawn.ids, 2) for m in (p, q))
    mean, error = policy.mean_and_error(policy.sequence_kl(log_p, log_q, drawn.mask))
    assert abs(mean - exact) < 4 * error and error < 0.1 * exact


def test_a_policy_is_at_no_kl_from_itself(drawn):
    model, _, answers = drawn
    log_p = policy.answer_log_probs(model, answers.ids, 6)
    assert float(policy.sequence_kl(log_p, log_p, answers.mask).abs().max()) == 0


def test_no_policy_is_above_the_frontier():
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(50, generator=generator, dtype=torch.float64).clamp(0.01, 0.99)
    kl, accuracy = policy.frontier(q, torch.linspace(0, 30, 3001))
    assert float(kl[0]) == pytest.approx(0, abs=1e-12)
    assert float(accuracy[0]) == pytest.approx(float(q.mean()))
    assert float(kl[-1]) == pytest.approx(float(-q.log().mean()), abs=1e-6)
    for _ in range(200):
        p = (q.logit() + 3 * torch.randn(50, generator=generator, dtype=torch.float64)).sigmoid()
        cost = (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean()
        best = accuracy[torch.searchsorted(kl, cost).clamp(max=len(kl) - 1)]
        assert float(p.mean()) <= float(best) + 1e-6


def test_right_answers_are_those_of_greedy_decoding(tmp_path):
    tokenizer = arithmetic.make_tokenizer(tmp_path)
    model = make_llama(13, seed=3)
    problems = Split.draw(1, 30, seed=0).held_out
    prompts = behaviour.prompt_ids(tokenizer, problems)
    out = model.generate(prompts, max_new_tokens=3, do_sample=False)
    texts = tokenizer.batch_decode(out[:, 6:], skip_special_tokens=True)
    # questions whose "right" answer is what the model says greedily, and one digit beside it
    ends = tokenizer(texts)["input_ids"]
    said = [Sample([*p, *t, 12], 6, 1) for p, t in zip(prompts.tolist(), ends, strict=True)]
    other = [replace_first(s) for s in said]
    chance, greedy = judge.right_answers(model, said)
    cut = torch.tensor([len(s.ids) == 10 for s in said])  # three tokens: the end may not follow
    assert bool((greedy | cut).all()) and not bool(cut.all())
    assert not bool(judge.right_answers(model, other)[1].any())
    log_p = policy.answer_log_probs(model, torch.tensor([said[0].ids]), 6)[0]
    expected = log_p.gather(-1, torch.tensor(said[0].ids[6:])[:, None]).sum().exp()
    assert float(chance[0]) == pytest.approx(float(expected), rel=1e-5)


def replace_first(sample):
    ids = list(sample.ids)
    ids[6] = (ids[6] + 1) % 12
    return Sample(ids, 6, 1)


# The runs


def test_the_methods_differ_in_objective_and_advantage_alone(tmp_path):
    made = behaviour.Behaviour(tmp_path, tmp_path / "s.jsonl", Split([], [], []), "", 0.0, 0.0)
    seen = []
    for method in learning.METHODS:
        config = learning.method_config(TINY, made, method, 0)
        errors = []
        parse_config(config, errors)
        assert not errors, (method.key, errors)
        config["trainer"].pop("output_dir")
        seen.append({k: v for k, v in config.items() if k not in ("objective", "advantage")})
    assert all(config == seen[0] for config in seen)
    assert all(m.advantage == learning.REWARD for m in learning.METHODS if m.alpha is not None)
    assert len({m.key for m in learning.METHODS}) == len(learning.METHODS) == 11


def test_the_whole_part_at_a_small_size(tmp_path, capsys):
    settings = replace(TINY, output=tmp_path, figure=tmp_path / "elsewhere" / "learning.png")
    methods = [m for m in learning.METHODS if m.key in ("sft-all", "is", "ppo-group")]
    assert learning.run_learning(settings, methods) == settings.figure
    picture = image.imread(settings.figure)[..., :3]
    assert len({tuple(rgb) for rgb in picture[::9, ::9].reshape(-1, 3).tolist()}) > 20
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(r["method"], r["seed"]) for r in rows] == [
        ("behaviour", -1),
        *((m.key, seed) for m in methods for seed in (0, 1)),
    ]
    assert rows[0]["kl"] == 0 and rows[0]["ess"] == pytest.approx(1.0, abs=1e-6)
    assert all(r["kl"] >= 0 and 0 < r["ess"] <= 1 and 0 <= r["accuracy"] <= 1 for r in rows)
    assert all(r["kl"] > 0 for r in rows if r["method"] == "sft-all")
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 24 and len({s["group"] for s in samples}) == 12
    for s in samples:
        assert s["old_logps"] == pytest.approx(s["behavior_logps"], abs=1e-5)
        a, b = s["prompt"].rstrip("=").split("+")
        right = s["completion"] == str(int(a) + int(b)) and s["completion_ids"][-1] == 12
        assert s["reward"] == float(right)
    text = capsys.readouterr().out
    for name in (
        "learning.png",
        "samples.jsonl",
        "results.jsonl",
        "sha256",
        "PPO-clip, centred",
    ):
        assert name in text
    assert "ppo_clip" in (tmp_path / "train.log").read_text()


def test_the_file_of_samples_repeats_bit_by_bit(tmp_path):
    made = [
        behaviour.make_behaviour(
            settings, lambda config, settings=settings: learning.train(settings, config)
        )
        for settings in (replace(TINY, output=tmp_path / name) for name in "ab")
    ]
    assert made[0].sha256 == made[1].sha256
    assert made[0].samples.read_bytes() == made[1].samples.read_bytes()


# The figure


@pytest.mark.parametrize(
    "heights",
    [[], [0.5], [0.5, 0.5, 0.5], [0.9, 0.99, 1.0, 1.0], [0.0, 0.3, 0.31]],
    ids=["none", "one", "equal", "top", "two close"],
)
def test_labels_keep_their_distance(heights):
    out = learning_figure.spread_out(heights, gap=0.1)
    assert len(out) == len(heights) and max(out, default=0) <= 1.0
    assert all(b - a >= 0.1 - 1e-9 for a, b in itertools.pairwise(out))


def test_the_title_says_what_came_out():
    def row(i, accuracy):
        return learning.Row(learning.METHODS[i], accuracy, 0, 0, 0, 1, 0, 1, 0)

    base = judge.Result("behaviour", -1, 0.4, 0.3, 0.0, 0.0, 1.0)
    title = learning_figure.title([row(0, 0.41), row(2, 0.9), row(10, 0.2)], base)
    assert title == "Right answers to unseen problems: 40% before, 20% to 90% after, by method"

"""The demo at a size that takes seconds: two processes, the same losses, the figure, its title."""

import json

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from pyoffline.demo import corpus, figure  # noqa: E402
from pyoffline.demo.run import DemoSettings, run_demo  # noqa: E402


def test_the_whole_demo_at_a_small_size(tmp_path, capfd):
    settings = DemoSettings(
        output=tmp_path / "out",
        figure=tmp_path / "elsewhere" / "demo.png",
        steps=4,
        batch=2,
        length=32,
        hidden=64,
        layers=1,
        vocab=600,
    )
    assert run_demo(settings) == settings.figure
    assert settings.figure.read_bytes().startswith(b"\x89PNG")
    runs = [figure.Run.read(tmp_path / "out" / n / "metrics.jsonl") for n in ("stock", "pyoffline")]
    assert [r.steps for r in runs] == [[1, 2, 3, 4]] * 2
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert all(r.peak >= r.base > 0 and r.step_time > 0 for r in runs)
    numbers = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert numbers["max_difference"] < 1e-4
    text = capfd.readouterr().out
    for name in ("demo.png", "metrics.jsonl", "final", "demo.json"):
        assert name in text
    for name in ("stock", "pyoffline"):
        assert (tmp_path / "out" / name / "final" / "model.safetensors").is_file()


def run(loss, seconds, peak):
    return figure.Run([3.0, loss], [1, 2], seconds, 0.9 * seconds, 500.0, peak)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (run(2.0, 1.0, 750.0), ("Same loss curve", "4.0× less memory", "2.00× faster")),
        (run(2.5, 4.0, 2500.0), ("differ by up to 0.5", "2.0× more memory", "2.00× slower")),
    ],
    ids=["better", "worse"],
)
def test_the_title_says_what_was_measured(ours, expected):
    title = figure.title(figure.summary(run(2.0, 2.0, 1500.0), ours))
    for part in expected:
        assert part in title, title


def test_a_busy_machine_is_not_a_speedup():
    slow = figure.Run([3.0, 2.0], [1, 2], 20.0, 2.0, 500.0, 1500.0)
    fast = figure.Run([3.0, 2.0], [1, 2], 5.0, 2.0, 500.0, 750.0)
    assert "1.00× faster (CPU time)" in figure.title(figure.summary(slow, fast))


def test_the_corpus_is_the_standard_library_and_repeats():
    files = corpus.source_files()
    assert files == sorted(files) and any(p.name == "argparse.py" for p in files)
    assert not any("site-packages" in p.parts for p in files)
    texts = corpus.read_texts(files, 100_000)
    assert 100_000 <= sum(map(len, texts)) and texts == corpus.read_texts(files, 100_000)


def test_pieces_have_the_length_that_was_asked_for(tmp_path):
    texts = corpus.read_texts(corpus.source_files(), 200_000)
    tokenizer = corpus.train_tokenizer(texts, tmp_path, vocab=500)
    rows = list(corpus.pieces(texts, tokenizer, 48))
    assert len(rows) > 50
    lengths = [len(tokenizer(row)["input_ids"]) for row in rows[:50]]
    assert all(abs(n - 48) <= 2 for n in lengths), lengths

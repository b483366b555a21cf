"""The demo's first part at a size that takes seconds: the same losses, memory under a limit that
is real, the figure, its title.
"""

import json
import subprocess
import sys

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from pyoffline import cli  # noqa: E402
from pyoffline.demo import context, corpus, figure, run  # noqa: E402
from pyoffline.demo.context import Point  # noqa: E402
from pyoffline.demo.numbers import NumbersSettings  # noqa: E402


def pixels(path):
    from matplotlib import image

    return image.imread(path)[..., :3]


def test_the_whole_part_at_a_small_size(tmp_path, capfd):
    numbers = NumbersSettings(
        steps=4, batch=2, length=32, hidden=64, layers=1, vocab=600, contexts=(48,)
    )
    settings = run.DemoSettings(tmp_path / "out", tmp_path / "figures", "numbers", numbers)
    path = tmp_path / "figures" / "numbers.png"
    assert run.run_demo(settings) == [path]
    assert len({tuple(rgb) for rgb in pixels(path)[::9, ::9].reshape(-1, 3).tolist()}) > 20
    out = tmp_path / "out" / "numbers"
    runs = [figure.Run.read(out / n / "metrics.jsonl") for n in ("stock", "pyoffline")]
    assert [r.steps for r in runs] == [[1, 2, 3, 4]] * 2
    assert runs[0].losses == pytest.approx(runs[1].losses, rel=1e-5)
    assert all(r.peak >= r.base > 0 and r.step_time > 0 for r in runs)
    numbers = json.loads((out / "numbers.json").read_text())
    assert numbers["max_difference"] < 1e-4
    assert [(p["loss"], p["length"]) for p in numbers["contexts"]] == [
        ("stock", 48),
        ("pyoffline", 48),
    ]
    assert all(100 < p["peak_mib"] < 2048 for p in numbers["contexts"])
    text = capfd.readouterr().out
    for name in ("numbers.png", "metrics.jsonl", "final", "numbers.json", "processor time"):
        assert name in text
    first = next(line for line in text.splitlines() if line.startswith("loss, first step"))
    assert [float(x) for x in first.split()[-2:]] == pytest.approx([r.losses[0] for r in runs])
    for name in ("stock", "pyoffline"):
        assert (out / name / "final" / "model.safetensors").is_file()


LIMITED = """
import torch
from pyoffline.benchmarks.memory import status_nbytes
from pyoffline.demo import context
context.limit_memory(status_nbytes("VmRSS") // context.MIB + 200)
torch.zeros(100 * 2**18)
try:
    torch.zeros(300 * 2**18)
except RuntimeError as error:
    print(context.ran_out(error))
try:
    context.limit_memory(10)
except ValueError as error:
    print(error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts this on Linux")
def test_the_memory_limit_is_one():
    """100 MiB of 200 left are had, 300 are not; a limit that is passed already is an error."""
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "True" and "give a higher limit" in second


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("shapes differ"), False),
    ],
    ids=["python", "torch", "C++", "another"],
)
def test_what_counts_as_no_memory(error, expected):
    assert context.ran_out(error) is expected


def test_a_loss_that_does_not_fit_is_not_tried_longer(monkeypatch):
    most = {"stock": 2, "pyoffline": 8}

    def point(loss, length, config, limit_mib):
        fits = length <= most[loss]
        return Point(loss, length, 100.0 * length if fits else None, None if fits else "no memory")

    monkeypatch.setattr(context, "measure_point", point)
    points = context.measure_contexts(("stock", "pyoffline"), (1, 2, 4, 8), lambda *_: None, 1)
    assert [(p.loss, p.length) for p in points if p.loss == "stock"] == [
        ("stock", n) for n in (1, 2, 4)
    ]
    assert [p.length for p in points if p.loss == "pyoffline"] == [1, 2, 4, 8]
    assert not points[4].fits and context.largest(points, "pyoffline") == 8


def test_another_failure_is_no_result(tmp_path):
    with pytest.raises(RuntimeError, match="no such file"):
        context.measure_point("stock", 8, tmp_path / "absent.yaml", 4096)


def measured(loss, seconds, peak):
    return figure.Run([3.0, loss], [1, 2], seconds, 0.9 * seconds, 500.0, peak)


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (measured(2.0, 1.0, 750.0), ("Same loss curve", "4.0× less memory", "2.00× faster")),
        (measured(2.5, 4.0, 2500.0), ("differ by up to 0.5", "2.0× more memory", "2.00× slower")),
    ],
    ids=["better", "worse"],
)
def test_the_title_says_what_was_measured(ours, expected):
    title = figure.title(figure.summary(measured(2.0, 2.0, 1500.0), ours))
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


def test_long_pieces_cross_files(tmp_path):
    texts = [text[:3000] for text in corpus.read_texts(corpus.source_files(), 200_000)]
    tokenizer = corpus.train_tokenizer(texts, tmp_path, vocab=500)
    length = 4000  # more than a cut text has
    first, second, *_ = corpus.long_pieces(texts, tokenizer, length)
    for row in (first, second):
        assert abs(len(tokenizer(row)["input_ids"]) - length) <= 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--limit-mib", "0"], "--limit-mib: expected at least 1"),
        (["--figure", "demo.png"], "expected a folder, got demo.png; there are two figures"),
    ],
    ids=["seeds", "limit", "figure"],
)
def test_a_wrong_argument_is_exit_code_2(arguments, match, capsys):
    assert cli.main(["demo", *arguments]) == 2
    assert match in capsys.readouterr().err

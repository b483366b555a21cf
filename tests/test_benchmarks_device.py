"""What `pyoffline bench --device cuda` adds: the clock, the floor, both GPU backends side by side,
memory of the allocator, peers and bars of a GPU; on CPU tensors with the CUDA backend emulated.
"""

import argparse
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import cuda_on_cpu
import host_cluster
import pytest
import torch

from pyoffline.benchmarks import cli, device, memory, ops, provenance, report, row_pass, runner
from pyoffline.benchmarks.floor import GEMMS, Floor
from pyoffline.benchmarks.providers import CUT_CROSS_ENTROPY_TRITON, LIGER, QUACK
from pyoffline.benchmarks.shapes import (
    BARS,
    MIB,
    SHAPES,
    Shape,
    fused_bar,
    make_inputs,
    memory_bar,
)

TINY = Shape(12, 8, 61)
QUIET = runner.Settings(
    rounds=2, budgets=(1,), peers=False, progress=lambda text: None, device="cuda"
)


@pytest.fixture
def emulated(monkeypatch, one_thread):
    """The CUDA backend on CPU tensors, timed by the host, with an allocator that counts in MiB."""
    if not host_cluster.compiler():
        pytest.skip("no C++ compiler: not run")
    cuda_on_cpu.emulate(monkeypatch)
    monkeypatch.setattr(sys.modules["pyoffline.backends"], "_why_not_triton", lambda *_: "absent")
    monkeypatch.setattr(device, "place", lambda kind: torch.device("cpu"))
    monkeypatch.setattr(device, "stopwatch", lambda kind: device.by_clock())
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 5 * MIB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7 * MIB)


def _parse(*argv):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="not run: there is a GPU")
def test_without_a_gpu_the_command_says_so():
    with pytest.raises(ValueError, match="--device cuda: torch sees no GPU"):
        cli.run(_parse("--device", "cuda", "--no-memory"))


def test_with_a_gpu_but_no_backend_the_command_gives_the_reasons(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("_why_not_cuda", "_why_not_triton"):
        backends = sys.modules["pyoffline.backends"]
        monkeypatch.setattr(backends, name, lambda *_, name=name: f"reason of {name}")
    with pytest.raises(ValueError, match="_why_not_cuda; triton: reason of _why_not_triton"):
        device.require("cuda")


def test_events_are_recorded_around_the_run_and_waited_for(monkeypatch):
    seen = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            seen.append("record")

        def synchronize(self):
            seen.append("wait")

        def elapsed_time(self, end):
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append("head start"))
    assert device.stopwatch("cuda")(lambda: seen.append("run")) == 1.5
    assert seen == ["head start", "record", "run", "record", "wait"]


@pytest.mark.parametrize("gemm", GEMMS)
def test_every_floor_candidate_of_a_gpu_gives_the_product(gemm):
    made = make_inputs(TINY, torch.bfloat16)
    floor = Floor(TINY, torch.bfloat16, made)
    floor.kind = "cuda"
    x, w, dlogits = (t.double() for t in (made.hidden, made.weight, floor.logits()))
    truth = {"logits": x @ w.T, "dhidden": dlogits @ w, "dweight": dlogits.T @ x}[gemm]
    outputs = {"torch.mm": gemm, "torch.mm, fp32 out": gemm + "32"}
    table = floor.candidates(gemm)
    assert table.keys() == outputs.keys()
    for name, make in table.items():
        call = make(floor, TINY.n)
        out = floor.buffers[outputs[name]].fill_(float("nan"))
        call()
        grain = torch.finfo(out.dtype).eps * 32
        assert (out.double() - truth).abs().max() <= grain * truth.abs().max(), name


@pytest.mark.parametrize("op", [name for name in ops.CASES if name != "linear_distill_loss"])
def test_every_op_runs_with_the_gpu_backends(op, emulated):
    record = runner.run_case(ops.CASES[op], TINY, "bf16", QUIET)
    names = [line["name"] for line in record["variants"]]
    assert names == ["floor", "pyoffline cuda", "pyoffline cuda, 1 MiB"]
    assert [line["backend"] for line in record["variants"][1:]] == ["cuda", "cuda"]
    assert {c["backend"] for c in record["checks"]} == {"cuda"}
    for line in record["memory"]:
        assert line["extra_nbytes"] == 2 * MIB - line["gradient_nbytes"]
    least = record["memory"][0]["bar_nbytes"] - record["memory"][1]["bar_nbytes"]
    assert least == 1023 * MIB
    assert "pyoffline cuda, 1 MiB" in report.render(record) and "check cuda" in report.render(
        record
    )


def test_an_op_that_no_gpu_backend_has_runs_what_is_picked(emulated):
    assert device.ours("cuda", "linear_distill_loss") == ("auto",)
    assert device.ours("cuda", "scoring") == device.ours("cuda") == ("cuda",)


def test_the_row_pass_is_held_to_the_bandwidth_of_a_copy(emulated, monkeypatch):
    monkeypatch.setitem(BARS, "cuda", {TINY: 1.1})
    record = row_pass.run(TINY, "bf16", QUIET)
    for line in record["variants"]:
        assert line["name"].startswith("row pass cuda, ") and line["bar"] is None
        assert line["copy_bar"] == 90 and line["passed"] == (line["percent_of_limit"] >= 90)
    assert ">= 90 %" in report.render(record)


def test_memory_that_cannot_be_measured_gives_its_reason(emulated):
    job = {"op": "none", "shape": "1,1,1", "dtype": "bf16", "budget": None}
    found = memory.measure_or_say_why({**job, "provider": "ours", "device": "cuda"})
    assert found == {"skipped": "'none'"}


def test_bars_of_a_gpu_are_those_of_the_design():
    assert [fused_bar(shape, "bf16", "cuda") for shape in SHAPES["cuda"]] == [1.10, 1.12, 1.35]
    assert fused_bar(SHAPES["cpu"][0], "bf16", "cuda") is None
    assert fused_bar(SHAPES["cuda"][0], "fp32", "cuda") is None
    assert memory_bar(Shape(1, 4, 8), "cuda") == 1024 * MIB + 128
    scoring, logps = (ops.CASES[name].bar for name in ("scoring", "linear_token_logps"))
    at = SHAPES["cuda"][0], "bf16", "cuda"
    assert (scoring(*at), logps(*at)) == (1.08, 1.40)


@pytest.mark.parametrize(
    ("provider", "module", "function"),
    [
        (LIGER, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy"),
        (QUACK, "quack.linear_cross_entropy", "chunked_linear_cross_entropy"),
        (CUT_CROSS_ENTROPY_TRITON, "cut_cross_entropy", "linear_cross_entropy"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_gpu_peers_get_hidden_weight_and_labels(provider, module, function, monkeypatch):
    case = ops.CASES["linear_cross_entropy"]
    on_cpu = runner.Settings(peers=True)
    assert provider not in runner.peers_of(case, on_cpu)
    assert provider in runner.peers_of(case, runner.Settings(peers=True, device="cuda"))
    package = module.split(".")[0]
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="not installed"):
            provider.load()
    fake = types.ModuleType(module)
    setattr(fake, function, lambda *args, **options: (args, options))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == package)
    monkeypatch.setattr("importlib.import_module", lambda name: {module: fake}[name])
    made = types.SimpleNamespace(labels=3)
    args, options = provider.load()(1, 2, made)
    assert args == (1, 2, 3)
    assert options == ({"impl": "cce"} if provider is CUT_CROSS_ENTROPY_TRITON else {})


def test_provenance_of_a_gpu_names_device_driver_and_versions(monkeypatch):
    properties = types.SimpleNamespace(
        name="a GPU", multi_processor_count=132, total_memory=80 << 30, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(provenance, "driver", lambda: "580.1")
    found = provenance.provenance("cuda")
    assert found["device"]["model"] == "a GPU" and found["device"]["flags"] == {"sm_90": True}
    assert {"torch", "cuda", "triton", "liger-kernel", "quack-kernels"} <= set(found["versions"])
    record = {**found, "op": "scoring", "shape": [1, 2, 3], "dtype": "bf16"}
    assert "a GPU, 132 multiprocessors (sm_90), driver 580.1" in report.render(record)


def test_the_gpu_check_fits_nine_minutes_and_names_files_and_options_that_exist():
    root = Path(__file__).parents[1]
    command = ["bash", str(root / "bench/gpu_check.sh"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    stages = re.findall(r"^(\w+) +(\d+)s  (.*)$", done.stdout, re.MULTILINE)
    assert {"build", "tests", "memcheck", "racecheck", "bars", "rows"} <= {s[0] for s in stages}
    assert sum(int(seconds) for _, seconds, _ in stages) <= 540
    for path in re.findall(r"\b(?:tests|bench)/\w+\.py", done.stdout):
        assert (root / path).exists(), path
    benches = [line for _, _, line in stages if "pyoffline bench" in line]
    assert len(benches) >= 3
    some = subprocess.run([*command, "rows", "build"], capture_output=True, text=True, cwd=root)
    assert re.findall(r"^\w+", some.stdout, re.MULTILINE) == ["build", "rows"]
    for line in benches:
        args = _parse(*line.split(" bench ")[1].split())
        assert args.device == "cuda" and set(args.op) <= set(ops.NAMES)
        assert all(Shape.parse(text) in BARS["cuda"] for text in args.shape or [])


def test_the_gpu_check_keeps_the_results_of_two_gpus_apart(tmp_path):
    """With stand-ins for the interpreter and the driver's tool: every stage, one of which fails."""
    tools, root = tmp_path / "tools", Path(__file__).parents[1]
    tools.mkdir()
    texts = {
        "nvidia-smi": "echo 'NVIDIA H200 (x), 580.1'",
        "python3": 'case "$*" in *row_pass*) echo FAILED; exit 1 ;; esac; echo "1 passed"',
        "compute-sanitizer": "echo clean",
    }
    for name, text in texts.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "OUT": str(tmp_path)}
    environment |= {"PYTHON": "python3", "PYOFFLINE_COMMIT": "abc"}
    command = ["bash", str(root / "bench/gpu_check.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout.endswith("1 stages failed\n"), done.stderr
    assert not done.stderr
    summary = (tmp_path / "NVIDIA-H200-x-" / "summary.txt").read_text()
    assert summary.startswith("NVIDIA H200 (x), 580.1; commit abc; 2")
    found = dict(re.findall(r"^(\w+) +exit +(\d+) ", summary, re.MULTILINE))
    assert found.pop("rows") == "1" and set(found.values()) == {"0"} and len(found) >= 9
    assert (tmp_path / "NVIDIA-H200-x-" / "logs.tar.gz").stat().st_size > 0


@pytest.mark.gpu
def test_the_command_on_a_gpu_writes_both_backends(tmp_path):
    path = tmp_path / "out.json"
    tiny = ("--op", "linear_policy_loss", "row_pass", "--shape", "64,64,4096", "--rounds", "2")
    cli.run(_parse("--device", "cuda", *tiny, "--no-peers", "--json", str(path)))
    loss, rows = report.read(path)
    assert loss["device"]["kind"] == "gpu" and all(c["passed"] for c in loss["checks"])
    measured = {line["backend"] for line in (*loss["variants"][1:], *rows["variants"])}
    assert measured == set(device.ours("cuda"))
    assert all(line["extra_nbytes"] > 0 for line in loss["memory"] if "extra_nbytes" in line)

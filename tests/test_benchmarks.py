"""The benchmarks' own arithmetic, and every op once at a tiny shape; no time is asserted."""

import argparse
import itertools
import json
import os
from pathlib import Path

import pytest
import torch

from pyoffline.benchmarks import cli, memory, ops, overview, plot, report, row_pass
from pyoffline.benchmarks.check import Check, check, pick_rows
from pyoffline.benchmarks.device import by_clock
from pyoffline.benchmarks.floor import GEMMS, Floor, own_name
from pyoffline.benchmarks.provenance import provenance
from pyoffline.benchmarks.providers import CUT_CROSS_ENTROPY, TORCH_CHUNKED, Provider
from pyoffline.benchmarks.runner import Settings, run_case, time_peer
from pyoffline.benchmarks.shapes import (
    DTYPES,
    FUSED_BARS,
    MIB,
    Inputs,
    Shape,
    fused_bar,
    make_inputs,
    memory_bar,
)
from pyoffline.benchmarks.timer import Variant, interleave, paired

TINY = Shape(40, 24, 301)
QUIET = Settings(rounds=2, budgets=(1,), memory=False, peers=False, progress=lambda text: None)
LINUX = Path("/proc/self/clear_refs").exists()


@pytest.fixture(scope="module")
def inputs() -> Inputs:
    return make_inputs(TINY, torch.bfloat16)


# Timer -------------------------------------------------------------------------------------------


def test_paired_ratios_of_known_times():
    ratio = paired([2.0, 3.0, 8.0], [1.0, 2.0, 2.0])
    assert ratio.rounds == (2.0, 1.5, 4.0)
    assert (ratio.median, ratio.low, ratio.high) == (2.0, 1.5, 4.0)


def test_paired_ratio_is_not_the_ratio_of_medians():
    # the machine is ten times slower in one round: each round's own ratio stays 1.1
    ratio = paired([1.1, 11.0, 1.1], [1.0, 10.0, 1.0])
    assert ratio.median == pytest.approx(1.1)
    assert ratio.high == pytest.approx(1.1)


@pytest.mark.parametrize("base", [[1.0], []])
def test_paired_refuses_rounds_that_do_not_match(base):
    with pytest.raises(ValueError, match="paired rounds"):
        paired([1.0, 2.0] if base else [], base)


def test_interleave_alternates_the_order_and_times_only_run():
    ticks = itertools.count(0.0, 1.0)
    order = []
    variants = [
        Variant("a", lambda: order.append("a"), lambda: order.append("before a")),
        Variant("b", lambda: order.append("b")),
    ]
    seconds = interleave(variants, 2, by_clock(lambda: next(ticks)))
    assert order == ["before a", "a", "b", "b", "before a", "a"]
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_interleave_refuses_two_variants_of_one_name():
    with pytest.raises(ValueError, match="differ"):
        interleave([Variant("a", list), Variant("a", list)], 1)


# Shapes, inputs, bars ----------------------------------------------------------------------------


def test_shape_texts():
    assert Shape.parse("1024,896,151936") == Shape(1024, 896, 151936)
    assert str(Shape.parse("2x3x4")) == "2,3,4"
    for bad in ("1,2", "1,2,x", "0,2,3"):
        with pytest.raises(ValueError, match="--shape"):
            Shape.parse(bad)


def test_bars_are_those_of_the_design():
    assert [fused_bar(shape, "bf16") for shape in FUSED_BARS] == [1.12, 1.12, 1.10]
    assert fused_bar(Shape(1024, 896, 151936), "fp32") is None
    assert fused_bar(TINY, "bf16") is None
    assert memory_bar(Shape(1, 896, 151936)) == 512 * MIB + 4 * 896 * 151936


def test_inputs_ignore_nothing_clip_little_and_hold_no_zeros():
    made = make_inputs(Shape(400, 24, 301), torch.bfloat16)
    assert 0 < made.clipped() < 0.2
    assert int((made.labels < 0).sum()) == 0
    for x in (made.hidden, made.weight):
        assert float((x == 0).float().mean()) < 0.01


# Floor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("gemm", GEMMS)
def test_every_floor_candidate_gives_the_product(dtype, gemm):
    made = make_inputs(TINY, DTYPES[dtype])
    floor = Floor(TINY, DTYPES[dtype], made)
    hidden, weight = made.hidden.double(), made.weight.double()
    truth = {"logits": hidden @ weight.T}
    # the operand of the other two, as the floor rounded it
    dlogits = floor.logits().double()
    truth |= {"dhidden": dlogits @ weight, "dweight": dlogits.T @ hidden}
    outputs = {
        "torch.mm": gemm,
        own_name(DTYPES[dtype]): "dhidden32" if gemm == "dhidden" else gemm,
        "MKL whole, fp32 out": gemm + "32",
    }
    grain = torch.finfo(DTYPES[dtype]).eps + 32 * torch.finfo(torch.float32).eps
    tolerance = grain * float(truth[gemm].abs().max())
    for name, make in floor.candidates(gemm).items():
        call = make(floor, TINY.n)
        out = floor.buffers[outputs[name]]
        out.fill_(float("nan"))
        call()
        assert float((out.double() - truth[gemm]).abs().max()) <= tolerance, name


def test_floor_chooses_one_candidate_per_product(inputs):
    floor = Floor(TINY, torch.bfloat16, inputs)
    floor.choose()
    found = floor.describe()
    assert set(found) == set(GEMMS)
    for gemm, line in found.items():
        assert line["chosen"] in floor.candidates(gemm)
        assert line["gflop_s"][line["chosen"]] == max(line["gflop_s"].values())
        floor.run(gemm)


# Check -------------------------------------------------------------------------------------------


def test_check_passes_for_ours_and_covers_two_chunks(inputs):
    found = check(ops.CASES["linear_policy_loss"], inputs)
    assert {(c.name, c.chunks) for c in found} == {
        (name, chunks) for name in ("output", "dhidden", "dweight") for chunks in (1, 2)
    }
    assert all(c.passed for c in found), found


def test_check_fails_for_a_wrong_gradient_and_for_nan(inputs):
    case = ops.CASES["linear_cross_entropy"]
    wrong = type(case)(case.name, lambda *a: case.ours(*a) * 1.1, case.torch, case.bar)
    assert not all(c.passed for c in check(wrong, inputs))
    assert not Check("output", 1, float("nan"), float("nan"), 2.0).passed


def test_a_failed_check_times_nothing(monkeypatch):
    case = ops.CASES["scoring"]
    wrong = type(case)(
        case.name,
        lambda *a: case.ours(*a) + 1,
        case.torch,
        case.bar,
        ("logits",),
        1,
        (False, False),
    )
    record = run_case(wrong, TINY, "bf16", Settings(rounds=1, progress=lambda text: None))
    assert record["variants"] == [] and "memory" not in record
    assert "FAIL, nothing is timed" in report.render(record)
    assert report.failures([record]) > 0


def test_checked_rows_are_away_from_the_clip_borders(inputs):
    ratio = inputs.noise_ratio()[pick_rows(inputs)]
    assert float(((ratio - 1).abs() - 0.2).abs().min()) > 0.05


# Ops, peers, report ------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ops.CASES)
def test_every_op_runs_at_a_tiny_shape(op):
    record = run_case(ops.CASES[op], TINY, "bf16", QUIET)
    names = [line["name"] for line in record["variants"]]
    assert names == ["floor", "pyoffline", "pyoffline, 1 MiB"]
    assert record["variants"][0]["ratio"]["rounds"] == [1.0, 1.0]
    for line in record["variants"]:
        assert len(line["seconds"]) == len(line["ratio"]["rounds"]) == 2
    assert set(record["floor"]) == set(ops.CASES[op].floor)


def test_row_pass_runs_at_a_tiny_shape():
    record = row_pass.run(TINY, "bf16", QUIET)
    line = record["variants"][0]
    assert line["gb_s"] > 0 and line["copy_gb_s"] > 0 and len(line["ratio"]["rounds"]) == 2
    assert "GB/s" in report.render(record)


def test_peers_that_need_no_compiler_compute_the_same_loss(inputs):
    case = ops.CASES["linear_cross_entropy"]
    want = case.torch(inputs.hidden, inputs.weight, inputs)
    peer = TORCH_CHUNKED.load()
    torch.testing.assert_close(
        peer(inputs.hidden, inputs.weight, inputs).float(), want, rtol=1e-2, atol=1e-2
    )


def test_cut_cross_entropy_loads_or_gives_its_reason():
    try:
        assert callable(CUT_CROSS_ENTROPY.load())
    except ImportError as error:
        assert str(error)


def _absent():
    raise ImportError("not installed")


def _slow(hidden, weight, inputs):
    import time

    time.sleep(0.02)
    return hidden.sum()


@pytest.mark.parametrize(
    ("provider", "reason"),
    [
        (Provider("absent", _absent), "not installed"),
        (Provider("slow", lambda: _slow), "the limit is"),
        (Provider("huge", lambda: _slow, logit_nbytes=1 << 50), "are free"),
    ],
    ids=lambda x: x.name if isinstance(x, Provider) else "",
)
def test_peers_are_skipped_with_the_reason(inputs, provider, reason):
    floor = Floor(TINY, torch.bfloat16, inputs)
    floor.choose()
    case = ops.CASES["scoring"]
    limit = Settings(peer_limit_s=0.001, progress=lambda text: None)
    found = time_peer(case, provider, limit, floor, inputs)
    assert reason in found["skipped"]


@pytest.fixture(scope="module")
def record() -> dict:
    made = run_case(ops.CASES["scoring"], TINY, "bf16", QUIET)
    made["peers"] = [{"name": "absent", "note": "", "skipped": "not installed"}]
    made["memory"] = [
        {
            "name": "pyoffline",
            "extra_nbytes": 5 * MIB,
            "explain_nbytes": 4 * MIB,
            "bar_nbytes": 6 * MIB,
            "passed": True,
            "gradient_nbytes": 0,
            "baseline_nbytes": 300 * MIB,
            "peak_nbytes": 305 * MIB,
        }
    ]
    return {**provenance(), **made}


def test_tables_have_their_columns_and_verdicts(record):
    text = report.render(record)
    for column in (*report.TIME_COLUMNS, *report.MEMORY_COLUMNS):
        assert column in text
    assert "skipped: not installed" in text
    line = dict(record["variants"][1], bar=0.0, passed=False)
    assert "FAIL" in report.render({**record, "variants": [line]})
    assert report.failures([{"variants": [line]}]) == 1


def test_json_holds_provenance_and_all_rounds(record, tmp_path):
    (path,) = report.save(tmp_path, [record])
    assert path.name == f"{record['date'][:10]}-scoring.json"
    found = json.loads(path.read_text())
    assert found["schema"] == report.SCHEMA
    (back,) = found["records"]
    assert {"date", "device", "versions", "threads", "op", "shape", "dtype"} <= set(back)
    assert {"model", "cores", "flags"} == set(back["device"])
    assert {"torch", "mkl", "numpy", "pyoffline", "pyoffline_git"} <= set(back["versions"])
    assert len(back["variants"][1]["ratio"]["rounds"]) == 2


def test_saving_again_replaces_the_same_record_part_by_part(record, tmp_path):
    report.save(tmp_path, [record])
    only_memory = {k: v for k, v in record.items() if k not in ("variants", "peers", "checks")}
    only_memory["memory"] = []
    (path,) = report.save(tmp_path, [only_memory])
    (back,) = report.read(path)
    assert back["memory"] == [] and len(back["variants"]) == 3
    assert back["earlier"]["date"] == record["date"] and "variants" in back["earlier"]["parts"]
    other = {**record, "dtype": "fp32"}
    report.save(tmp_path, [other])
    assert len(report.read(path)) == 2


def test_plot_is_written(record, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "bench.png"
    plot.draw([record], path)
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_what_is_committed_is_read_and_drawn_line_by_line(tmp_path, capsys):
    """The command of bench/results/README.md: every op and shape is one line of the figure."""
    pytest.importorskip("matplotlib")
    files = sorted((Path(__file__).parents[1] / "bench" / "results" / "cpu").glob("*.json"))
    figure = tmp_path / "bench.png"
    cli.run(_parse("--load", *map(str, files), "--plot", str(figure)))
    assert figure.read_bytes()[:4] == b"\x89PNG"
    records = [r for path in files for r in report.read(path)]
    lines = overview.lines_of(records)
    assert len(records) > cli.MANY and len(lines) > 10
    assert set(lines) <= {(r["op"], tuple(r["shape"]), r["dtype"]) for r in records}
    measured = sum(len(plot.bars(r)) for r in records)
    assert sum(map(len, lines.values())) == measured


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not LINUX, reason="VmHWM is reset through /proc, which Linux has")
def test_memory_peak_is_reset_and_sees_a_freed_tensor():
    size = 64 * MIB
    block = torch.ones(size // 4)
    del block
    before = memory.reset_peak()
    assert memory.status_nbytes("VmHWM") < before + 8 * MIB
    block = torch.ones(size // 4)
    del block
    grown = memory.status_nbytes("VmHWM") - before
    assert 0.9 * size < grown < 1.5 * size


@pytest.mark.skipif(not LINUX, reason="VmHWM is reset through /proc, which Linux has")
def test_memory_of_a_fresh_process_and_of_one_that_fails():
    job = {"op": "scoring", "provider": "ours", "dtype": "bf16", "budget": 1}
    # 2000 x 8192 bf16 logits are 31 MiB, a chunk of the budget is 1 MiB
    found = memory.measure_fresh({**job, "shape": "2000,32,8192"})
    assert found["gradient_nbytes"] == 0
    assert found["extra_nbytes"] < 16 * MIB, found
    assert "KeyError" in memory.measure_fresh({**job, "op": "none", "shape": "1,1,1"})["skipped"]


# Command -----------------------------------------------------------------------------------------


def _parse(*argv):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    return parser.parse_args(argv)


def test_command_measures_writes_and_reads_back(tmp_path, capsys):
    path = tmp_path / "out.json"
    tiny = ("--op", "scoring", "row_pass", "--shape", str(TINY), "--rounds", "1")
    code = cli.run(_parse(*tiny, "--no-memory", "--no-peers", "--json", str(path)))
    assert code == 0
    assert [r["op"] for r in report.read(path)] == ["scoring", "row_pass"]
    assert "GFLOP/s" in capsys.readouterr().out
    assert cli.run(_parse("--load", str(path))) == 0
    assert "row pass, 40 rows" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--op", "nothing"), "--op"),
        (("--shape", "1,2"), "--shape"),
        (("--rounds", "0"), "--rounds"),
        (("--budget", "0"), "--budget"),
    ],
)
def test_command_names_a_wrong_argument(argv, words):
    with pytest.raises(ValueError, match=words):
        cli.run(_parse(*argv))


def test_provenance_says_where_it_ran():
    found = provenance()
    assert found["device"]["cores"] == os.cpu_count()
    assert found["threads"] == torch.get_num_threads()


def test_the_help_names_every_op():
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser)
    text = parser.format_help()
    assert [name for name in ops.NAMES if name not in text] == []
